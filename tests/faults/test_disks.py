"""A disk that fails, and a kill between any two things that are done to it (cases 9 and 4): what
did not get there whole is never taken for written.

A library between Python, Orbax and the kernel answers EIO to `fsync` or `rename` of files below a
folder, on request, or kills the process at a certain one of its calls.
"""

import contextlib
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
import tiny

from lm.train.checkpoint import Checkpoints, sealed_steps

# FAULT names the call that fails ("fsync" or "rename"), or says "kill": in the call AT of all that
# change something. BELOW is the folder in which it does.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static atomic_int calls;
__attribute__((destructor)) static void count(void) {
  if (getenv("AT")) fprintf(stderr, "\ncalls: %d\n", calls);
}
static int fails(const char *call, const char *path) {
  const char *fault = getenv("FAULT"), *below = getenv("BELOW"), *at = getenv("AT");
  if (!fault || !below || !path || !strstr(path, below)) return 0;
  if (!strcmp(fault, "kill") && at && atomic_fetch_add(&calls, 1) == atoi(at))
    kill(getpid(), SIGKILL);
  return !strcmp(fault, call);
}
static int at_fails(const char *call, int fd) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  path[n < 0 ? 0 : n] = 0;
  return fails(call, path);
}
#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define EIO_IF(condition) if (condition) { errno = EIO; return -1; }
int fsync(int fd) { EIO_IF(at_fails("fsync", fd)) return NEXT(fsync)(fd); }
int fdatasync(int fd) { EIO_IF(at_fails("fsync", fd)) return NEXT(fdatasync)(fd); }
int rename(const char *a, const char *b) {
  EIO_IF(fails("rename", b)) return NEXT(rename)(a, b);
}
int unlink(const char *a) { fails("", a); return NEXT(unlink)(a); }
int unlinkat(int x, const char *a, int f) { at_fails("", x); return NEXT(unlinkat)(x, a, f); }
int rmdir(const char *a) { fails("", a); return NEXT(rmdir)(a); }
int mkdir(const char *a, mode_t m) { fails("", a); return NEXT(mkdir)(a, m); }
int renameat(int x, const char *a, int y, const char *b) {
  EIO_IF(fails("rename", b)) return NEXT(renameat)(x, a, y, b);
}
"""

CODE = """
import os, sys
from pathlib import Path
sys.path.insert(0, "tests")
import jax.numpy as jnp
from lm.rundir import JsonLines, check_manifest, read_json, read_lines, write_json
from lm.train.checkpoint import Checkpoints, read_manifest, sealed_steps

folder = Path(os.environ["BELOW"])
checkpoints = Checkpoints(folder / "checkpoints")
state = {"w": jnp.arange(4096.0)}
checkpoints.save(1, state, {"seconds": {}})
checkpoints.seal()
write_json(folder / "result.json", {"was": 1})
lines = JsonLines(folder / "rows.jsonl")
lines.append({"row": 1})
lines.sync()

def refused(what):
    try:
        what()
    except (OSError, ValueError) as error:
        assert "Input/output error" in str(error), error
        return
    raise SystemExit("it passed for written")

def save():
    checkpoints.save(2, state, {"seconds": {}})
    checkpoints.seal()

def append():
    lines.append({"row": 2})
    lines.sync()

for fault in ("fsync", "rename"):
    os.environ["FAULT"] = fault
    refused(save)
    assert sealed_steps(folder / "checkpoints") == [1], fault
    refused(lambda: write_json(folder / "result.json", {"was": 2}))
    if fault == "fsync":
        refused(append)
    assert [p.name for p in folder.rglob(".*")] == []
    os.environ["FAULT"] = ""
    assert read_json(folder / "result.json") == {"was": 1}, fault
save()  # the disk is well again
assert sealed_steps(folder / "checkpoints") == [1, 2]
step, found, _, problems = checkpoints.restore(state)
assert (step, problems) == (2, []) and (found["w"] == state["w"]).all()
checkpoints.close()
"""


KILLED = """
import os
from pathlib import Path
import jax.numpy as jnp
from lm.train.checkpoint import Checkpoints

checkpoints = Checkpoints(Path(os.environ["BELOW"]) / "checkpoints")
for step in (1, 2, 3):
    checkpoints.save(step, {"w": jnp.arange(4096.0) + step}, {"seconds": {}})
    checkpoints.seal()
    os.environ["FAULT"] = "kill"  # from the second on: the third has an old one to remove
checkpoints.close()
"""


@pytest.fixture(scope="module")
def shim(tmp_path_factory) -> Path:
    """The library, compiled."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    folder = tmp_path_factory.mktemp("shim")
    (folder / "shim.c").write_text(SHIM)
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", "shim.so", "shim.c", "-ldl"]
    subprocess.run(command, check=True, timeout=60, cwd=folder)
    return folder / "shim.so"


def run(code: str, shim: Path, below: Path, **more: str) -> subprocess.CompletedProcess[str]:
    below.mkdir(parents=True)
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tiny.ROOT,
        env=tiny.environment(LD_PRELOAD=str(shim), BELOW=str(below), JAX_PLATFORMS="cpu", **more),
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_what_did_not_reach_the_disk_is_not_committed(shim, tmp_path):
    """Catches a checkpoint that is sealed, a file that is replaced or a row that counts though the
    disk said no, and a disk that is well again and of no use (9).
    """
    done = run(CODE, shim, tmp_path / "below")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_kill_between_any_two_calls_leaves_a_whole_checkpoint(shim, tmp_path):
    """Catches a moment in writing one checkpoint and removing another at which a kill leaves none,
    a half of one that counts, or a temporary file that stays (4).
    """
    whole = run(KILLED, shim, tmp_path / "whole", AT="-1")
    assert whole.returncode == 0, whole.stderr[-3000:]
    calls = int(whole.stderr.rsplit("calls: ", 1)[1])
    assert calls > 24
    newest = []
    for at in (calls * i // 12 for i in range(12)):
        below = tmp_path / str(at)
        done = run(KILLED, shim, below, AT=str(at))
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        with contextlib.closing(Checkpoints(below / "checkpoints")) as checkpoints:
            step, found, _, problems = checkpoints.restore({"w": jnp.zeros(4096)})
        assert problems == [] and (found["w"] == jnp.arange(4096.0) + step).all()
        kept = {p.name for p in (below / "checkpoints").iterdir()}
        sealed = {str(s) for s in sealed_steps(below / "checkpoints")}
        assert kept == sealed | {f"{s}.manifest.json" for s in sealed}
        newest.append(step)
    print(calls, newest)
    assert newest == sorted(newest) and newest[0] == 1 and newest[-1] == 3
