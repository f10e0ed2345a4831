"""The run directory: the truth of a study, as plain files that survive being killed at any moment.

A file is written whole or not at all (`write_bytes`: temporary file, fsync, rename, fsync of the
folder). Rows and events are appended as JSON lines, each with a CRC-32, by one writer
(`JsonLines`). Folders are sealed with a manifest of sizes and SHA-256 hashes (`make_manifest`),
because a flipped bit in a stored array is otherwise loaded in silence. Who works on what is said
by `flock` locks, which die with their process and so never have to be cleaned up.

Standard library only.
"""

import contextlib
import copy
import errno
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import secrets
import socket
import subprocess
import time
import zlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lm.config import UserError

MANIFEST = "manifest.json"
LARGEST = 1 << 30  # bytes of a JSON file: the study.json of 10,000 cells has about a tenth of it
PACKAGES = (
    *("onset-lm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "array-record"),
    *("tensorflow-datasets", "sentencepiece", "numpy", "scipy", "pandas", "pyarrow", "altair"),
)

UNKNOWN: dict[str, Any] = {"host": "an unknown host", "pid": "?", "started": "?", "what": "?"}

type AnyPath = str | os.PathLike[str]


class Held(UserError):
    """Another live process holds the lock; the message names it."""


def write_bytes(path: AnyPath, data: bytes) -> None:
    """Puts `data` at `path` whole or not at all, and on the disk before it returns."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        # After a full disk the space must come back, or the retry fails as well.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def write_json(path: AnyPath, obj: Any) -> None:
    """Writes `obj` as indented JSON, atomically; NaN and infinity become null."""
    text = json.dumps(_no_nan(obj), indent=2, allow_nan=False)
    write_bytes(path, text.encode() + b"\n")


def read_json(path: AnyPath) -> Any:
    """What `write_json` wrote; raises `UserError` where the file is not JSON any more, or larger
    than any that we write.
    """
    try:
        if (size := os.stat(path).st_size) > LARGEST:
            raise ValueError(f"it has {size} bytes")
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error}); restore it or remove its folder") from error


def sha256(path: AnyPath) -> str:
    """The hex SHA-256 of a file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_manifest(folder: AnyPath) -> dict[str, Any]:
    """`{"files": {name: {"bytes", "sha256"}}}` of all files below `folder` but its own manifest."""
    folder = Path(folder)
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name != MANIFEST:
            files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return {"files": files}


def check_manifest(folder: AnyPath, manifest: Mapping[str, Any]) -> list[str]:
    """One sentence for every file that is missing, has another size, or has other bytes."""
    folder, problems = Path(folder), []
    try:
        files = {
            name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()
        }
    except (AttributeError, KeyError, TypeError):
        return [f"the manifest of {folder} is damaged"]
    if not files:
        return [f"the manifest of {folder} lists no files"]
    if outside := [name for name in files if name[:1] == "/" or ".." in name.split("/")]:
        return [f"the manifest of {folder} names {outside[0]!r}, which is not in the folder"]
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
            continue
        if (found := path.stat().st_size) != size:
            what = "truncated" if found < size else "longer than it was"
            problems.append(f"{path} is {what}: {found} bytes, {size} in the manifest")
        elif sha256(path) != digest:
            problems.append(f"{path} has changed: its SHA-256 is not the one in the manifest")
    return problems


class JsonLines:
    """An append-only file of JSON lines with a CRC each; one writer at a time.

    Opening it drops a torn last line; `torn` is the number of bytes that were dropped.
    """

    def __init__(self, path: AnyPath) -> None:
        self.path = Path(path)
        new = not self.path.exists()
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self.torn = self._drop_torn_tail()
        if new:
            _sync_folder(self.path.parent)

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one record by one write; if it fails, no part of it stays and OSError is raised."""
        line = encode_line(record)
        end = os.fstat(self._fd).st_size
        try:
            written = os.write(self._fd, line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except BaseException as error:
            os.ftruncate(self._fd, end)
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            raise

    def sync(self) -> None:
        """Returns when everything appended is on the disk."""
        os.fsync(self._fd)

    def close(self) -> None:
        """Syncs and closes; a second call does nothing."""
        if self._fd >= 0:
            try:
                os.fsync(self._fd)
            finally:
                os.close(self._fd)
                self._fd = -1

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _drop_torn_tail(self) -> int:
        size = end = os.fstat(self._fd).st_size
        step = 1 << 16
        while end > 0:
            start = max(0, end - step)
            newline = os.pread(self._fd, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end < size:
            os.ftruncate(self._fd, end)
            os.fsync(self._fd)
        return size - end


def encode_line(record: Mapping[str, Any]) -> bytes:
    """One line: the record's JSON with the CRC-32 of that JSON as its last field, and a newline."""
    if not record or "crc" in record:
        raise ValueError("a record needs at least one field, and none called 'crc'")
    body = json.dumps(_no_nan(record), separators=(",", ":"), allow_nan=False).encode()
    return body[:-1] + b',"crc":"%08x"}\n' % zlib.crc32(body)


def good_lines(path: AnyPath) -> tuple[list[bytes], list[str]]:
    """The lines of a file of JSON lines, without their newlines, and one sentence for every line
    that fails its CRC.

    A last line without a newline is torn or still being written, and is left out. A file that is
    not there has no lines.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return [], []
    good, problems = [], []
    for number, line in enumerate(lines, 1):
        # 18 bytes are the comma, the field and the brace: without them, the brace is missing.
        crc = zlib.crc32(b"}", zlib.crc32(memoryview(line)[:-18]))
        if line[-18:] == b',"crc":"%08x"}' % crc:
            good.append(line)
        else:
            problems.append(f"{path} line {number} fails its checksum")
    return good, problems


def read_lines(path: AnyPath) -> tuple[list[dict[str, Any]], list[str]]:
    """All records of a file of JSON lines, without their CRC, and the sentences of `good_lines`."""
    lines, problems = good_lines(path)
    records = []
    for line in lines:
        try:
            records.append(json.loads(line[:-18] + b"}"))
        except RecursionError:  # not ours, whatever its checksum says
            problems.append(f"{path} has a line that is nested too deeply")
    return records, problems


def inside(workdir: AnyPath, name: str) -> Path:
    """The folder `name` of a workdir; raises `UserError` where the name is a path, or the folder a
    link that may lead out of the workdir.
    """
    path = Path(workdir) / name
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise UserError(f"{name!r} is no name of a cell; restore {Path(workdir) / 'study.json'}")
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link; put the folder itself there")
    return path


@contextlib.contextmanager
def lock(path: AnyPath, what: str) -> Iterator[None]:
    """Holds an exclusive lock on `path` while the block runs; `what` says for whom, in words.

    The lock dies with the process. Raises `Held` if another process has it.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if not try_lock(fd):
            raise Held(held_sentence(path, read_owner(fd)))
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "started": now(), "what": what}
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps(owner).encode() + b"\n", 0)
        yield
        os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def holder(path: AnyPath) -> dict[str, Any] | None:
    """Who holds the lock now (`host`, `pid`, `started`, `what`), or None; for looking only."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return read_owner(fd)
    finally:
        os.close(fd)
    return None


def cache_folder(name: str) -> Path:
    """Where programs and kernels are kept between runs: below ONSET_CACHE or ~/.cache/onset."""
    folder = os.path.expanduser(os.environ.get("ONSET_CACHE") or "~/.cache/onset")
    # A user without a home has no cache: nothing can be made below this file.
    return Path(os.devnull if folder.startswith("~") else folder) / name


def now() -> str:
    """The time as ISO 8601 in UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def environment() -> dict[str, Any]:
    """What can change a bit of the result; imports none of the packages whose version it gives."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "nproc": os.environ.get("NPROC"),
        "xla_flags": os.environ.get("XLA_FLAGS"),
        "jax_platforms": os.environ.get("JAX_PLATFORMS"),
        **copy.deepcopy(_installed()),
    }


# Once a process: what it has loaded does not change with the checkout, and two calls of git are a
# tenth of a second, which a study of short cells would pay for each.
@functools.cache
def _installed() -> dict[str, Any]:
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {**_git(Path(__file__).resolve().parents[1]), "versions": versions}


def _git(root: Path) -> dict[str, Any]:
    """Commit and dirtiness of the checkout this package lies in; never of a folder further up."""
    unknown = {"git_commit": None, "git_dirty": None}
    if not (root / ".git").exists():
        return unknown
    try:
        commit = _git_line(root, "rev-parse", "HEAD").strip()
        return {"git_commit": commit, "git_dirty": bool(_git_line(root, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return unknown


def _git_line(root: Path, *args: str) -> str:
    command = ["git", "-C", str(root), *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    return done.stdout


def try_lock(fd: int) -> bool:
    """Whether the open file is now locked by this process alone."""
    # `holder` takes a shared lock for an instant: one failed try is no proof of an owner.
    for attempt in range(4):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05 * (attempt < 3))
    return False


def read_owner(fd: int) -> dict[str, Any]:
    """What the holder of a lock has written into it; "unknown" and "?" for what is not there."""
    try:
        owner = json.loads(os.pread(fd, 4096, 0))
    except ValueError:  # the owner has the lock but has not yet written its name
        owner = {}
    return UNKNOWN | (owner if isinstance(owner, dict) else {})


def held_sentence(path: AnyPath, owner: Mapping[str, Any]) -> str:
    """Who holds what, and what to do about it."""
    owner = UNKNOWN | dict(owner)
    return (
        f"{path} is held by pid {owner['pid']} on {owner['host']} since {owner['started']} "
        f"({owner['what']}); wait until it ends or stop it, then give the same command again"
    )


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _no_nan(obj: Any) -> Any:
    """JSON has no NaN and no infinity: null stands for them, and the record says why elsewhere."""
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, Mapping):
        return {key: _no_nan(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_no_nan(value) for value in obj]
    return obj
