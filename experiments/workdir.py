"""A workdir and the workers in it: what every kind of study shares, whatever it trains.

A workdir belongs to one study under one config; anything else is refused with a diff. Workers are
processes that learn what to do from the run directory; they are kept running until every cell has
a result, and given up when they end three times without bringing any cell further.
"""

import contextlib
import errno
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from experiments.display import Display
from experiments.worker import LAUNCHER
from launch import local
from lm.config import UserError, diff, to_dict
from lm.rundir import cache_folder, holder, now, read_json, read_lines, write_json
from lm.train.checkpoint import disk_error

RESTARTS = 2  # of workers that ended without bringing any cell further


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
        if foreign:
            raise UserError(
                f"{workdir} holds {foreign[0]!r} and no study; choose an empty --workdir"
            )
        return
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
    left: Sequence[Any], workdir: Path, workers: int, command: local.Command, console: Console
) -> int:
    """Keeps `workers` processes of `command` running until every cell of `left` (anything with
    `name`, `steps` and `replicas`) has a result; returns the exit code.
    """
    restarts, before = 0, progress(left, workdir)
    with signals_raise(), Display(left, workdir, console) as display:
        wait(left, workdir, console)
        handles = local.submit([command] * workers)
        try:
            while True:
                time.sleep(0.2)
                display.update()
                if "running" in local.status(handles):
                    continue
                if all((workdir / c.name / "result.json").exists() for c in left):
                    return 0
                after = progress(left, workdir)
                restarts = 0 if after > before else restarts + 1
                before = after
                codes = {h.process.returncode for h in handles}
                if 2 in codes or restarts > RESTARTS:
                    break
                wait(left, workdir, console)
                handles = local.submit([command] * workers)
        finally:
            local.cancel(handles)
    return explain_failure(left, workdir, command.log)


def wait(left: Sequence[Any], workdir: Path, console: Console) -> None:
    """Waits for workers that a killed runner left behind; they stop after their next checkpoint."""
    for cell in left:
        told = False
        while owner := holder(workdir / cell.name / "lock"):
            if not told:
                console.print(
                    f"{cell.name}: waiting for pid {owner['pid']} on {owner['host']}, which an"
                    " earlier run left behind, to checkpoint and stop",
                    highlight=False,
                )
            told = True
            time.sleep(0.2)


def command(workdir: Path, workers: int, module: str, *args: str) -> local.Command:
    """`python -m MODULE WORKDIR ARGS`, a worker's command. NPROC sets XLA's thread pool, and with
    it the order of sums: it is pinned at the first run.
    """
    pins = workdir / "pins.json"
    if not pins.exists():
        per_worker = max(1, (os.cpu_count() or 1) // workers)
        write_json(pins, {"NPROC": os.environ.get("NPROC", str(per_worker))})
    env = {
        "NPROC": read_json(pins)["NPROC"],
        LAUNCHER: str(os.getpid()),
        "JAX_COMPILATION_CACHE_DIR": os.environ.get(
            "JAX_COMPILATION_CACHE_DIR", str(cache_folder("xla"))
        ),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return local.Command(
        (sys.executable, "-m", module, str(workdir), *args),
        workdir / "logs" / "worker.log",
        env,
    )


def progress(left: Sequence[Any], workdir: Path) -> int:
    """A number that grows when any cell gets further."""
    total = 0
    for cell in left:
        folder = workdir / cell.name
        sealed = [
            int(p.name.split(".")[0]) for p in (folder / "checkpoints").glob("[0-9]*.manifest.json")
        ]
        total += max(sealed, default=0) + 1 + (folder / "result.json").exists()
    return total


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
        if last.get("kind") == "user":
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
