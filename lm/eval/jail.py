"""Runs inside: a script in an interpreter of its own that builds the jail, starts the programs in
it, watches them and reports. `lm.eval.sandbox` starts it and is its only caller.

It is the first process of the new process namespace, so that everything the programs leave behind
dies with it, and it lets itself be killed by nothing that runs in there. It holds every right of
its user namespace and gives none of them on. Standard library only.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
from typing import Any, NoReturn

NOBODY = 65534
EVERY = 0.02  # seconds between two looks at the memory
VERDICT = 1 << 16  # bytes that a judge may say

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
MOUNT_SETATTR = 442

libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _prctl(option: int, value: Any, more: Any = 0) -> None:
    _check(libc.prctl(option, ctypes.c_ulong(value), more, 0, 0), f"prctl {option}")


def _mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    name = kind.encode() if kind else None
    result = libc.mount(
        source.encode(), target.encode(), name, ctypes.c_ulong(flags), data.encode() or None
    )
    _check(result, f"mount {kind or 'bind'} {source}")


def _read_only(path: str, devices: bool) -> None:
    """Also what is mounted below, which the old remount would leave writable."""
    flags = MS_RDONLY | MS_NOSUID | (0 if devices else MS_NODEV)
    attributes = (ctypes.c_uint64 * 4)(flags, 0, 0, 0)
    result = libc.syscall(
        MOUNT_SETATTR, AT_FDCWD, path.encode(), AT_RECURSIVE, attributes, ctypes.sizeof(attributes)
    )
    _check(result, f"mount_setattr {path}")


def enter(job: dict[str, Any]) -> bool:
    """Moves this process into a new user namespace, and its children into new namespaces for all
    the rest; returns whether NOBODY is a user of its own in there.
    """
    uid, gid, pid = os.geteuid(), os.getegid(), os.getpid()
    # Only the superuser of outside may give a namespace a second user, and only from outside.
    two = uid == 0 and job["own_user"]
    lines = f"0 {uid} 1\n{NOBODY} {NOBODY} 1\n" if two else f"{NOBODY} {{}} 1\n"
    ready, said = os.pipe(), os.pipe()
    helper = os.fork()
    if helper == 0:
        os.close(ready[1])
        os.read(ready[0], 1)
        try:
            if not two:
                _write(f"/proc/{pid}/setgroups", "deny")
            _write(f"/proc/{pid}/uid_map", lines.format(uid))
            _write(f"/proc/{pid}/gid_map", lines.format(gid))
            os.write(said[1], b"1")
        finally:
            os._exit(0)
    os.unshare(
        os.CLONE_NEWUSER
        | os.CLONE_NEWNS
        | os.CLONE_NEWPID
        | os.CLONE_NEWNET
        | os.CLONE_NEWIPC
        | os.CLONE_NEWUTS
    )
    os.close(said[1])
    os.write(ready[1], b"1")
    mapped = os.read(said[0], 1) == b"1"
    os.waitpid(helper, 0)
    for fd in (*ready, said[0]):
        os.close(fd)
    if not mapped:
        raise OSError("the users of a new namespace cannot be set")
    return two


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.write(fd, text.encode())
    os.close(fd)


def build_root(job: dict[str, Any]) -> int:
    """Makes the interpreter and an empty /tmp all that there is of the file system; returns an open
    /proc of the new process namespace, which has no name any more.
    """
    root = job["folder"]
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for path in job["show"]:
        _show(path, root + path)
    for name in ("null", "zero", "urandom"):
        _show(f"/dev/{name}", f"{root}/dev/{name}", devices=True)
    os.mkdir(f"{root}/tmp")
    size = f"size={job['disk']},nr_inodes=1024,mode=777"
    _mount("tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, size)
    os.mkdir(f"{root}/proc")
    _mount("proc", f"{root}/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    proc = os.open(f"{root}/proc", os.O_RDONLY | os.O_DIRECTORY)
    _check(libc.umount2(f"{root}/proc".encode(), MNT_DETACH), "umount proc")
    os.chdir(root)
    _check(libc.syscall(PIVOT_ROOT[os.uname().machine], b".", b"."), "pivot_root")
    _check(libc.umount2(b".", MNT_DETACH), "umount the old root")
    os.chdir("/")
    _mount("none", "/", None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir("/tmp")
    return proc


def _show(path: str, target: str, devices: bool = False) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    _mount(path, target, None, MS_BIND | MS_REC)
    _read_only(target, devices)


def start(job: dict[str, Any], source: str, fds: dict[int, int], group: int = 0) -> int:
    """Starts a program with nothing but the file descriptors `fds` (new: old); returns its pid."""
    script = _hidden(source)
    pid = os.fork()
    if pid:
        os.close(script)
        return pid
    try:
        # Far above all targets first, so that no dup2 closes what a later one needs.
        high = {new: _move(old) for new, old in {0: script, **fds}.items()}
        for new, old in high.items():
            os.dup2(old, new)
        os.closerange(max(high) + 1, 1 << 16)
        _become_nobody(job, group)
        python = job["python"]
        os.execve(python, [python, "-I", "-S", "-"], {"PYTHONDONTWRITEBYTECODE": "1"})
    except BaseException as error:
        os.write(2, f"cannot start: {error}\n".encode())
    finally:
        os._exit(127)


def _move(fd: int) -> int:
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_DUPFD, 200)


def _hidden(source: str) -> int:
    """A file without a name, which the other programs cannot open."""
    name = f"{os.getpid()}-{time.monotonic_ns()}"
    fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    os.unlink(name)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(source.encode("utf-8", "surrogatepass"))
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _become_nobody(job: dict[str, Any], group: int) -> None:
    """The limits; then the rights go, and can never come back."""
    os.setpgid(0, group)
    os.nice(10)
    limits = {
        "CPU": job["cpu_s"],
        "AS": job["memory"],
        "DATA": job["memory"],
        "FSIZE": job["file"],
        "NOFILE": job["open_files"],
        "NPROC": job["processes"],
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }
    if job["uid"] is not None:
        os.setgroups([])
        os.setresgid(job["uid"], job["uid"], job["uid"])
        os.setresuid(job["uid"], job["uid"], job["uid"])
    for name, value in limits.items():
        # A second between the soft and the hard limit: SIGXCPU, then SIGKILL.
        hard = value + 1 if name == "CPU" else value
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, hard))
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    if job["filter"]:
        code = ctypes.create_string_buffer(bytes.fromhex(job["filter"]))

        class Program(ctypes.Structure):
            _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_void_p)]

        program = Program(len(code) // 8, ctypes.addressof(code))
        _prctl(PR_SET_SECCOMP, 2, ctypes.byref(program))


def watch(job: dict[str, Any], main: int, verdict: int, memory: Any) -> dict[str, Any]:
    """Waits for the process `main`; returns how it ended and what came out of `verdict`.

    Ends everything before that when time or memory is used up, or when nobody waits any more.
    """
    deadline = time.monotonic() + job["wall_s"]
    watched = select.poll()
    handle = os.pidfd_open(main)
    for fd in (0, handle, verdict):
        watched.register(fd, select.POLLIN)
    said, overdrawn = b"", False
    while True:
        events = dict(watched.poll(EVERY * 1000))
        if verdict in events:
            piece = os.read(verdict, VERDICT)
            said += piece[: VERDICT - len(said)]
            if not piece:
                watched.unregister(verdict)
        if handle in events and verdict not in events:
            break
        if 0 in events and not os.read(0, 1):
            return {"end": "abandoned"}
        if time.monotonic() > deadline:
            return {"end": "time", "said": said.decode("latin-1")}
        if memory() > job["memory_total"]:
            return {"end": "memory", "said": said.decode("latin-1")}
        overdrawn |= _reap(main)
    _, status = os.waitpid(main, 0)
    code = os.waitstatus_to_exitcode(status)
    overdrawn |= _reap(0) or code == -signal.SIGXCPU
    end = "cpu" if overdrawn else "killed" if code == -signal.SIGKILL else "exit"
    return {"end": end, "code": code, "said": said.decode("latin-1")}


def _reap(main: int) -> bool:
    """Buries all that ended but `main`, so that they do not count as processes any more; returns
    whether one had used up its time.
    """
    overdrawn = False
    with contextlib.suppress(ChildProcessError):
        while found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if found.si_pid == main:
                break
            _, status = os.waitpid(found.si_pid, 0)
            overdrawn |= os.waitstatus_to_exitcode(status) == -signal.SIGXCPU
    return overdrawn


def resident(proc: int, group: int | None) -> int:
    """Bytes of memory that the processes hold: all but the first, or all of a group."""
    pages = 0
    for name in os.listdir(proc):
        if not name.isdigit() or name == "1":
            continue
        with contextlib.suppress(OSError):
            if group is not None and os.getpgid(int(name)) != group:
                continue
            fd = os.open(f"{name}/statm", os.O_RDONLY, dir_fd=proc)
            pages += int(os.read(fd, 200).split()[1])
            os.close(fd)
    return pages * resource.getpagesize()


def supervise(job: dict[str, Any], proc: int) -> dict[str, Any]:
    """Starts the program, and the judge if there is one, and waits for the one that matters."""
    verdict = os.pipe()
    group = None
    if job["judge"] is None:
        main = start(job, job["program"], {1: 1, 2: 2})
        group = main
    else:
        asked, answered, null = os.pipe(), os.pipe(), os.open("/dev/null", os.O_WRONLY)
        ends = {1: null, 2: null, 3: answered[0], 4: asked[1], 5: verdict[1]}
        main = start(job, job["judge"], ends)
        group = main
        with contextlib.suppress(OSError):
            os.setpgid(main, main)
        start(job, job["program"], {1: 1, 2: 2, 3: asked[0], 4: answered[1]}, group)
        for fd in (*asked, *answered, null):
            os.close(fd)
    os.close(verdict[1])
    # Whoever still reads our output waits for an end that only the programs should decide.
    for fd in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
    own = group if job["isolation"] == "limits" else None
    try:
        return watch(job, main, verdict[0], lambda: resident(proc, own))
    finally:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)


def count_of_user(uid: int) -> int:
    """Processes and threads of a user, which outside a namespace all count against its limit."""
    found = 0
    for name in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == uid:
                found += len(os.listdir(f"/proc/{name}/task"))
    return found


def prepare(job: dict[str, Any]) -> int:
    """All that comes before the first program; returns an open /proc."""
    _prctl(PR_SET_DUMPABLE, 0)
    # A handler of its own would make the first process of a namespace killable by its children.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if job["isolation"] == "namespaces":
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        proc = build_root(job)
        job["processes"] += 2  # itself and who waits for it
    else:
        proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
        os.chdir(job["folder"])
        job["processes"] += count_of_user(os.geteuid() if job["uid"] is None else job["uid"])
    return proc


def main(report: int) -> NoReturn:
    """Reads a job from the first line of stdin and writes one JSON object to the file `report`."""
    os.set_inheritable(report, False)
    found: dict[str, Any]
    try:
        job = json.loads(_line())
        with contextlib.suppress(OSError):
            _write("/proc/self/oom_score_adj", "1000")
        if job["isolation"] == "namespaces":
            if not enter(job):
                job["uid"] = None
            first = os.fork()
            if first:
                for fd in (0, 1, 2, report):
                    os.close(fd)
                os.waitpid(first, 0)
                os._exit(0)
        proc = prepare(job)
        found = supervise(job, proc)
    except BaseException as error:
        found = {"end": "setup", "why": f"{type(error).__name__}: {error}"}
    os.write(report, json.dumps(found).encode())
    os._exit(0)


def _line() -> bytes:
    """Not buffered: what follows the line is not ours to read yet."""
    pieces: list[bytes] = []
    while not (pieces and pieces[-1].endswith(b"\n")):
        piece = os.read(0, 1 << 16)
        if not piece:
            raise EOFError("no job came")
        pieces.append(piece)
    return b"".join(pieces)


if __name__ == "__main__":
    main(int(sys.argv[1]))
