"""Tests against chance, what luck does elsewhere, and the least effect that can be seen."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests

from lm.config import UserError
from lm.emergence import significance


def rows(ladder, task="t", chance=0.25, n=1000, metric="exact_match"):
    """Final rows {params: [rate per seed]}."""
    pairs = [(params, value) for params, values in ladder.items() for value in values]
    frame = pd.DataFrame(pairs, columns=["params", "value"])
    return frame.assign(
        task=task,
        level="1",
        metric=metric,
        chance=chance,
        n=n,
        status="ok",
        role="ladder",
        format=0,
    )


def test_luck_has_the_known_figures():
    """Catches > for >=, a rounded threshold and a sum in place of 1 - (1 - q)^M."""
    q, anywhere, expected = significance.look_elsewhere(32, 0.5, 0.6, 12)
    assert (q, anywhere, expected) == pytest.approx((0.108, 0.745, 1.29), abs=6e-3)
    assert significance.look_elsewhere(250, 0.25, 0.35, 12).anywhere == pytest.approx(
        0.0025, abs=1e-4
    )
    same = [significance.look_elsewhere(100, 0.25, tau).one for tau in (0.3, 0.1 + 0.2)]
    assert same[0] == same[1] == stats.binom.sf(29, 100, 0.25)
    assert significance.look_elsewhere(10, 0.5, 0.0, 3) == (1, 1, 3)


def test_the_exact_test_is_scipy_s_and_has_an_answer_at_the_ends():
    for hits in (0, 20, 32):
        want = stats.binomtest(hits, 32, 0.5, alternative="greater").pvalue
        assert significance.above_chance(hits, 32, 0.5) == pytest.approx(want)
    ends = [significance.above_chance(*a) for a in ((0, 9, 0.0), (1, 9, 0.0), (9, 9, 1.0))]
    assert ends == [1, 0, 1]
    assert np.isnan(significance.above_chance(0, 0, 0.5))


def test_corrections_are_those_of_the_papers():
    """Catches one method under both names, an unordered step, and NaN counted as a test."""
    p = np.random.default_rng(0).uniform(0, 0.1, 20)
    for name, theirs in (("holm", "holm"), ("bh", "fdr_bh")):
        want = multipletests(p, method=theirs)[1]
        found = significance.adjust([np.nan, *p], name)
        assert found == pytest.approx([np.nan, *want], nan_ok=True)
        assert np.isnan(significance.adjust([np.nan], name)).all()


def test_nulls_stay_at_their_level_and_a_planted_rise_is_found():
    """Catches a table without correction, and seeds that differ taken for independent items."""
    rng = np.random.default_rng(0)
    sizes = [400 * 2**i for i in range(10)]
    plain = split = 0
    for _ in range(25):
        null = {p: rng.binomial(1000, 0.25, 4) / 1000 for p in sizes}
        plain += min(one.holm for one in significance.against_chance(rows(null))) < 0.05
        loose = {p: rng.binomial(1000, rng.beta(25, 75, 4)) / 1000 for p in sizes}
        split += min(one.holm for one in significance.against_chance(rows(loose))) < 0.05
    assert plain <= 5 and split <= 5  # without the discount nearly all of the latter are "found"
    ladder = {400: [0.25, 0.24], 800: [0.25, 0.26], 1600: [0.4, 0.38]}
    found = significance.against_chance(pd.concat([rows(ladder), rows(ladder, "u", metric="nll")]))
    assert [one.holm < 0.05 for one in found] == [False, False, True]
    assert all(one.p <= one.bh <= one.holm for one in found)


def test_the_detectable_effect_has_its_power():
    """Catches alpha at two sides, and a rate that is found half of the time instead of 80%."""
    rise = significance.minimum_detectable_effect(1000, 0.25)
    least = int(stats.binom.isf(0.05, 1000, 0.25)) + 1
    assert stats.binom.sf(least - 1, 1000, 0.25) <= 0.05 < stats.binom.sf(least - 2, 1000, 0.25)
    assert stats.binom.sf(least - 1, 1000, 0.25 + rise) == pytest.approx(0.8)
    assert rise == pytest.approx((1.645 + 0.842) * (0.25 * 0.75 / 1000) ** 0.5, rel=0.05)
    more = significance.minimum_detectable_effect(1000, 0.25, seeds=4)
    discounted = significance.minimum_detectable_effect(1000, 0.25, seeds=4, dispersion=4)
    assert more < 0.6 * rise and discounted == rise
    assert significance.minimum_detectable_effect(1000, 0.25, tests=12) > rise
    ends = [significance.minimum_detectable_effect(n, c) for n, c in ((2, 0.5), (9, 1.0))]
    assert np.isnan(ends).all()
    assert significance.minimum_detectable_effect(100, 0.0) == pytest.approx(1 - 0.2**0.01)


def test_the_table_of_detectable_effects():
    """Catches items added over seeds twice, and a task's dispersion taken from one size."""
    flat = {p: [0.25, 0.25, 0.25] for p in (400, 800)}
    wild = {p: [0.1, 0.25, 0.4] for p in (400, 800)}
    calm, loose = significance.detectable(pd.concat([rows(flat, "a"), rows(wild, "b")]))
    want = significance.minimum_detectable_effect(1000, 0.25, 3, tests=2)
    assert (calm.items, calm.seeds, calm.dispersion, calm.rise) == (1000, 3, 1.0, want)
    assert loose.dispersion == pytest.approx(1000 * 0.0225 / 0.1875 / np.log(2), rel=1e-6)
    assert loose.rise > 5 * calm.rise
    assert significance.detectable(rows(flat)[:0]) == []
    assert significance.against_chance(rows(flat)[:0]) == []


@pytest.mark.parametrize(
    "call",
    [
        lambda: significance.above_chance(5, 4, 0.5),
        lambda: significance.above_chance(1, 4, 1.5),
        lambda: significance.look_elsewhere(0, 0.5, 0.6),
        lambda: significance.minimum_detectable_effect(100, 0.5, alpha=0),
        lambda: significance.minimum_detectable_effect(100, float("nan")),
    ],
)
def test_bad_input_is_one_sentence(call):
    with pytest.raises(UserError):
        call()
