"""Intervals from stored answers: planted variance components, pairing, and scipy as the oracle."""

import numpy as np
import pytest
from scipy import stats

from lm.config import UserError
from lm.emergence import bootstrap, metrics
from lm.emergence.metrics import Answers


def answers(seed, n=50, length=3, p=0.7, items=0):
    """Answers of one seed to n items of up to `length` tokens; `items` decides the items."""
    of_items = np.random.default_rng(items)
    target = of_items.integers(1, 90, (n, length)).astype(np.int32)
    target[:, 1:][of_items.random((n, length - 1)) < 0.3] = metrics.PAD
    rng = np.random.default_rng([seed, 1])
    hit = rng.random(target.shape) < p
    greedy = np.where((target >= 0) & ~hit, target + 1, target).astype(np.int32)
    logprob = np.where(hit, np.log(0.8), np.log(0.1)).astype(np.float32)
    choices = rng.normal(size=(n, 4)).astype(np.float32)
    square = np.full(target.shape, 0.5, np.float32)
    return Answers(target, logprob, greedy, square, logprob, greedy, choices)


def outcomes(rng, s, n, sd_seed, sd_item, sd_rest):
    """A table [s, n] of mean zero with these standard deviations of seed, item and the rest."""
    seeds, items = rng.normal(0, sd_seed, (s, 1)), rng.normal(0, sd_item, (1, n))
    return seeds + items + rng.normal(0, sd_rest, (s, n))


def table(y):
    return {"m": (y, np.ones_like(y))}


def test_every_metric_is_that_of_one_evaluation():
    """Catches a sum that is not the metric of `metrics.score`, and one that is forgotten."""
    one = answers(3)
    (found,) = bootstrap.curve({400: [one]}, resamples=20).values()
    want = {k: m.value for k, m in metrics.score(one).items() if k != "calibration_error"}
    assert {k: float(found.value[k]) for k in want} == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("crossed", [True, False])
def test_the_spread_is_that_of_seeds_and_items(crossed):
    """Catches items drawn apart where seeds share them, or together where they do not, and the
    variance that is lost when S of S seeds are drawn.
    """
    rng = np.random.default_rng(0)
    s, n = 6, 60
    variance = {"boot": 0.0, "true": 1.0 / s + (1.0 / n if crossed else 1.0 / (n * s))}
    for _ in range(60):
        y = outcomes(rng, s, n, 1.0, 1.0 if crossed else 0.0, 0.0 if crossed else 1.0)
        draws = bootstrap.resample(table(y), crossed, 150).draws["m"]
        variance["boot"] += draws.var() / 60
    assert variance["boot"] == pytest.approx(variance["true"], rel=0.15)


def test_shared_items_do_not_average_out():
    """Catches a bootstrap that takes the hard items of one seed for the luck of that seed."""
    y = np.tile(np.random.default_rng(0).normal(size=(1, 40)), (8, 1))
    together, apart = (bootstrap.resample(table(y), c).estimate("m").stderr for c in (True, False))
    assert together == pytest.approx(y[0].std() / 40**0.5, rel=0.1)
    assert apart < 0.5 * together


def test_items_are_taken_for_shared_only_where_they_are():
    same = bootstrap.curve({4: [answers(0), answers(1)], 8: [answers(2)]}, resamples=20)
    apart = bootstrap.curve({4: [answers(0), answers(1, items=1)]}, resamples=20)
    assert [one.crossed for one in (*same.values(), *apart.values())] == [True, True, False]


def test_bca_is_scipy_s_where_items_are_crossed():
    """Catches an acceleration from one level alone: the crossed draw is scipy's of two samples of
    indices.
    """
    rng = np.random.default_rng(1)
    y = np.exp(outcomes(rng, 24, 30, 0.3, 0.9, 0.2))
    index = (np.arange(24), np.arange(30))

    def statistic(seeds, items, axis):
        return y[seeds[..., :, None], items[..., None, :]].mean((-2, -1))

    options = {"n_resamples": 6000, "vectorized": True, "method": "BCa", "batch": 1000}
    want = stats.bootstrap(index, statistic, rng=np.random.default_rng(2), **options)
    found = bootstrap.resample(table(y), True, 6000).estimate("m")
    assert found.method == "bca"
    assert found.ci == pytest.approx(tuple(want.confidence_interval), rel=0.025)


def test_a_difference_of_metrics_is_paired():
    """Catches metrics with draws of their own: two metrics that move together differ by little."""
    rng = np.random.default_rng(0)
    y = outcomes(rng, 10, 50, 1.0, 1.0, 0.0)
    one = np.ones_like(y)
    found = bootstrap.resample({"a": (y, one), "b": (y + 0.1 + rng.normal(0, 0.01, y.shape), one)})
    alone, both = found.estimate("a"), found.estimate(lambda m: m["b"] - m["a"])
    assert both.value == pytest.approx(0.1, abs=0.01) and both.stderr < 0.01 * alone.stderr


def test_coverage_with_planted_components():
    """Catches an interval that forgets a level: 95% within the scatter of 80 tables."""
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(80):
        y = outcomes(rng, 20, 40, 0.5, 1.0, 0.5)
        ci = bootstrap.resample(table(y), True, 400).estimate("m").ci
        hits += ci.low < 0 < ci.high
    assert 0.86 < hits / 80 < 1.0


def test_what_cannot_vary_is_told_and_not_invented():
    """Catches a perfect rung of no width, a ratio of zeros that counts, an interval of nothing."""
    perfect = bootstrap.curve({4: [answers(s, p=1.1) for s in range(3)]}, resamples=50)[4]
    exact = perfect.estimate("exact_match")
    assert (exact.method, exact.ci.high) == ("wilson", 1.0) and exact.ci.low < 0.96
    zero = bootstrap.resample(table(np.zeros((3, 8))), resamples=50)
    ratio = zero.estimate(lambda m: m["m"] / m["m"])
    assert ratio.undefined == 1 and np.isnan(ratio.ci.low)
    single = bootstrap.resample(table(np.ones((1, 1))), resamples=50).estimate("m")
    assert single.method == "none"
    impossible = answers(0)
    impossible.logprob[0, 0] = -np.inf
    assert bootstrap.curve({4: [impossible]}, 50)[4].estimate("nll").method == "none"


def test_the_interquartile_mean_and_its_interval():
    """Catches a mean that an outlier moves, and seeds resampled for all tasks at once."""
    scores = np.array([[0.0, 1, 2, 3], [4, 5, 6, 700]])
    assert bootstrap.interquartile_mean(scores) == pytest.approx(3.5)
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(20, 1)) + np.zeros((20, 6))
    found = bootstrap.aggregate(shared, 500)
    assert found.method == "bca" and found.ci.low < found.value < found.ci.high
    together = bootstrap.aggregate(shared[:, :1], 500).stderr
    assert found.stderr < 0.6 * together
    assert bootstrap.aggregate(scores[:1]).method == "none"


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: bootstrap.resample(table(np.full((2, 2), np.nan))), "no outcome"),
        (lambda: bootstrap.resample(table(np.ones((0, 2)))), "one of each"),
        (lambda: bootstrap.resample({"m": (np.ones((2, 2)), np.zeros((2, 2)))}), "no weight"),
        (lambda: bootstrap.curve({4: [answers(0), answers(1, n=20)]}), "items"),
        (lambda: bootstrap.curve({4: []}), "items"),
        (lambda: bootstrap.aggregate(np.array([[np.nan]])), "finite"),
        (lambda: bootstrap.resample(table(np.ones((2, 2)))).estimate("x"), "not among"),
    ],
)
def test_bad_input_is_one_sentence(call, word):
    with pytest.raises(UserError, match=word):
        call()
