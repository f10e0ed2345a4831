"""Intervals over seeds and items."""

import numpy as np
import pandas as pd
import pytest

from lm.emergence import seeds


def rung_rows(values, chance=0.25, n=1000):
    """Final rows {params: values}, one per seed."""
    rows = [(params, value) for params, row in values.items() for value in row]
    frame = pd.DataFrame(rows, columns=["params", "value"])
    return frame.assign(chance=chance, n=n, stderr=0.01)


def test_wilson_gives_the_published_interval():
    """Fails on any other interval of a rate (17 of 100, Wilson 1927)."""
    assert seeds.wilson(17, 100) == pytest.approx((0.1089, 0.2555), abs=1e-4)
    assert seeds.wilson(0, 0) == (0, 1)


def test_the_bootstrap_knows_both_levels():
    """Fails if seeds or items are left out of the resampling: the variance of a mean of S seeds of
    n items is between/S + within/(S n)."""
    rng = np.random.default_rng(0)
    levels = rng.normal(0, 1.0, 40)
    items = levels[:, None] + rng.normal(0, 4.0, (40, 30))
    draws = seeds.hierarchical_bootstrap(items, 2000, seed=1)
    spread = items.mean(1).var() / 40 + items.var(1).mean() / (40 * 30)
    assert draws.var() == pytest.approx(spread, rel=0.1)
    same = np.tile(items[:1], (40, 1))  # equal seeds: only the items are left
    spread = same[0].var() / (40 * 30)
    assert seeds.hierarchical_bootstrap(same, 2000).var() == pytest.approx(spread, rel=0.15)


def test_the_bootstrap_is_a_function_of_its_seed():
    items = np.random.default_rng(0).normal(size=(3, 10))
    one, two, other = (seeds.hierarchical_bootstrap(items, 50, seed=s) for s in (0, 0, 1))
    assert (one == two).all() and (one != other).any()


def test_a_perfect_rung_is_not_certain():
    """Fails if 1000 of 1000 in every seed gives an interval of no width."""
    (rung,) = seeds.rungs(rung_rows({400: [1.0, 1.0, 1.0]}))
    assert 0.998 < rung.low < rung.high <= 1.0


def test_a_bimodal_rung_keeps_its_seeds():
    """Fails if the share that broke through is read off the mean, or the threshold moves."""
    rows = rung_rows(
        {400: [0.2, 0.24, 0.18], 1568: [0.23, 1.0, 0.24, 0.36, 0.23, 0.99], 6208: [1.0]}
    )
    small, middle, top = seeds.rungs(rows)
    assert [r.through for r in (small, middle, top)] == [0, 2, 1]
    assert (middle.share_low, middle.share_high) == pytest.approx((0.0968, 0.7000), abs=1e-3)
    assert (middle.least, middle.most) == (0.23, 1.0)
    assert middle.low < 0.35 and middle.high > 0.7


def test_noise_around_chance_never_breaks_through():
    """Fails if the threshold is put halfway into the noise of a task that nothing has learned."""
    rows = rung_rows({400: [0.24, 0.26, 0.27], 784: [0.25, 0.28, 0.26]})
    assert [rung.through for rung in seeds.rungs(rows)] == [0, 0]


def test_a_metric_without_chance_has_no_share():
    rows = rung_rows({400: [2.1, 2.0], 784: [0.1, 0.2]}, chance=np.nan)
    low, high = seeds.rungs(rows)
    assert (high.through, high.share_low, high.share_high) == (0, 0, 1)
    assert high.low < 0.15 < high.high
    assert list(seeds.rungs(rows[:0])) == []
