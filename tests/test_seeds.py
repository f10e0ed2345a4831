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


def over_items(items, resamples):
    """The oracle: draws seeds and then items of [seeds, n] themselves; bootstrap means."""
    rng = np.random.default_rng(1)
    chosen = rng.integers(len(items), size=(resamples, len(items)))
    draws = rng.integers(items.shape[1], size=(resamples, *items.shape))
    return np.take_along_axis(items[chosen], draws, axis=2).mean(axis=(1, 2))


@pytest.mark.parametrize("apart", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["rate", "mean"])
def test_the_bootstrap_from_values_is_that_over_items(kind, apart):
    """Fails if seeds or items are left out of the draw: with seeds alike only items scatter."""
    rng = np.random.default_rng(0)
    levels = 0.5 + apart * np.linspace(-1, 1, 8)[:, None]
    items = rng.random((8, 60)) < levels if kind == "rate" else rng.normal(levels, 1.0, (8, 60))
    items = items.astype(float)
    if not apart:
        items = np.tile(items[:1], (8, 1))
    stderr = None if kind == "rate" else items.std(1) / 60**0.5
    got = seeds.bootstrap_rung(items.mean(1), np.full(8, 60), stderr, 4000)
    want = over_items(items, 4000)
    assert got.mean() == pytest.approx(want.mean(), abs=0.02)
    assert got.std() == pytest.approx(want.std(), rel=0.08)


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


def test_a_rung_says_whether_its_seeds_are_two_groups_and_how_good_the_upper_one_is():
    """Catches a mean over failures as well, and evidence for groups where all seeds agree."""
    low, high = [0.24, 0.26, 0.25, 0.23, 0.25, 0.26], [0.9, 0.92, 0.94]
    small, middle, top = seeds.rungs(
        rung_rows({400: low, 1568: low + high, 6208: [0.93, 0.92, 0.94, 0.9]})
    )
    assert [rung.bimodal for rung in (small, middle, top)] == [False, True, False]
    assert middle.success == pytest.approx(0.92) and 0.88 < middle.success_low < 0.92
    assert 0.92 < middle.success_high < 0.96 and middle.gain > 10
    assert np.isnan(small.success) and small.through == 0
    (loss,) = seeds.rungs(rung_rows({400: low + high}, chance=np.nan))
    assert not loss.bimodal and np.isnan(loss.success)
