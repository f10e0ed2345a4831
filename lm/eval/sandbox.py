"""Runs a Python program that nobody has read in a process of its own, and says how it ended.

Two kinds of isolation:

* `namespaces`: the program sees an interpreter and an empty /tmp of bounded size, read-only
  otherwise, and nobody else's files, processes, memory or network; it is nobody, may regain no
  rights and make no calls of `lm.eval.seccomp`. A first process of ours holds the namespace and
  everything in it dies with that one. Linux with user namespaces; no superuser is needed.
* `limits`: the same limits and filter, but the file system and the processes of this machine are
  in sight, with the rights of the user (of nobody, if that is the superuser). Against accidents,
  not against malice, and only for who asks for it.

Limits on processor time, memory of one process and of all together, files, processes, output and
time on the clock hold in both. `explain` says what this machine has. docs/code.md says what
neither protects from.
"""

import dataclasses
import functools
import json
import os
import platform
import selectors
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

from lm.config import UserError, positive, within
from lm.eval import seccomp

Isolation = Literal["namespaces", "limits"]
ISOLATIONS: tuple[Isolation, ...] = ("namespaces", "limits")
JAIL = Path(__file__).with_name("jail.py")
NOBODY = 65534
GRACE = 5.0  # seconds past the wall time, after which the jail itself is taken for stuck
LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a run may use: seconds, bytes, counts."""

    wall_s: float = 20.0
    cpu_s: int = 5  # of each process
    memory: int = 1 << 30  # address space of each process
    memory_total: int = 1 << 30  # resident, of all processes together
    disk: int = 16 << 20  # of all files together
    file: int = 8 << 20  # of each file
    open_files: int = 64
    processes: int = 16
    output: int = 1 << 16  # of stdout and of stderr

    def __post_init__(self) -> None:
        positive("wall_s", self.wall_s)
        for name in ("cpu_s", "disk", "file", "processes", "output"):
            within(name, getattr(self, name), 1)
        within("open_files", self.open_files, 16)
        for name in ("memory", "memory_total"):
            within(name, getattr(self, name), 64 << 20)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended: `exit` (with the code, negative for a signal), or by what it was stopped.

    `said` is what the judge wrote, and nothing that the program can write.
    """

    end: str  # exit cpu time memory output killed
    code: int | None
    stdout: str
    stderr: str
    said: str
    seconds: float


def run(
    program: str,
    limits: Limits | None = None,
    isolation: Isolation = "namespaces",
    judge: str | None = None,
) -> Outcome:
    """Runs a program (Python source, read from its stdin), whatever it does, and returns.

    With a `judge`, a second program in the same jail, the two are connected: what the program
    writes to file descriptor 4 the judge reads from 3, and the reverse; what the judge writes to 5
    is the outcome's `said`; its end is the end of the run. Raises UserError where the isolation is
    not to be had.
    """
    require(isolation)
    return _run(program, limits or Limits(), isolation, judge)


def require(isolation: Isolation) -> None:
    """Raises UserError where this machine does not have an isolation."""
    if why := why_not(isolation):
        remedy = "run it on a machine that has them"
        if isolation == "namespaces" and not why_not("limits"):
            remedy = "--isolation=limits runs it all the same, with this machine's files in reach"
        raise UserError(f"generated code cannot be isolated by {isolation} here: {why}; {remedy}")


@functools.cache
def why_not(isolation: Isolation) -> str:
    """Why an isolation is not to be had on this machine, found by trying; empty if it is."""
    if sys.platform != "linux":
        return f"it needs Linux, and this is {sys.platform}"
    if not seccomp.supported():
        return f"the filter of system calls has no table for {platform.machine()}"
    try:
        outcome = _run("print('alive')", Limits(wall_s=20), isolation, None)
    except OSError as error:
        return str(error)
    if outcome.stdout != "alive\n":
        last = outcome.stderr[-200:].strip()
        return f"a first program ended with {outcome.end} {outcome.code}: {last}"
    return ""


def explain() -> str:
    """What this machine has, one line each."""
    lines = []
    for isolation in ISOLATIONS:
        why = why_not(isolation)
        lines.append(f"{isolation}: {f'no, {why}' if why else 'yes'}")
    user = f"uid {NOBODY}" if os.geteuid() == 0 else "the caller's uid, without any right"
    lines.append(f"programs run as {user}; filter of system calls for {platform.machine()}")
    return "\n".join(lines)


def _run(program: str, limits: Limits, isolation: Isolation, judge: str | None) -> Outcome:
    began = time.monotonic()
    # In namespaces the folder is only where the jail's own file systems are put.
    with tempfile.TemporaryDirectory(prefix="onset-", ignore_cleanup_errors=True) as folder:
        job = _job(limits, isolation, folder) | {"program": program, "judge": judge}
        if job["uid"] is not None and isolation == "limits":
            os.chown(folder, NOBODY, NOBODY)
        read, write = os.pipe()
        try:
            process = subprocess.Popen(
                [job["python"], "-I", "-S", str(JAIL), str(write)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(write,),
                env={},
                cwd="/",
                start_new_session=True,
            )
        finally:
            os.close(write)
        try:
            deadline = began + limits.wall_s + GRACE
            pieces, end = _collect(process, read, json.dumps(job).encode(), deadline, limits.output)
        finally:
            # The jail takes the end of its stdin for ours, and takes everything with it.
            _end(process)
            os.close(read)
    return _outcome(pieces, end, time.monotonic() - began)


def _job(limits: Limits, isolation: Isolation, folder: str) -> dict:
    """What the jail is told, but for the programs."""
    root = os.geteuid() == 0
    return dataclasses.asdict(limits) | {
        "isolation": isolation,
        "folder": folder,
        "python": os.path.realpath(sys.executable),
        "show": _shown(),
        "own_user": root,
        "uid": NOBODY if root else None,
        "filter": seccomp.program(signals=isolation == "namespaces").hex(),
    }


def _shown() -> list[str]:
    """Files and folders that an interpreter needs, none inside another."""
    base = os.path.realpath(sys.base_prefix)
    if base in ("/usr", "/usr/local"):
        base = "/usr"
    found = [path for path in (base, *LIBRARIES) if os.path.lexists(path)]
    inside = {p for p in found for q in found if p != q and Path(p).is_relative_to(q)}
    return sorted(set(found) - inside)


def _collect(
    process: subprocess.Popen[bytes], report: int, job: bytes, deadline: float, most: int
) -> tuple[list[bytes], str]:
    """What came out of stdout, stderr and the report, each up to a bound, and `output` or `time`
    if it had to be cut off there.
    """
    assert process.stdin and process.stdout and process.stderr
    pieces, end = [b"", b"", b""], ""
    with selectors.DefaultSelector() as selector:
        for i, fd in enumerate((process.stdout.fileno(), process.stderr.fileno(), report)):
            os.set_blocking(fd, False)
            selector.register(fd, selectors.EVENT_READ, i)
        os.set_blocking(process.stdin.fileno(), False)
        selector.register(process.stdin.fileno(), selectors.EVENT_WRITE, 3)
        job += b"\n"
        while any(key.data < 3 for key in selector.get_map().values()):
            if (left := deadline - time.monotonic()) < 0:
                return pieces, end or "time"
            for key, _ in selector.select(left):
                if key.data == 3:
                    job = _write(key.fd, job)
                    if not job:
                        selector.unregister(key.fd)
                    continue
                piece = os.read(key.fd, 1 << 16)
                if not piece:
                    selector.unregister(key.fd)
                    # With the report everything has ended that could still write.
                elif key.data == 2:
                    pieces[2] += piece
                elif len(pieces[key.data]) + len(piece) > most:
                    pieces[key.data] = (pieces[key.data] + piece)[:most]
                    return pieces, "output"
                else:
                    pieces[key.data] += piece
    return pieces, end


def _write(fd: int, job: bytes) -> bytes:
    """What of the job is left to write; nothing, if nobody reads it."""
    try:
        return job[os.write(fd, job) :]
    except BrokenPipeError:
        return b""


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe:
            pipe.close()
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _outcome(pieces: list[bytes], end: str, seconds: float) -> Outcome:
    stdout, stderr = (piece.decode("utf-8", "replace") for piece in pieces[:2])
    try:
        found = json.loads(pieces[2])
    except ValueError:
        found = {"end": end or "killed"}
    if found["end"] == "setup":
        raise OSError(f"the jail cannot be built: {found['why']}")
    said = found.get("said", "").encode("latin-1").decode("utf-8", "replace")
    kind = end or found["end"]
    return Outcome(kind, found.get("code"), stdout, stderr, said, seconds)
