"""One cell on several processes: the same rows of every batch, the same bits, and an end in a
bounded time for all of them when one is killed or stopped.
"""

import os
import random
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from experiments import supervise
from experiments.processes import COORDINATOR, COUNT, INDEX, _code, join
from launch import Command, Status
from lm.config import UserError, build
from lm.data.loader import dataset
from lm.rundir import read_json, write_json
from lm.train import loop, mixture
from lm.train.cell import Cell

CELL = "1x4"


def start(workdir: Path, processes: int) -> subprocess.Popen[str]:
    """The cell on so many processes, of one device each."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "experiments.processes", str(workdir)),
            *("--cells", CELL, f"--processes={processes}"),
        ],
        cwd=tiny.ROOT,
        env=tiny.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], code: int, seconds: float) -> None:
    """Waits for the end, and sees that nothing is left of it."""
    try:
        out, _ = process.communicate(timeout=seconds)
    finally:
        with_session(process.pid, signal.SIGKILL)
    assert process.returncode == code, out
    assert ranks(process.pid) == []


def with_session(pid: int, number: int) -> None:
    for each in (*ranks(pid), pid):
        try:
            os.kill(each, number)
        except ProcessLookupError:
            continue


def ranks(parent: int) -> list[int]:
    """The pids of the processes that carry out a cell, the first one first."""
    found = Path(f"/proc/{parent}/task/{parent}/children")
    return [int(pid) for pid in found.read_text().split()] if found.exists() else []


def cell_of(workdir: Path) -> Cell:
    return build(Cell, read_json(workdir / "study.json")["cell_configs"][CELL], CELL)


def on_devices(finished: Path, folder: Path, devices: int) -> Path:
    """The same cell in this process, on several of its devices; returns its folder."""
    used = jax.devices()[:devices]
    loop.train(cell_of(finished), folder, finished / "data", devices=used)
    return folder


def assert_same(got: Path, want: Path) -> None:
    """Every row and every parameter by its bits."""
    assert tiny.rows(got) == tiny.rows(want)
    assert tiny.params(got) == tiny.params(want)
    assert tiny.events(got, "replay_mismatch") == []


def test_two_processes_give_the_bits_of_two_devices(finished, tmp_path):
    """Fails if a process reads another's rows, in another order, if a row or an event is written
    twice, or if scores and final parameters are not those of the whole.
    """
    workdir = tiny.unfinished(finished, tmp_path / "run", CELL)
    finish(start(workdir, 2), 0, 300)
    assert_same(workdir / CELL, on_devices(finished, tmp_path / "reference", 2))
    # One process has other sums, and nothing but the last bits of them is another.
    one, two = tiny.rows(finished / CELL), tiny.rows(workdir / CELL)
    losses = [key for key in one if key[3] == "train"]
    assert one.keys() == two.keys() and len(losses) == 12
    for key in losses:
        assert abs(float.fromhex(one[key][0]) - float.fromhex(two[key][0])) < 1e-5
    assert len(tiny.events(workdir / CELL, "begin")) == 1


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_rows_of_all_processes_are_the_batch(finished, parts):
    """Fails if a cut of the batch changes the order, leaves out a row or reads one twice."""
    (loader, *_) = mixture.loaders(
        cell_of(finished), mixture.load(cell_of(finished), finished / "data")
    )
    cuts = np.linspace(0, loader.batch_size, parts + 1).astype(int).tolist()
    for start, steps in ((0, 1), (3, 5), (200, 4)):  # the last: in a later epoch
        whole = loader.chunk(start, steps)
        each = [
            loader.chunk(start, steps, range(a, b)) for a, b in zip(cuts, cuts[1:], strict=False)
        ]
        for name, array in whole._asdict().items():
            found = np.concatenate([getattr(part, name) for part in each], axis=1)
            np.testing.assert_array_equal(found, array)
    (chunk,) = dataset(loader, 2, 4, 5, rows=range(1, 3))
    np.testing.assert_array_equal(chunk.tokens, loader.chunk(2, 2).tokens[:, 1:3])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({COUNT: "2", INDEX: "0"}, "ONSET_COORDINATOR is not set beside"),
        ({COORDINATOR: "h:1", COUNT: "two", INDEX: "0"}, "'two' .* whole numbers"),
        ({COORDINATOR: "h:1", COUNT: "2", INDEX: "2"}, "ONSET_PROCESS is 2; it must be between"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(given, words):
    """Fails if a process waits for others that cannot come."""
    with pytest.raises(UserError, match=words):
        join(given)


def test_an_attempt_ends_with_what_matters_most():
    """Fails if a refusal is tried again, or a crash is taken for a polite end."""
    assert _code([0, 0]) == 0 and _code([75, 75]) == 75
    assert _code([1, 2, -9]) == 2 and _code([70, -6]) == 70
    assert _code([0, -9]) == _code([None, -9]) == _code([1, -9]) == 137  # it was killed
    assert _code([-6, None]) == 70  # it was stopped
    assert _code([75, 1]) == _code([-6, -6]) == _code([None, 1]) == 1


@pytest.mark.parametrize(
    ("place", "told", "flags", "count"),
    [
        ("local", {}, [], 1),
        ("local", {"processes": 2}, ["--cells", "a", "--processes=2"], 1),
        ("slurm", {}, ["--cells", "a"], 1),
        ("slurm", {"nodes": 2}, ["--cells", "a"], 2),
        ("slurm", {"nodes": 2, "processes": 4}, ["--cells", "a"], 4),
    ],
)
def test_every_place_starts_the_processes_that_it_is_told(tmp_path, place, told, flags, count):
    """Fails if a setting of the place is not what its commands say, or if cells that several
    processes carry out are more at a time than there are workers.
    """
    write_json(tmp_path / "launch.json", {"of": str(tmp_path), "where": place, "settings": told})
    command = Command(("worker",), tmp_path / "logs" / "worker.log")
    crew = supervise.Crew(["a", "b"], tmp_path, 1, command, print)
    made: list[Command] = []
    crew.engine = types.SimpleNamespace(
        submit=lambda commands, settings: [made.append(c) or c.name for c in commands],
        status=lambda ids, settings: [Status("running")] * len(ids),
    )
    assert crew.step() and [*made[0].argv] == ["worker", *flags] and made[0].processes == count
    assert len(made) == (1 if place == "local" else 2)
    assert supervise.together(tmp_path) == max(told.get("processes", 1), told.get("nodes", 1))


def test_rows_that_the_processes_do_not_divide_are_refused(study, tmp_path, lm):
    """Fails if a worker finds it, after the data were prepared and the processes had met."""
    workdir = tmp_path / "run"
    sentence = lm("run", study, f"--workdir={workdir}", "--where.processes=3").refusal
    assert "batch 8" in sentence and "3 devices" in sentence and not workdir.exists()
    sentence = lm("run", study, f"--workdir={workdir}", "--where.processes=0").refusal
    assert "processes is 0" in sentence


@pytest.mark.slow
def test_a_study_on_two_processes(study, finished, tmp_path, lm):
    """Fails if `lm run` starts something else than two processes a cell, or cannot end them."""
    workdir = tmp_path / "run"
    done = lm("run", study, f"--workdir={workdir}", "--where.processes=2", "--workers=1")
    assert (done.code, done.err) == (0, "")
    for name in tiny.CELLS:
        assert read_json(workdir / name / "environment.json")[0]["devices"] == 2
        assert tiny.rows(workdir / name).keys() == tiny.rows(finished / name).keys()
    assert_same(workdir / CELL, on_devices(finished, tmp_path / "reference", 2))


@pytest.mark.slow
def test_four_processes_give_the_bits_of_four_devices(finished, tmp_path):
    """Fails like the quick one; sums over four are in the order of the ranks, or they differ."""
    workdir = tiny.unfinished(finished, tmp_path / "run", CELL)
    finish(start(workdir, 4), 0, 300)
    reference = on_devices(finished, tmp_path / "reference", 4)
    got, want = tiny.rows(workdir / CELL), tiny.rows(reference)
    assert got.keys() == want.keys()
    for key in (key for key in got if key[3] == "train"):
        assert abs(float.fromhex(got[key][0]) - float.fromhex(want[key][0])) < 1e-5


def until_a_checkpoint(workdir: Path, process: subprocess.Popen[str]) -> None:
    sealed = workdir / CELL / "checkpoints" / "10.manifest.json"
    tiny.until(lambda: sealed.exists() or process.poll() is not None, 120)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_all_end_when_one_does_and_the_next_attempt_goes_on(finished, tmp_path, rank, number):
    """Fails if a process waits for ever for one that is gone or asleep, if anything is left of the
    attempt, or if the next one does not end with the bits of an undisturbed run. It goes on from
    a checkpoint of two processes: on two again, and on one with two devices.
    """
    workdir = tiny.unfinished(finished, tmp_path / "run", CELL)
    process = start(workdir, 2)
    until_a_checkpoint(workdir, process)
    os.kill(ranks(process.pid)[rank], number)
    tick = time.monotonic()
    finish(process, 137 if number == signal.SIGKILL else 70, 60)
    assert time.monotonic() - tick < 40
    if not (workdir / CELL / "result.json").exists():
        if rank:
            finish(start(workdir, 2), 0, 300)
        else:
            command = [sys.executable, "-m", "experiments.worker", str(workdir), "--cells", CELL]
            flags = tiny.environment(XLA_FLAGS="--xla_force_host_platform_device_count=2")
            subprocess.run(command, cwd=tiny.ROOT, env=flags, check=True, timeout=120)
        assert tiny.events(workdir / CELL, "resume")
    assert_same(workdir / CELL, on_devices(finished, tmp_path / "reference", 2))


@pytest.mark.slow
def test_a_polite_end_on_two_and_the_rest_on_one(finished, tmp_path):
    """Fails if the processes stop at different steps, or if a checkpoint of two cannot be read by
    one; its losses may differ in the last bits, and the events must say so.
    """
    workdir = tiny.unfinished(finished, tmp_path / "run", CELL)
    process = start(workdir, 2)
    tiny.until(lambda: tiny.size(workdir / CELL / "rows.jsonl"), 120)
    os.kill(ranks(process.pid)[1], signal.SIGTERM)  # one is asked, all stop
    finish(process, 75, 60)
    (event,) = tiny.events(workdir / CELL, "interrupted")
    command = [sys.executable, "-m", "experiments.worker", str(workdir), "--cells", CELL]
    subprocess.run(command, cwd=tiny.ROOT, env=tiny.environment(), check=True, timeout=120)
    (resumed,) = tiny.events(workdir / CELL, "resume")
    assert resumed["step"] == event["step"] < 30
    (marked,) = tiny.events(workdir / CELL, "not_bit_exact")
    assert "devices: 2 -> 1" in marked["what"]
    one, both = tiny.rows(finished / CELL), tiny.rows(workdir / CELL)
    assert one.keys() == both.keys()
    for key in (key for key in one if key[3] == "train"):
        assert abs(float.fromhex(one[key][0]) - float.fromhex(both[key][0])) < 1e-5


@pytest.mark.slow
def test_ten_random_kills_of_two_processes(finished, tmp_path):
    """Each of ten attempts loses one process at a random moment; fails if one of them hangs, or if
    an end has other bits than the undisturbed one.
    """
    reference, rng, resumed = on_devices(finished, tmp_path / "reference", 2), random.Random(5), 0
    for trial in range(10):
        workdir = tiny.unfinished(finished, tmp_path / str(trial), CELL)
        process = start(workdir, 2)
        tiny.until(lambda p=process: len(ranks(p.pid)) == 2)
        pid = rng.choice(ranks(process.pid))
        tiny.until(lambda w=workdir: tiny.size(w / CELL / "rows.jsonl"), 120)
        time.sleep(rng.random())
        if process.poll() is None:
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=60)
        assert ranks(process.pid) == []
        if not (workdir / CELL / "result.json").exists():
            finish(start(workdir, 2), 0, 300)
        resumed += bool(tiny.events(workdir / CELL, "resume"))
        assert_same(workdir / CELL, reference)
    assert resumed
