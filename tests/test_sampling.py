"""Rates below one in n: PassUntil, exact probabilities, the task scaling law, p to the power K."""

import numpy as np
import pytest
from scipy import stats

from lm.config import UserError
from lm.emergence import sampling
from lm.emergence.metrics import PAD, Answers

SIZES = np.repeat(400 * 4.0 ** np.arange(6), 3)


def answers(logprob, greedy=None, target=None):
    """Answers whose every token has this log-probability [n, A]; token 1 is right."""
    logprob = np.asarray(logprob, np.float32)
    target = np.ones(logprob.shape, np.int32) if target is None else target
    greedy = target if greedy is None else np.where(target == PAD, PAD, greedy).astype(np.int32)
    square = np.ones_like(logprob)
    return Answers(target, logprob, greedy, square, logprob, greedy, np.empty((len(target), 0)))


def test_pass_until_is_unbiased_and_its_interval_covers():
    """Catches r/K, which is 1/(r-1) too high, and the interval of a fixed number of trials."""
    rng = np.random.default_rng(0)
    trials = rng.negative_binomial(5, 0.02, 3000) + 5
    found = [sampling.pass_until(5, int(k), 5) for k in trials]
    each = np.array([one.value for one in found])
    assert each.mean() == pytest.approx(0.02, abs=3.5 * each.std() / 3000**0.5)
    assert np.mean(5 / trials) > 0.02 * 1.15
    covered = np.mean([one.ci.low <= 0.02 <= one.ci.high for one in found])
    assert 0.94 < covered < 0.975
    one = found[0]
    assert stats.nbinom.cdf(one.trials - 5, 5, one.ci.low) == pytest.approx(0.025)
    assert stats.nbinom.sf(one.trials - 6, 5, one.ci.high) == pytest.approx(0.025)


def test_an_exhausted_budget_is_told():
    """Catches no success in a budget reported as a rate of zero with no doubt."""
    none = sampling.pass_until(0, 1000, 3)
    assert (none.value, none.ci.low, none.exhausted) == (0, 0, True)
    assert none.ci.high == pytest.approx(1 - 0.025**0.001)
    some = sampling.pass_until(2, 50, 3).ci
    assert some == pytest.approx(tuple(stats.binomtest(2, 50).proportion_ci(0.95, "exact")))
    always = sampling.pass_until(3, 3, 3)
    assert (always.value, always.ci.high) == (1, 1) and always.ci.low > 0.2


def test_sampling_stops_at_the_last_wanted_success():
    """Catches the rest of a batch counted as trials, and a budget that is overrun."""
    outcomes = np.zeros(100, bool)
    outcomes[[3, 40, 41, 42]] = True
    at = iter(range(0, 100, 20))

    def draw(n):
        start = next(at)
        return outcomes[start : start + n]

    found = sampling.sample_until(draw, 3, 100, batch=20)
    assert (found.trials, found.successes, found.exhausted) == (42, 3, False)
    never = sampling.sample_until(lambda n: np.zeros(n, bool), 2, 50, batch=20)
    assert (never.trials, never.exhausted) == (50, True)


def test_the_exact_probability_is_what_sampling_gives():
    """Catches a mean over tokens in place of their sum, and padding that counts as a token."""
    rng = np.random.default_rng(0)
    target = np.ones((60, 3), np.int32)
    target[:30, 2] = PAD
    p = sampling.from_answers(answers(np.log(rng.uniform(0.2, 0.6, (60, 3))), target=target))
    one = sampling.from_answers(answers(np.log([[0.5, 0.4, 0.1]])))
    assert one == pytest.approx([0.02]) and p[:30].mean() > 2 * p[30:].mean()
    found = np.mean(
        [[r.value for r in sampling.simulate(p, 4, 100_000, rng)] for _ in range(20)], axis=0
    )
    assert found.mean() == pytest.approx(p.mean(), rel=0.05)
    assert np.corrcoef(found, p)[0, 1] > 0.95
    rare = sampling.simulate(np.array([0.0, 1e-12, 1e-4, 1.0]), 3, 10_000, rng)
    assert [r.exhausted for r in rare[:2]] == [True, True] and rare[3].value == 1
    cut = sampling.simulate(np.full(600, 3e-4), 3, 10_000, rng)
    hits = [r.successes if r.exhausted else 3 for r in cut]
    want = stats.binom.pmf(range(3), 10_000, 3e-4) * 600
    assert np.bincount(hits, minlength=4)[:3] == pytest.approx(want, abs=36)


def rates(curvature, rng, noise=0.1):
    x = np.log(SIZES) - np.log(SIZES).mean()
    y = 1.0 - 0.4 * x + curvature * x**2 + rng.normal(0, noise, len(x))
    return np.exp(-np.exp(y))


@pytest.mark.parametrize(
    ("curvature", "word"), [(0.0, "law"), (-0.06, "accelerated"), (0.06, "decelerated")]
)
def test_growth_is_told_from_a_law(curvature, word):
    """Catches the sign of the curvature, and a test that finds one in a law: 5% of 100."""
    rng = np.random.default_rng(1)
    found = [sampling.growth(SIZES, rates(curvature, rng)) for _ in range(100)]
    assert np.mean([one.growth == word for one in found]) > 0.88
    assert np.mean([one.curvature for one in found]) == pytest.approx(curvature, abs=0.01)
    if word == "law":
        assert np.mean([one.slope for one in found]) == pytest.approx(-0.4, abs=0.01)
        assert np.mean([one.slope_ci.low < -0.4 < one.slope_ci.high for one in found]) > 0.88


def test_growth_needs_rates_that_have_a_logarithm():
    """Catches a rate of 0 or 1 that becomes infinite, and three sizes called a law."""
    p = rates(0, np.random.default_rng(0))
    p[:3], p[3] = 0, 1
    found = sampling.growth(SIZES, p)
    assert (found.n, found.left_out) == (14, 4)
    p[:9] = 0
    assert sampling.growth(SIZES, p).growth == "undetermined"
    rising = sampling.growth(SIZES, rates(0, np.random.default_rng(0))[::-1])
    assert rising.growth == "undetermined" and rising.slope > 0


def test_the_ratio_to_independent_tokens():
    """Catches tokens that stand or fall together taken for independent, seeds that differ taken
    for tokens that do, and an interval that is not paired.
    """
    rng = np.random.default_rng(0)

    def seed(p, together, n=400):
        draw = rng.random((n, 1 if together else 3)) < p
        return answers(np.full((n, 3), -1.0), np.where(np.broadcast_to(draw, (n, 3)), 1, 2))

    alone = sampling.independence([seed(0.7, False) for _ in range(4)], 400)
    assert alone.ci.low < 1 < alone.ci.high and alone.ci.high - alone.ci.low < 0.2
    bound = sampling.independence([seed(0.7, True) for _ in range(4)], 400)
    assert bound.value == pytest.approx(1 / 0.49, rel=0.1) and bound.ci.low > 1.5
    differ = sampling.independence([seed(p, False) for p in (0.1, 0.9, 0.9)], 400)
    assert differ.value == pytest.approx(1, abs=0.1)
    never = sampling.independence([seed(0, False)], 50)
    assert np.isnan(never.value) and never.undefined == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda: sampling.pass_until(1, 5, 1),
        lambda: sampling.pass_until(3, 2, 3),
        lambda: sampling.growth([400, 0], [0.1, 0.1]),
        lambda: sampling.growth([400.0], [1.1]),
        lambda: sampling.simulate(np.array([1.5]), 2, 10, np.random.default_rng(0)),
    ],
)
def test_bad_input_is_one_sentence(call):
    with pytest.raises(UserError):
        call()
