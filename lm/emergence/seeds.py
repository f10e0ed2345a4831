"""What the seeds of one size say together: intervals, bimodality, the share that broke through.

Near a threshold the seeds of one size are not scattered around their mean: some have the ability
and some do not (Zhao et al. 2025). A mean with a normal interval hides that, so every rung is
described by each of its seeds, by the share of them that broke through with an interval, and by a
bootstrap that resamples seeds first and items within seeds second.

*Broke through* means: above the halfway mark between chance and the ceiling of the ladder,

    threshold = chance + max(ceiling - chance, 0.2) / 2,     ceiling = best rung mean,

where the 0.2 (`LEAST_RISE`, the least rise that counts as an ability beginning) keeps the mark
out of the noise of a task that nothing has learned. The share of seeds above it is P(breakthrough |
size), and the mean of those alone says how good the ability is where there is one. Whether the
seeds fall into two groups at all is asked of the mixture in `lm.emergence.bimodal`.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import stats

from lm.emergence.bimodal import modes

if TYPE_CHECKING:
    import pandas as pd

LEAST_RISE = 0.2


class Interval(NamedTuple):
    """A closed interval at 95% unless said otherwise."""

    low: float
    high: float


class Rung(NamedTuple):
    """The seeds of one size on one metric, summarised.

    `through` of `seeds` broke through, a share with the interval `share_low`, `share_high`;
    `success` is their mean with its interval (NaN where none did). `dip_p` and `gain` are the
    evidence for two groups: p of the dip, BIC of the mixture (NaN with fewer than 4 seeds).
    """

    params: int
    seeds: int
    mean: float
    low: float
    high: float
    least: float
    most: float
    through: int
    share_low: float
    share_high: float
    success: float = float("nan")
    success_low: float = float("nan")
    success_high: float = float("nan")
    bimodal: bool = False
    dip_p: float = float("nan")
    gain: float = float("nan")


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a rate (Wilson 1927); [0, 1] when n is 0."""
    if n == 0:
        return Interval(0.0, 1.0)
    found = stats.binomtest(successes, n).proportion_ci(level, method="wilson")
    return Interval(float(found.low), float(found.high))


def bootstrap_rung(
    values: np.ndarray, n: np.ndarray, stderr: np.ndarray | None, resamples: int = 1000
) -> np.ndarray:
    """Bootstrap means of a size, drawing seeds and then items, from each seed's value [S] alone.

    Without `stderr` the values are rates of n items and the items are drawn from Jeffreys'
    posterior Beta(k + 1/2, n - k + 1/2), so that 1000 of 1000 right is not certainty; with it they
    are means, drawn from a normal. Returns [resamples].
    """
    rng = np.random.default_rng(0)
    chosen = rng.integers(len(values), size=(resamples, len(values)))
    if stderr is None:
        hits = values * n
        return rng.beta(hits[chosen] + 0.5, (n - hits)[chosen] + 0.5).mean(1)
    return rng.normal(values[chosen], np.nan_to_num(stderr)[chosen]).mean(1)


def interval(draws: np.ndarray, level: float = 0.95) -> Interval:
    """The percentile interval of bootstrap draws."""
    low, high = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(float(low), float(high))


def threshold(chance: float, rung_means: np.ndarray) -> float:
    """The value above which a seed has broken through (see the module)."""
    return chance + max(float(np.max(rung_means)) - chance, LEAST_RISE) / 2


def rungs(curve: "pd.DataFrame") -> Iterator[Rung]:
    """One summary per size of the rows of one task, level and metric, smallest size first.

    `curve` has one finished row per seed. Rates (rows with a chance) have a threshold; of other
    metrics `through` is 0 and its interval [0, 1], and nothing is said of groups.
    """
    if curve.empty:
        return
    chance = float(curve["chance"].iloc[0])
    rate = np.isfinite(chance)
    mark = threshold(chance, curve.groupby("params")["value"].mean().to_numpy()) if rate else np.inf
    for params, rung in curve.groupby("params"):
        values, n = rung["value"].to_numpy(), rung["n"].to_numpy()
        draws = bootstrap_rung(values, n, None if rate else rung["stderr"].to_numpy())
        through = int((values > mark).sum())
        share = wilson(through, len(values) if rate else 0)
        ends = values.min(), values.max()
        rest = params, len(values), values.mean(), *interval(draws), *ends, through, *share
        if not rate:
            yield Rung(*rest)
            continue
        found, above = modes(values, n), values > mark
        won = (float("nan"),) * 3
        if through:
            won = values[above].mean(), *interval(bootstrap_rung(values[above], n[above], None))
        yield Rung(*rest, *won, found.bimodal, found.dip_p, found.gain)
