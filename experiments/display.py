"""What `lm run` shows while workers train: their `progress.json` and results, as bars or lines."""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from lm.config import UserError
from lm.rundir import holder, read_json

if TYPE_CHECKING:  # it imports JAX, and `lm status` uses the table
    from lm.train.cell import Cell


BARS = 40  # with more cells only those at work have a bar


def print_columns(
    console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str]
) -> None:
    """Prints a table whose words are never cut; columns named in `left` begin at the left.

    Plain padding: for 10,000 rows `rich.table` takes half a minute of a core.
    """
    table = [headings, *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    pads = [str.ljust if heading in left else str.rjust for heading in headings]
    lines = [
        "  ".join(pad(word, n) for pad, word, n in zip(pads, row, widths, strict=True)).rstrip()
        for row in table
    ]
    console.print(Text("\n".join(lines)), soft_wrap=True)


class Display:
    """A bar per cell on a terminal, a line per finished cell elsewhere."""

    def __init__(self, left: Sequence["Cell"], workdir: Path, console: Console) -> None:
        self.workdir, self.console = workdir, console
        self.waiting = {c.name: c for c in left}
        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
        )
        self.bars = Progress(*columns, console=console, disable=not console.is_terminal)
        self.ids = {
            c.name: self.bars.add_task(
                c.name, total=c.steps, note="", start=False, visible=len(left) <= BARS
            )
            for c in left
        }
        self.next = 0.0

    def update(self, now: bool = False) -> None:
        """Reads what the workers say of themselves; with thousands of cells not every time."""
        begin = time.monotonic()
        if begin >= self.next or now:
            self._update()
            self.next = time.monotonic() + 10 * (time.monotonic() - begin)

    def _update(self) -> None:
        for name, cell in list(self.waiting.items()):
            folder = self.workdir / name
            if not (folder / "progress.json").exists() and holder(folder / "lock"):
                self.bars.start_task(self.ids[name])
                self.bars.update(self.ids[name], note="compiling")
            with contextlib.suppress(FileNotFoundError, UserError):
                state = read_json(folder / "progress.json")
                self.bars.start_task(self.ids[name])
                self.bars.update(self.ids[name], visible=True)
                loss = "diverged" if state["loss"] is None else f"loss {state['loss']:.3f}"
                note = f"{loss} · {len(cell.replicas)} replicas"
                self.bars.update(self.ids[name], completed=state["step"], note=note)
            with contextlib.suppress(FileNotFoundError):
                result = read_json(folder / "result.json")
                self.bars.update(self.ids[name], completed=cell.steps)
                self.bars.stop_task(self.ids[name])
                self.bars.update(self.ids[name], visible=len(self.ids) <= BARS)
                del self.waiting[name]
                if not self.console.is_terminal:
                    s = result["seconds"]
                    self.console.print(
                        f"{name}: {len(cell.replicas)} replicas x {cell.steps} steps in "
                        f"{s['total']:.0f} s (compile {s['compile']:.0f}, "
                        f"train {s['train']:.0f}, eval {s['eval']:.0f})",
                        highlight=False,
                    )

    def __enter__(self) -> "Display":
        self.bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.update(now=True)
        self.bars.stop()
