"""Who may write into a cell: leases with fencing tokens, beside the lock.

A `flock` dies with its process, and on one machine that is nearly all one needs. It says nothing of
a holder that is stopped and later goes on, and little, on some shared file systems, of another
machine's. So whoever takes a cell also creates `leases/TOKEN.json`, TOKEN being one more than the
largest there is. Creating is exclusive on every file system: one taker wins. From then on the
holder before is rejected, since every commit first asks whether a larger token is there (`check`).
A thread counts `beat` up in the holder's own file and in no other, so a holder that comes back from
the dead cannot overwrite the mark of who came after.

A cell is taken over if its lock is free and its last holder is provably dead (same machine, no such
process with that start time), or if that holder's file did not change for `EXPIRES` seconds of the
taker's own monotonic clock (`Watch`). No clock is compared with that of another machine.

Between a check and the write that it allows a holder can still be stopped. What it then writes are
the bits that its successor writes: training is deterministic, rows have an identity.

Standard library only.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lm.rundir import Held, held_sentence, holder, now, read_owner, try_lock

BEAT = 5.0  # seconds
# Of silence: far more than a thread that beats waits for a busy disk or the interpreter's lock.
EXPIRES = float(os.environ.get("ONSET_LEASE") or 60)
COMMAND = "ONSET_COMMAND"  # which command of which launcher this process carries out


class Lost(Exception):
    """Somebody else has taken the cell over; nothing more may be written into it."""


class Lease:
    """The right to write into a cell, held by this process under `token`."""

    def __init__(self, folder: Path, token: int, previous: dict[str, Any] | None) -> None:
        self.token, self.previous = token, previous
        self.ended = "error"  # what the file says in the end; the holder sets it
        self.on_beat: Callable[[], None] = lambda: None
        self._folder = folder
        self._next = str(_path(folder, token + 1))
        self._record = {"token": token, **_me(), "taken": now(), "beat": 0, "ended": None}
        fd = os.open(_path(folder, token), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
        self._fd = fd
        self._write()

    def check(self) -> None:
        """Raises `Lost` if the cell has been taken over; one look at the file system."""
        if os.path.exists(self._next):
            by = newest(self._folder) or {}
            raise Lost(
                f"{self._folder.name} was taken over by pid {by.get('pid')} on {by.get('host')},"
                f" since lease {self.token} had shown no sign of life; nothing more is written"
            )

    def beat(self) -> None:
        """Shows that the holder lives."""
        self._record["beat"] += 1
        self._write()

    def end(self) -> None:
        """Says how it ended; a second call does nothing."""
        if self._fd >= 0:
            self._record["ended"] = self.ended
            self._write()
            os.close(self._fd)
            self._fd = -1

    def _write(self) -> None:
        # In place and never shorter, so that a full disk cannot stop it.
        with contextlib.suppress(OSError):
            os.pwrite(self._fd, json.dumps(self._record).encode().ljust(511) + b"\n", 0)


class Watch:
    """What an observer has seen of other people's leases, by its own monotonic clock."""

    def __init__(self, expires: float | None = None) -> None:
        self.expires = EXPIRES if expires is None else expires
        self._seen: dict[Path, tuple[bytes, float, float]] = {}

    def silent(self, folder: Path) -> float:
        """Seconds for which the newest lease has not changed, as far as this observer knows."""
        text, tick = _newest_text(folder), time.monotonic()
        before, since, last = self._seen.get(folder, (b"", tick, tick))
        # An observer that was itself asleep knows nothing of the time in between.
        if text != before or tick - last > max(1.0, self.expires / 2):
            since = tick
        self._seen[folder] = text, since, tick
        return tick - since

    def expired(self, folder: Path) -> bool:
        """Whether there is a lease, not ended, that has been silent for too long."""
        silent = self.silent(folder)
        return silent >= self.expires and newest(folder) is not None


@contextlib.contextmanager
def lease(folder: Path, what: str, watch: Watch | None = None) -> Iterator[Lease]:
    """Holds lock and lease of a cell while the block runs; a thread beats, and then calls the
    lease's `on_beat`. Raises `Held` if somebody else has the cell, or may have it.
    """
    with contextlib.ExitStack() as stack:
        fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        stack.callback(lambda: os.close(fd))
        free = try_lock(fd) and _same_file(fd, folder / "lock")
        last = newest(folder)
        safe = free and (last is None or last.get("ended") or dead(last))
        if not safe and (watch is None or not watch.expired(folder)):
            owner = (last or {}) | ({} if free else read_owner(fd))
            raise Held(held_sentence(folder / "lock", owner))
        (folder / "leases").mkdir(exist_ok=True)
        try:
            held = Lease(folder, _largest(folder) + 1, last)
        except FileExistsError:  # somebody was faster, and has not written down who
            raise Held(held_sentence(folder / "lock", newest(folder) or {})) from None
        stack.callback(held.end)
        if not free:
            fd = _new_lock(folder, fd)
        owner = {key: held._record[key] for key in ("host", "pid")}
        owner |= {"started": held._record["taken"], "what": what}
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(owner).encode() + b"\n", 0)
        stop = threading.Event()
        thread = threading.Thread(target=_beat, args=(held, stop), daemon=True)
        thread.start()
        try:
            yield held
        finally:
            stop.set()
            if _same_file(fd, folder / "lock"):
                os.ftruncate(fd, 0)


def newest(folder: Path) -> dict[str, Any] | None:
    """The record of the newest lease; empty if it cannot be read yet, None if there is none."""
    text = _newest_text(folder)
    try:
        record = json.loads(text)
    except ValueError:
        return {} if _largest(folder) else None
    return record if isinstance(record, dict) else {}


def dead(record: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is no more."""
    me = _me()
    if any(record.get(key) != me[key] for key in ("host", "boot")):
        return False
    # A lock that is free is not held by another thread of this very process.
    same = record.get("pid") == me["pid"] and record.get("start") == me["start"]
    return same or _start(record.get("pid")) != record.get("start")


def close_dead(folder: Path, command: str, ended: str) -> dict[str, Any] | None:
    """Writes how the newest lease ended, if `command` held it and nobody holds the cell any more;
    gives the record, as it was, to the one caller that did.
    """
    record = newest(folder)
    if not record or record.get("command") != command or record.get("ended"):
        return None
    if holder(folder / "lock"):
        return None
    path = _path(folder, record["token"])
    with contextlib.suppress(OSError), open(path, "r+b") as file:
        file.write(json.dumps(record | {"ended": ended}).encode().ljust(511) + b"\n")
    return record


def _beat(held: Lease, stop: threading.Event) -> None:
    while not stop.wait(min(BEAT, EXPIRES / 6)):
        held.beat()
        held.on_beat()


def _new_lock(folder: Path, old: int) -> int:
    """A lock file in the place of one that a silent process holds; only the winner of the token
    comes here. The descriptor takes the number of the old one.
    """
    temporary = folder / f".lock.{os.getpid()}.tmp"
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.replace(temporary, folder / "lock")
    os.dup2(fd, old, inheritable=False)
    os.close(fd)
    return old


def _same_file(fd: int, path: Path) -> bool:
    """Whether the open file is still the one at `path`, which a taker may have replaced."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False


def _me() -> dict[str, Any]:
    """This process, so that another one can tell whether it still is."""
    return {
        "host": socket.gethostname(),
        "boot": _boot(),
        "pid": os.getpid(),
        "start": _start(os.getpid()),
        "command": os.environ.get(COMMAND, ""),
    }


def _boot() -> str:
    """Since when, and in which container, process numbers mean what they do here."""
    found = []
    with contextlib.suppress(OSError):
        found = [Path("/proc/sys/kernel/random/boot_id").read_text().strip()]
        found.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(found)


def _start(pid: Any) -> str:
    """The kernel's start time of a process, empty if it has ended."""
    try:
        fields = Path(f"/proc/{int(pid)}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, ValueError, TypeError):
        return ""
    return "" if fields[0] == "Z" else fields[19]


def _path(folder: Path, token: int) -> Path:
    return folder / "leases" / f"{token}.json"


def _largest(folder: Path) -> int:
    try:
        names = os.listdir(folder / "leases")
    except FileNotFoundError:
        return 0
    return max((int(n[:-5]) for n in names if n.endswith(".json") and n[:-5].isdigit()), default=0)


def _newest_text(folder: Path) -> bytes:
    token = _largest(folder)
    try:
        return _path(folder, token).read_bytes() if token else b""
    except OSError:
        return b""
