"""Runs commands as processes of this machine.

`submit(commands) -> handles; status(handles); cancel(handles)`: the contract of every engine. A
handle says how a process ended; what it achieved is in the run directory.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

State = Literal["running", "done", "failed"]


@dataclasses.dataclass(frozen=True)
class Command:
    """An argument list, what it adds to the environment, and the file its output goes to."""

    argv: tuple[str, ...]
    log: Path
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Handle:
    """A submitted command."""

    command: Command
    process: subprocess.Popen[bytes]


def submit(commands: Sequence[Command]) -> list[Handle]:
    """Starts every command in a session of its own, its output appended to its log."""
    return [_start(command) for command in commands]


def status(handles: Sequence[Handle]) -> list[State]:
    """The state of each, without waiting."""
    codes = [handle.process.poll() for handle in handles]
    return ["running" if code is None else "failed" if code else "done" for code in codes]


def cancel(handles: Sequence[Handle], grace: float = 10.0) -> None:
    """Ends every running session: SIGTERM, then SIGKILL after `grace` seconds."""
    # A process that has been waited for has given its number back: somebody else may have it.
    running = [handle for handle in handles if handle.process.poll() is None]
    for handle in running:
        _signal(handle, signal.SIGTERM)
    deadline = time.monotonic() + grace
    for handle in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            handle.process.wait(max(0.0, deadline - time.monotonic()))
        _signal(handle, signal.SIGKILL)  # ends what the process has started and left behind, too
        handle.process.wait()


def _start(command: Command) -> Handle:
    command.log.parent.mkdir(parents=True, exist_ok=True)
    with open(command.log, "ab") as log:
        process = subprocess.Popen(
            command.argv,
            env={**os.environ, **command.env},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Ctrl-C reaches the launcher alone, which then decides what becomes of its workers.
            start_new_session=True,
        )
    return Handle(command, process)


def _signal(handle: Handle, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(handle.process.pid, number)
