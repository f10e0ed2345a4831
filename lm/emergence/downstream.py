"""From size and data to loss, and from loss to downstream error (Gadre et al. 2024).

Over-training, with N parameters and M tokens per parameter (equation 4 at C = 6 M N^2):

    L(N, M) = E + alpha N^b + beta 6^(b/2) (M N)^b,      b < 0

Downstream, the mean top-1 error of a set of tasks falls with the loss (equation 5):

    err(L) = eps - k exp(-gamma L)

Both are linear but for one parameter. Given b, or gamma, the rest is solved, and what remains is
searched on a grid in one dimension and refined: no starts, and no local minimum to be caught in.
The two in sequence predict the error of a run from its size and data before it is trained.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize_scalar, nnls

from lm.config import UserError

EXPONENTS = np.linspace(-1.5, -0.02, 150)
RATES = np.geomspace(0.02, 20, 200)


@dataclass(frozen=True)
class OverTraining:
    """L(N, M) in nats per token; `exponent` is b, negative."""

    alpha: float
    beta: float
    exponent: float
    e: float

    def at(self, params: np.ndarray, ratio: np.ndarray) -> np.ndarray:
        """The loss at these parameters and tokens per parameter."""
        n, m = np.asarray(params, np.float64), np.asarray(ratio, np.float64)
        b = self.exponent
        return self.e + self.alpha * n**b + self.beta * 6 ** (b / 2) * (m * n) ** b


@dataclass(frozen=True)
class ErrorLaw:
    """err(L) = eps - k exp(-gamma L); accuracy is 1 - err."""

    eps: float
    k: float
    gamma: float

    def at(self, loss: np.ndarray) -> np.ndarray:
        """The error at these losses (nats per token)."""
        return self.eps - self.k * np.exp(-self.gamma * np.asarray(loss, np.float64))


def fit_overtraining(params: np.ndarray, ratio: np.ndarray, loss: np.ndarray) -> OverTraining:
    """Least squares on the losses of runs [J], with E, alpha and beta held at 0 or above.

    Raises `UserError` below four runs (there are four parameters), for values that are not
    positive and finite, and where all runs have one size.
    """
    n, m, y = _columns(4, params=params, ratio=ratio, loss=loss)
    if np.ptp(np.log(n)) < 1e-9:
        raise UserError("all runs have the same parameters; give runs of at least two sizes")
    middle = np.exp(np.log(n).mean()), np.exp(np.log(m * n).mean())

    def solve(b: float) -> tuple[float, np.ndarray]:
        columns = np.stack([np.ones_like(y), (n / middle[0]) ** b, (m * n / middle[1]) ** b], 1)
        found, norm = nnls(columns, y)
        return norm**2, found

    b = _search(lambda value: solve(value)[0], EXPONENTS)
    e, first, second = solve(b)[1]
    alpha, beta = first * middle[0] ** -b, second * middle[1] ** -b * 6 ** (-b / 2)
    return OverTraining(float(alpha), float(beta), b, float(e))


def fit_error(loss: np.ndarray, error: np.ndarray) -> ErrorLaw:
    """Least squares on the errors of runs [J] with these losses.

    Raises `UserError` below four runs, for values that are not finite, and where all losses are
    equal.
    """
    x, y = _columns(4, loss=loss, error=error)
    if np.ptp(x) < 1e-9:
        raise UserError(f"all runs have the loss {x[0]:g}; give runs that differ in loss")
    middle = x.mean()

    def solve(gamma: float) -> tuple[float, np.ndarray]:
        columns = np.stack([np.ones_like(x), -np.exp(-gamma * (x - middle))], 1)
        found = np.linalg.lstsq(columns, y, rcond=None)[0]
        return float(((columns @ found - y) ** 2).sum()), found

    gamma = _search(lambda value: solve(value)[0], RATES)
    eps, k = solve(gamma)[1]
    return ErrorLaw(float(eps), float(k * np.exp(gamma * middle)), gamma)


def _search(cost: Callable[[float], float], grid: np.ndarray) -> float:
    """The minimum over a grid, refined between its neighbours."""
    costs = [cost(value) for value in grid]
    i = int(np.argmin(costs))
    bounds = grid[max(i - 1, 0)], grid[min(i + 1, len(grid) - 1)]
    found = minimize_scalar(cost, bounds=bounds, method="bounded", options={"xatol": 1e-12})
    return float(found.x if found.fun < costs[i] else grid[i])


def _columns(least: int, **columns: np.ndarray) -> list[np.ndarray]:
    """Columns of equal length as floats, or why no law can be fitted to them."""
    made = {name: np.asarray(column, np.float64) for name, column in columns.items()}
    names, lengths = list(made), [len(column) for column in made.values()]
    if len(set(lengths)) > 1:
        raise UserError(f"{' and '.join(names)} differ in number; give one of each per run")
    if lengths[0] < least:
        raise UserError(f"the law has {lengths[0]} runs; it takes at least {least}")
    for name, column in made.items():
        floor = -np.inf if name == "error" else 0
        bad = column[~(np.isfinite(column) & (column > floor))]
        if len(bad):
            limit = "finite values" if name == "error" else "finite values above 0"
            raise UserError(f"{name} holds {bad[0]}; the law takes {limit}")
    return list(made.values())
