"""A disk that fails: what could not be brought to it is never taken for written (case 9).

A library between Python, Orbax and the kernel answers EIO to `fsync` or `rename` of files below a
folder, on request.
"""

import shutil
import subprocess
import sys

import pytest
import tiny

# FAULT names the call that fails ("fsync" or "rename"), BELOW the folder in which it does.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int fails(const char *call, const char *path) {
  const char *fault = getenv("FAULT"), *below = getenv("BELOW");
  return fault && below && path && !strcmp(fault, call) && strstr(path, below);
}
static int sync_fails(int fd) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  path[n < 0 ? 0 : n] = 0;
  return fails("fsync", path);
}
#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define EIO_IF(condition) if (condition) { errno = EIO; return -1; }
int fsync(int fd) { EIO_IF(sync_fails(fd)) return NEXT(fsync)(fd); }
int fdatasync(int fd) { EIO_IF(sync_fails(fd)) return NEXT(fdatasync)(fd); }
int rename(const char *a, const char *b) {
  EIO_IF(fails("rename", b)) return NEXT(rename)(a, b);
}
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


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_what_did_not_reach_the_disk_is_not_committed(tmp_path):
    """Catches a checkpoint that is sealed, a file that is replaced or a row that counts though the
    disk said no, and a disk that is well again and of no use (9).
    """
    (tmp_path / "shim.c").write_text(SHIM)
    shim = tmp_path / "shim.so"
    command = ["cc", "-shared", "-fPIC", "-O1", "-o", shim, tmp_path / "shim.c", "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    below = tmp_path / "below"
    below.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        cwd=tiny.ROOT,
        env=tiny.environment(LD_PRELOAD=str(shim), BELOW=str(below), JAX_PLATFORMS="cpu"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
