"""How attempts end: classes, rules, the watchdog, and launchers that race (3, 10, 23, 25, 30-32).

A study that trains by itself and needs no compiler stands for every other: the runner, the workers'
leases and the engine are the same.
"""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import tiny

from experiments import exits, inspect_run
from lm.config import UserError
from lm.rundir import JsonLines, read_json, read_lines, write_json

STUDY = '''"""Cells that sleep, and do what they are told."""

import hashlib
import os
import time
from pathlib import Path

from ml_collections import ConfigDict

from experiments.own import Plan
from lm.emergence.metrics import Measure
from lm.train.cell import Replica

STEPS = 4


def get_config():
    return ConfigDict({"cells": 3, "train": ConfigDict({"seconds": 0.05, "fault": "", "times": 1})})


def points(config):
    return [{"name": f"c{i}"} for i in range(config.cells)]


def plan(config, point):
    name, size = point["name"], 10 * (int(point["name"][1:]) + 1)
    who = Replica(name, "ladder", 0, 0, 0, 0, 0, 1.0)
    return Plan(name, "ladder", 1, size, size, size, STEPS, 1, 1.0, 1.0, (who,))


def train(config, plan, record):
    with open(record.folder.parent / "ran", "a") as file:
        file.write(f"{plan.name}\\n")
    if plan.name == "c0" and record.attempt <= config.train.times:
        fault(config.train.fault)
    for step in range(1, STEPS + 1):
        time.sleep(config.train.seconds / STEPS)
        record.progress(step, 1.0 / step)
    found = {"loss": Measure(1.0 / plan.params, 0.1, 10)}
    record.measure(plan.replicas[0], STEPS, "sleep", "", found)
    record.seconds["train"] = config.train.seconds
    return [hashlib.sha256(plan.name.encode()).hexdigest()]


def fault(kind):
    if kind == "bug":
        raise RuntimeError("a bug at step 0")
    if kind == "memory":
        import resource
        resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))
        bytearray(2**33)
    if kind == "device":
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 GiB")
    if kind == "killed":
        os.kill(os.getpid(), 9)
    if kind == "hang":
        time.sleep(1000)
    if kind == "disk":
        raise OSError(28, "No space left on device")
'''


@pytest.fixture(scope="module")
def sleepy(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("study") / "sleepy.py"
    path.write_text(STUDY)
    return path


def start(study: Path, workdir: Path, *more: str, **environment: str) -> subprocess.Popen[str]:
    """`lm run` without the page, which is not what is tried here."""
    code = (
        "import sys; from lm.emergence import report; report.main = lambda argv: 0\n"
        "from lm.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    argv = [sys.executable, "-c", code, "run", str(study), f"--workdir={workdir}", *more]
    return subprocess.Popen(
        argv,
        cwd=tiny.ROOT,
        env=tiny.environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(study: Path, workdir: Path, *more: str, **environment: str) -> tuple[int, str, str]:
    with start(study, workdir, *more, **environment) as process:
        out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def ran(workdir: Path) -> Counter[str]:
    """How often each cell was begun."""
    return Counter((workdir / "ran").read_text().split())


def ends(workdir: Path, cell: str = "c0") -> list[str]:
    """The kinds of the attempts that failed."""
    return [e["kind"] for e in read_lines(workdir / cell / "events.jsonl")[0] if "kind" in e]


@pytest.mark.parametrize(
    ("code", "why", "kind"),
    [
        (75, "", "preempted"),
        (-15, "", "preempted"),
        (143, "", "preempted"),
        (-10, "", "preempted"),
        (-9, "", "killed"),
        (137, "OOMKilled", "oom"),
        (-9, "out of memory, by the kernel", "oom"),
        (None, "NODE_FAIL", "killed"),
        (None, "OUT_OF_MEMORY", "oom"),
        (70, "", "hang"),
        (2, "", "user"),
        (1, "", "bug"),
        (-11, "", "bug"),
    ],
)
def test_an_exit_code_has_a_class(code, why, kind):
    """Catches a signal before the handlers that is a bug (3), and an OOM kill that is bad luck."""
    assert exits.kind_of_exit(code, why) == kind and kind in exits.RULES


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (MemoryError(), "oom"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 byte"), "oom"),
        (RuntimeError("a zoom lens"), "bug"),
        (UserError("disk full: 3 bytes are left"), "disk"),
        (UserError("no such task"), "user"),
        (KeyError("x"), "bug"),
        (RuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer"), "killed"),
    ],
)
def test_an_exception_has_a_class(error, kind):
    """Catches a word that merely contains `oom`, and a full disk that is tried again."""
    assert exits.kind_of(error) == kind


@pytest.mark.parametrize(
    ("fault", "times", "kinds", "code"),
    [
        ("memory", 9, ["oom"] * 2, 1),
        ("bug", 1, ["bug"], 0),
        pytest.param("device", 9, ["oom"] * 2, 1, marks=pytest.mark.slow),
        pytest.param("bug", 9, ["bug"] * 3, 1, marks=pytest.mark.slow),
        pytest.param("killed", 2, ["killed"] * 2, 0, marks=pytest.mark.slow),
        pytest.param("killed", 99, ["killed"] * 6, 1, marks=pytest.mark.slow),
        pytest.param("disk", 9, ["disk"], 2, marks=pytest.mark.slow),
    ],
)
def test_each_class_has_its_rule(sleepy, tmp_path, fault, times, kinds, code):
    """Catches a crash loop without an end, an OOM that is tried unchanged again and again, a
    transient fault that is not survived, and a cell that takes the others down (30, 31, 7).
    """
    workdir = tmp_path / "run"
    told = (f"--config.train.fault={fault}", f"--config.train.times={times}", "--workers=1")
    found, _, err = run(sleepy, workdir, *told)
    assert (found, ends(workdir)) == (code, kinds), err
    assert ran(workdir)["c0"] == len(kinds) + (code == 0)
    if code != 2:
        assert ran(workdir)["c1"] == ran(workdir)["c2"] == 1
        assert all((workdir / c / "result.json").exists() for c in ("c1", "c2"))
    if code:
        assert "c0" in err and "Traceback" not in err


def test_the_watchdog_ends_what_hangs_and_says_where(sleepy, tmp_path):
    """Catches a stuck cell that nobody ends, one without stacks in the log or an event, and
    a retry that does not come (32).
    """
    workdir = tmp_path / "run"
    told = ("--config.train.fault=hang", "--workers=1")
    code, _, err = run(sleepy, workdir, *told, ONSET_HANG="1.5", ONSET_LEASE="2")
    assert code == 0, err
    assert ends(workdir) == ["hang"] and ran(workdir) == {"c0": 2, "c1": 1, "c2": 1}
    log = (workdir / "logs" / "worker.log").read_text()
    assert "most recent call first" in log and "in fault" in log


def test_the_watchdog_s_second_thread_needs_no_interpreter():
    """Catches a hang that keeps the interpreter's lock and so cannot be seen by any Python code."""
    code = (
        "import sys; from experiments import exits\n"
        "dog = exits.Watchdog(lambda message: None, after=-59.5)\n"
        "sys.setswitchinterval(1000); sum(range(10**12))\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tiny.ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "most recent call first" in done.stderr


def test_a_second_signal_is_a_quick_end():
    """Catches a worker that cannot be asked again, and a doubled signal that counts as two (2)."""
    code = (
        "import time; from experiments import exits\n"
        "stop = exits.stop_signal(); print('up', flush=True)\n"
        "while not stop(): time.sleep(0.01)\n"
        "print('asked', flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=tiny.ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "asked\n" and process.poll() is None
        time.sleep(1.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == exits.AGAIN


def test_status_says_attempts_and_goodput(tmp_path, capsys, monkeypatch):
    """Catches an attempt that is not counted, work that counts though it was lost, and a name that
    is cut at 80 columns.
    """
    workdir = tmp_path / "run"
    name = "a-name-that-is-longer-than-most-formulae-and-still-allowed"
    cell = workdir / name
    cell.mkdir(parents=True)
    study = {"name": "s", "points": [{"name": name}], "cells": {name: [name]}}
    write_json(workdir / "study.json", study)
    times = ("00:00:00", "00:00:10", "00:01:00", "00:01:40")
    with JsonLines(cell / "events.jsonl") as events:
        for clock, event in zip(times, ("begin", "failed", "begin", "done"), strict=True):
            events.append({"event": event, "time": f"2026-01-01T{clock}+00:00", "kind": "killed"})
    seconds = {"compile": 3.0, "train": 40.0, "eval": 10.0, "total": 60.0}
    write_json(cell / "result.json", {"status": "done", "replicas": [], "seconds": seconds})
    workdir_, there = inspect_run.open_study(workdir)
    found = inspect_run.cell_status(workdir_ / name, [name])
    assert (found["attempts"], found["useful"], found["wall"]) == (2, 50.0, 100.0)
    assert inspect_run.goodput([found]) == 0.5
    monkeypatch.setenv("COLUMNS", "80")
    assert inspect_run.status([str(workdir)]) == 0
    out = capsys.readouterr().out
    assert name in out and "2 attempts, goodput 0.50" in out


@pytest.mark.slow
def test_fifty_simultaneous_starts(sleepy, tmp_path):
    """Catches a cell that two launchers carry out, and a loser that does not say who won (10)."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    told = ("--config.cells=6", "--config.train.seconds=2.0", "--workers=2")
    processes = [start(sleepy, workdir, *told) for _ in range(50)]
    codes: Counter[int] = Counter()
    for process in processes:
        _, err = process.communicate(timeout=600)
        codes[process.returncode] += 1
        assert process.returncode == 0 or "is held by pid " in err, err
    assert codes[0] >= 1 and codes[0] + codes[2] == 50
    assert ran(workdir) == {f"c{i}": 1 for i in range(6)}


@pytest.mark.slow
def test_two_hundred_cells_at_once_are_two_hundred_rows(sleepy, tmp_path):
    """Catches a row that is lost when many cells end in the same second (25)."""
    workdir = tmp_path / "run"
    code, _, err = run(sleepy, workdir, "--config.cells=200", "--config.train.seconds=0.0")
    assert code == 0, err
    assert ran(workdir) == {f"c{i}": 1 for i in range(200)}
    rows = [read_lines(workdir / f"c{i}" / "rows.jsonl") for i in range(200)]
    assert all(len(records) == 1 and not problems for records, problems in rows)


@pytest.mark.slow
def test_a_stopped_worker_is_followed_and_cannot_write(sleepy, tmp_path):
    """Catches a cell that waits for ever for a worker that was stopped, and one that, woken again,
    writes beside its successor (12).
    """
    workdir = tmp_path / "run"
    told = ("--config.cells=2", "--config.train.seconds=6.0", "--workers=2")
    with start(sleepy, workdir, *told, ONSET_LEASE="3") as process:
        tiny.until((workdir / "c1" / "progress.json").exists)
        pid = tiny.worker(workdir / "c1")
        os.kill(pid, signal.SIGSTOP)
        tiny.until((workdir / "c1" / "leases" / "2.json").exists)
        os.kill(pid, signal.SIGCONT)
        _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert ran(workdir) == {"c0": 1, "c1": 2}
    assert read_json(workdir / "c1" / "result.json")["attempts"] == 2
    assert read_json(workdir / "c1" / "leases" / "1.json")["ended"] == "lost"
    assert len(read_lines(workdir / "c1" / "rows.jsonl")[0]) == 1
