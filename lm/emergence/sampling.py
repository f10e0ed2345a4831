"""Success rates far below one in n: PassUntil, exact answer probabilities, and p to the power K.

An exact match of 0 in 1,000 items says only that the rate is below 0.3%. Two ways see further down.

PassUntil (Hu et al. 2023) samples answers until r are right. With K the samples it took,

    p = (r - 1) / (K - 1)                            unbiased, negative binomial (Haldane 1945)
    P(K <= k) = P(Bin(k, p) >= r)                    from which the exact interval

Where the log-probabilities of the target were stored no sampling is needed: an answer is sampled
with probability exp(Σ_t ln p_t), exactly (`from_answers`). It is the rate of *sampling* at
temperature 1, which greedy exact match may exceed by far.

The task scaling law is PU = exp(-c N^-a), a line in log(-log PU) against log N. A curve that falls
below its own line as N grows (negative curvature) gains faster than any such law: *accelerated*.

If tokens were right independently with the rate q, an answer of K tokens would be right with q^K
(Schaeffer et al. 2023). `independence` measures the ratio of exact match to that.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special, stats

from lm.config import UserError
from lm.emergence import bootstrap
from lm.emergence.metrics import PAD, Answers
from lm.emergence.seeds import Interval

Growth = Literal["law", "accelerated", "decelerated", "undetermined"]
LEAST_SIZES = 4  # three points lie on a parabola whatever they are


@dataclass(frozen=True)
class Rate:
    """A success rate from `successes` of `trials`. `exhausted` says that the budget ended before
    the wanted successes came: the rate is then binomial, and its interval that of Clopper-Pearson.
    """

    value: float
    ci: Interval
    successes: int
    trials: int
    exhausted: bool


@dataclass(frozen=True)
class GrowthFit:
    """log(-log PU) = level + slope x + curvature x², x = ln N less its mean; 95% t-intervals.

    `slope` is that of the line alone, minus the exponent a of the law. `left_out` counts the rates
    of 0 or 1, which have no place on this scale.
    """

    growth: Growth
    slope: float
    slope_ci: Interval
    curvature: float
    curvature_ci: Interval
    n: int
    left_out: int


def pass_until(successes: int, trials: int, wanted: int, level: float = 0.95) -> Rate:
    """The rate of sampling that stopped at `wanted` successes, or at the end of its budget.

    Raises `UserError` if `wanted` is below 2 (the estimate needs r - 1), or on impossible counts.
    """
    if wanted < 2 or not 0 <= successes <= wanted or trials < max(successes, 1):
        raise UserError(
            f"{successes} of {wanted} successes in {trials} trials; at least 2 are wanted, and "
            "trials are no fewer than successes"
        )
    tail, r, k = 0.5 - level / 2, successes, trials
    low = float(special.betaincinv(r, k - r + 1, tail)) if r else 0.0
    if r < wanted:
        high = float(special.betaincinv(r + 1, k - r, 1 - tail)) if r < k else 1.0
        return Rate(r / k, Interval(low, high), r, k, True)
    high = float(special.betaincinv(r, k - r, 1 - tail)) if r < k else 1.0
    return Rate((r - 1) / (k - 1), Interval(low, high), r, k, False)


def sample_until(
    draw: Callable[[int], np.ndarray], wanted: int, budget: int, batch: int = 1000
) -> Rate:
    """Draws until `wanted` successes or `budget` samples; `draw(n)` gives n outcomes, bool [n].

    Samples of the last batch beyond the last wanted success are not counted.
    """
    hits = trials = 0
    while trials < budget:
        right = np.asarray(draw(min(batch, budget - trials)), bool)
        (where,) = np.nonzero(right)
        if hits + len(where) >= wanted:
            trials += int(where[wanted - hits - 1]) + 1
            return pass_until(wanted, trials, wanted)
        hits, trials = hits + len(where), trials + len(right)
    return pass_until(hits, trials, wanted)


def from_answers(answers: Answers) -> np.ndarray:
    """The exact probability [n] that sampling gives the whole of each answer."""
    real = answers.target != PAD
    return np.exp(np.where(real, answers.logprob, 0.0).astype(np.float64).sum(1))


def simulate(
    probability: np.ndarray, wanted: int, budget: int, rng: np.random.Generator
) -> list[Rate]:
    """PassUntil on items of known probability [n], without a model.

    Their mean rate is compared with the mean probability, to check that sampling is what
    `from_answers` says.
    """
    p = np.asarray(probability, np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise UserError("probabilities lie in [0, 1]")
    # K - r is negative binomial; a rate of nearly 0 would take longer than an int can say.
    floor = np.maximum(p, 1e-9)
    trials = np.where(p > 1e-9, rng.negative_binomial(wanted, floor) + wanted, budget + 1)
    # What was cut off has a number of successes below `wanted`: binomial, drawn by inversion.
    below = stats.binom.cdf(wanted - 1, budget, p)
    hits = stats.binom.ppf(rng.uniform(size=p.shape) * below, budget, p)
    hits = np.clip(np.nan_to_num(hits), 0, wanted - 1)
    return [
        pass_until(wanted, int(k), wanted) if k <= budget else pass_until(int(h), budget, wanted)
        for k, h in zip(trials, hits, strict=True)
    ]


def growth(params: np.ndarray, rate: np.ndarray, level: float = 0.95) -> GrowthFit:
    """Whether rates [J], one per size and seed, follow the task scaling law.

    `law` if a falling line is enough, `accelerated` or `decelerated` if the curvature differs from
    0; `undetermined` if fewer than 4 sizes have a rate between 0 and 1 or the line does not fall.
    Raises `UserError` on sizes or rates out of range.
    """
    n, p = np.asarray(params, np.float64), np.asarray(rate, np.float64)
    if len(n) != len(p) or not (n > 0).all() or not ((p >= 0) & (p <= 1)).all():
        raise UserError("one rate in [0, 1] for every positive size")
    inside = (p > 0) & (p < 1)
    sizes, left_out = np.unique(n[inside]), int((~inside).sum())
    if len(sizes) < LEAST_SIZES:
        nan, nowhere = float("nan"), Interval(np.nan, np.nan)
        return GrowthFit("undetermined", nan, nowhere, nan, nowhere, int(inside.sum()), left_out)
    x, y = np.log(n[inside]), np.log(-np.log(p[inside]))
    x = x - x.mean()
    line, parabola = (_least_squares(x, y, degree, level) for degree in (1, 2))
    (slope, slope_ci), (curvature, curvature_ci) = line, parabola
    word: Growth = "undetermined"
    if curvature_ci.high < 0:
        word = "accelerated"
    elif curvature_ci.low > 0:
        word = "decelerated"
    elif slope_ci.high < 0:
        word = "law"
    return GrowthFit(word, slope, slope_ci, curvature, curvature_ci, len(x), left_out)


def independence(
    answers: Sequence[Answers], resamples: int = bootstrap.RESAMPLES, seed: int = 0
) -> bootstrap.Estimate:
    """Exact match over what independent tokens would give, with its paired bootstrap interval.

    `answers` are those of the seeds of one size. Both means are over seeds, each seed with its own
    token accuracy, so that seeds that differ are not taken for tokens that depend on each other.
    NaN where no token is ever right.
    """
    found = bootstrap.curve({0: answers}, resamples, seed)[0]
    return found.estimate(lambda m: m["exact_match"] / m["independent_match"])


def _least_squares(
    x: np.ndarray, y: np.ndarray, degree: int, level: float
) -> tuple[float, Interval]:
    """The highest coefficient of a polynomial with its t-interval."""
    design = np.vander(x, degree + 1)
    theta, *_ = np.linalg.lstsq(design, y)
    free = len(x) - degree - 1
    variance = ((y - design @ theta) ** 2).sum() / free
    error = np.sqrt(variance * np.linalg.inv(design.T @ design)[0, 0])
    reach = float(stats.t.ppf(0.5 + level / 2, free) * error)
    return float(theta[0]), Interval(float(theta[0]) - reach, float(theta[0]) + reach)
