"""Runs commands as processes of this machine.

Every command is a session of its own, led by a small shell script that waits for it and writes its
exit code to a file: so the code is known to whoever asks, also when the launcher has died in
between. An id is `PID:START:OOM:FILE`: the shell, when it started (a process number alone is
reused), how often the kernel had killed for lack of memory by then, and where the exit code goes.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from launch import Command, Status
from lm.config import within

# A shell with handlers outlives the signal that its session gets: the command decides what that is,
# and the shell stays to write down how it ended. The handlers come after the command has begun: a
# signal between the two would end nobody. A signal interrupts `wait`, so it is asked again; some
# shells have the command's code by then and give it once more, others (127) have given it already.
# Nothing is interpolated: file and command are arguments.
SHELL = """
file=$1; shift; "$@" & child=$!
trap : TERM INT HUP USR1
while wait $child; code=$?; [ $code -gt 128 ]; do
  kill -0 $child 2>/dev/null || { wait $child; last=$?; [ $last = 127 ] || code=$last; break; }
done
echo $code >"$file.tmp" && mv "$file.tmp" "$file"; exit $code
"""
POLL = 0.05


@dataclasses.dataclass(frozen=True)
class Settings:
    """How many processes carry out one cell; `--workers` says how many cells at a time."""

    processes: int = dataclasses.field(default=1, metadata={"omit": True})

    def __post_init__(self) -> None:
        within("processes", self.processes, 1, 1024)


def ready(settings: Settings) -> None:
    """A machine can always start processes."""


def processes(settings: Settings) -> int:
    """How many processes carry out one cell together."""
    return settings.processes


def submit(commands: Sequence[Command], settings: Settings | None = None) -> list[str]:
    """Starts every command in a session of its own, its output appended to its log."""
    return [_start(command) for command in commands]


def status(ids: Sequence[str], settings: Settings | None = None) -> list[Status]:
    """The state of each, without waiting."""
    return [_status(identity) for identity in ids]


def cancel(ids: Sequence[str], settings: Settings | None = None, grace: float = 10.0) -> None:
    """Ends every running session: SIGTERM, then SIGKILL after `grace` seconds."""
    left = [i for i in ids if _status(i).state == "running"]
    for identity in left:
        _signal(identity, signal.SIGTERM)
    deadline = time.monotonic() + grace
    while left and time.monotonic() < deadline:
        time.sleep(POLL)
        left = [i for i in left if _status(i).state == "running"]
    for identity in left:
        _signal(identity, signal.SIGKILL)  # with what the command has started and left behind
    while left:
        left = [i for i in left if _status(i).state == "running"]
        time.sleep(POLL * bool(left))


def started(pid: int) -> str:
    """When a living process began, as the kernel tells it; empty if there is none, or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return "" if fields[0] == "Z" else fields[19]
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return ""
    done = subprocess.run(  # a system without /proc
        ["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, timeout=10
    )
    return "-".join(done.stdout.replace(":", ".").split())


def _start(command: Command) -> str:
    folder = command.log.absolute().parent / "exits"
    folder.mkdir(parents=True, exist_ok=True)
    file = str(folder / f"{command.name}-{time.time_ns()}")
    memory = _memory_kills()
    output = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    pid = os.posix_spawn(
        "/bin/sh",
        ["sh", "-c", SHELL, "sh", file, *command.argv],
        {**os.environ, **command.env},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(command.log), output, 0o666),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        # Ctrl-C reaches the launcher alone, which then decides what becomes of its workers.
        setsid=True,
        setsigdef=[signal.SIGPIPE, signal.SIGXFSZ, signal.SIGTERM, signal.SIGINT],
    )
    return f"{pid}:{started(pid)}:{memory}:{file}"


def _status(identity: str) -> Status:
    pid, start, memory, file = _parts(identity)
    code = _read_code(file)
    if code is None and _reap(pid, file) is False and start and started(pid) == start:
        return Status("running")
    if code is None:
        code = _read_code(file)  # written, or reaped, since we looked
    if code is None:
        return Status("gone", None, "its session was killed")
    why = "out of memory, by the kernel" if code == -9 and _memory_kills() > memory else ""
    return Status("failed" if code else "done", code, why)


def _reap(pid: int, file: str) -> bool:
    """Whether the shell was a child of this process and has ended; a code it could not write is
    written in its place.
    """
    with contextlib.suppress(ChildProcessError):  # that of a launcher that has died
        done, state = os.waitpid(pid, os.WNOHANG)
        if done:
            if not os.path.exists(file):
                code = os.waitstatus_to_exitcode(state)
                Path(file + ".tmp").write_text(f"{code if code >= 0 else 128 - code}\n")
                os.replace(file + ".tmp", file)
            return True
    return False


def _read_code(file: str) -> int | None:
    try:
        code = int(Path(file).read_text())
    except (FileNotFoundError, ValueError):
        return None
    return 128 - code if code > 128 else code  # a shell's spelling of a signal


def _signal(identity: str, number: signal.Signals) -> None:
    pid, start, *_ = _parts(identity)
    if started(pid) == start:  # else somebody else may have the number
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, number)


def _parts(identity: str) -> tuple[int, str, int, str]:
    pid, start, memory, file = identity.split(":", 3)
    return int(pid), start, int(memory), file


def _memory_kills() -> int:
    """How often the kernel has killed a process of this control group for lack of memory."""
    for path in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control"):
        with contextlib.suppress(OSError, ValueError):
            words = dict(line.split() for line in Path(path).read_text().splitlines())
            return int(words.get("oom_kill", 0))
    return 0
