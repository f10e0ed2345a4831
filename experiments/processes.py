"""One cell on several processes, on one machine or on many.

`python -m experiments.processes WORKDIR --cells NAME --processes=2` starts them here and waits;
under `srun`, or with the three variables of `join`, each process is started without `--processes`
and finds the others. Every process has the devices of its machine, reads its own rows of each
batch, and writes its own part of each checkpoint. The first one alone has the cell's lease and
writes rows, events and the result; the records of the others go to a folder that is thrown away.

Nobody is replaced: when one process ends or stops, the attempt ends for all, within `HEARTBEAT` +
`GRACE` seconds, and the next attempt goes on from the last checkpoint, on as many processes as it
likes. Exit codes are those of a worker.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments import exits, worker
from lm import lease
from lm.config import UserError, build, within
from lm.rundir import read_json
from lm.train.cell import Cell
from lm.train.loop import Interrupted, train

HEARTBEAT = 10  # seconds of silence after which JAX ends every process of the attempt
GRACE = 5.0  # seconds that the others have to end by themselves when one has
MEET = 120  # seconds for all processes to begin
COORDINATOR, COUNT, INDEX = "ONSET_COORDINATOR", "ONSET_PROCESSES", "ONSET_PROCESS"
PARENT = "ONSET_PROCESSES_PARENT"


def main(argv: list[str]) -> int:
    """Starts the processes, or is one of them."""
    parser = argparse.ArgumentParser("experiments.processes", description=__doc__)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--cells", required=True, metavar="NAME", help="the cell")
    parser.add_argument("--processes", type=int, default=0, help="how many to start here")
    args = parser.parse_args(argv)
    own = [sys.executable, "-m", "experiments.processes", str(args.workdir)]
    own += ["--cells", args.cells]
    if args.processes:
        within("--processes", args.processes, 1)
        return together(own, args.processes)
    join(os.environ)
    code = work(args.workdir, args.cells)
    if code in (0, exits.AGAIN):  # all of them come here, or none
        jax.distributed.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the ordinary way waits for those that are gone


def together(argv: Sequence[str], count: int) -> int:
    """Runs `count` processes that find each other, here, until all have ended; returns the exit
    code of the attempt. None of them is alive when it returns.
    """
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda n, _: asked.append(n))
    shared = {COORDINATOR: f"127.0.0.1:{_free_port()}", COUNT: str(count), PARENT: str(os.getpid())}
    ranks = [
        subprocess.Popen(argv, env={**os.environ, **shared, INDEX: str(i)}) for i in range(count)
    ]
    codes: list[int | None] = []
    try:
        deadline = float("inf")
        while None in (codes := [rank.poll() for rank in ranks]):
            while asked:
                wish = asked.pop()
                for rank in ranks:
                    rank.send_signal(wish)
            # Those that end well have met in a barrier; one that leaves alone is as good as dead.
            if any(code is not None for code in codes):
                grace = GRACE if any(codes) else HEARTBEAT + GRACE
                deadline = min(deadline, time.monotonic() + grace)
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for rank in ranks:
            rank.kill()  # one that is stopped would stay for ever
            rank.wait()
    return _code(codes)


def _code(codes: Sequence[int | None]) -> int:
    """What says most of the processes' exit codes (None: it had to be ended): the user's mistake, a
    watchdog, a stop, one that was killed, one that was silent until JAX ended the others.
    """
    for code in (exits.USER, exits.HUNG):
        if code in codes:
            return code
    if all(code in (0, exits.AGAIN) for code in codes):
        return max(code or 0 for code in codes)
    if -signal.SIGKILL in codes:
        return 128 + signal.SIGKILL
    return exits.HUNG if None in codes and -signal.SIGABRT in codes else 1


def join(environment: Mapping[str, str]) -> None:
    """Makes this process one of several, before the first use of a device: from the variables
    COORDINATOR (host:port of the first), COUNT and INDEX, or, without them, from what the cluster
    tells JAX (Slurm within `srun`, TPU slices).

    Raises UserError where only some are given, or the numbers make no sense.
    """
    # Its handler would swallow SIGTERM; ours asks for a checkpoint.
    jax.config.update("jax_enable_preemption_service", False)
    given = {name: environment[name] for name in (COORDINATOR, COUNT, INDEX) if name in environment}
    if not given:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT)
        return
    if len(given) < 3:
        lacking = ", ".join(sorted({COORDINATOR, COUNT, INDEX} - given.keys()))
        raise UserError(f"{lacking} is not set beside {', '.join(given)}; set all three or none")
    try:
        count, index = int(given[COUNT]), int(given[INDEX])
    except ValueError:
        raise UserError(
            f"{COUNT} is {given[COUNT]!r} and {INDEX} {given[INDEX]!r}; both must be whole numbers"
        ) from None
    within(COUNT, count, 1)
    within(INDEX, index, 0, count - 1)
    where = _meeting(given[COORDINATOR], index == 0)
    jax.distributed.initialize(
        where,
        num_processes=count,
        process_id=index,
        heartbeat_timeout_seconds=HEARTBEAT,
        initialization_timeout=MEET,
    )


def _meeting(where: str, first: bool) -> str:
    """Where the processes meet, once it can be: JAX itself would end the process, or wait, without
    saying what is wrong. Raises UserError where it is no place; SystemExit where it is taken, so
    that the next attempt tries another.
    """
    host, _, port = where.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"{COORDINATOR} is {where!r}; it must be HOST:PORT")
    deadline = time.monotonic() + MEET
    while True:  # the name of a pod is known a moment after the pod
        try:
            found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
            break
        except (OSError, UnicodeError, OverflowError) as error:
            if time.monotonic() > deadline:
                raise UserError(f"{COORDINATOR} {where} cannot be found ({error})") from None
            time.sleep(0.5)
    if first:
        family, kind, *_ = found[0]
        with contextlib.closing(socket.socket(family, kind)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("", int(port)))
            except OSError as error:
                print(
                    f"port {port} is taken ({error}); the next attempt takes another",
                    file=sys.stderr,
                )
                raise SystemExit(1) from None
    return where


def work(workdir: Path, name: str) -> int:
    """Trains a cell together with the other processes; returns this one's exit code."""
    asked, parent = exits.stop_signal(), os.environ.get(PARENT)

    def stop() -> bool:
        return asked() or (parent is not None and os.getppid() != int(parent))

    if jax.process_index():
        return _follow(workdir, name, stop)
    begun: list[str] = []

    def carry_out(name: str, held: lease.Lease) -> int:
        with worker.watched(workdir / name, held) as check:
            begun.append(name)
            _together(True)
            cell = _cell(workdir, name)
            train(cell, workdir / name, workdir / "data", stop=_agreed(stop), check=check)
        return worker.CODES.get(held.ended, 0)

    code = worker.through(workdir, iter([name]), carry_out, stop)
    if not begun:  # it is done, or somebody else has it
        _together(False)
    return code


def _follow(workdir: Path, name: str, stop: Callable[[], bool]) -> int:
    """What every process but the first does."""
    if not _together(False):
        return 0
    try:
        with tempfile.TemporaryDirectory(prefix="onset-") as scratch:
            train(
                _cell(workdir, name),
                Path(scratch),
                workdir / "data",
                stop=_agreed(stop),
                checkpoints=workdir / name / "checkpoints",
            )
        return 0
    except Interrupted:
        return exits.AGAIN
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return exits.USER
    except Exception:
        traceback.print_exc()
        return 1


def _cell(workdir: Path, name: str) -> Cell:
    return build(Cell, read_json(workdir / "study.json")["cell_configs"][name], name)


def _agreed(stop: Callable[[], bool]) -> Callable[[], bool]:
    """True on every process at the same step, once any of them has been asked to stop."""
    return lambda: bool(np.any(multihost_utils.process_allgather(np.int32(stop()))))


def _together(begin: bool) -> bool:
    """What the first process says, on all of them."""
    return bool(multihost_utils.broadcast_one_to_all(np.int32(begin)))


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(exits.USER)
