"""Tables with a planted truth, and the bench that measures the statistics on them."""

import json

import numpy as np
import pytest

from lm import bench
from lm.emergence import onset, planted
from lm.emergence.table import COLUMNS, check


def means(plant, metric="exact_match"):
    rows = plant.rows[plant.rows["metric"] == metric]
    return rows.groupby("params")["value"].mean()


@pytest.mark.parametrize("kind", planted.KINDS)
def test_rows_have_the_columns_of_a_study(kind):
    """Catches a column of the table that planted rows lack, or hold in another type."""
    rows = planted.plant(kind, 0, sizes=6, seeds=2).rows
    assert list(rows.columns) == list(COLUMNS)
    check(rows.astype(object).where(rows.notna(), None).iloc[0].to_dict())


@pytest.mark.parametrize("kind", ["sharp", "induced", "mirage"])
@pytest.mark.parametrize("seed", range(3))
def test_the_planted_onset_is_where_the_mean_is_halfway(kind, seed):
    """Catches a truth that is not that of the rows, against which coverage would be measured."""
    plant = planted.plant(kind, seed, sizes=40, seeds=30, chance=0.1)
    curve = means(plant)
    half = (curve.iloc[:3].mean() + curve.iloc[-3:].mean()) / 2
    at = np.interp(half, np.maximum.accumulate(curve), np.log10(curve.index))
    assert at == pytest.approx(np.log10(plant.onset), abs=0.05)


def test_a_mirage_is_a_power_of_a_steady_accuracy():
    """Catches exact match or loss that do not belong to the token accuracy beside them."""
    plant = planted.plant("mirage", 1, sizes=30, seeds=30, chance=0.0)
    exact, token = means(plant).to_numpy(), means(plant, "token_accuracy").to_numpy()
    real = (exact > 0.05) & (token < 0.98)
    length = np.log(exact[real]) / np.log(token[real])
    assert 8 <= np.median(length) <= 20 and np.ptp(length) < 0.25 * np.median(length)
    assert means(plant, "nll").to_numpy() == pytest.approx(-np.log(token), abs=0.02)
    assert (np.diff(token) > -0.01).all() and np.diff(token).max() < 0.1


def test_split_seeds_have_the_ability_or_have_it_not():
    """Catches split seeds that slide."""
    values = planted.plant("sharp", 0, sizes=12, seeds=20, split=True).rows.query(
        "metric == 'exact_match'"
    )["value"]
    top = values.max()
    assert ((abs(values - 0.25) < 0.08) | (abs(values - top) < 0.1)).all()


def test_missing_seeds_leave_one_of_each_size():
    """Catches a size that is lost altogether, and `missing` that loses none."""
    rows = planted.plant("line", 0, sizes=10, seeds=8, missing=0.9).rows
    left = rows[rows["metric"] == "nll"].groupby("params").size()
    assert len(left) == 10 and left.sum() < 30


def test_random_ladders_stay_within_their_ranges():
    """Catches a range other than the one that coverage was measured over."""
    drawn = [planted.draw("flat", seed).rows.query("metric == 'nll'") for seed in range(40)]
    sizes = {rows["params"].nunique() for rows in drawn}
    seeds = {rows.groupby("params").size().max() for rows in drawn}
    assert sizes == set(range(8, 13)) and min(seeds) >= 3 and max(seeds) <= 20
    assert drawn[3].equals(planted.draw("flat", 3).rows.query("metric == 'nll'"))


@pytest.mark.parametrize(("verdict", "code"), [("metric-induced", 1), ("emergent", 1)])
def test_the_bench_counts_what_the_verdicts_say(monkeypatch, capsys, verdict, code):
    """Catches a share of the wrong tables, and a miss that does not end in exit code 1."""
    shape = onset.Shape("exact_match", "hinge", 9, 9, 1, 1, onset.Interval(0, 1e9), 1, None)

    def judge(rows):
        rest = (0.25, np.nan, onset.NOWHERE, shape, None, 9, 9, 0, 3)
        return onset.Verdict("t", "1", verdict, "", *rest)

    monkeypatch.setattr(onset, "judge", judge)
    assert bench.main(["verdicts", "--tables=6", "--json"]) == code
    found = {one["what"]: one for one in json.loads(capsys.readouterr().out)}
    assert found["95% interval covers the onset"]["measured"] == 1
    induced = float(verdict == "metric-induced")
    assert found["mirages called metric-induced"]["measured"] == induced
    assert found["sharp onsets called emergent"]["measured"] == 1 - induced
    nulls = found["smooth nulls called emergent or metric-induced"]
    assert nulls["measured"] == 1 and nulls["ok"] is False
    assert found["split seeds, 50/50, found at 20"]["n"] == 6
