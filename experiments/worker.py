"""A worker: trains the cells of a run directory that nobody else has, one after another, until none
is left.

`python -m experiments.worker WORKDIR`, or `--check` to see only whether the cells on standard input
fit the devices. It learns everything from the run directory and says
everything there; the runner, or a scheduler, only starts it and looks at its exit code: 0 nothing
left to do here, 75 stopped after a checkpoint (start it again), 2 the user has to mend something, 1
a cell failed.
"""

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from lm.config import UserError, build
from lm.rundir import Held, JsonLines, lock, now, read_json
from lm.sharding import make_mesh
from lm.train.cell import Cell
from lm.train.checkpoint import disk_error
from lm.train.loop import Interrupted, train
from lm.train.program import make_cell_population

AGAIN = 75  # sysexits' EX_TEMPFAIL: the launcher starts the same command again
LAUNCHER = "ONSET_LAUNCHER"  # the pid of the process that started this one


def main(argv: list[str]) -> int:
    """Works through `argv[0]`; see the module."""
    if argv == ["--check"]:
        return _check(json.load(sys.stdin))
    workdir = Path(argv[0])
    stop = _stop_signal()
    cells = read_json(workdir / "study.json")["cell_configs"]
    worst = 0
    for name, config in cells.items():
        folder = workdir / name
        if stop():
            return AGAIN
        if (folder / "result.json").exists():
            continue
        try:
            folder.mkdir(exist_ok=True)
            with lock(folder / "lock", f"lm run, cell {name}"):
                worst = max(worst, _train(build(Cell, config, name), folder, workdir, stop))
        except Held:
            continue
        except Interrupted:
            return AGAIN
        except OSError as error:  # a full disk, before the cell could begin
            told = disk_error(error, workdir)
            _say(f"{name}: {told}")
            return 2 if isinstance(told, UserError) else 1
    return worst


def _check(cells: list[dict[str, Any]]) -> int:
    """Traces every cell on the devices of this machine: 2 and a sentence where one does not fit."""
    try:
        for config in cells:
            cell = build(Cell, config, config["name"])
            replicas = cell.train.replica_devices
            mesh = make_mesh(cell.train.strategy, jax.devices(), replicas=replicas)
            make_cell_population(cell, mesh)
    except UserError as error:
        print(f"cell {config['name']}: {error}", file=sys.stderr)
        return 2
    return 0


def _train(cell: Cell, folder: Path, workdir: Path, stop: Callable[[], bool]) -> int:
    if (folder / "result.json").exists():  # another worker's, between our look and our lock
        return 0
    try:
        train(cell, folder, workdir / "data", stop=stop)
        return 0
    except Interrupted:
        raise
    except Exception as error:
        told = disk_error(error, folder)
        if isinstance(told, UserError):
            _failed(folder, "user", str(told))
            _say(f"{cell.name}: {told}")
            return 2
        _say(traceback.format_exc())
        _failed(folder, "crash", f"{type(error).__name__}: {error}")
        return 1


def _failed(folder: Path, kind: str, message: str) -> None:
    try:
        with JsonLines(folder / "events.jsonl") as events:
            events.append({"event": "failed", "time": now(), "kind": kind, "message": message})
    except OSError as error:  # a full disk: the launcher looks for that itself
        _say(f"{folder}: could not record the failure: {error}")


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # the log may be on the disk that is full
        print(text, file=sys.stderr, flush=True)


def _stop_signal() -> Callable[[], bool]:
    """True once SIGTERM or SIGUSR1 came, or the process that started this one is gone."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda n, _: asked.append(n))
    # The launcher may be gone before this line: then getppid is that of whoever adopted us.
    parent = int(os.environ.get(LAUNCHER, os.getppid()))
    return lambda: bool(asked) or os.getppid() != parent


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
