"""Linearity and breakthroughness of a curve over sizes (Srivastava et al. 2022, appendix B).

With y_i the mean score at the i-th size, sizes in order, and d_i = y_{i+1} - y_i,

    I = sign(argmax y - argmin y) (max y - min y)
    L = I / sqrt(mean_i d_i²)        linearity: M - 1 for M equal steps
    B = I / sqrt(median_i d_i²)      breakthroughness, the emergence score of Schaeffer et al. 2023

They screen and do not judge. B is a range over the noise between the sizes that do not change, so
it is infinite where more than half of the steps are exactly none, it falls as the floor gets
noisier, and the shot count alone moved it from 13 to 305 on GPT-3's two-digit addition. Infinity
and 0/0 (no change at all) stay what they are, with a flag beside them.

The null permutes the sizes: their scores are the same and stand in any order. p is the share of
orders with a score at least as high, the observed one among them (Phipson & Smyth 2010).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from lm.config import UserError
from lm.emergence.seeds import Interval

if TYPE_CHECKING:
    import pandas as pd

RESAMPLES = 2000
Flag = Literal["", "infinite", "no change", "one size"]


@dataclass(frozen=True)
class Score:
    """A statistic with its bootstrap interval over seeds and its permutation p-value over sizes.

    `flag` says why `value` is infinite or NaN. An end of the interval may be infinite. `undefined`
    is the share of resamples without any change, left out of the interval.
    """

    value: float
    flag: Flag
    ci: Interval
    undefined: float
    p: float


@dataclass(frozen=True)
class Screen:
    """Both statistics of one curve; `improvement` is I, signed."""

    sizes: int
    seeds: int
    improvement: float
    linearity: Score
    breakthrough: Score


def linearity(y: np.ndarray) -> np.ndarray:
    """L of scores [..., M] in order of size: NaN where nothing changes or M is 1."""
    return _score(np.asarray(y, np.float64), np.mean)


def breakthroughness(y: np.ndarray) -> np.ndarray:
    """B of scores [..., M] in order of size: ±inf where the median step is none."""
    return _score(np.asarray(y, np.float64), np.median)


def improvement(y: np.ndarray) -> np.ndarray:
    """I of scores [..., M] in order of size; of equal scores the first counts."""
    direction = np.sign(y.argmax(-1) - y.argmin(-1))
    return direction * (y.max(-1) - y.min(-1))


def screen(
    scores: Mapping[int, Sequence[float]], resamples: int = RESAMPLES, seed: int = 0
) -> Screen:
    """L and B of one curve, {size: one score per seed}.

    The interval resamples seeds within sizes and is NaN where every size has one seed. Raises
    `UserError` on a size without a score and on NaN.
    """
    if not scores or any(len(scores[size]) == 0 for size in scores):
        raise UserError("a size has no score; leave it out, and give at least one size")
    seeds = [np.asarray(scores[size], np.float64) for size in sorted(scores)]
    if not all(np.isfinite(values).all() for values in seeds):
        raise UserError("a score is NaN or infinite; leave that seed out")
    rng = np.random.default_rng(seed)
    y = np.array([values.mean() for values in seeds])
    # S - 1 of S seeds: drawing S understates the variance of their mean (see `bootstrap`).
    draws = np.stack(
        [rng.choice(values, (resamples, max(len(values) - 1, 1))).mean(1) for values in seeds], -1
    )
    orders = rng.permuted(np.tile(y, (resamples, 1)), axis=1)
    varied = any(len(values) > 1 for values in seeds)
    return Screen(
        *(len(y), sum(map(len, seeds)), float(improvement(y))),
        _described(linearity, y, draws if varied else None, orders),
        _described(breakthroughness, y, draws if varied else None, orders),
    )


def screens(
    rows: "pd.DataFrame", metric: str = "exact_match", resamples: int = RESAMPLES, seed: int = 0
) -> dict[tuple[str, str], Screen]:
    """{(task, level): screen} from final rows, one per seed.

    Ladder rows of the canonical format count; seeds that diverged are left out.
    """
    ladder = rows[(rows["role"] == "ladder") & (rows["format"] == 0) & (rows["metric"] == metric)]
    good = ladder[(ladder["status"] == "ok") & np.isfinite(ladder["value"])]
    return {
        (task, level): screen(
            {size: rung["value"].tolist() for size, rung in curve.groupby("params")},
            *(resamples, seed),
        )
        for (task, level), curve in good.groupby(["task", "level"])
    }


def _score(y: np.ndarray, middle: Callable[..., np.ndarray]) -> np.ndarray:
    if y.shape[-1] < 2:
        return np.full(y.shape[:-1], np.nan)
    scale = np.sqrt(middle(np.diff(y) ** 2, axis=-1))
    with np.errstate(divide="ignore", invalid="ignore"):  # 0/0 and x/0 are answers here
        return improvement(y) / scale


def _described(
    statistic: Callable[[np.ndarray], np.ndarray],
    y: np.ndarray,
    draws: np.ndarray | None,
    orders: np.ndarray,
) -> Score:
    value = float(statistic(y))
    flag: Flag = "one size" if len(y) < 2 else "no change" if np.isnan(value) else ""
    if np.isinf(value):
        flag = "infinite"
    ci, undefined = Interval(np.nan, np.nan), 0.0
    if draws is not None and len(y) > 1:
        found = statistic(draws)
        known = found[~np.isnan(found)]
        undefined = 1 - len(known) / len(found)
        if len(known):
            # Not interpolated: between a number and infinity there is nothing.
            ends = np.quantile(known, [0.025, 0.975], method="inverted_cdf")
            ci = Interval(*ends.tolist())
    p = float("nan")
    if np.isfinite(value) or flag == "infinite":
        # Sums in another order differ in the last bits.
        least = value - 1e-9 * abs(value) if np.isfinite(value) else value
        p = float((1 + np.sum(statistic(orders) >= least)) / (1 + len(orders)))
    return Score(value, flag, ci, undefined, p)
