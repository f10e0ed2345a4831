"""`lm tasks`: what abilities there are, and what one of them asks in each of its formats."""

import argparse
import json
from typing import Any

from lm import tasks
from lm.config import UserError, nearest


def main(argv: list[str]) -> int:
    """`lm tasks [NAME] [--json]`."""
    parser = argparse.ArgumentParser(
        prog="lm tasks",
        description="Lists the abilities; with a name, its levels, formats, chance and test items.",
        epilog="example: lm tasks hop",
    )
    parser.add_argument("name", nargs="?", help="a task such as hop")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    found = listing() if arguments.name is None else describe(arguments.name)
    if arguments.json:
        print(json.dumps({"tasks": found}))
    else:
        show(found)
    return 0


def listing() -> list[dict[str, Any]]:
    """Every task and level with an example, ordered by ability."""
    found = [_example(tasks.task(name, level)) for name, level in tasks.TASKS]
    return sorted(found, key=lambda entry: entry["ability"])  # stable: else as in TASKS


def describe(name: str) -> list[dict[str, Any]]:
    """Every level and format of a task, with its chance and the number of its test items (at most
    1,000); raises UserError naming the nearest task.
    """
    levels = [level for task, level in tasks.TASKS if task == name]
    if not levels:
        known = sorted({task for task, _ in tasks.TASKS})
        raise UserError(f"task {name!r} is not known; {nearest(name, known)}")
    made = [tasks.task(name, level, f) for level in levels for f in range(tasks.FORMATS)]
    return [
        _example(task)
        | {"chance": tasks.chance(task).value, "items": len(tasks.items(task, "test", 0, 1000))}
        for task in made
    ]


def _example(task: tasks.Task) -> dict[str, Any]:
    first = tasks.examples(task, "test", 0, 1)[0]
    about = {"ability": task.ability, "task": task.name, "level": task.level, "format": task.format}
    return about | {"prompt": first.prompt, "answer": first.answer}


def show(found: list[dict[str, Any]]) -> None:
    """Prints the entries as a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    detailed = "chance" in found[0]
    extra = ("format", "chance", "test items") if detailed else ()
    grid = Table("ability", "task", "level", *extra, "prompt", "answer", box=None)
    for entry in found:
        cells = [entry["ability"], entry["task"], entry["level"]]
        if detailed:
            cells += [str(entry["format"]), f"{entry['chance']:.3f}", f"{entry['items']:,}"]
        grid.add_row(*cells, escape(entry["prompt"]), escape(entry["answer"]))
    Console(width=100).print(grid)
