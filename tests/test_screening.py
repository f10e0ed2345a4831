"""Linearity and breakthroughness: published values, their ends, their null."""

import numpy as np
import pandas as pd
import pytest

from lm.config import UserError
from lm.emergence import screening

STEP = [0.0] * 7 + [1.0]
ADDITION = {  # GPT-3, two-digit addition, eight sizes, per cent (Brown et al. 2020, table H.1)
    "zero-shot": [0.7, 0.65, 0.7, 0.85, 1.1, 2.54, 15.4, 76.9],
    "one-shot": [2.0, 0.55, 3.15, 4.0, 12.1, 19.6, 73.0, 99.6],
    "few-shot": [2.0, 4.1, 3.5, 4.5, 8.9, 11.9, 55.5, 100.0],
}


@pytest.mark.parametrize(
    ("y", "linear", "breaking"),
    [
        (np.arange(8.0), 7, 7),
        (-np.arange(8.0), -7, -7),
        (STEP, 7**0.5, np.inf),
        ([1.0, *STEP[:-1]], -(7**0.5), -np.inf),
        (ADDITION["zero-shot"], 3.21, 305.0),
        (ADDITION["one-shot"], 4.31, 13.21),
        (ADDITION["few-shot"], 4.14, 32.67),
    ],
)
def test_the_statistics_have_their_known_values(y, linear, breaking):
    """Catches a mean for the median, a lost sign, a clipped infinity."""
    assert screening.linearity(y) == pytest.approx(linear, abs=0.005)
    assert screening.breakthroughness(y) == pytest.approx(breaking, abs=0.1)


def test_no_change_and_no_second_size_are_told():
    """Catches 0/0 that becomes a number, and a warning of NumPy's."""
    flat = screening.screen({size: [0.5, 0.5] for size in range(1, 6)}, 50)
    assert np.isnan(flat.breakthrough.value) and flat.breakthrough.flag == "no change"
    assert flat.linearity.undefined == 1 and np.isnan([*flat.linearity.ci, flat.linearity.p]).all()
    alone = screening.screen({400: [0.1, 0.9]}, 50)
    assert (alone.sizes, alone.linearity.flag) == (1, "one size")
    step = screening.screen(dict(enumerate([[y] for y in STEP])), 400).breakthrough
    assert (step.value, step.flag) == (np.inf, "infinite") and np.isnan(step.ci.low)
    assert step.p == pytest.approx(1 - 1 / 8, abs=0.06)  # a step up anywhere else is infinite too


def test_the_interval_comes_from_seeds_and_may_end_in_infinity():
    """Catches sizes resampled in place of seeds, and an infinite end that becomes NaN."""
    rng = np.random.default_rng(0)
    noisy = {s: s + rng.normal(0, 0.3, 5) for s in range(8)}
    found = screening.screen(noisy, 500).linearity
    assert 3 < found.ci.low < found.value < found.ci.high < 8
    seeds = {s: [float(s == 7), float(s in (2, 4, 5, 7))] for s in range(8)}
    ends = screening.screen(seeds, 500).breakthrough
    assert np.isfinite(ends.ci.low) and np.isinf(ends.ci.high)


def test_the_null_is_at_its_level_and_order_is_found():
    """Catches a test that finds order in noise: 5% of 200 curves without any, and one with."""
    rng = np.random.default_rng(1)
    found = [
        screening.screen({s: [y] for s, y in enumerate(rng.normal(size=8))}, 200, seed=i)
        for i in range(200)
    ]
    for name in ("linearity", "breakthrough"):
        rate = np.mean([getattr(one, name).p < 0.05 for one in found])
        assert 0.01 < rate < 0.1
    assert screening.screen({s: [0.1 * s] for s in range(8)}).linearity.p < 0.01


def test_a_table_is_screened_in_order_of_size():
    """Catches sizes in order of text, other metrics and diverged seeds that count."""
    pairs = [(400, 0.0), (1600, 0.1), (20000, 0.2), (20000, 9.0)]
    rows = pd.DataFrame(pairs, columns=["params", "value"]).assign(task="t", level="1")
    rows = rows.assign(
        role="ladder", format=0, metric="exact_match", status=["ok"] * 3 + ["diverged"]
    )
    (found,) = screening.screens(rows, resamples=20).values()
    assert found.linearity.value == pytest.approx(2) and found.seeds == 3
    assert screening.screens(rows, "nll") == {}


@pytest.mark.parametrize("scores", [{}, {4: []}, {4: [np.nan]}])
def test_bad_input_is_one_sentence(scores):
    with pytest.raises(UserError):
        screening.screen(scores)
