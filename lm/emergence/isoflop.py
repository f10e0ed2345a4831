"""Which size is best at a budget: Hoffmann et al. (2022), approaches 1 and 2.

Approach 2 takes runs of several sizes at each of a few FLOP levels, fits the valley of their loss

    L = c0 + c1 u + c2 u^2,   u = ln N,      so   ln N* = -c1 / (2 c2),

and regresses ln N* on ln C, each level weighted by the inverse variance of its minimum (the delta
method; the runs of all levels are taken to scatter alike). The slope is the exponent a of
N* ~ C^a. A level whose valley does not turn, or turns outside its sizes, says nothing and is left
out and counted.

Approach 1 takes whole training curves: at every budget the run with the least loss, and then the
same regression. A budget at which the best is the smallest or the largest size on offer is left
out: there the best could lie beyond.

The exponent is given under both parameter counts, with and without embeddings: most of the
difference between Kaplan et al. (2020) and Hoffmann et al. is that choice (Pearce & Song 2024;
Porian et al. 2024). Intervals are a bootstrap of the runs with Dirichlet weights (Rubin 1981),
under which no valley loses its points, widened by sqrt(n / (n - 3)), since a valley takes three
of the n runs of a level; joined with the interval of the weighted regression (Student's t, one
variance for all runs), because a valley hangs on its end points, which a bootstrap makes too sure.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import stats

from lm.config import UserError
from lm.emergence.seeds import Interval, interval

if TYPE_CHECKING:
    import pandas as pd

RESAMPLES = 1000
SAME_LEVEL = 0.25  # in ln C: runs closer than this are one level, for token counts are rounded
COUNTS = ("params", "params_total")


class Valley(NamedTuple):
    """One FLOP level: its sizes' number, the best size and loss, and whether it lies inside."""

    flops: float
    sizes: int
    params: float
    loss: float
    inside: bool


@dataclass(frozen=True)
class Exponent:
    """N* = coefficient C^value, from `levels` budgets, `left_out` more of which said nothing."""

    count: str
    value: float
    ci95: Interval
    coefficient: float
    levels: int
    left_out: int
    valleys: tuple[Valley, ...]

    def at(self, flops: np.ndarray) -> np.ndarray:
        """The best size at these budgets."""
        return self.coefficient * np.asarray(flops, np.float64) ** self.value


def study(frame: "pd.DataFrame", seed: int = 0) -> dict[str, Exponent]:
    """Approach 2 under both parameter counts, from one row per run of an isoFLOP study.

    Columns `params` (non-embedding), `params_total`, `flops` and `value` (nats per token), at the
    end of training. Raises `UserError` where a column is missing or fewer than two levels have a
    valley.
    """
    missing = [name for name in (*COUNTS, "flops", "value") if name not in frame]
    if missing:
        raise UserError(f"an isoFLOP table has no column {missing[0]!r}; add it")
    good = frame[np.isfinite(frame["value"]) & (frame["value"] > 0)]
    columns = good["flops"].to_numpy(np.float64), good["value"].to_numpy(np.float64)
    return {
        count: fit_valleys(good[count].to_numpy(np.float64), *columns, count, seed)
        for count in COUNTS
    }


def fit_valleys(
    params: np.ndarray, flops: np.ndarray, loss: np.ndarray, count: str = "params", seed: int = 0
) -> Exponent:
    """Approach 2 on runs [J]; raises as `study` does."""
    u, c, y = _logs(params, flops, loss)
    rng = np.random.default_rng(seed)
    minima, weights, middles, valleys = [], [], [], []
    left_out, freedom, squares = 0, 0, 0.0
    for level in _levels(c):
        uu, yy, n = u[level], y[level], len(level)
        sizes = len(np.unique(uu))
        if sizes < 3:
            left_out += 1
            continue
        draws = np.vstack([np.ones(n), n * rng.dirichlet(np.ones(n), RESAMPLES)])
        theta, spread, square = _parabolas(uu - uu.mean(), yy, draws)
        inside = (theta[:, 2] > 0) & (np.abs(_minimum(theta)) <= np.abs(uu - uu.mean()).max())
        best = _minimum(theta) + uu.mean()
        inside[0] = inside[0] and uu.min() <= best[0] <= uu.max()
        middle = float(c[level].mean())
        bottom = float(theta[0, 0] - theta[0, 1] ** 2 / (4 * theta[0, 2])) if inside[0] else np.nan
        where = float(np.exp(best[0])) if inside[0] else np.nan
        valleys.append(Valley(float(np.exp(middle)), sizes, where, bottom, bool(inside[0])))
        if not inside[0]:
            left_out += 1
            continue
        stretch = np.sqrt(n / (n - 3)) if n > 3 else np.nan
        moved = np.where(inside, best[0] + stretch * (best - best[0]), np.nan)
        moved[0] = best[0]  # three runs are a valley, without anything left for an interval
        minima.append(moved)
        weights.append(1 / max(spread, 1e-300))
        middles.append(middle)
        freedom, squares = freedom + n - 3, squares + square
    if len(minima) < 2:
        raise UserError(
            f"{len(minima)} of {len(valleys)} FLOP levels have a valley inside their sizes; an"
            " exponent takes two: add sizes on both sides of the best"
        )
    x, weight = np.array(middles), np.array(weights)
    slope, level = _regress(x, np.stack(minima), weight)
    draws = slope[1:][np.isfinite(slope[1:])]
    ends = Interval(float("nan"), float("nan"))
    if freedom and len(draws) > RESAMPLES / 2:
        lever = (weight * (x - np.average(x, weights=weight)) ** 2).sum()
        reach = stats.t.ppf(0.975, freedom) * float(np.sqrt(squares / freedom / lever))
        low, high = interval(draws)
        ends = Interval(min(low, float(slope[0]) - reach), max(high, float(slope[0]) + reach))
    return Exponent(
        count, float(slope[0]), ends, float(np.exp(level[0])), len(minima), left_out, tuple(valleys)
    )


def fit_envelope(
    run: np.ndarray,
    params: np.ndarray,
    flops: np.ndarray,
    loss: np.ndarray,
    count: str = "params",
    budgets: int = 200,
    seed: int = 0,
) -> Exponent:
    """Approach 1: the least loss over training curves, given as points [J] of the runs `run`.

    Curves are interpolated in ln C; the interval is a bootstrap of runs. Raises `UserError` below
    four sizes, or where the best size is never inside those on offer.
    """
    u, c, y = _logs(params, flops, loss)
    names, which = np.unique(np.asarray(run), return_inverse=True)
    sizes = np.array([u[which == i][0] for i in range(len(names))])
    if len(np.unique(sizes)) < 4:
        raise UserError(f"the envelope has {len(np.unique(sizes))} sizes; it takes at least 4")
    grid = np.linspace(c.min(), c.max(), budgets)
    table = np.full((len(names), budgets), np.inf)
    for i in range(len(names)):
        mine = np.flatnonzero(which == i)
        order = mine[np.argsort(c[mine])]
        curve = np.interp(grid, c[order], y[order], left=np.inf, right=np.inf)
        table[i] = curve
    rng = np.random.default_rng(seed)
    whole = _envelope(np.arange(len(names)), sizes, table, grid)
    if whole is None:
        raise UserError("the best size is always the smallest or the largest; add sizes beyond")
    found = [
        _envelope(rng.integers(len(names), size=len(names)), sizes, table, grid)
        for _ in range(RESAMPLES // 5)
    ]
    slopes = np.array([f[0] for f in found if f is not None])
    ends = interval(slopes) if len(slopes) > 50 else Interval(float("nan"), float("nan"))
    slope, level, used = whole
    nothing: tuple[Valley, ...] = ()
    return Exponent(count, slope, ends, float(np.exp(level)), used, budgets - used, nothing)


def _envelope(
    chosen: np.ndarray, sizes: np.ndarray, table: np.ndarray, grid: np.ndarray
) -> tuple[float, float, int] | None:
    """Slope, level and number of budgets of the envelope of some runs; None where it has none."""
    here, mine = table[chosen], sizes[chosen]
    known = np.isfinite(here)
    best = mine[here.argmin(0)]
    low = np.where(known, mine[:, None], np.inf).min(0)
    high = np.where(known, mine[:, None], -np.inf).max(0)
    inside = known.any(0) & (best > low) & (best < high)
    if len(np.unique(best[inside])) < 2:
        return None
    # One point a size, at the middle of its budgets: within a size the envelope is flat.
    distinct = np.unique(best[inside])
    middles = np.array([grid[inside & (best == size)].mean() for size in distinct])
    slope, level = np.polyfit(middles, distinct, 1)
    return float(slope), float(level), int(inside.sum())


def _logs(params: np.ndarray, flops: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, ...]:
    columns = [np.asarray(c, np.float64) for c in (params, flops, loss)]
    for name, column in zip(("params", "flops", "loss"), columns, strict=True):
        bad = column[~(np.isfinite(column) & (column > 0))]
        if len(bad):
            raise UserError(f"{name} holds {bad[0]}; a FLOP level takes finite values above 0")
    return np.log(columns[0]), np.log(columns[1]), columns[2]


def _levels(c: np.ndarray) -> list[np.ndarray]:
    """The runs of each FLOP level, by gaps in ln C [J]."""
    order = np.argsort(c, kind="stable")
    cuts = np.flatnonzero(np.diff(c[order]) > SAME_LEVEL) + 1
    groups = np.split(order, cuts)
    wide = max((float(np.ptp(c[g])) for g in groups if len(g)), default=0.0)
    if wide > 2 * SAME_LEVEL:
        raise UserError(
            f"budgets run on over a factor of {np.exp(wide):.1f} without a gap; an isoFLOP study"
            " has levels, with the runs of one within a few per cent"
        )
    return groups


def _parabolas(u: np.ndarray, y: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Weighted parabolas [R, 3], the variance of the first's minimum at unit noise, its squares."""
    basis = np.stack([np.ones_like(u), u, u * u], 1)
    normal = np.einsum("rj,jk,jl->rkl", weight, basis, basis)
    theta = np.linalg.solve(normal, ((weight * y) @ basis)[:, :, None])[:, :, 0]
    c1, c2 = theta[0, 1:]
    slope = np.array([0, -1 / (2 * c2), c1 / (2 * c2**2)]) if c2 else np.zeros(3)
    squares = float(((y - basis @ theta[0]) ** 2).sum())
    return theta, float(slope @ np.linalg.inv(normal[0]) @ slope), squares


def _minimum(theta: np.ndarray) -> np.ndarray:
    curve = np.where(theta[:, 2] > 0, theta[:, 2], np.nan)
    return np.where(np.isfinite(curve), -theta[:, 1] / (2 * curve), np.inf)


def _regress(x: np.ndarray, best: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and intercepts [R] of ln N* [levels, R] on ln C [levels]."""
    share = weight / weight.sum()
    middle = share @ x
    slope = (share * (x - middle)) @ best / (share @ (x - middle) ** 2)
    return slope, share @ best - slope * middle
