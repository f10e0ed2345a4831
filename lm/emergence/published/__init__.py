"""`lm published NAME`: published curves recomputed from their data, number by number.

Each name is one module of this package with `analyse(folder) -> Result`: our numbers beside the
printed ones with a tolerance, and a figure. The data belong to their authors and are not part of
this project: they are read from the folder --data, or fetched (see `files`).
"""

import argparse
import importlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm.config import UserError, nearest
from lm.emergence.published.numbers import Number, Result, show
from lm.rundir import write_bytes

if TYPE_CHECKING:
    from rich.table import Table

# name -> what it shows, and where the data come from
NAMES = {
    "chinchilla": (
        "the loss law refitted: Hoffmann's parameters rejected, and the trap that made them",
        "Epoch's points of figure 4; parameter counts of Schaeffer et al. 2026",
    ),
    "gadre": (
        "over-trained models predicted from small ones, loss and downstream error",
        "Gadre et al. 2024, gathered from their JSON",
    ),
    "pythia": (
        "LAMBADA begins under accuracy and not under loss; MMLU and WSC never do",
        "Biderman et al. 2023, gathered from their JSON",
    ),
    "obsscaling": (
        "one component behind eight benchmarks; exact match beside BLEU",
        "Ruan et al. 2024",
    ),
    "gpt3": (
        "arithmetic by size: screening statistics, and shapes that 8 points cannot decide",
        "Brown et al. 2020, table H.1",
    ),
    "wei2022": ("how many BIG-bench tasks were called emergent", "Wei et al. 2022, appendix E"),
    "ushape": ("easy and hard questions scale in opposite ways", "Wu & Lo 2025"),
}
WIDTH = 100


def main(argv: list[str]) -> int:
    """`lm published [NAME] [--data=DIR] [--out=DIR] [--json]`; 1 if a number does not agree."""
    arguments = _parse(argv)
    if arguments.list or arguments.name is None:
        _list()
        return 0
    result = analyse(arguments.name, arguments.data)
    figure = _draw(arguments.name, result, arguments.out)
    if arguments.json:
        print(json.dumps(to_json(arguments.name, result), ensure_ascii=False, allow_nan=False))
    else:
        _show(arguments.name, result, figure)
    return int(not all(number.ok for number in result.numbers))


def analyse(name: str, folder: str | None = None) -> Result:
    """The numbers and figure of one name, from the data in `folder` or fetched."""
    if name not in NAMES:
        raise UserError(f"{name!r} is no published curve; {nearest(name, list(NAMES))}")
    return importlib.import_module(f"lm.emergence.published.{name}").analyse(folder)


def to_json(name: str, result: Result) -> dict[str, Any]:
    """The numbers as JSON has them: NaN and infinity are null."""
    numbers = [
        {key: _plain(value) for key, value in number._asdict().items()} for number in result.numbers
    ]
    return {"name": name, "numbers": numbers}


def table(numbers: list[Number]) -> "Table":
    """What, ours, published, tolerance and whether it agrees, within 100 columns."""
    from rich import box
    from rich.table import Column, Table

    right = [Column(head, justify="right") for head in ("ours", "published", "tolerance")]
    grid = Table(
        Column("what", overflow="fold"), *right, "ok", box=box.SIMPLE, padding=(0, 1, 0, 0)
    )
    for number in numbers:
        verdict = "yes" if number.ok else "[bold red]NO[/]"
        values = show(number.ours), show(number.published), number.tolerance
        grid.add_row(number.what, *values, verdict)
    return grid


def _parse(argv: list[str]) -> argparse.Namespace:
    lines = [f"  {name:11} {what}" for name, (what, _) in NAMES.items()]
    parser = argparse.ArgumentParser(
        prog="lm published",
        description="Recomputes published curves, number by number, and draws each.",
        epilog="\n".join([*lines, "", "example: lm published chinchilla --data=data/published"]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="one of those below")
    parser.add_argument("--list", action="store_true", help="the names, and whose data they are")
    parser.add_argument("--data", metavar="DIR", help="folder of the data files; default: fetch")
    parser.add_argument("--out", metavar="DIR", default=".", help="for NAME.png; default: here")
    parser.add_argument("--json", action="store_true", help="for machines: the numbers")
    return parser.parse_args(argv)


def _list() -> None:
    from rich.console import Console
    from rich.table import Table

    from lm.emergence.published.files import SOURCES

    grid = Table("name", "shows", "data", box=None, padding=(0, 2, 0, 0))
    for name, (what, whose) in NAMES.items():
        grid.add_row(name, what, whose)
    console = Console(width=WIDTH)
    console.print(grid)
    console.print()
    for name, source in SOURCES.items():
        how = "fetched, or in --data" if source.url else f"in --data: {source.made}"
        console.print(f"{name}: {how}", highlight=False, markup=False)


def _show(name: str, result: Result, figure: Path) -> None:
    from rich.console import Console

    console = Console(width=WIDTH)
    console.print(table(result.numbers))
    agree = sum(number.ok for number in result.numbers)
    console.print(f"{name}: {agree} of {len(result.numbers)} numbers agree")
    if any(number.what.endswith("*") for number in result.numbers):
        console.print("* not printed by the authors: an earlier computation of ours, or a limit")
    console.print(f"figure: {figure}", highlight=False, soft_wrap=True)


def _draw(name: str, result: Result, folder: str) -> Path:
    """Writes NAME.png into the folder, which is made if it is not there."""
    from lm.emergence import plots

    place = Path(folder).expanduser()
    if place.exists() and not place.is_dir():
        raise UserError(f"{folder} is a file; --out takes a folder")
    place.mkdir(parents=True, exist_ok=True)
    write_bytes(place / f"{name}.png", plots.png(result.figure))
    return place / f"{name}.png"


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
