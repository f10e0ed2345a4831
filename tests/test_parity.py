"""The parity study and the runner of studies that train by themselves."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest

from experiments import inspect_run, own, parity, quanta, study
from experiments import workdir as shared
from lm.config import UserError
from lm.emergence import metrics, report, table
from lm.rundir import read_json, read_lines

FILE = Path(parity.__file__)
TINY = (
    *("widths=(2,4)", "task.tasks=3", "task.bits=6", "task.k=2", "train.steps=200"),
    *("train.batch=64", "train.chunk=50", "eval.items=64", "eval.first=50", "seeds.replicas=2"),
)


def tiny(*more: str) -> study.Study:
    return study.load(FILE, [f"--config.{text}" for text in (*TINY, *more)])


def trained(name: str, *more: str) -> tuple[own.Plan, dict]:
    """The plan of one point of the tiny study, and what a population has after two dispatches."""
    config = tiny(*more).config
    config.model.width = 8
    s = parity.settings(config)
    plan = parity.plan(config, {"name": name})
    states, keys = quanta.start(s, plan.replicas)
    masks = np.stack([quanta.draw_masks(s.task, who.data) for who in plan.replicas])
    run = jax.jit(quanta.population_run(s))
    begun = states.params
    for first in (0, s.train.chunk):
        states, _ = run(states, keys, masks, first)
    words = quanta.test_words(s)
    odd = np.asarray(quanta.population_logits(states.params, words)) > 0
    right = odd == (np.asarray(quanta.parity(words & masks[:, :, None])) > 0)
    found = {"begun": begun, "params": states.params}
    return plan, jax.tree.map(np.asarray, found) | {"accuracy": right.mean((1, 2))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A tiny study carried out with its worker in this process, without its page; read only."""
    folder = tmp_path_factory.mktemp("parity") / "run"
    with pytest.MonkeyPatch.context() as patch:
        assert carry_out(patch, tiny(), folder) == 0
    return folder


def carry_out(patch: pytest.MonkeyPatch, found: study.Study, folder: Path) -> int:
    def work(left, workdir, workers, command, console):
        assert command.argv[1:] == ("-m", "experiments.own", str(workdir), str(FILE))
        return own.worker(command.argv[3:])

    patch.setattr(shared, "work", work)
    patch.setattr(report, "main", lambda argv: 0)
    return own.main(found, str(folder), 1, False)


def test_labels_are_the_parity_of_the_bits_of_the_task():
    """Catches a wrong mask, a shifted bit, and tasks that share all their bits."""
    task = quanta.TaskConfig(tasks=24, bits=24, k=3, zipf=1.4)
    masks = quanta.draw_masks(task, 7)
    assert len(set(masks.tolist())) == 24
    assert all(int(mask).bit_count() == 3 and mask < 2**24 for mask in masks)
    assert (masks == quanta.draw_masks(task, 7)).all()
    assert (masks != quanta.draw_masks(task, 8)).any()
    words = np.random.default_rng(0).integers(0, 2**32, 500, np.uint32)
    for mask in masks[:5]:
        bits = [bit for bit in range(32) if int(mask) >> bit & 1]
        xor = np.bitwise_xor.reduce([(words >> bit) & 1 for bit in bits])
        assert (np.asarray(quanta.parity(words & mask)) == xor).all()


def test_a_batch_is_fresh_and_follows_zipf():
    """Catches thresholds off by one task, a stream that repeats, and labels of another task."""
    config = parity.get_config()
    config.train.batch = 20_000
    s = parity.settings(config)
    masks = jax.numpy.asarray(quanta.draw_masks(s.task, 0))
    task, word, label = map(np.asarray, quanta.batch(s, jax.random.key(0), masks, 3))
    counts = np.bincount(task, minlength=24)
    expected = s.task.frequency * len(task)
    assert counts.shape == (24,) and np.sum((counts - expected) ** 2 / expected) < 50  # p = .001
    assert (label == np.asarray(quanta.parity(word & np.asarray(masks)[task]))).all()
    assert abs(label.mean() - 0.5) < 0.02
    again, other = (quanta.batch(s, jax.random.key(0), masks, step)[1] for step in (3, 4))
    assert (np.asarray(again) == word).all() and (np.asarray(other) != word).mean() > 0.99


def test_the_network_is_one_hidden_layer_on_code_and_bits():
    """Catches a gather of the wrong row, a missing bias, and parameters that are not counted."""
    plan, found = trained("a", "seeds.replicas=1")
    p = {name: leaf[0] for name, leaf in found["params"].items()}
    assert sum(leaf.size for leaf in p.values()) == plan.params == 8 * (3 + 6 + 2) + 1
    word, task = np.array([0b101101, 0b000001], np.uint32), np.array([2, 0])
    x = (word[:, None] >> np.arange(6)) & 1
    first = np.concatenate([p["code"], p["bits"]])
    hidden = np.maximum(np.concatenate([np.eye(3)[task], x], 1) @ first + p["bias"], 0)
    logits = quanta.logit(jax.tree.map(jax.numpy.asarray, p), task, jax.numpy.asarray(word))
    np.testing.assert_allclose(logits, hidden @ p["out"] + p["out_bias"], rtol=1e-5, atol=1e-6)


def test_the_size_is_that_of_the_table():
    """Catches a ladder that is not 50 w + 1, and another number of FLOPs."""
    found = study.load(FILE)
    plans = [own.plan(found, point) for point in found.points]
    assert {101, 201, 401, 801, 1601, 3201, 6401} < {p.params for p in plans}
    assert plans[-1].flops_per_token == 3 * 2 * (24 * 256 + 256)
    assert {len(p.replicas) for p in plans} == {8} and {p.steps for p in plans} == {12_000}


def test_a_population_trains_like_each_of_its_replicas_alone():
    """Catches seeds that leak between replicas and a run that is not the same twice."""
    _, both = trained("a")
    _, again = trained("a")
    _, alone = trained("a", "seeds.replicas=1", "seeds.first=1")
    for name, leaf in both["params"].items():
        assert leaf.tobytes() == again["params"][name].tobytes()
        np.testing.assert_allclose(leaf[1], alone["params"][name][0], rtol=1e-5, atol=1e-6)
        first, second = both["begun"][name]
        assert not np.allclose(first, second), "two init seeds begin alike"


def test_two_bits_are_learned():
    """Catches an optimiser, a label or a loss that is wrong: XOR is learned in 800 steps."""
    _, found = trained("a", "task.tasks=1", "train.chunk=400", "optim.learning_rate=0.02")
    assert (found["accuracy"] > 0.95).all()


def test_measures_are_those_of_the_answers_of_a_language_model():
    """Catches a Brier score over one class, a wrong sign of the margin, NaN counted as wrong."""
    rng = np.random.default_rng(0)
    z, y = rng.normal(0, 3, 200), rng.integers(0, 2, 200)
    p = 1 / (1 + np.exp(-np.stack([-z, z], 1)))
    column = {
        "target": y[:, None],
        "logprob": np.log(p[np.arange(200), y])[:, None],
        "greedy": p.argmax(1)[:, None],
        "square": (p**2).sum(1)[:, None],
        "highest": np.log(p.max(1))[:, None],
        "decoded": p.argmax(1)[:, None],
    }
    expected = metrics.score(metrics.Answers(**column, choices=np.zeros((200, 0))))
    for name, measure in quanta.measures(z, y).items():
        np.testing.assert_allclose(measure, expected[name], rtol=1e-6)
    lost = quanta.measures(np.array([np.nan, 1.0]), np.array([0.0, 1.0]))
    assert all(np.isnan(measure.value) for measure in lost.values())


def test_the_run_directory_keeps_the_contract(finished, capsys):
    """Catches a file, a row or a field that status, verify, explain or the report miss."""
    frame = table.load(finished)
    final = frame[frame["step"] == 200]
    assert sorted(frame["step"].unique()) == [50, 100, 200]
    assert len(final) == 2 * 2 * (3 * 4 + 1 + 1)
    mean = final[final["task"] == "parity_mean"].set_index(["params", "replica"])["value"]
    each = final[(final["task"] == "parity") & (final["metric"] == "nll")]
    weight = np.array([1.0, 2**-1.4, 3**-1.4])
    for where, losses in each.sort_values("level").groupby(["params", "replica"])["value"]:
        assert mean[where] == pytest.approx(losses @ weight / weight.sum())
    chance = final[final["metric"] == "exact_match"]["chance"]
    assert (chance == 0.5).all() and set(final["role"]) == {"ladder"}
    seeds = final[["replica", "seed_init", "seed_data", "seed_dropout"]].drop_duplicates()
    assert seeds.to_numpy().tolist() == [[0, 0, 0, 0], [1, 1, 1, 0]]
    assert (final["flops"] == final["tokens"] * 6.0 * final["width"] * 7).all()
    capsys.readouterr()
    for verb, more in (("status", []), ("verify", []), ("explain", ["w4"])):
        assert getattr(inspect_run, verb)([str(finished), *more, "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        if verb == "status":
            assert [cell["state"] for cell in said["cells"]] == ["done", "done"]
        elif verb == "verify":
            assert said["ok"] and all(said["params_sha256"].values())
        else:
            assert said["chance"] == {f"parity.{level}": 0.5 for level in range(3)}
    verdicts = report.analyse(finished)["verdicts"]
    assert [v["level"] for v in verdicts] == ["0", "1", "2"]


def test_what_is_done_is_skipped_and_what_was_killed_begins_again(finished, tmp_path, monkeypatch):
    """Catches finished cells that are trained again, doubled rows and a resume with other bits."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = table.table_sha256(table.load(folder))
    done = (folder / "w2" / "result.json").stat().st_mtime_ns
    hashes = read_json(folder / "w4" / "result.json")["replicas"]
    (folder / "w4" / "result.json").unlink()
    rows = folder / "w4" / "rows.jsonl"
    rows.write_bytes(rows.read_bytes()[:-4000])
    assert carry_out(monkeypatch, tiny(), folder) == 0
    assert (folder / "w2" / "result.json").stat().st_mtime_ns == done
    assert read_json(folder / "w4" / "result.json")["replicas"] == hashes
    assert read_json(folder / "w4" / "result.json")["attempts"] == 2
    assert table.table_sha256(table.load(folder)) == before and not table.problems(folder)
    count = len(read_lines(rows)[0])
    assert count == len(table.load(folder)) / 2
    with pytest.raises(UserError, match="begun with another config"):
        own.main(tiny("optim.learning_rate=0.1"), str(folder), 1, False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("scale=huge", "scale is 'huge'; use 'full' or 'smoke'"),
        ("task.k=7", "no 3 different sets of 7 out of 6 bits"),
        ("task.bits=40", "bits is 40; an input is one word of at most 32"),
        ("widths=(0,)", "width"),
        ("train.batch=0", "batch"),
        ("seeds.replicas=0", "replicas"),
    ],
)
def test_bad_settings_give_one_sentence(text, words, capsys):
    """Catches a mistake that surfaces as a traceback, or only after the study has begun."""
    with pytest.raises(UserError, match=words) as error:
        own.main(tiny(text), None, None, True)
    assert "\n" not in str(error.value)


def test_a_bad_scale_names_file_and_line(monkeypatch):
    """Catches `line ?` where the study is given by a relative path, as on a command line."""
    monkeypatch.chdir(FILE.parents[1])
    for name in ("parity", "desk"):
        with pytest.raises(UserError, match=rf"experiments/{name}.py line \d+: .*use 'full'"):
            study.load(f"experiments/{name}.py", ["--config.scale=huge"])


def test_dry_run_counts_and_the_command_line_is_checked(capsys, tmp_path):
    """Catches a dry run that writes, and a missing --workdir that is a traceback."""
    assert own.main(tiny(), None, None, True) == 0
    assert "2 points, 4 replicas" in capsys.readouterr().out
    with pytest.raises(UserError, match="--workdir is missing"):
        own.main(tiny(), None, None, False)
    with pytest.raises(UserError, match="--workers is 0"):
        own.main(tiny(), str(tmp_path / "run"), 0, False)
    assert not (tmp_path / "run").exists()


def test_a_study_that_trains_itself_has_plan_and_train(tmp_path):
    """Catches half of the pair, which would fall through to training language models."""
    text = FILE.read_text().replace("def plan(", "def plans(")
    (tmp_path / "half.py").write_text(text)
    with pytest.raises(UserError, match="one of plan and train"):
        study.load(tmp_path / "half.py")
    assert study.load(FILE.with_name("desk.py")).train is None


def test_the_summary_finds_planted_counts_and_slope():
    """Catches a threshold, a rung or an axis mixed up in the figures of the notebook."""
    rows = []
    for params in (401, 1601, 3201):
        for replica in range(4):
            same = {"point": f"w{params}", "params": params, "replica": replica, "step": 10}
            for level in range(3):
                value = 0.95 if level <= replica % 2 else 0.6
                where = {"task": "parity", "level": str(level), "metric": "exact_match"}
                rows.append({**same, **where, "value": value})
            where = {"task": "parity_mean", "level": "zipf", "metric": "nll"}
            rows.append({**same, **where, "value": params**-0.5 * (1 + 0.1 * (replica - 1.5))})
    found = parity.summary(pd.DataFrame(rows), (401, 1601, 3201))
    assert found["learned"][1601] == [1, 2, 1, 2]
    assert found["slope"] == pytest.approx(-0.5) and found["ci95"] == pytest.approx([-0.5, -0.5])
    assert found["nll"][401][0] == pytest.approx(401**-0.5)
