"""A study that trains in two seconds, and what the tests of the runner need around it.

Two cells, 1x4 and 2x4 (layers x width), with two seeds each: six dispatches of five steps, a
checkpoint after every other one, evaluations after 5, 10, 20 and 30 steps.
"""

import contextlib
import fcntl
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from lm.rundir import holder, read_json, read_lines

ROOT = Path(__file__).parents[1]
CELLS = ("1x4", "2x4")
STUDY = '''"""Does a tiny model survive?"""

from ml_collections import ConfigDict

MIXTURE = {
    "text": {"task": "text", "level": "", "rows": 4, "weight": 0.5, "examples": 1},
    "recall": {"task": "recall", "level": "3", "rows": 2, "weight": 1.0, "examples": 200},
    "addition": {"task": "addition", "level": "1", "rows": 2, "examples": 60, "formats": 2},
}


def get_config():
    c = ConfigDict()
    c.scale = "cool"  # or "hot": two points in one cell, one with a hopeless learning rate
    c.model = ConfigDict({"size": "2x4", "heads": 1, "kv_heads": 1, "vocab_size": 112})
    c.optim = ConfigDict({"name": "adamw", "learning_rate": 1e-2, "warmup_tokens": 500})
    c.train = ConfigDict(
        {
            "tokens": 30 * 8 * 32,
            "chunk": 5,
            "checkpoint_every": 10,
            "replicas": "auto",
            "strategy": "replicated",
            "replica_devices": 1,
        }
    )
    source = {"kind": "folder", "path": "TEXT"}
    tokenizer = {"kind": "char", "vocab_size": 112}
    c.data = ConfigDict(
        {"length": 32, "source": source, "tokenizer": tokenizer, "mixture": MIXTURE}
    )
    c.eval = ConfigDict({"items": 16, "text_rows": 16, "first": 5, "batch": 16})
    c.seeds = ConfigDict({"replicas": 2, "first": 0, "vary": ("init", "data"), "eval": 0})
    return c


def points(config):
    if config.scale == "hot":
        return [{"name": "2x4"}, {"name": "hot", "optim.learning_rate": 1e30}]
    return [{"name": size, "model.size": size} for size in ("1x4", "2x4")]
'''


def write_study(folder: Path) -> Path:
    """The study file, with eight short texts beside it."""
    rng = random.Random(0)
    words = ["the", "model", "reads", "a", "text", "and", "learns", "what", "comes", "next"]
    (folder / "text").mkdir(parents=True)
    for i in range(8):
        lines = [" ".join(rng.choices(words, k=8)) for _ in range(60)]
        (folder / "text" / f"{i}.txt").write_text("\n".join([*lines, f"file {i}", ""]))
    (folder / "tiny.py").write_text(STUDY.replace("TEXT", str(folder / "text")))
    return folder / "tiny.py"


def environment(**more: str) -> dict[str, str]:
    """That of a user with one CPU device, who pins NPROC; with the compile cache of all tests."""
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"NPROC": "1"} | more


def start(*args: object, cwd: Path = ROOT, **more: str) -> subprocess.Popen[str]:
    """`lm ARGS` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "lm.cli", *map(str, args)],
        cwd=cwd,
        env=environment(**more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


class Done(NamedTuple):
    """How a command line ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        """The one object that `--json` prints; fails unless the exit code is 0."""
        assert self.code == 0, self.err
        return json.loads(self.out)

    @property
    def refusal(self) -> str:
        """The one sentence of a refusal; fails unless the exit code is 2."""
        assert self.code == 2, self
        return one_sentence(self.err)


def one_sentence(stderr: str) -> str:
    """What stderr says after `lm: error: `; fails unless that is all it says."""
    assert stderr.startswith("lm: error: ") and stderr.endswith("\n"), stderr
    assert "Traceback" not in stderr and stderr.count("\n") == 1, stderr
    return stderr.removeprefix("lm: error: ").rstrip("\n")


def rows(cell: Path, point: str = "") -> dict[tuple, tuple]:
    """Every row of a cell (of one of its points) without timing: identity -> values, floats as hex.

    Fails on a damaged line and on a row that is there twice.
    """
    records, problems = read_lines(cell / "rows.jsonl")
    assert not problems
    found = {}
    for r in records:
        if point in ("", r["point"]):
            key = (
                r["point"],
                r["replica"],
                r["step"],
                r["task"],
                r["level"],
                r["format"],
                r["metric"],
            )
            assert key not in found, f"{key} is there twice"
            numbers = (r["value"], r["stderr"], r["chance"])
            hexes = [None if x is None else float(x).hex() for x in numbers]
            found[key] = (*hexes, r["n"], r["status"], r["learning_rate"])
    return found


def params(cell: Path) -> dict[tuple[str, int], str]:
    """(point, replica) -> SHA-256 of the final parameters."""
    replicas = read_json(cell / "result.json")["replicas"]
    return {(r["point"], r["replica"]): r["params_sha256"] for r in replicas}


def events(cell: Path, kind: str) -> list[dict]:
    """The events of one kind."""
    return [e for e in read_lines(cell / "events.jsonl")[0] if e["event"] == kind]


def unfinished(finished: Path, workdir: Path, *cells: str) -> Path:
    """A copy of a finished workdir in which some cells have not begun."""
    caches = ("report.html", "analysis.json", "table.parquet", "figures", "logs")
    shutil.copytree(finished, workdir, ignore=shutil.ignore_patterns(*caches, *cells))
    return workdir


def until[T](condition: Callable[[], T], seconds: float = 60.0) -> T:
    """The first true value of a condition; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)
    return value


def worker(cell: Path) -> int:
    """The pid that trains a cell, or 0."""
    owner = holder(cell / "lock") or {}
    return owner["pid"] if isinstance(owner.get("pid"), int) else 0


def size(path: Path) -> int:
    """Bytes of a file; 0 if it is not there."""
    return path.stat().st_size if path.exists() else 0


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder but locks, which say who was there last; to see that nothing was
    touched.
    """
    files = (p for p in folder.rglob("*") if p.is_file() and p.name != "lock")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Waits for an exclusive lock: what several test processes share is made by one of them."""
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
