"""The scaling law of text loss: L(N) = A N^-alpha, or L(N) = E + A N^-alpha where sizes allow.

The residuals are of ln L, and their Huber loss is minimised (Hoffmann et al. 2022, approach 3):

    min over a, alpha, E >= 0 of  sum_j rho((ln(E + exp(a - alpha (ln N_j - m))) - ln L_j) / s)

with m the mean of ln N, which takes the correlation out of a and alpha, and s the scale of the
residuals, 1.345 times their median absolute deviation. The loss is a sum in units of s: averaged
and unscaled, a default optimiser stops after two iterations wherever it was started, which is how
the first published fit went wrong (Besiroglu et al. 2024). Several starts, for the same reason.

E is kept if AICc prefers it and there are at least five sizes; the interval is the percentile
interval of a bootstrap of seeds within sizes (NaN where a size has one seed).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.optimize import least_squares

from lm.emergence.onset import final_rows, resample, usable
from lm.emergence.seeds import Interval, interval

if TYPE_CHECKING:
    import pandas as pd

Form = Literal["A N^-alpha", "E + A N^-alpha"]
RESAMPLES = 200
LEAST_SIZES_FOR_E = 5


@dataclass(frozen=True)
class Law:
    """A fitted law; `n` replicas at `sizes` sizes, losses in nats per token."""

    axis: str
    form: Form
    alpha: float
    ci95: Interval
    e: float
    a: float
    n: int
    sizes: int

    def at(self, size: np.ndarray) -> np.ndarray:
        """The loss at these sizes."""
        return self.e + self.a * np.asarray(size, np.float64) ** -self.alpha


def text_law(
    frame: "pd.DataFrame", axis: Literal["params", "flops"] = "params", seed: int = 0
) -> Law | None:
    """The law of the final held-out text loss of the ladder; None below three sizes."""
    rows = frame[(frame["task"] == "text") & (frame["metric"] == "nll")]
    rows = usable(final_rows(rows[rows["role"] == "ladder"]))
    rows = rows[(rows["value"] > 0) & (rows[axis] > 0)]
    if rows[axis].nunique() < 3:
        return None
    rows = rows.sort_values(["params", "point", "replica"])
    return fit_law(rows[axis].to_numpy(np.float64), rows["value"].to_numpy(), axis, seed)


def fit_law(size: np.ndarray, loss: np.ndarray, axis: str = "params", seed: int = 0) -> Law:
    """The law of losses [J] at sizes [J], at least three of them distinct."""
    distinct = len(np.unique(size))
    x, y = np.log(size), np.log(loss)
    found = {form: _fit(x, y, form) for form in ("A N^-alpha", "E + A N^-alpha")}
    scores = {form: _aicc(x, y, theta, 2 + (form != "A N^-alpha")) for form, theta in found.items()}
    form: Form = "A N^-alpha"
    if distinct >= LEAST_SIZES_FOR_E and scores["E + A N^-alpha"] < scores[form]:
        form = "E + A N^-alpha"
    theta = found[form]
    draws = []
    for counts in resample(size, RESAMPLES, seed):
        where = np.repeat(np.arange(len(x)), counts.astype(int))
        draws.append(_fit(x[where], y[where], form, theta, x.mean())[1])
    # Resampling S seeds underestimates their variance by (S - 1)/S, a third at three seeds.
    per_size = len(x) / distinct
    stretch = np.sqrt(per_size / (per_size - 1)) if per_size > 1 else np.nan
    ends = interval(theta[1] + stretch * (np.array(draws) - theta[1]))
    a = float(np.exp(theta[0] + theta[1] * x.mean()))
    return Law(axis, form, float(theta[1]), ends, float(theta[2]), a, len(x), distinct)


def _fit(
    x: np.ndarray,
    y: np.ndarray,
    form: Form,
    near: np.ndarray | None = None,
    middle: float | None = None,
) -> np.ndarray:
    """(ln loss above E at the middle, alpha, E), from several starts or from `near` one."""
    middle = x.mean() if middle is None else middle
    slope, level = np.polyfit(x - middle, y, 1)
    if form == "A N^-alpha":
        scale = _scale(y - level - slope * (x - middle))
        start = [np.array([level, -slope])] if near is None else [near[:2]]
        return np.append(_descend(x - middle, y, start, scale), 0.0)
    lowest = float(np.exp(y.min()))
    if near is None:
        starts = [
            np.array([np.log(np.exp(level) - share * lowest), alpha, share * lowest])
            for share in (0.0, 0.3, 0.6, 0.9)
            for alpha in (-slope, 0.3, 0.6)
        ]
        rough = _descend(x - middle, y, starts, 0.1)
    else:
        rough = near
    scale = _scale(_residual(rough, x - middle, y))
    return _descend(x - middle, y, [rough], scale)


def _descend(x: np.ndarray, y: np.ndarray, starts: list[np.ndarray], scale: float) -> np.ndarray:
    """The best local minimum over the starts, in units of the residuals' scale."""
    bounds = ([-np.inf, -np.inf, 0.0][: len(starts[0])], np.inf)
    options = {"loss": "huber", "f_scale": scale, "ftol": 1e-12, "xtol": 1e-12, "gtol": 1e-12}
    found = [
        least_squares(_residual, start, args=(x, y), jac=_slope, bounds=bounds, **options)
        for start in starts
    ]
    return min(found, key=lambda result: result.cost).x


def _residual(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    e = theta[2] if len(theta) > 2 else 0.0
    return np.log(e + np.exp(theta[0] - theta[1] * x)) - y


def _slope(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    power = np.exp(theta[0] - theta[1] * x)
    total = power + (theta[2] if len(theta) > 2 else 0.0)
    columns = [power / total, -x * power / total, 1 / total]
    return np.stack(columns[: len(theta)], 1)


def _scale(residual: np.ndarray) -> float:
    return max(1.345 * 1.4826 * float(np.median(np.abs(residual))), 1e-6)


def _aicc(x: np.ndarray, y: np.ndarray, theta: np.ndarray, shape: int) -> float:
    """Of a normal with free scale: n ln(RSS/n) + 2k + 2k(k+1)/(n-k-1), k = shape + 1."""
    n, k = len(y), shape + 1
    if n <= k + 1:
        return float("inf")
    square = np.mean(_residual(theta, x - x.mean(), y) ** 2)
    return n * float(np.log(max(square, 1e-18))) + 2 * k + 2 * k * (k + 1) / (n - k - 1)
