"""A worker: trains the cells of a run directory that nobody else has, one after another, until none
is left. While one trains, a thread compiles the next.

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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from lm.config import UserError, build
from lm.rundir import Held, JsonLines, holder, lock, now, read_json
from lm.sharding import make_mesh
from lm.train.cell import Cell
from lm.train.checkpoint import disk_error
from lm.train.loop import Interrupted, train
from lm.train.program import Program, compile_cell, make_cell_population, scoring_rows

AGAIN = 75  # sysexits' EX_TEMPFAIL: the launcher starts the same command again
LAUNCHER = "ONSET_LAUNCHER"  # the pid of the process that started this one


def main(argv: list[str]) -> int:
    """Works through `argv[0]`; see the module."""
    if argv == ["--check"]:
        return _check(json.load(sys.stdin))
    workdir = Path(argv[0])
    stop = _stop_signal()
    cells = read_json(workdir / "study.json")["cell_configs"]
    ahead = _Ahead(workdir, cells)
    code = _work(workdir, cells, ahead, stop)
    if ahead.busy():
        os._exit(code)  # the ordinary way waits for the thread, and nobody needs what it makes
    return code


def _work(
    workdir: Path, cells: Mapping[str, Any], ahead: "_Ahead", stop: Callable[[], bool]
) -> int:
    worst = 0
    for name in ahead.order():
        folder = workdir / name
        if stop():
            return AGAIN
        try:
            folder.mkdir(exist_ok=True)
            with lock(folder / "lock", f"lm run, cell {name}"):
                cell = build(Cell, cells[name], name)
                worst = max(worst, _train(cell, folder, workdir, ahead, stop))
        except Held:
            continue
        except Interrupted:
            return AGAIN
        except OSError as error:  # a full disk, before the cell could begin
            told = disk_error(error, workdir)
            _say(f"{name}: {told}")
            return 2 if isinstance(told, UserError) else 1
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
                (self.workdir / name).mkdir(exist_ok=True)
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
            replicas = cell.train.replica_devices
            mesh = make_mesh(cell.train.strategy, jax.devices(), replicas=replicas)
            make_cell_population(cell, mesh)
    except UserError as error:
        print(f"cell {config['name']}: {error}", file=sys.stderr)
        return 2
    return 0


def _train(cell: Cell, folder: Path, workdir: Path, ahead: _Ahead, stop: Callable[[], bool]) -> int:
    if (folder / "result.json").exists():  # another worker's, between our look and our lock
        return 0
    try:
        train(cell, folder, workdir / "data", stop=stop, program=lambda: ahead.program(cell))
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
