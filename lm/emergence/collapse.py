"""Does a metric collapse: is it one function of loss, or of FLOPs, tokens, parameters?

If what a model can do is decided by its loss (Du et al. 2024), the checkpoints of all sizes lie on
one curve against loss, and fan out against tokens. With no form assumed but that the curve is
monotone, y ~ f(x) is fitted to all sizes together by isotonic regression, and

    R²          1 - Σ(y - f)² / Σ(y - mean)²        of that fit
    residual    max |y - f|
    RMSE        of a size predicted by the fit to all *other* sizes, held at its ends; their mean
    R² outside  1 - Σ(y - f_without)² / Σ(y - mean)²

An isotonic fit has as many parameters as it likes, so R² flatters; the last two do not. Intervals
resample sizes, which are what differs; the draws are the same for every axis, so the difference of
two axes has an interval of its own. With few sizes these are rough.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lm.config import UserError
from lm.emergence.seeds import Interval

if TYPE_CHECKING:
    import pandas as pd

AXES = ("loss", "flops", "params", "tokens")
RESAMPLES = 500
LEAST_SIZES = 3


@dataclass(frozen=True)
class Collapse:
    """A metric against one axis; `excess` is its RMSE outside less that of the first axis, whose
    own is 0. `worst` is the RMSE of the size that is predicted worst.
    """

    axis: str
    increasing: bool
    r2: float
    residual: float
    rmse: float
    rmse_ci: Interval
    worst: float
    r2_outside: float
    excess: float
    excess_ci: Interval
    sizes: int
    n: int


def compare(
    frame: "pd.DataFrame",
    task: str,
    level: str,
    metric: str = "nll",
    axes: tuple[str, ...] = AXES,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[Collapse]:
    """One record per axis from all rows of a study, in the order of `axes`.

    Ladder rows of the canonical format count. `loss` is the held-out text loss of the same replica
    and step (rows of task `text`, metric `nll`), the others are columns. Evaluations that lack any
    of the axes are left out of all, so that they are compared on the same points.

    Raises `UserError` on fewer than 3 sizes, on nothing to compare, and on a metric that never
    changes.
    """
    keys = ["point", "replica", "step"]
    ladder = frame[(frame["role"] == "ladder") & (frame["format"] == 0)]
    good = ladder[(ladder["status"] == "ok") & np.isfinite(ladder["value"])]
    rows = good[(good["task"] == task) & (good["level"] == level) & (good["metric"] == metric)]
    if "loss" in axes:
        text = good[(good["task"] == "text") & (good["metric"] == "nll")]
        text = text[[*keys, "value"]].rename(columns={"value": "loss"}).drop_duplicates(keys)
        rows = rows.merge(text, on=keys)
    rows = rows.drop_duplicates(keys)
    if rows.empty:
        raise UserError(f"no {metric} of {task} {level} beside a text loss; see the table's names")
    x = {axis: rows[axis].to_numpy(np.float64) for axis in axes}
    return collapse(
        x, rows["value"].to_numpy(np.float64), rows["params"].to_numpy(), seed, resamples
    )


def collapse(
    x: Mapping[str, np.ndarray],
    y: np.ndarray,
    size: np.ndarray,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[Collapse]:
    """One record per axis of `x`, {axis: [J]}, for y [J] of sizes [J].

    The direction is that of the better fit to all points, and stays for those left out. Raises as
    `compare` does, and on arrays that are not finite.
    """
    y, size = np.asarray(y, np.float64), np.asarray(size)
    arrays = {axis: np.asarray(values, np.float64) for axis, values in x.items()}
    if not all(len(a) == len(y) and np.isfinite(a).all() for a in (*arrays.values(), y)):
        raise UserError("the axes and the metric must be finite and of one length")
    sizes, group = np.unique(size, return_inverse=True)
    if len(sizes) < LEAST_SIZES:
        raise UserError(f"{len(sizes)} sizes; a collapse needs at least {LEAST_SIZES}")
    if np.ptp(y) == 0:
        raise UserError(f"the metric is {y[0]:.3g} everywhere; there is nothing to collapse")
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(sizes), size=(resamples, len(sizes)))
    rows = [np.flatnonzero(group == g) for g in range(len(sizes))]
    counts = np.array([len(r) for r in rows], np.float64)
    outside: list[tuple[float, np.ndarray]] = []
    found = []
    for axis, values in arrays.items():
        up = _squares(values, y, True) <= _squares(values, y, False)
        residual = np.abs(y - _predict(values, y, values, up))
        left_out = np.empty(len(y))
        for r in rows:
            rest = np.setdiff1d(np.arange(len(y)), r)
            left_out[r] = y[r] - _predict(values[rest], y[rest], values[r], up)
        squares = np.array([(left_out[r] ** 2).sum() for r in rows])
        each = np.sqrt(squares / counts)
        rmse, drawn = each.mean(), each[draws].mean(1)
        outside.append((float(rmse), drawn))
        first, first_drawn = outside[0]
        spread = float(((y - y.mean()) ** 2).sum())
        found.append(
            Collapse(
                axis=axis,
                increasing=bool(up),
                r2=1 - float((residual**2).sum()) / spread,
                residual=float(residual.max()),
                rmse=float(rmse),
                rmse_ci=_interval(drawn),
                worst=float(each.max()),
                r2_outside=1 - float(squares.sum()) / spread,
                excess=float(rmse - first),
                excess_ci=_interval(drawn - first_drawn),
                sizes=len(sizes),
                n=len(y),
            )
        )
    return found


def _predict(x: np.ndarray, y: np.ndarray, at: np.ndarray, increasing: bool) -> np.ndarray:
    from sklearn.isotonic import IsotonicRegression

    fit = IsotonicRegression(increasing=increasing, out_of_bounds="clip").fit(x, y)
    return fit.predict(at)


def _squares(x: np.ndarray, y: np.ndarray, increasing: bool) -> float:
    return float(((y - _predict(x, y, x, increasing)) ** 2).sum())


def _interval(draws: np.ndarray) -> Interval:
    return Interval(*np.quantile(draws, [0.025, 0.975]).tolist())
