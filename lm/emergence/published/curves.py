"""Four curves of one metric against the log of size or steps, by least squares and AICc.

    line       c0 + c1 x              2 parameters
    power      c 10^(p x)             2
    hinge      c0 + c1 max(x - x0, 0) 3
    logistic   left + (right - left) / (1 + exp(-k (x - x0)))     4, the left end at 0 or above

AICc = n ln(RSS / n) + 2k + 2k(k + 1)/(n - k - 1), k with the variance. One value per size and no
items: this is for curves of which only that was published; `lm.emergence.fits` is for studies.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares

type Shape = Callable[[np.ndarray, np.ndarray], np.ndarray]
type Bounds = tuple[list[float], list[float]] | tuple[()]


class Curve(NamedTuple):
    """A fitted curve: its parameters, AICc, and `at(x)`."""

    theta: np.ndarray
    aicc: float
    shape: Shape

    def at(self, x: np.ndarray) -> np.ndarray:
        """The curve at x."""
        return self.shape(self.theta, np.asarray(x, np.float64))


def line(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A straight line."""
    return theta[0] + theta[1] * x


def power(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """A power law of the size, with the log of its level at x = 0."""
    return np.exp(np.clip(theta[0] + theta[1] * x, -700, 700))


def hinge(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Flat, then a straight line."""
    return theta[0] + theta[1] * np.maximum(x - theta[2], 0)


def logistic(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
    """From theta[0] to theta[1]."""
    z = np.clip(theta[2] * (x - theta[3]), -700, 700)
    return theta[0] + (theta[1] - theta[0]) / (1 + np.exp(-z))


def fit(x: np.ndarray, y: np.ndarray) -> dict[str, Curve]:
    """All four curves on points x, y [n], n of at least 7, y a rate; lowest AICc first."""
    low, high, top = float(x.min()), float(x.max()), float(y.max())
    spans = np.linspace(low, high, 8)[1:-1]
    rate = [(float(np.log(max(top, 1e-9))) - p * high, p) for p in (0.3, 1.0, 3.0)]
    starts: dict[str, tuple[Shape, Sequence[tuple[float, ...]], Bounds]] = {
        "line": (line, [(float(y.mean()), 0.0)], ()),
        "power": (power, rate, ()),
        "hinge": (hinge, [(float(y[0]), top / (high - low), at) for at in spans], ()),
        "logistic": (
            logistic,
            [(0.0, top, k, at) for at in spans for k in (2.0, 8.0)],
            ([0.0, 0.0, 0.0, -np.inf], [1.0, 1.5, np.inf, np.inf]),
        ),
    }
    found = {}
    for name, (shape, tries, bounds) in starts.items():
        best = min(
            (_descend(shape, np.array(start, float), x, y, bounds) for start in tries),
            key=lambda pair: pair[0],
        )
        found[name] = Curve(best[1], _aicc(best[0], len(y), len(best[1]) + 1), shape)
    return dict(sorted(found.items(), key=lambda item: item[1].aicc))


def _descend(
    shape: Shape,
    start: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    bounds: Bounds,
) -> tuple[float, np.ndarray]:
    options = {"bounds": bounds} if bounds else {}
    found = least_squares(
        lambda theta: shape(theta, x) - y, start, x_scale="jac", max_nfev=1000, **options
    )
    return 2 * float(found.cost), found.x


def _aicc(squares: float, n: int, k: int) -> float:
    return n * float(np.log(max(squares, 1e-300) / n)) + 2 * k + 2 * k * (k + 1) / (n - k - 1)
