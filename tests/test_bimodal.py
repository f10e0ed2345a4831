"""Two groups of seeds at one size: found where planted, and not in one overdispersed group."""

import diptest
import numpy as np
import pytest
from scipy import optimize, stats

from lm.emergence import bimodal, planted
from lm.emergence.bimodal import modes

ITEMS = np.full(20, 1000.0)


def share_found(tables, share):
    found = [modes(planted.rung(seed, share), ITEMS).bimodal for seed in range(tables)]
    return np.mean(found)


def test_two_groups_are_found_and_one_is_not():
    """Catches a test without power, and one that calls every overdispersed group two."""
    assert share_found(40, 0.5) >= 0.9
    assert share_found(40, 0.2) >= 0.8
    assert share_found(80, None) <= 0.05


def test_a_few_seeds_at_exactly_1_are_a_group():
    """Catches a component without spread: 1000 of 1000 has none of its own."""
    values = np.r_[np.full(16, 0.25) + 0.01 * np.linspace(-1, 1, 16), np.ones(4)]
    found = modes(values, ITEMS)
    assert found.bimodal and np.isfinite(found.gain)
    assert (found.low, found.high, found.share) == pytest.approx((0.25, 1.0, 0.2), abs=0.01)
    assert (found.dip, found.dip_p) == diptest.diptest(values)
    assert found.dip_p > 0.05  # a fifth is too little for the dip


def test_a_hill_cut_by_the_ceiling_is_one_group():
    """Catches groups that overlap: many seeds at 1.0 and the rest of the same hill below."""
    rng = np.random.default_rng(5)
    values = np.clip(rng.normal(0.95, 0.08, 20), 0, 1).round(3)
    assert (values == 1).sum() >= 4
    assert not modes(values, ITEMS).bimodal


def test_one_group_has_the_likelihood_of_scipy():
    """Catches a search that stops short of its maximum, which would favour two groups."""
    hits = np.round(planted.rung(3, None) * 1000)

    def cost(theta):
        mu, rho = 1 / (1 + np.exp(-theta[0])), np.exp(theta[1])
        a, b = mu * (1 / rho - 1), (1 - mu) * (1 / rho - 1)
        ways = stats.betabinom.logpmf(hits, 1000, a, b) - bimodal_ways(hits)
        return -ways.sum()

    best = optimize.minimize(cost, [0.0, -3.0], method="Nelder-Mead", options={"xatol": 1e-6})
    assert bimodal._one(hits, ITEMS) == pytest.approx(-best.fun, abs=0.02)


def bimodal_ways(hits):
    """ln of the binomial coefficient of 1000 items."""
    return stats.binom.logpmf(hits, 1000, 0.5) - 1000 * np.log(0.5)


@pytest.mark.parametrize("level", [0.0, 0.4, 1.0])
def test_equal_seeds_are_one_group(level):
    """Catches a division by no spread."""
    assert not modes(np.full(20, level), ITEMS).bimodal


@pytest.mark.parametrize("values", [[], [0.2], [0.2, 0.9, 1.0]])
def test_too_few_seeds_say_nothing(values):
    """Catches a p from three seeds."""
    found = modes(np.array(values), np.full(len(values), 1000.0))
    assert not found.bimodal and np.isnan(found.dip_p) and np.isnan(found.gain)


def test_few_items_are_not_taken_for_groups():
    """Catches counts treated as continuous values: 5 items give six of them."""
    rng = np.random.default_rng(0)
    found = [modes(rng.binomial(5, 0.5, 20) / 5, np.full(20, 5.0)).bimodal for _ in range(40)]
    assert sum(found) <= 2


def test_seeds_may_have_different_numbers_of_items():
    """Catches one n taken for all."""
    n = np.tile([200.0, 1000.0], 10)
    values = np.where(np.arange(20) < 8, 0.995, 0.25)
    found = modes(values, n)
    assert found.bimodal and found.share == pytest.approx(0.4, abs=0.01)
