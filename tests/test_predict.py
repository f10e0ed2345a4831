"""Predictions of larger sizes: what they say, how they are frozen, and how they are scored."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
from scipy import special, stats

from lm.config import UserError
from lm.emergence import forecast, planted, predict, predict_score
from lm.emergence.shapes import Curve
from lm.emergence.table import RowWriter
from lm.rundir import write_json

SIZES = [400, 1000, 2500, 6000, 15_000, 40_000]


def curve(kind, levels, seeds=3, floor=0.25, n=1000, scatter=0.01):
    """A curve over half-decades with these levels, seeds scattered around each."""
    rng = np.random.default_rng(0)
    x = np.repeat(2.5 + 0.5 * np.arange(len(levels)), seeds)
    y = np.repeat(np.array(levels, float), seeds) + scatter * rng.standard_normal(len(x))
    y = np.round(np.clip(y, 0, 1) * n) / n if kind == "rate" else np.maximum(y, 0)
    return Curve("rate" if kind == "rate" else "continuous", x, y, np.full(len(x), float(n)), floor)


def test_an_onset_not_yet_seen_may_come():
    """Catches "flat forever", an onset that is expected at once, and one that the next size and a
    far one have the same chance of.
    """
    draws = forecast.forecast("rate", curve("rate", [0.25] * 5), np.array([4.6, 5.5, 7.4]))
    jumped = (draws > 0.5).mean(1)
    assert jumped[0] < 0.1 < jumped[1] < jumped[2] < 0.6
    assert np.median(draws[0]) == pytest.approx(0.25, abs=0.02)


def test_a_loss_may_jump_too():
    """Catches a text law or a line that is certain of what it never saw."""
    (draws,) = forecast.forecast("loss", curve("loss", [2.0, 1.98, 1.96, 1.95]), np.array([5.0]))
    assert np.median(draws) == pytest.approx(1.92, abs=0.06) and 0.03 < (draws < 1.2).mean() < 0.4


def test_what_is_solved_stays_solved():
    """Catches a tail that opens on both sides of a finished transition."""
    own = curve("rate", [0.25, 0.25, 0.25, 0.97, 0.97, 0.97])
    (draws,) = forecast.forecast("rate", own, np.array([6.0]))
    assert (np.abs(draws - 0.97) < 0.05).mean() > 0.9


def test_split_seeds_are_predicted_split():
    """Catches a normal interval around a mean that no seed has."""
    rng = np.random.default_rng(0)
    x = np.repeat(2.5 + 0.4 * np.arange(6), 8)
    through = rng.random(48) < np.repeat([0, 0, 0, 0.25, 0.4, 0.5], 8)
    own = Curve("rate", x, np.where(through, 0.9, 0.25), np.full(48, 1000.0), 0.25)
    (draws,) = forecast.forecast("rate", own, np.array([4.6]))
    assert (draws > 0.8).mean() > 0.3 and (draws < 0.4).mean() > 0.15
    assert ((draws > 0.45) & (draws < 0.75)).mean() < 0.2


def test_a_power_law_goes_on():
    """Catches a law that ignores its limit or its slope: alpha 0.1 without one."""
    x = np.repeat(2.5 + 0.4 * np.arange(7), 3)
    loss = 6 * 10 ** (-0.1 * x) * np.exp(np.random.default_rng(0).normal(0, 0.004, 21))
    law = Curve("continuous", x, loss, np.full(21, 100.0))
    (draws,) = forecast.forecast("law", law, np.array([5.9]))
    low, high = np.quantile(draws, [0.025, 0.975])
    assert low < 6 * 10**-0.59 < high and high / low < 1.3


@pytest.mark.parametrize("kind", ["rate", "loss", "law"])
@pytest.mark.filterwarnings("error")
def test_degenerate_curves_have_a_prediction(kind, monkeypatch):
    """Catches NaN, a warning or a traceback where all values are equal, 0, 1 or from one seed, and
    where chance is 0 or 1.
    """
    for name, value in {"FIRST": 400, "PARTICLES": 60, "DRAWS": 200}.items():
        monkeypatch.setattr(forecast, name, value)
    for level, floor, n in ((0.0, 0.0, 1000), (1.0, 1.0, 10), (0.5, 0.5, 1)):
        own = curve(kind, [level] * 4, seeds=1, floor=floor, n=n, scatter=0)
        draws = forecast.forecast(kind, own, np.array([4.5, 9.0]))
        assert np.isfinite(draws).all() and (draws >= 0).all() and (np.diff(draws) >= 0).all()
        assert kind != "rate" or (draws <= 1).all()


def test_the_sampler_knows_a_posterior_in_closed_form():
    """Catches a wrong evidence, acceptance or temperature: h heads and t tails of two coins under a
    uniform prior, Beta(h + 1, t + 1) each.
    """
    rng = np.random.default_rng(0)
    for heads, tails, near in ((7, 3, 0.1), (70_000, 30_000, 0.5)):

        def loglik(z, heads=heads, tails=tails):
            return (heads * np.log(z) + tails * np.log1p(-z)).sum(1)

        z, evidence = forecast.temper(loglik, 2, rng)
        exact = stats.beta(heads + 1, tails + 1)
        assert evidence == pytest.approx(2 * special.betaln(heads + 1, tails + 1), abs=near)
        assert z.mean() == pytest.approx(exact.mean(), abs=0.3 * exact.std())
        assert z.std(0).mean() == pytest.approx(exact.std(), rel=0.2)


def test_scores_are_those_of_a_normal():
    """Catches a CRPS, a log score or an interval that is not of the quantiles it was given."""
    at = ("t", "1", "nll", "onset", 100, 0.5)
    quantiles = 10 + stats.norm.ppf((np.arange(100) + 0.5) / 100)
    middle, far = (predict_score.score_one(at, quantiles, 10.0 + d) for d in (0.0, 3.0))
    assert middle.crps == pytest.approx((np.sqrt(2) - 1) / np.sqrt(np.pi), abs=0.005)
    assert middle.log_score == pytest.approx(0.5 * np.log(2 * np.pi), abs=0.1)
    assert middle.in80 and middle.in95 and not far.in80 and not far.in95
    assert middle.width == pytest.approx(2 * 1.2816, abs=0.01)
    assert far.error == pytest.approx(-3 / 13) and far.crps > 2
    point = predict_score.score_one(at, np.full(100, 0.5), 0.0)
    assert point.crps == pytest.approx(0.5) and np.isnan(point.error)
    assert point.log_score == predict_score.WORST


def test_baselines_know_their_scatter():
    """Catches a line or a last value that is certain: 80% must hold 80% where it is right."""
    x, rng = np.repeat(np.linspace(3, 5, 6), 5), np.random.default_rng(0)
    at = (np.arange(100) + 0.5) / 100
    hits = []
    for _ in range(100):
        y = 5 - x + 0.1 * rng.standard_normal(30)
        own = Curve("continuous", x, y, np.full(30, 100.0))
        low, high = predict_score.central(predict_score._line(own, np.array([5.5]), at)[0], 0.8)
        hits.append(low <= -0.5 + 0.1 * rng.standard_normal() <= high)
    assert 0.68 < np.mean(hits) < 0.92
    last = predict_score._last(own, np.array([6.0]), at)[0]
    assert np.median(last) == pytest.approx(own.means[-1] - 0.4, abs=0.1)


@pytest.fixture(scope="module")
def tested():
    """A back-test of one short planted ladder of each kind."""
    kinds = ("sharp", "smooth", "power", "flat")
    ladders = [planted.plant(kind, 1, sizes=6, seeds=4).rows.assign(task=kind) for kind in kinds]
    return predict_score.backtest(pd.concat(ladders))


def test_back_tested_intervals_cover(tested):
    """Catches intervals that do not hold what they say, and a loss to the baselines over all (200
    ladders by hand: docs/emergence.md has the figures).
    """
    own = [s for s in tested if s.model == "onset"]
    assert 0.6 < np.mean([s.in80 for s in own]) < 0.99 and np.mean([s.in95 for s in own]) > 0.8
    for model in ("last", "line"):
        other = [s for s in tested if s.model == model]
        assert sum(s.crps for s in own) < sum(s.crps for s in other)
        assert [s.value for s in other] == [s.value for s in own]


def test_a_back_test_sees_nothing_beyond_its_cut(tested):
    """Catches a floor or a curve fitted on what is predicted, and a lost cut or seed."""
    own = [s for s in tested if (s.model, s.task, s.metric) == ("onset", "flat", "exact_match")]
    assert len(own) == (2 + 1) * 4 and len({round(s.distance, 3) for s in own}) == 3
    rows = planted.plant("flat", 1, sizes=6, seeds=4).rows
    rows = rows[rows["metric"] == "exact_match"].assign(task="flat")
    beyond = rows["params"] == rows["params"].max()
    changed = predict_score.backtest(rows.assign(value=rows["value"].mask(beyond, 1.0)))
    again = [s for s in changed if s.model == "onset"]
    assert [s.median for s in again] == [s.median for s in own]


def test_a_summary_pools_by_task_and_distance(tested):
    """Catches a part that is lost or counted twice, and a skill against the wrong baseline."""
    table = predict_score.summary(tested)
    pooled = table[(table["beyond"] == "all") & (table["task"] == "all")]
    assert len(pooled) == 2 * 3 and pooled["n"].sum() == len(tested)
    parts = table[(table["beyond"] != "all")]
    assert parts["n"].sum() == len(tested) and (table["task"] == "flat/1").sum() == 6
    line = pooled[pooled["model"] == "line"]
    assert (line["skill"] == 0).all()


def make(folder, begun=SIZES):
    """A run directory of six planted sizes, of which some have finished."""
    points = [
        {"name": f"2x{i}", "role": "ladder", "layers": 2, "width": i, "params": params}
        for i, params in enumerate(SIZES)
    ]
    cells = {p["name"]: [p["name"]] for p in points}
    study = {"name": "planted", "fingerprint": "f", "points": points, "cells": cells}
    folder.mkdir(parents=True)
    write_json(folder / "study.json", study)
    for point in points:
        if point["params"] in begun:
            finish(folder, point)
    return folder


def finish(folder, point, time="2026-01-01T00:00:00.000+00:00"):
    """Trains one point, as it were."""
    level = 0.25 if point["params"] < 3000 else 0.95
    values = level + 0.01 * np.random.default_rng(point["params"]).standard_normal(4)
    rows = planted.table({"exact_match": {point["params"]: values}}, task="recall")
    rows = rows.assign(cell=point["name"], point=point["name"])
    cell = folder / point["name"]
    cell.mkdir()
    with RowWriter(cell / "rows.jsonl") as file:
        records = rows.to_dict("records")
        file.append([{k: None if v != v else v for k, v in row.items()} for row in records])
    write_json(cell / "config.json", {})
    write_json(cell / "environment.json", [{"time": time}])
    write_json(cell / "result.json", {"status": "done", "replicas": []})


def test_a_prediction_is_frozen_and_scored(tmp_path, lm):
    """Catches a prediction that is written again, one made after its target began that counts as
    pre-registered, one that lacks a size, and a changed file that is scored.
    """
    workdir = make(tmp_path / "run", SIZES[:5])
    study = json.loads((workdir / "study.json").read_text())
    command = ("predict", workdir, "--up_to=2x3", "--json")
    first = lm(*command, "--sizes=1e6").json
    assert [t["params"] for t in first["targets"]] == [15_000, 40_000, 1e6]
    assert [t["begun"] for t in first["targets"]] == [["2x4"], [], []]
    assert first["new"] and first["sizes"] == SIZES[:4] and first["up_to"]["params"] == 6000
    assert {"git_commit", "version", "time", "fingerprint", "rows_sha256"} <= first.keys()
    entry = first["predictions"][0]
    assert entry["i95"][0] <= entry["i80"][0] <= entry["median"] <= entry["i80"][1]
    assert all(len(q) == predict_score.QUANTILES for q in entry["quantiles"].values())
    again = lm(*command, "--sizes=1e6").json
    assert not again["new"] and again["path"] == first["path"]
    assert len(list((workdir / "predictions").iterdir())) == 1
    finish(workdir, study["points"][5], time="2999-01-01T00:00:00.000+00:00")
    scores, problems = predict.score(workdir)
    assert problems == [] and len(scores) == 2 * 4 * 3
    assert {s.params: s.registered for s in scores} == {15_000: False, 40_000: True}
    found = lm("predict", workdir, "--json").json
    assert (
        {row["n"] for row in found["registered"]} == {4} == {row["n"] for row in found["post_hoc"]}
    )
    assert "pre-registered" in lm("predict", workdir).out
    (path,) = (workdir / "predictions").iterdir()
    path.write_text(path.read_text().replace('"median": 0', '"median": 1', 1))
    done = lm("predict", workdir)
    assert done.code == 1 and "has changed since it was written" in done.out
    assert predict.score(workdir)[0] == []


def test_a_target_that_began_in_secret_is_post_hoc(tmp_path):
    """Catches trust in what a file says of itself where the cell's own clock says otherwise."""
    workdir = make(tmp_path / "run", SIZES[:5])
    predict.freeze(workdir, "2x4")
    point = json.loads((workdir / "study.json").read_text())["points"][5]
    finish(workdir, point, time="2001-01-01T00:00:00.000+00:00")
    assert [s.registered for s in predict.score(workdir)[0]] == [False] * 12
    shutil.rmtree(workdir / "2x5")
    assert predict.score(workdir) == ([], [])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((), "--up_to is missing"),
        (("--up_to=2x2",), "3 sizes up to 2x2 are finished"),
        (("--up_to=1",), "0 sizes up to 1 are finished"),
        (("--up_to=1e9",), "no size of .* is larger than 1e9"),
        (("--up_to=9x9",), "'9x9' is no size of study planted"),
        (("--up_to=nan",), "must be a positive number"),
        (("--up_to=-5",), "must be a positive number"),
        (("--up_to=2x3", "--task=recal"), "no task 'recal' is finished"),
        (("--up_to=2x3", "--sizes=1e5,big"), "'big' is no size"),
        (("--up_to=2x3", "--backtest"), "exclude each other"),
        (("--wrong",), "unrecognized arguments"),
    ],
)
def test_what_cannot_be_predicted_is_refused(tmp_path, lm, args, said):
    """Catches a traceback, or a prediction from too little."""
    import re

    workdir = make(tmp_path / "run")
    assert re.search(said, lm("predict", workdir, *args).refusal)


def test_a_folder_without_a_study_is_refused(tmp_path, lm):
    """Catches a traceback for a folder that is no workdir, and for a study without rows."""
    assert "has no study.json" in lm("predict", tmp_path, "--up_to=2x3").refusal
    empty = make(tmp_path / "run", [])
    assert "no task has 5 finished sizes" in lm("predict", empty, "--backtest").refusal
    with pytest.raises(UserError, match="0 sizes"):
        predict.freeze(empty, "2x3")
