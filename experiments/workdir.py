"""A workdir and the workers in it: what every kind of study shares, whatever it trains.

A workdir belongs to one study under one config; anything else is refused with a diff. Workers are
processes that learn what to do from the run directory; they are kept running until every cell has
a result or was given up (`experiments.supervise`).
"""

import ast
import contextlib
import errno
import os
import shutil
import signal
import sys
import time
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments import exits, supervise
from experiments.display import Display
from launch import Command
from lm.config import UserError, build, diff, to_dict
from lm.rundir import cache_folder, now, read_json, read_lines, write_json
from lm.train.checkpoint import disk_error

# Seconds between two looks at the commands. What a look takes counts as well: a scheduler may need
# seconds to answer, and a study of 10,000 cells a tenth of one to be looked through.
POLL = {"local": 0.1, "slurm": 2.0, "kubernetes": 2.0}


FLAG = "--where."
BOOLS = ("true", "false")

type Where = tuple[str, Any]  # the name of an engine, and its Settings


def refuse_file(workdir: Path) -> None:
    for path in (workdir, *workdir.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; give --workdir a folder")


def check_owner(workdir: Path, description: Mapping[str, Any]) -> None:
    """Refuses a workdir that holds something else: other files, another study, or this one under
    another config. What a killed writer left (`.NAME.tmp`) does not count.
    """
    if not workdir.exists():
        return
    if not (workdir / "study.json").exists():
        foreign = sorted(
            p.name
            for p in workdir.iterdir()
            if p.name not in ("lock", "data") and not (p.name[0] == "." and p.suffix == ".tmp")
        )
        if not foreign:
            return
        # Who has just begun the study here has written this first; we may have looked in between.
        if not (workdir / "study.json").exists():
            raise UserError(
                f"{workdir} holds {foreign[0]!r} and no study; choose an empty --workdir"
            )
    there = read_json(workdir / "study.json")
    if not isinstance(there, dict) or not {"name", "fingerprint", "config"} <= there.keys():
        raise UserError(
            f"{workdir / 'study.json'} is damaged; restore it, or choose another folder"
        )
    if there["name"] != description["name"]:
        raise UserError(
            f"{workdir} belongs to study {there['name']!r}, not {description['name']!r};"
            " choose another --workdir"
        )
    if there["fingerprint"] != description["fingerprint"]:
        lines = diff(there["config"], to_dict(description["config"]))
        shown = "\n  ".join(lines[:20] + [f"… and {len(lines) - 20} more"] * (len(lines) > 20))
        raise UserError(
            f"{workdir} was begun with another config; undo the change or choose another --workdir:"
            f"\n  {shown}"
        )


def split_settings(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The `--where.KEY=VALUE` arguments of a command line, and the others."""
    ours = [arg for arg in argv if arg.startswith(FLAG)]
    return ours, [arg for arg in argv if not arg.startswith(FLAG)]


def settings(place: str, told: Sequence[str]) -> Any:
    """The engine's settings from `--where.KEY=VALUE`; raises UserError on what is none of them."""
    cls = supervise.engine(place).Settings
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for text in told:
        key, equals, value = text.removeprefix(FLAG).partition("=")
        if not equals or not key:
            raise UserError(f"{text} sets nothing; write {FLAG}{key or 'KEY'}=VALUE")
        values[key] = value
        if hints.get(key) is not str:  # an account may be called 0123
            with contextlib.suppress(ValueError, SyntaxError):
                values[key] = ast.literal_eval(value.title() if value in BOOLS else value)
    return build(cls, values, f"where={place}")


def ready(where: Where | None) -> None:
    """Raises UserError if the engine can do nothing from here; before anything is written."""
    if where:
        supervise.engine(where[0]).ready(where[1])


def choose(workdir: Path, where: Where | None) -> None:
    """Writes down which engine carries out the cells; the local one if nothing is said."""
    supervise.choose(workdir, *(where or ("local", settings("local", []))))


def undo(workdir: Path, before: set[str] | None) -> None:
    """Takes away what was made since the folder held `before` (None: since it was not there)."""
    if before is None:
        shutil.rmtree(workdir)
        return
    for path in workdir.iterdir():
        if path.name not in before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def begin(workdir: Path, description: Mapping[str, Any]) -> None:
    """Writes `study.json` once; what pins the bits of the results is in it, so a resume takes the
    same.
    """
    if not (workdir / "study.json").exists():
        write_json(workdir / "study.json", {**description, "begun": now()})


def work(
    left: Sequence[Any], workdir: Path, workers: int, command: Command, console: Console
) -> int:
    """Keeps `workers` processes of `command` running, or one for each cell where that is for a
    scheduler to decide, until every cell of `left` (anything with `name`, `steps` and `replicas`)
    has a result; returns the exit code. What an earlier call left running is gone on with.
    """

    def say(text: str) -> None:
        console.print(text, highlight=False, style="dim", markup=False)

    with signals_raise(), Display(left, workdir, console) as display:
        crew = supervise.Crew([c.name for c in left], workdir, workers, command, say)
        try:
            tick = time.monotonic()
            while crew.step():
                display.update()
                time.sleep(max(POLL[crew.place], 4 * (time.monotonic() - tick)))
                tick = time.monotonic()
        except OSError as error:  # a full disk: there is no room for `launch.json`
            raise disk_error(error, workdir) from error
        except BaseException:
            if crew.place != "local" and crew.live():
                say("the cells go on; give the same command again to watch them")
            raise
        finally:
            if crew.place == "local":
                crew.cancel()
    if all((workdir / c.name / "result.json").exists() for c in left):
        return 0
    return explain_failure(left, workdir, command.log)


def command(workdir: Path, workers: int, module: str, *args: str) -> Command:
    """`python -m MODULE WORKDIR ARGS`, the command of a worker, one of `workers` processes. NPROC
    sets XLA's thread pool, and with it the order of sums: it is pinned at the first run.
    """
    pins = workdir / "pins.json"
    if not pins.exists():
        per_worker = max(1, (os.cpu_count() or 1) // workers)
        write_json(pins, {"NPROC": os.environ.get("NPROC", str(per_worker))})
    env = {
        "NPROC": read_json(pins)["NPROC"],
        "JAX_COMPILATION_CACHE_DIR": os.environ.get(
            "JAX_COMPILATION_CACHE_DIR", str(cache_folder("xla"))
        ),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return Command(
        (sys.executable, "-m", module, str(workdir), *args),
        workdir / "logs" / "worker.log",
        env,
    )


def explain_failure(left: Sequence[Any], workdir: Path, log: Path) -> int:
    """Raises what is the user's to mend; else one sentence for each cell that has no result."""
    if shutil.disk_usage(workdir).free < 1 << 16:  # too little for an event that would say so
        raise disk_error(OSError(errno.ENOSPC, "disk full"), workdir)
    sentences = []
    for cell in left:
        if (workdir / cell.name / "result.json").exists():
            continue
        events, _ = read_lines(workdir / cell.name / "events.jsonl")
        last = events[-1] if events and events[-1]["event"] == "failed" else {}
        if last.get("kind") in exits.STOPS_ALL:
            raise UserError(f"cell {cell.name}: {last['message']}")
        why = f"failed ({last['message']})" if last else "did not finish"
        sentences.append(f"cell {cell.name} {why}; {log} has the output of its worker")
    print(*sentences, sep="\n", file=sys.stderr)
    return 1


@contextlib.contextmanager
def signals_raise() -> Iterator[None]:
    """SIGTERM ends the runner the way Ctrl-C does, so that workers get to checkpoint."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
