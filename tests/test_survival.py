"""Time to emergence: planted waiting times, censoring, and who cannot."""

import numpy as np
import pandas as pd
import pytest
from statsmodels.duration.survfunc import survdiff

from lm.config import UserError
from lm.emergence import survival

GRID = [10.0, 20.0, 40.0, 80.0, 160.0, 320.0]


def study(waits, grid=GRID, diverged=()):
    """Every evaluation of {params: [time of emergence or inf]}: .25 before it, .9 from it on."""
    rows = [
        {
            **{"point": f"p{params}", "replica": replica, "params": params, "step": int(t)},
            **{"tokens": t * 100, "value": 0.9 if t >= wait else 0.25, "chance": 0.25},
            **{
                "task": "recall",
                "level": "5",
                "metric": "exact_match",
                "format": 0,
                "role": "ladder",
            },
            "status": "diverged" if (params, replica) in diverged and t > 20 else "ok",
        }
        for params, times in waits.items()
        for replica, wait in enumerate(times)
        for t in grid
    ]
    return pd.DataFrame(rows)


def test_times_are_bracketed_by_the_grid_and_censored():
    """Catches the evaluation before in place of that after, and a run that diverged counted as
    one that was watched to the end.
    """
    frame = study({400: [15, np.inf, 5], 800: [np.inf]}, diverged=[(800, 0)])
    found = survival.emergence_times(frame[frame["status"] == "ok"], "tokens", 0.5)
    assert [(t.before, t.time, t.emerged) for t in found] == [
        (1000, 2000, True),
        (32000, 32000, False),
        (0, 1000, True),
        (2000, 2000, False),
    ]
    small = survival.survival(frame, "recall", "5", axis="step").sizes[1]
    assert (small.params, small.watched, small.curve.replicas) == (800, 20, 1)


def test_who_cannot_and_who_has_not_yet():
    """Catches a run that ended early called unable, and a size that needs no patience."""
    waits = {400: [np.inf] * 3, 800: [30, np.inf, 30], 1600: [15] * 3, 3200: [np.inf] * 2}
    found = survival.survival(study(waits), "recall", "5", axis="step")
    assert found.threshold == pytest.approx(0.25 + 0.65 / 2)
    assert [one.outcome for one in found.sizes] == ["cannot", "split", "emerged", "not yet"]
    assert [one.curve.median for one in found.sizes] == pytest.approx(
        [np.nan, 40, 20, np.nan], nan_ok=True
    )
    assert (found.sizes[1].grid, found.sizes[1].watched) == (20, 320)
    short = survival.survival(study(waits, GRID[:3]), "recall", "5", axis="step")
    assert short.sizes[0].outcome == "not yet"


def test_the_curve_is_that_of_a_textbook():
    """Catches censored runs counted as events or dropped (Freireich 1963, 6-MP arm)."""
    time = [6, 6, 6, 6, 7, 9, 10, 10, 11, 13, 16, 17, 19, 20, 22, 23, 25, 32, 32, 34, 35]
    seen = [1, 1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0]
    found = survival.kaplan_meier(time, seen)
    assert found.survival == pytest.approx(
        [0.857, 0.807, 0.753, 0.690, 0.627, 0.538, 0.448], abs=1e-3
    )
    assert (found.median, found.median_ci) == (23, (13, np.inf))
    placebo = [1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23]
    test = survival.log_rank(time + placebo, seen + [1] * 21, [0] * 21 + [1] * 21)
    assert test.chi2 == pytest.approx(16.79, abs=0.01) and test.freedom == 1
    assert test.p == 0.001 and test.p_chi2 < 1e-4
    three = [0, 1, 2] * 14
    chi2, p = survdiff(np.array(time + placebo), np.array(seen + [1] * 21), np.array(three))
    test = survival.log_rank(time + placebo, seen + [1] * 21, three)
    assert (test.chi2, test.p_chi2) == pytest.approx((chi2, p))


def test_planted_weibull_times_are_covered():
    """Catches a median without the censored runs: 95% within the scatter of 150 samples."""
    rng = np.random.default_rng(0)
    truth = 100 * np.log(2) ** (1 / 1.5)
    hits, middle = 0, []
    for _ in range(150):
        time = 100 * rng.weibull(1.5, 20)
        limit = rng.uniform(50, 300, 20)
        found = survival.kaplan_meier(np.minimum(time, limit), time <= limit)
        hits += found.median_ci.low <= truth <= found.median_ci.high
        middle.append(found.median)
    assert 0.9 < hits / 150 <= 1
    assert np.nanmedian(middle) == pytest.approx(truth, rel=0.06)


def test_the_log_rank_keeps_its_level_and_finds_a_hazard():
    """Catches chi² relied on with three replicas a size (16% at 5%), and a test without power."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(4), 3)

    def found(scale, group, seed=0):
        time = np.minimum(rng.exponential(scale), 150.0)
        return survival.log_rank(time, time < 150, group, 199, seed)

    null = [found(np.full(12, 100.0), group, i) for i in range(200)]
    assert 0.01 < np.mean([one.p < 0.05 for one in null]) < 0.09
    assert np.mean([one.p_chi2 < 0.05 for one in null]) > 0.1
    faster = np.repeat([300.0, 100, 50, 25], 8)
    assert np.mean([found(faster, np.repeat(np.arange(4), 8)).p < 0.05 for _ in range(20)]) > 0.8


def test_ends_have_a_defined_result():
    """Catches a traceback where nobody emerges, everybody does at once, or one replica is left."""
    nobody = survival.kaplan_meier([5.0, 6], [False, False])
    assert np.isnan(nobody.median) and nobody.median_ci.high == np.inf and nobody.emerged == 0
    at_once = survival.kaplan_meier([5.0, 5], [True, True])
    assert (at_once.median, at_once.survival.tolist()) == (5, [0])
    one = survival.survival(study({400: [15]}), "recall", "5")
    assert one.sizes[0].outcome == "emerged" and np.isnan(one.log_rank.p)
    for case in ([5.0, 6], [False] * 2, [0, 1]), ([5.0, 1], [True] * 2, [0, 1]), ([5.0], [1], [0]):
        p = survival.log_rank(*case).p
        assert np.isnan(p) or 0 <= p <= 1
    assert np.isnan(survival.log_rank([5.0, 6], [True, False], [1, 1]).p)
    with pytest.raises(UserError):
        survival.kaplan_meier([], [])
    with pytest.raises(UserError):
        survival.kaplan_meier([np.nan], [True])
    with pytest.raises(UserError, match="no finite"):
        survival.survival(study({400: [15]}), "recall", "6")
    with pytest.raises(UserError, match="no chance"):
        survival.survival(study({400: [15]}).assign(chance=np.nan), "recall", "5")
    assert survival.survival(
        study({400: [15]}).assign(chance=np.nan), "recall", "5", mark=0.5
    ).sizes
