"""Killed at any moment and started again, a study ends with the bits of an uninterrupted one."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from lm.rundir import read_json

CELL = "2x4"


@contextlib.contextmanager
def running(study: Path, workdir: Path) -> Iterator[subprocess.Popen[str]]:
    """`lm run` as a process; the session of a worker that is left at the end is killed."""
    process = tiny.start("run", study, f"--workdir={workdir}", "--workers=1")
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # not read to the end: what the runner started may hold them open
        process.stderr.close()
        if pid := tiny.worker(workdir / CELL):
            os.killpg(os.getpgid(pid), signal.SIGKILL)


def stopped_while_training(workdir: Path) -> int:
    """The pid of the worker, which is halted after its first dispatch, somewhere in its second."""
    pid = tiny.until(lambda: tiny.worker(workdir / CELL))
    tiny.until(lambda: tiny.size(workdir / CELL / "rows.jsonl"))
    os.kill(pid, signal.SIGSTOP)
    return pid


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def kill_at_a_random_moment(
    cell: Path, whole: int, rng: random.Random, runner: subprocess.Popen
) -> bool:
    """SIGKILL for the worker's session: when a random share of the `whole` bytes of rows is there,
    which may be so from the start, and then a random while later. False if it was done before.
    """
    share, later = rng.random() * whole, rng.choice((0, 0.003, 0.03, 0.3, 1.5)) * rng.random()
    result = cell / "result.json"
    tiny.until(lambda: runner.poll() is not None or result.exists() or tiny.worker(cell))
    pid = tiny.worker(cell)
    if not pid:
        return False
    tiny.until(lambda: tiny.size(cell / "rows.jsonl") >= share or result.exists() or gone(pid))
    with contextlib.suppress(AssertionError):
        tiny.until(lambda: gone(pid), later)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(os.getpgid(pid), signal.SIGKILL)
    tiny.until(lambda: gone(pid))
    return not result.exists()


def assert_same(workdir: Path, finished: Path) -> None:
    """Every row of the cell by the bits of its floats, and the hash of every replica's
    parameters.
    """
    assert tiny.rows(workdir / CELL) == tiny.rows(finished / CELL)
    assert tiny.params(workdir / CELL) == tiny.params(finished / CELL)
    assert tiny.events(workdir / CELL, "replay_mismatch") == []


def test_killed_workers_and_the_same_command_again(finished, study, tmp_path, lm):
    """Fails if a kill loses or doubles a row, or changes a bit of a row or a parameter: rows that
    reach the disk after the checkpoint that vouches for them, data that depend on the start.
    """
    workdir = tiny.unfinished(finished, tmp_path / "run", CELL)
    rng, whole = random.Random(2), tiny.size(finished / CELL / "rows.jsonl")
    hits = 0
    while hits < 3:
        shutil.rmtree(workdir / CELL, ignore_errors=True)  # done too soon: anew
        while hits < 3 and not (workdir / CELL / "result.json").exists():
            with running(study, workdir) as process:  # starts its workers again by itself, twice
                while hits < 3 and process.poll() is None:
                    hits += kill_at_a_random_moment(workdir / CELL, whole, rng, process)
                process.wait(300)
    assert lm("run", study, f"--workdir={workdir}").code == 0
    assert_same(workdir, finished)
    assert lm("verify", workdir, "--json").json == lm("verify", finished, "--json").json


def test_sigterm_checkpoints_and_the_same_command_goes_on(finished, study, tmp_path, lm):
    """Fails if a polite end loses what was trained, or leaves a worker behind."""
    workdir = tiny.unfinished(finished, tmp_path / "run", CELL)
    with running(study, workdir) as process:
        worker = stopped_while_training(workdir)
        process.terminate()
        os.kill(worker, signal.SIGCONT)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 130 and err == "lm: interrupted\n"
        tiny.until(lambda: gone(worker), 1)
    (event,) = tiny.events(workdir / CELL, "interrupted")
    assert (workdir / CELL / "checkpoints" / f"{event['step']}.manifest.json").exists()
    cells = {cell["cell"]: cell for cell in lm("status", workdir, "--json").json["cells"]}
    assert (cells[CELL]["state"], cells[CELL]["step"]) == ("stopped", event["step"])
    assert lm("run", study, f"--workdir={workdir}").code == 0
    (resumed,) = tiny.events(workdir / CELL, "resume")
    assert resumed["step"] == event["step"] < 30
    assert_same(workdir, finished)


def test_a_new_runner_goes_on_with_the_workers_of_one_that_was_killed(finished, study, tmp_path):
    """Fails if the workers of a killed runner stop, if the same command, given at once, starts
    others beside them, or if it does not see the end of a process that is not its child.
    """
    workdir = tiny.unfinished(finished, tmp_path / "run", CELL)
    first = tiny.start("run", study, f"--workdir={workdir}", "--workers=1")
    worker = stopped_while_training(workdir)
    first.kill()
    first.communicate()
    with running(study, workdir) as second:
        lines = iter(second.stdout.readline, "")
        assert any("1 of an earlier run still at work" in line for line in lines)
        os.kill(worker, signal.SIGCONT)
        _, err = second.communicate(timeout=300)
        assert second.returncode == 0, err
    (attempt,) = read_json(workdir / CELL / "environment.json")
    assert attempt and not tiny.events(workdir / CELL, "resume")
    assert len(list((workdir / "logs" / "exits").iterdir())) == 1  # of one command
    assert_same(workdir, finished)


def test_a_replica_that_diverges_leaves_the_others_alone(finished, study, tmp_path, lm):
    """Fails if NaN is a crash, if it spreads to other replicas of the same compiled program, or if
    rows, result, status and report do not say what happened.
    """
    workdir = tmp_path / "run"
    assert lm("run", study, f"--workdir={workdir}", "--config.scale=hot").code == 0
    cell = workdir / "2x4+1"
    outcome = {(r["point"], r["status"]) for r in read_json(cell / "result.json")["replicas"]}
    assert outcome == {("2x4", "ok"), ("hot", "diverged")}
    lost = {key: row for key, row in tiny.rows(cell, "hot").items() if row[4] == "diverged"}
    assert all(value is None for value, *_ in lost.values())
    assert {key[1] for key in lost} == {0, 1} and max(key[2] for key in lost) == 30
    assert {e["replica"] for e in tiny.events(cell, "diverged")} == {0, 1}
    (status,) = lm("status", workdir, "--json").json["cells"]
    assert (status["state"], status["diverged"], status["replicas"]) == ("done", 2, 4)
    assert status["loss"] > 0  # of those that are left
    assert "4, 2 diverged" in lm("status", workdir).out
    notes = lm("report", workdir, "--json").json["notes"]
    assert any("diverged" in note.lower() and "2" in note for note in notes), notes
    # The others' bits are those of the cell that never had such neighbours.
    assert tiny.rows(cell, "2x4") == tiny.rows(finished / "2x4")
    others = {key: digest for key, digest in tiny.params(cell).items() if key[0] == "2x4"}
    assert others == tiny.params(finished / "2x4")


@pytest.mark.slow
def test_twenty_random_kills(study, tmp_path, lm):
    """Each of 20 runs of one cell, of 20 checkpoints, is killed once, at a random moment, and
    started again; all must end with the same bits. Fails like the quick one above; it looks in
    more places.
    """
    finished = tmp_path / "finished"
    more = f"--config.train.tokens={200 * 8 * 32}"
    assert lm("run", study, f"--workdir={finished}", more).code == 0
    rng, whole = random.Random(20), tiny.size(finished / CELL / "rows.jsonl")
    same = resumed = 0
    for trial in range(20):
        workdir = tiny.unfinished(finished, tmp_path / str(trial), CELL)
        command = [sys.executable, "-m", "experiments.worker", str(workdir)]
        options = {"cwd": tiny.ROOT, "env": tiny.environment(), "stderr": subprocess.DEVNULL}
        killed = False
        while not killed:  # a kill that came too late does not count
            shutil.rmtree(workdir / CELL, ignore_errors=True)
            with subprocess.Popen(command, start_new_session=True, **options) as process:
                killed = kill_at_a_random_moment(workdir / CELL, whole, rng, process)
        assert subprocess.run(command, **options).returncode == 0
        resumed += bool(tiny.events(workdir / CELL, "resume"))
        assert_same(workdir, finished)
        same += 1
        shutil.rmtree(workdir)
    print(f"{same}/20 bit-identical, {resumed} of them from a checkpoint")
    assert same == 20 and resumed > 5
