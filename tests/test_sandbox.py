"""Programs that mean harm: each is contained, and says or leaves behind nothing that it should not.

They run as on this machine, and again as an unprivileged user where the tests run as root. Where
there are no user namespaces, they are left out and the reason is said.
"""

import dataclasses
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm.config import UserError
from lm.eval import sandbox
from lm.eval.sandbox import Limits, run

WHY = sandbox.why_not("namespaces")
pytestmark = pytest.mark.skipif(bool(WHY), reason=f"no namespaces: {WHY}")
QUICK = Limits(wall_s=2.0, cpu_s=1, memory=256 << 20, memory_total=256 << 20, processes=8)
PATIENT = dataclasses.replace(QUICK, wall_s=60.0)  # for what ends by something else than the clock
ROOT = Path(__file__).parents[1]


def alive(marker: str) -> list[str]:
    """The processes of this machine that have a word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def test_an_ordinary_program_runs():
    outcome = run("import sys, math; print(math.pi); print('no', file=sys.stderr); sys.exit(3)")
    assert (outcome.end, outcome.code) == ("exit", 3)
    assert outcome.stdout == "3.141592653589793\n" and outcome.stderr == "no\n"
    assert outcome.said == ""


# Each ends by what is named, whatever else it does.
ENDINGS = {
    "an infinite loop": ("while True: pass", "cpu"),
    "sleep": ("import time; time.sleep(100)", "time"),
    "signals ignored": (
        "import signal, time\n"
        "for s in range(1, 65):\n"
        "    if s not in (9, 19, 32, 33): signal.signal(s, signal.SIG_IGN)\n"
        "end = time.monotonic() + 60\n"
        "while time.monotonic() < end: pass",
        "killed",  # by the hard limit on processor time, a second after the soft one
    ),
    "infinite output": ("while True: print('x' * 1000)", "output"),
    "infinite errors": ("import os\nwhile True: os.write(2, b'x' * 1000)", "output"),
    "many that hold memory": (
        "import os, time\n"
        "for _ in range(6):\n"
        "    if not os.fork(): break\n"
        "x = b'x' * (100 << 20); time.sleep(60)",
        "memory",
    ),
    "shared memory": (
        "import mmap, os, time\n"
        "for _ in range(6):\n"
        "    if not os.fork(): break\n"
        "m = mmap.mmap(-1, 100 << 20)\n"
        "for i in range(0, len(m), 4096): m[i] = 1\n"
        "time.sleep(60)",
        "memory",
    ),
    "a fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "time"),
    "a killed program": ("import os; os.fork(); os.kill(os.getpid(), 9)", "killed"),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_what_never_ends_is_ended(name):
    program, end = ENDINGS[name]
    limits = QUICK if end == "time" else PATIENT
    outcome = run(program, limits)
    assert outcome.end == end, outcome
    assert outcome.seconds < limits.wall_s + sandbox.GRACE
    assert len(outcome.stdout) <= QUICK.output


def test_threads_and_processes_are_counted_together():
    program = """
import os, threading, time
count = 0
try:
    while True:
        if os.fork() == 0: time.sleep(60)
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); count += 2
except (OSError, RuntimeError): print(count, flush=True)
os._exit(0)
"""
    # So much memory that it is not what ends it.
    outcome = run(program, Limits(processes=8, memory=1 << 34))
    assert outcome.end == "exit" and 4 <= int(outcome.stdout) <= 10, outcome


# Each prints `no: ` and the reason why it could not; anything else is a hole.
TRIES = {
    "10 GB": "b'x' * (10 << 30)",
    "a huge list": "[0] * (1 << 31)",
    "system V memory": "assert libc.shmget(0, 1 << 30, 0o1600) >= 0, 'refused'",
    "a memory file": "os.memfd_create('x')",
    "a TCP socket": "socket.socket()",
    "a UDP socket": "socket.socket(type=socket.SOCK_DGRAM)",
    "a local socket": "socket.socket(socket.AF_UNIX)",
    "a raw socket": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "a socket to the host of a virtual machine": "socket.socket(socket.AF_VSOCK)",
    "new namespaces": "os.unshare(os.CLONE_NEWUSER)",
    "a clone in new namespaces": "assert libc.syscall(NR, 0x10000011, 0, 0, 0, 0) >= 0, 'refused'",
    "a mount": "assert libc.mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0, 'refused'",
    "tracing the first process": "assert libc.ptrace(16, 1, 0, 0) == 0, 'refused'",
    "being root again": "os.setuid(0)",
    "another group": "os.setgroups([0])",
    "its own interpreter": "open(sys.executable, 'ab')",
    "the standard library": "open(os.__file__, 'a')",
    "a file beside the root": "open('/x', 'w')",
    "the devices": "open('/dev/vda', 'rb')",
    "the device of memory": "os.mknod('/tmp/mem', 0o20600, os.makedev(1, 1))",
    "the users": "open('/etc/passwd')",
    "what was above before": "open('../etc/passwd')",
    "the processes": "os.listdir('/proc/1')",
    "higher limits": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1))",
    "a higher priority": "os.nice(-20)",
    "a shell": "os.execv('/bin/sh', ['sh', '-c', 'echo shell'])",
    "a full disk": "[open(f'/tmp/{i}', 'wb').write(bytes(4 << 20)) for i in range(100)]",
    "a large file": "open('/tmp/x', 'wb').write(bytes(100 << 20))",
    "a large hole": "open('/tmp/x', 'wb').truncate(100 << 20)",
    "a million files": "[open(f'/tmp/{i}', 'x').close() for i in range(1000000)]",
    "many open files": "[os.dup(0) for i in range(1000)]",
    "a core dump": "resource.setrlimit(resource.RLIMIT_CORE, (1, 1))",
    "what it is given": "assert sys.stdin.read(), 'nothing'",
}
FRAME = """
import ctypes, os, resource, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
NR = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
for name, line in %r.items():
    if os.fork() == 0:
        try:
            exec(line)
            print(name, "yes", flush=True)
        except BaseException as error:
            print(name, "no:", repr(error)[:80], flush=True)
        os._exit(0)
    os.wait()
    for file in os.listdir("/tmp"): os.unlink(f"/tmp/{file}")
"""


@pytest.fixture(scope="module")
def tried() -> dict[str, str]:
    """What became of every try; all are made in one jail, each in a process of its own."""
    limits = Limits(wall_s=60, memory=512 << 20, memory_total=512 << 20)
    outcome = run(FRAME % TRIES, limits)
    assert outcome.end == "exit" and outcome.code == 0, outcome
    lines = outcome.stdout.splitlines()
    return {name: line for name in TRIES for line in lines if line.startswith(f"{name} ")}


@pytest.mark.parametrize("name", TRIES)
def test_it_is_refused(name, tried):
    assert tried[name].startswith(f"{name} no:"), tried[name]


def test_files_outside_are_out_of_reach(tmp_path):
    """Catches a file system that is only hidden by rights: the superuser has all of them."""
    canary, secret = tmp_path / "canary", tmp_path / "secret"
    canary.write_text("sings")
    secret.write_text("s3cret")
    secret.chmod(0o600)
    program = f"""
import os, shutil
for path in {[str(p) for p in (canary, secret, ROOT / "lm")]!r}:
    for action in (os.unlink, shutil.rmtree, os.listdir, lambda p: print(open(p).read())):
        try: action(path)
        except OSError: pass
        else: print("hole", action, path)
for folder in ("/root", "/home", "/etc", "/var", "/work", "/tmp", "/proc", "/sys", "/dev"):
    if os.path.isdir(folder): print(folder, sorted(os.listdir(folder)))
"""
    outcome = run(program)
    assert "hole" not in outcome.stdout and "s3cret" not in outcome.stdout, outcome
    seen = dict(line.split(" ", 1) for line in outcome.stdout.splitlines())
    assert seen["/tmp"] == seen["/proc"] == "[]" and "/sys" not in seen
    assert seen["/dev"] == "['null', 'urandom', 'zero']" and seen["/etc"] == "['ld.so.cache']"
    assert canary.read_text() == "sings" and (ROOT / "lm").is_dir()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["canary", "secret"]


def test_nothing_of_the_environment_is_handed_on(monkeypatch):
    monkeypatch.setenv("ONSET_CANARY", "s3cret")
    outcome = run("import os, sys; print(dict(os.environ), sys.argv, os.getcwd())")
    assert "s3cret" not in outcome.stdout and "PATH" not in outcome.stdout
    assert outcome.stdout.endswith("['-'] /tmp\n")


def test_a_listener_of_this_machine_cannot_be_reached(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as local:
        local.bind(path := str(tmp_path / "socket"))
        local.listen()
        # Without the filter too: a pair of sockets may be had, and there is no network behind it.
        program = f"""
import socket
a, b = socket.socketpair()
for kind, address in (2, ("127.0.0.1", {tcp.getsockname()[1]})), (1, {path!r}):
    try: socket.socket(kind).connect(address)
    except OSError as error: print("no ", type(error))
    try: a.connect(address)
    except (OSError, TypeError) as error: print("no ", type(error))
"""
        outcome = run(program)
        assert outcome.stdout.count("no ") == 4, outcome
        for listener in (tcp, local):
            listener.settimeout(0.05)
            with pytest.raises(TimeoutError):
                listener.accept()


def test_namespaces_hold_without_the_filter(monkeypatch):
    """Each of the two has to be enough for the network and for what is to be seen."""
    monkeypatch.setattr(sandbox.seccomp, "program", lambda signals: b"")
    with socket.create_server(("127.0.0.1", 0)) as server:
        name = f"onset-{os.getpid()}"
        with socket.socket(socket.AF_UNIX) as abstract:
            abstract.bind(f"\0{name}")
            abstract.listen()
            program = f"""
import ctypes, os, socket
for kind, address in (2, ("127.0.0.1", {server.getsockname()[1]})), (1, "\\0{name}"):
    try: socket.socket(kind).connect(address)
    except OSError as error: print("no", error.errno)
print(ctypes.CDLL(None).mount(b"none", b"/tmp", b"tmpfs", 0, None), os.listdir("/"))
"""
            lines = run(program).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["no", "no", "-1"], lines


def test_what_runs_away_dies_with_the_run():
    """Two forks and a session of its own, with and without an end of the program itself."""
    marker = f"runaway{os.getpid()}"
    away = f"""
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(10):
            try: os.close(fd)
            except OSError: pass
        os.execv(sys.executable, ["python", "-c", "import time; time.sleep(99) #{marker}"])
    os._exit(0)
time.sleep(0.3)
"""
    assert run(away, PATIENT).end == "exit"
    assert run(away + "time.sleep(99)", QUICK).end == "time"
    assert alive(marker) == []


def test_the_run_dies_with_its_owner(tmp_path):
    """A killed evaluation leaves nothing behind that goes on."""
    marker = f"orphan{os.getpid()}"
    sleep = f"import time; time.sleep(99) #{marker}"
    program = f"import os, sys; os.execv(sys.executable, ['python', '-c', {sleep!r}])"
    code = f"from lm.eval.sandbox import run, Limits; run({program!r}, Limits(wall_s=60))"
    # The folder on which the jail was built, an empty one, is all that stays.
    env = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=env) as process:
        deadline = time.monotonic() + 20
        while not (found := [p for p in alive(marker) if p != str(process.pid)]):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.kill()
        process.wait()
        while alive(marker) and time.monotonic() < deadline:
            time.sleep(0.05)
    assert found and alive(marker) == []
    assert [list(path.iterdir()) for path in tmp_path.iterdir()] == [[]]


@pytest.mark.parametrize(
    "target",
    ["os.getppid()", "1", str(os.getpid()), str(os.getppid())],
    ids=["its parent", "the first", "the tests", "who tests"],  # numbers differ between workers
)
def test_neither_the_jail_nor_its_owner_can_be_killed(target):
    program = f"""
import os, signal
for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP, signal.SIGINT):
    try: os.kill({target}, number)
    except OSError: pass
print("still here")
"""
    outcome = run(program)
    assert (outcome.end, outcome.stdout) == ("exit", "still here\n")


def test_deep_recursion_and_large_tracebacks_stay_small():
    deep = "import sys; sys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1) + 1\nf(0)"
    outcome = run(deep, PATIENT)
    assert outcome.end != "output" and outcome.code != 0
    wide = "def f(x):\n    raise ValueError('y' * (1 << 20))\nf(0)"
    outcome = run(wide, PATIENT)
    assert outcome.end == "output" and len(outcome.stderr) == QUICK.output


def test_a_judge_is_heard_and_the_program_is_not():
    judge = "import os; os.write(4, b'ask'); os.write(5, os.read(3, 100).upper())"
    program = "import os; print('5'); os.read(3, 3); os.write(4, b'answer')"
    outcome = run(program, judge=judge)
    assert (outcome.said, outcome.end, outcome.stdout) == ("ANSWER", "exit", "5\n")
    loud = """
import os
for fd in range(3, 64):
    try: os.write(fd, b"passed")
    except OSError: pass
"""
    outcome = run(loud, judge="import os; os.read(3, 1)")
    assert outcome.said == ""


def test_all_but_tmp_is_mounted_read_only():
    """Whose files they are does not matter: the interpreter may belong to who runs it."""
    program = """
import os, sys
for path in ("/", "/dev", "/usr/lib", "/tmp", *sys.path):
    if os.path.isdir(path): print(path, bool(os.statvfs(path).f_flag & os.ST_RDONLY))
"""
    found = dict(line.split() for line in run(program).stdout.splitlines())
    assert found.pop("/tmp") == "False" and set(found.values()) == {"True"} and len(found) > 4


def test_no_folder_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run("open('x', 'w').write('y')").code == 0
    assert list(tmp_path.iterdir()) == []


def test_limits_that_make_no_sense_are_refused():
    for setting in ({"wall_s": 0}, {"cpu_s": 0}, {"memory": 1}, {"open_files": 3}, {"output": 0}):
        with pytest.raises(UserError, match=next(iter(setting))):
            Limits(**setting)


def test_without_namespaces_it_is_refused_and_says_what_remains(monkeypatch):
    monkeypatch.setattr(sandbox, "why_not", lambda i: "none" if i == "namespaces" else "")
    with pytest.raises(UserError, match="isolation=limits"):
        run("print(1)")
    monkeypatch.setattr(sandbox.seccomp.platform, "machine", lambda: "riscv64")
    assert not sandbox.seccomp.supported()


NO_LIMITS = sandbox.why_not("limits")


@pytest.mark.skipif(bool(NO_LIMITS), reason=f"no limits: {NO_LIMITS}")
def test_limits_alone_end_what_never_ends(tmp_path):
    """What they promise: resources, signals, sockets, and nothing that outlives the run."""
    marker = f"limits{os.getpid()}"
    escape = f"""
import os, signal, socket, sys
for action in (os.setsid, lambda: os.setpgid(0, 0), lambda: os.kill({os.getpid()}, 0),
               lambda: os.kill(os.getppid(), signal.SIGKILL), socket.socket):
    try: action(); print("hole", action)
    except PermissionError: pass
print(dict(os.environ), os.listdir("."))
if os.fork() == 0:
    if os.fork(): os._exit(0)
    os.execv(sys.executable, ["python", "-c", "import time; time.sleep(99) #{marker}"])
"""
    outcome = run(escape, PATIENT, "limits")
    assert outcome.end == "exit" and "hole" not in outcome.stdout, outcome
    assert "HOME" not in outcome.stdout and outcome.stdout.endswith("[]\n")
    assert alive(marker) == []
    for name in ("a fork bomb", "many that hold memory", "infinite output", "sleep"):
        program, end = ENDINGS[name]
        limits = QUICK if end == "time" else PATIENT
        assert run(program, limits, "limits").end == end
    assert "MemoryError" in run("b'x' * (10 << 30)", PATIENT, "limits").stderr


def test_what_there_is_is_explained():
    lines = sandbox.explain().splitlines()
    assert lines[0] == "namespaces: yes" and platform.machine() in lines[2]


@pytest.mark.skipif(os.geteuid() != 0, reason="these tests run as an unprivileged user as it is")
def test_an_unprivileged_user_is_contained_as_well():
    """The same tests once more in a mount namespace where the interpreter may be read by all."""
    if not shutil.which("setpriv") or subprocess.run(["unshare", "-m", "true"]).returncode:
        pytest.skip("there is no setpriv, or no mount namespace for this user")
    prefix = os.path.realpath(sys.base_prefix)
    top = "/" + prefix.split("/")[1]
    script = f"""
set -e
keep=$(mktemp -d); mount --bind {prefix} $keep
mount -t tmpfs -o mode=755 none {top}; mkdir -p {prefix}; mount --bind $keep {prefix}
umount $keep; rmdir $keep; export TMPDIR=$(mktemp -d); chmod 777 $TMPDIR
trap 'rm -rf $TMPDIR' EXIT
setpriv --reuid=4321 --regid=4321 --clear-groups --inh-caps=-all --bounding-set=-all \\
  env HOME=$TMPDIR PYTHONDONTWRITEBYTECODE=1 ONSET_TEST_CACHE=$TMPDIR/cache {sys.executable} \\
  -m pytest -q -x -p no:cacheprovider -p no:xdist {__file__} \\
  -k 'limits_alone or refused or fork or files_out or runs_away or judge'
"""
    if top in ("/usr", "/lib"):  # everybody may read it, and nothing need be moved
        script = "set -e; export TMPDIR=$(mktemp -d); chmod 777" + script.split("chmod 777", 1)[1]
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr
    assert "skipped" not in done.stdout.splitlines()[-1], json.dumps(done.stdout[-2000:])
