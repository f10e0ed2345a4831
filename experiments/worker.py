"""A worker: trains the cells of a run directory that nobody else has, one after another, until none
is left. While one trains, a thread compiles the next.

`python -m experiments.worker WORKDIR [--cells NAME,NAME]`, or `--check` to see only whether the
cells on standard input fit the devices. It learns everything from the run directory and says
everything there; the runner, or a scheduler, only starts it and looks at its exit code: 0 nothing
left to do here, 75 stopped after a checkpoint (start it again), 2 the user has to mend something,
70 ended by its watchdog, 1 a cell failed.
"""

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from experiments import exits
from experiments.exits import AGAIN
from lm import lease
from lm.config import UserError, build
from lm.rundir import Held, JsonLines, holder, inside, lock, now, read_json
from lm.train.cell import Cell
from lm.train.checkpoint import disk_error
from lm.train.loop import Interrupted, train
from lm.train.program import (
    Program,
    cell_mesh,
    compile_cell,
    make_cell_population,
    scoring_rows,
)


def main(argv: list[str]) -> int:
    """Works through `argv[0]`; see the module."""
    if argv == ["--check"]:
        return _check(json.load(sys.stdin))
    workdir, chosen = arguments(argv)
    stop = exits.stop_signal()
    cells = read_json(workdir / "study.json")["cell_configs"]
    cells = {name: cells[name] for name in cells if chosen is None or name in chosen}
    ahead = _Ahead(workdir, cells)
    code = _work(workdir, ahead, stop)
    if ahead.busy():
        os._exit(code)  # the ordinary way waits for the thread, and nobody needs what it makes
    return code


def arguments(argv: list[str]) -> tuple[Path, set[str] | None]:
    """The workdir, and the cells that `--cells` leaves; without it all."""
    if "--cells" not in argv:
        return Path(argv[0]), None
    return Path(argv[0]), set(argv[argv.index("--cells") + 1].split(","))


def _work(workdir: Path, ahead: "_Ahead", stop: Callable[[], bool]) -> int:
    def carry_out(name: str, held: lease.Lease) -> int:
        cell = build(Cell, ahead.cells[name], name)
        return _train(cell, workdir / name, workdir, ahead, stop, held)

    return through(workdir, ahead.order(), carry_out, stop)


def through(
    workdir: Path,
    names: Iterator[str],
    carry_out: Callable[[str, lease.Lease], int],
    stop: Callable[[], bool],
) -> int:
    """Carries out every cell that nobody else has, then those whose holder shows no sign of life;
    returns the worst exit code.
    """
    worst, watch, others = 0, lease.Watch(), list[str]()

    def attempt(name: str) -> int:
        folder = inside(workdir, name)
        if (folder / "result.json").exists():
            return 0
        # Sooner than the lease, which tries the lock again for a while.
        if holder(folder / "lock") and not watch.expired(folder):
            raise Held(f"{folder} is held")
        folder.mkdir(exist_ok=True)
        with lease.lease(folder, f"lm run, cell {name}", watch) as held:
            if (folder / "result.json").exists():  # another worker's, since we looked
                held.ended = "done"
                return 0
            taken_over(folder, held)
            return carry_out(name, held)

    try:
        for name in names:
            if stop():
                return AGAIN
            try:
                worst = max(worst, attempt(name))
            except Held:
                watch.silent(workdir / name)
                others.append(name)
        seen = {name: lease.newest(workdir / name) for name in others}
        while others:
            for name in list(others):
                if stop():
                    return AGAIN
                with contextlib.suppress(Held):
                    worst = max(worst, attempt(name))
                # A holder that beats will finish, or its launcher will see to it.
                if (workdir / name / "result.json").exists() or (
                    lease.newest(workdir / name) != seen[name] or seen[name] is None
                ):
                    others.remove(name)
            time.sleep(0.2 * bool(others))
    except Interrupted:
        return AGAIN
    except lease.Lost as lost:
        _say(str(lost))
        return AGAIN
    except UserError as error:
        _say(str(error))
        return exits.USER
    except OSError as error:  # a full disk, before the cell could begin
        told = disk_error(error, workdir)
        _say(f"{workdir}: {told}")
        return exits.USER if isinstance(told, UserError) else 1
    return worst


class _Ahead:
    """The cells to train, in order, and the next one's program, compiled on a thread.

    Who compiles a cell ahead holds `CELL/ahead.lock`. The others pass the cell by, while they have
    another one to train, so that no two compile it.
    """

    def __init__(self, workdir: Path, cells: Mapping[str, Any]) -> None:
        self.workdir, self.cells, self.tried = workdir, cells, set[str]()
        self.thread = ThreadPoolExecutor(1, "compile")
        self.name = ""
        self.next: Future[Program] | None = None
        self.claim = contextlib.ExitStack()

    def order(self) -> Iterator[str]:
        """Every cell without a result, once; those that others compile ahead come last."""
        for theirs in (False, True):
            for name in self.cells:
                if name in self.tried or (self.workdir / name / "result.json").exists():
                    continue
                if theirs or name == self.name or not holder(self.workdir / name / "ahead.lock"):
                    self.tried.add(name)
                    yield name

    def program(self, cell: Cell) -> Program:
        """The program of a cell, waited for; then that of the next one is begun."""
        try:
            if self.next and cell.name == self.name:
                return self.next.result()
            return compile_cell(cell, scoring_rows(cell))
        finally:
            if cell.name == self.name or self.name in self.tried or self._taken(self.name):
                self._drop()
            if not self.name:
                self._begin()

    def busy(self) -> bool:
        """Whether the thread is at work."""
        return self.next is not None and not self.next.done()

    def _taken(self, name: str) -> bool:
        folder = self.workdir / name
        return (folder / "result.json").exists() or holder(folder / "lock") is not None

    def _drop(self) -> None:
        self.claim.close()
        self.name = ""

    def _begin(self) -> None:
        for name, config in self.cells.items():
            if name in self.tried or self._taken(name):
                continue
            if holder(self.workdir / name / "ahead.lock"):  # sooner than `lock`, which tries again
                continue
            # Nothing is lost without it: the cell is compiled, or fails, when its turn comes.
            with contextlib.suppress(OSError, UserError):
                cell = build(Cell, config, name)
                inside(self.workdir, name).mkdir(exist_ok=True)
                self.claim.enter_context(
                    lock(self.workdir / name / "ahead.lock", f"lm run, compiling cell {name}")
                )
                self.name = name
                self.next = self.thread.submit(compile_cell, cell, scoring_rows(cell))
                return


def _check(cells: list[dict[str, Any]]) -> int:
    """Traces every cell on the devices of this machine: 2 and a sentence where one does not fit."""
    try:
        for config in cells:
            cell = build(Cell, config, config["name"])
            make_cell_population(cell, cell_mesh(cell, jax.devices()))
    except UserError as error:
        print(f"cell {config['name']}: {error}", file=sys.stderr)
        return 2
    return 0


def _train(
    cell: Cell,
    folder: Path,
    workdir: Path,
    ahead: _Ahead,
    stop: Callable[[], bool],
    held: lease.Lease,
) -> int:
    def program() -> Program:
        return ahead.program(cell)

    with watched(folder, held) as check:
        train(cell, folder, workdir / "data", stop=stop, program=program, check=check)
    return CODES.get(held.ended, 0)


# What `watched` has written as the end of a lease -> exit code; anything else is none.
CODES = {"user": exits.USER, "disk": exits.USER, "oom": 1, "bug": 1}


@contextlib.contextmanager
def watched(folder: Path, held: lease.Lease) -> Iterator[Callable[[], None]]:
    """An attempt at a cell: gives what is to be called at every step, and says in the events and in
    the lease how the attempt ended. Only Interrupted and Lost come out of it.
    """

    def hangs(message: str) -> None:
        failed(folder, "hang", message, held)
        held.end()

    dog = exits.Watchdog(hangs)
    held.on_beat = dog.look

    def check() -> None:
        dog.step()
        held.check()

    try:
        yield check
        held.ended = "done"
    except Interrupted:
        held.ended = "preempted"
        raise
    except lease.Lost:
        held.ended = "lost"
        raise
    except Exception as error:
        held.check()  # whoever took the cell over may have taken the ground from under us
        told = disk_error(error, folder)
        held.ended = exits.kind_of(told)
        user = isinstance(told, UserError)
        _say(f"{folder.name}: {told}" if user else traceback.format_exc())
        failed(folder, held.ended, str(told) if user else f"{type(error).__name__}: {error}", held)
    finally:
        dog.stop()


def failed(folder: Path, kind: str, message: str, held: lease.Lease | None = None) -> None:
    """Puts the end of an attempt into the events of its cell, and into its lease."""
    if held:
        held.ended = kind
    try:
        attempt = {"attempt": len(read_json(folder / "environment.json"))}
    except (OSError, UserError):
        attempt = {}
    try:
        with JsonLines(folder / "events.jsonl") as events:
            record = {"event": "failed", "time": now(), **attempt}
            events.append({**record, "kind": kind, "message": message})
    except OSError as error:  # a full disk: the launcher looks for that itself
        _say(f"{folder}: could not record the failure: {error}")


def taken_over(folder: Path, held: lease.Lease) -> None:
    """An event for the attempt before, if it ended without a word."""
    last = held.previous
    if last is not None and not last.get("ended"):
        who = f"pid {last.get('pid')} on {last.get('host')}"
        failed(folder, "killed", f"{who} (lease {held.token - 1}) is no more, or silent")


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the log may be on the disk that is full
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
