"""`lm eval`: abilities that are thought of later, measured on the checkpoints a study kept."""

import contextlib
import dataclasses
import functools
import os
import random
import shutil
import signal
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from experiments.evaluate import check_params
from lm import tasks
from lm.config import UserError, build
from lm.data import tokenizer
from lm.emergence import metrics
from lm.emergence.rescore import rescore
from lm.eval.suite import evaluate, make_test_set
from lm.rundir import lock, read_json, write_json
from lm.sharding import make_mesh
from lm.train import checkpoint, loop, mixture
from lm.train.cell import TEXT, Cell, MixtureConfig
from lm.train.population import replica
from lm.train.program import compile_scoring, make_cell_population, scoring_rows

NEW = ("parity/10", "reversed_addition/1")
KEYS = [("parity", "10", 0), ("reversed_addition", "1", 0)]


def cell_of(workdir: Path, name: str = "2x4") -> Cell:
    return build(Cell, read_json(workdir / name / "config.json"), name)


def measured_directly(workdir: Path, name: str, step: int) -> dict[tuple, tuple]:
    """Every row that the new tasks should have: items as a study makes them, in one test set with
    the study's own tasks and text, given to `lm.eval.suite` on the restored parameters.
    """
    cell, device = cell_of(workdir, name), jax.devices()[:1]
    prepared = mixture.load(cell, workdir / "data")
    packs = {key: test for key, test in prepared.test.items() if key[0] != TEXT}
    assert not set(KEYS) & set(packs)
    for key in KEYS:
        packs[key] = mixture.prepare_test(cell, workdir / "data", tasks.task(*key), 16)
    test = make_test_set(packs, prepared.test[TEXT, "", 0], 16, cell.eval.batch)
    program = compile_scoring(cell, scoring_rows(cell), device)
    found = {}
    with jax.set_mesh(program.mesh):
        states = checkpoint.load(workdir / name / "checkpoints", step, program.states)
        for index, who in enumerate(cell.replicas):
            answers, _ = evaluate(program.score, replica(states.params, index), test)
            for key in KEYS:
                for metric, m in metrics.score(answers[key]).items():
                    numbers = [None if np.isnan(x) else x.hex() for x in (m.value, m.stderr)]
                    found[who.point, who.index, step, *key, metric] = (*numbers, m.n)
    return found


def begun(cells: list[Path], process: subprocess.Popen) -> bool:
    """Whether somebody evaluates, or did."""
    return process.poll() is not None or any(map(tiny.worker, cells))


def new_rows(workdir: Path, name: str) -> dict[tuple, tuple]:
    """Rows of the new tasks: identity -> value, error (as hex) and number of items."""
    every = tiny.rows(workdir / name)
    return {key: (*row[:2], row[3]) for key, row in every.items() if key[3:6] in KEYS}


def kill_after_an_evaluation(workdir: Path, process: subprocess.Popen) -> None:
    """SIGKILL for the process that evaluates, when it has done at least one replica."""
    tiny.until(lambda: tiny.events(workdir / "2x4", "evaluated") or process.poll() is not None)
    for name in tiny.CELLS:
        if pid := tiny.worker(workdir / name):
            os.kill(pid, signal.SIGKILL)


def test_killed_and_given_again_it_measures_what_the_suite_says(finished, tmp_path, lm):
    """Fails if a kill loses or doubles a row, if an old row changes, if new rows are not those of
    the items that the study would have had, or if the report and the readers of answers miss them.
    """
    workdir = shutil.copytree(finished, tmp_path / "run")
    command = ["eval", workdir, f"--tasks={','.join(NEW)}"]
    with tiny.start(*command) as process:
        kill_after_an_evaluation(workdir, process)
        process.communicate(timeout=60)
    assert process.returncode == 1
    done = lm(*command, "--json").json
    assert done["evaluated"] + done["there"] == 2 * 2 * 2 and done["there"] >= 1
    for name in tiny.CELLS:
        every, old = tiny.rows(workdir / name), tiny.rows(finished / name)
        want = {
            k: r for step in (20, 30) for k, r in measured_directly(workdir, name, step).items()
        }
        assert new_rows(workdir, name) == want and len(every) == len(old) + len(want)
        assert old.items() <= every.items()
        assert tiny.events(workdir / name, "replay_mismatch") == []
        assert len(tiny.events(workdir / name, "evaluated")) == 4
    assert lm(*command, "--json").json == {"evaluated": 0, "there": 8, "left_out": []}

    assert lm("verify", workdir).code == 0
    verdicts = {(v["task"], v["level"]) for v in lm("report", workdir, "--json").json["verdicts"]}
    assert {key[:2] for key in KEYS} < verdicts
    frame = rescore(workdir)  # reads the stored answers of every task, old and new
    assert set(KEYS) <= set(zip(frame["task"], frame["level"], frame["format"], strict=True))
    rows = [r for r in frame.to_dict("records") if r["metric"] == "exact_match"]
    chance = {t["task"]: t["chance"] for t in read_json(workdir / "study.json")["tasks"]}
    assert all(r["chance"] == chance[r["task"]] for r in rows if r["task"] == "parity")


def test_items_are_those_that_the_study_would_have_had(finished, tmp_path):
    """Fails if another seed, split, number, order or tokenizer than the study's own draws them, or
    if the choices are not listed in the same way.
    """
    cell = cell_of(finished)
    cell = dataclasses.replace(cell, data=dataclasses.replace(cell.data, length=64))
    more = {**cell.data.mixture, "new": MixtureConfig("parity", 1, "10", examples=20, formats=2)}
    had = dataclasses.replace(cell, data=dataclasses.replace(cell.data, mixture=more))
    mixture.prepare(had, tmp_path)
    shutil.copytree(
        mixture.folder(had, tmp_path) / "tokenizer", mixture.folder(cell, tmp_path) / "tokenizer"
    )
    prepared = mixture.load(had, tmp_path)
    for format in (0, 1):
        want = prepared.test["parity", "10", format]
        found = mixture.prepare_test(cell, tmp_path, tasks.task("parity", "10", format), 16)
        assert found.about["choices"] == want.about["choices"] and want.documents == 16
        for name in ("tokens", "doc_start", "weight", "row_start"):
            np.testing.assert_array_equal(getattr(found, name), getattr(want, name))


REFUSALS = {
    "an unknown task": (["--tasks=party/10"], "'party/10'", "did you mean 'parity/10'?"),
    "no level": (["--tasks=parity"], "'parity'", "did you mean 'parity/10'?"),
    "no task": (["--tasks=,"], "--tasks is ','", "--tasks=hop/2"),
    "a task it had": (["--tasks=recall/3"], "measured recall/3", "name a task that it had not"),
    "no items": (["--tasks=hop/2", "--items=0"], "--items is 0", "at least 1"),
    "six formats": (["--tasks=hop/2", "--formats=6"], "--formats is 6", "between 1 and 5"),
    "a step that is gone": (["--tasks=hop/2", "--steps=10"], "no checkpoint of step 10", "20, 30"),
    "a word for steps": (["--tasks=hop/2", "--steps=first"], "'first'", "all, last"),
    "an argument": (["--tasks=hop/2", "--stops=last"], "--stops=last", "lm eval --help"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_cannot_be_measured_is_refused(finished, lm, case):
    """Fails if a check is lost, or comes when something is written."""
    arguments, *words = REFUSALS[case]
    before = tiny.snapshot(finished)
    sentence = lm("eval", finished, *arguments).refusal
    assert all(word in sentence for word in words), sentence
    assert tiny.snapshot(finished) == before


def test_a_workdir_that_is_not_ready_is_refused(finished, tmp_path, lm):
    """Fails if an evaluation goes beside a running study, or without anything to evaluate."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    with lock(workdir / "lock", "lm run tiny"):
        sentence = lm("eval", workdir, "--tasks=hop/2").refusal
        assert "(lm run tiny)" in sentence and "wait until it ends" in sentence
    for name in tiny.CELLS:
        (workdir / name / "result.json").rename(workdir / name / "r")
    assert "no cell of" in lm("eval", workdir, "--tasks=hop/2").refusal
    for name in tiny.CELLS:
        (workdir / name / "r").rename(workdir / name / "result.json")
    shutil.rmtree(workdir / "1x4" / "checkpoints")
    assert "1x4 has no checkpoint" in lm("eval", workdir, "--tasks=hop/2").refusal
    study = read_json(workdir / "study.json")
    entry = {"task": "hop", "level": "2", "format": 0, "items": 9, "time": ""}
    write_json(workdir / "study.json", study | {"evaluated": [entry]})
    sentence = lm("eval", workdir, "--tasks=hop/2").refusal
    assert "was evaluated with 9 items, not 16" in sentence and "give --items=9" in sentence
    del study["cell_configs"]
    write_json(workdir / "study.json", study)
    assert "no checkpoints to evaluate" in lm("eval", workdir, "--tasks=hop/2").refusal


def test_what_the_tokenizer_or_a_row_cannot_hold_is_refused(finished, tmp_path):
    """Fails if a model is asked in tokens it never saw, or an item is cut."""
    cell = cell_of(finished)
    trained = tokenizer.load(mixture.folder(cell, finished / "data") / "tokenizer")
    lacking = tokenizer.train(["abc 01"], trained.config, "abc 01\n")
    lacking.save(mixture.folder(cell, tmp_path) / "tokenizer")
    with pytest.raises(UserError, match="reversed_addition/1 writes '.', which the study's token"):
        mixture.prepare_test(cell, tmp_path, tasks.task("reversed_addition", "1"), 4)
    short = dataclasses.replace(cell, data=dataclasses.replace(cell.data, length=8))
    trained.save(mixture.folder(short, tmp_path) / "tokenizer")
    with pytest.raises(UserError, match=r"parity/10 has an item of \d+ tokens .* holds 9; choose"):
        mixture.prepare_test(short, tmp_path, tasks.task("parity", "10"), 4)


def test_other_final_parameters_than_those_of_the_result_are_refused(finished):
    """Fails if a checkpoint that came from elsewhere is measured under this study's name."""
    cell, mesh = cell_of(finished), make_mesh("replicated", jax.devices()[:1])
    shapes = make_cell_population(cell, mesh).states
    folder = finished / "2x4"
    check_params(folder, checkpoint.load(folder / "checkpoints", 30, shapes))
    with pytest.raises(UserError, match="not hold the parameters of its result.json .replica 0 of"):
        check_params(folder, checkpoint.load(folder / "checkpoints", 20, shapes))


def test_keeping_checkpoints_changes_no_bit(finished, tmp_path):
    """Fails if a checkpoint more, at a step that is kept, changes a row or a parameter, or if one
    of those that are to stay is not there.
    """
    cell = cell_of(finished, "1x4")
    cell = dataclasses.replace(cell, train=dataclasses.replace(cell.train, keep_every=8))
    loop.train(cell, tmp_path, finished / "data", devices=jax.devices()[:1])
    assert checkpoint.sealed_steps(tmp_path / "checkpoints") == [0, 5, 10, 20, 30]
    assert tiny.rows(tmp_path) == tiny.rows(finished / "1x4")
    assert tiny.params(tmp_path) == tiny.params(finished / "1x4")


@pytest.mark.slow
def test_ten_random_kills(finished, tmp_path, lm):
    """Each of ten evaluations is killed at a random moment, twice, and given again; all must end
    with the rows and the answers of an undisturbed one. Fails like the quick one.
    """
    command = [f"--tasks={','.join(NEW)},hop/2", "--formats=3"]
    whole = shutil.copytree(finished, tmp_path / "whole")
    assert lm("eval", whole, *command).code == 0
    rng, hits = random.Random(9), 0
    for trial in range(10):
        workdir = shutil.copytree(finished, tmp_path / str(trial))
        for _ in range(2):
            with tiny.start("eval", workdir, *command) as process:
                folders = [workdir / name for name in tiny.CELLS]
                tiny.until(functools.partial(begun, folders, process))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(5 * rng.random())
                for pid in filter(None, (tiny.worker(workdir / n) for n in tiny.CELLS)):
                    os.kill(pid, signal.SIGKILL)
                    hits += 1
                process.communicate(timeout=60)
        assert lm("eval", workdir, *command).code == 0
        for name in tiny.CELLS:
            assert tiny.rows(workdir / name) == tiny.rows(whole / name)
            stored = {p.name: p.read_bytes() for p in (workdir / name / "answers").iterdir()}
            assert stored == {p.name: p.read_bytes() for p in (whole / name / "answers").iterdir()}
        assert lm("verify", workdir).code == 0
        shutil.rmtree(workdir)
    assert hits >= 5
