"""Candidate curves for a metric against size, fitted to every seed by maximum likelihood.

With x = log10(parameters), a curve is mean(x) = left + (right - left) u(x), where the position u
goes from 0 to 1 and, with w the 10-90% width in decades, is one of

    constant      0
    line          (x - first) / (last - first)
    power         a rate grows from chance as N^c, a loss falls to its limit as N^-c (Kaplan 2020)
    logistic      1 / (1 + exp(-2 ln 9 (x - x50) / w))
    hinge         clip(1/2 + 0.8 (x - x50) / w, 0, 1)

The two that can be sharp are fitted twice: *sharp* (w <= 1 decade) and *wide* (w >= 1); a power law
is held to w >= 1. So "is it sharp?" is one comparison of AICc between two sets of curves
(Burnham & Anderson 2002: AICc = -2 ln L + 2k + 2k(k+1)/(n-k-1), n = seeds).

Around the mean, a rate is beta-binomial (its items are not independent given the size: seeds
differ) and a continuous metric is normal. Both get more scatter in the middle of a transition,

    rho = rho0 + (1 - rho0) rho1 4u(1-u)          sigma² = s0² (1 + r² 4u(1-u)),

because at a threshold some seeds have the ability and some do not; without the second term one
bimodal size would make every curve look impossible, or every curve look alike.

All functions are vectorised over candidate parameters, [G, k], and seeds, J.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
from scipy.optimize import OptimizeResult, differential_evolution, minimize
from scipy.special import betaln

SHARP_WIDTH = 1.0  # decades; nature has no such number, so this one is fixed before the data
NARROWEST, WIDEST = 0.02, 8.0
STEEPEST_POWER = np.log10(9) / SHARP_WIDTH  # from 10% to 90% of a power law in one decade
EDGE = 1e-5  # a rate of 0 or 1 is never certain
LEAST_NOISE = 0.01  # of the range of a continuous metric: what changes less is no shape

Box = list[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One metric of one task at the end of training: a value per seed.

    x log10 parameters, y value, n items: [J]. `floor` is the left end of a rate's transition:
    chance, or the mean of the smallest sizes where that is below chance.
    """

    kind: Literal["rate", "continuous"]
    x: np.ndarray
    y: np.ndarray
    n: np.ndarray
    floor: float = 0.0

    @cached_property
    def sizes(self) -> np.ndarray:
        """The distinct x, ascending."""
        return np.unique(self.x)

    @cached_property
    def means(self) -> np.ndarray:
        """The mean of the seeds at each of `sizes`."""
        return np.array([self.y[self.x == size].mean() for size in self.sizes])

    @property
    def span(self) -> float:
        """Decades from the smallest size to the largest."""
        return float(self.sizes[-1] - self.sizes[0])


class Fit(NamedTuple):
    """One fitted candidate: its ends, its shape parameters and its two noises."""

    name: str
    sharp: bool
    left: float
    right: float
    shape: np.ndarray
    noise: np.ndarray
    loglik: float
    k: int
    aicc: float


class Candidate(NamedTuple):
    """A shape: its position `u(shape [G, k], x [J]) -> [G, J]` and the box of its parameters."""

    name: str
    sharp: bool
    position: Callable[[np.ndarray, np.ndarray], np.ndarray]
    box: Box


def fit_all(curve: Curve) -> list[Fit]:
    """Every candidate fitted to the curve, best AICc first."""
    fit = _fit_rate if curve.kind == "rate" else _fit_continuous
    return sorted((fit(curve, candidate) for candidate in candidates(curve)), key=lambda f: f.aicc)


def candidates(curve: Curve) -> list[Candidate]:
    """The shapes compared on this curve; a midpoint may lie half the ladder outside of it."""
    first, last = curve.sizes[0], curve.sizes[-1]

    def line(shape: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.broadcast_to((x - first) / (last - first), (len(shape), len(x)))

    def power(shape: np.ndarray, x: np.ndarray) -> np.ndarray:
        if curve.kind == "rate":
            return 10 ** (shape * (x - last))
        return (1 - 10 ** (-shape * (x - first))) / (1 - 10 ** (-shape * (last - first)))

    middle = (first - 0.5 * curve.span, last + 0.5 * curve.span)
    narrow, one, wide = np.log10([NARROWEST, SHARP_WIDTH, WIDEST])
    steps = [(name, position) for name, position in (("logistic", logistic), ("hinge", hinge))]
    return [
        Candidate("constant", False, lambda shape, x: np.zeros((len(shape), len(x))), []),
        Candidate("line", False, line, []),
        Candidate("power", False, power, [(0.02, STEEPEST_POWER)]),
        *(Candidate(name, True, u, [middle, (narrow, one)]) for name, u in steps),
        *(Candidate(name, False, u, [middle, (one, wide)]) for name, u in steps),
    ]


def logistic(shape: np.ndarray, x: np.ndarray) -> np.ndarray:
    """shape [G, 2]: x50 and log10 of the 10-90% width."""
    z = 2 * np.log(9) * (x - shape[:, :1]) / 10 ** shape[:, 1:]
    return 1 / (1 + np.exp(-np.clip(z, -60, 60)))


def hinge(shape: np.ndarray, x: np.ndarray) -> np.ndarray:
    """shape as for `logistic`: flat, a straight ramp, flat."""
    return np.clip(0.5 + 0.8 * (x - shape[:, :1]) / 10 ** shape[:, 1:], 0, 1)


def mean_at(curve: Curve, fit: Fit, x: np.ndarray) -> np.ndarray:
    """The fitted mean at log10 sizes x."""
    same = [c for c in candidates(curve) if (c.name, c.sharp) == (fit.name, fit.sharp)]
    return fit.left + (fit.right - fit.left) * same[0].position(fit.shape[None], x)[0]


def loglik_rate(curve: Curve, mean: np.ndarray, u: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Beta-binomial log-likelihood [G, J] (without its binomial coefficient), noise = log rho."""
    base, extra = np.exp(noise[:, :1]), np.exp(noise[:, 1:])
    rho = np.minimum(base + (1 - base) * extra * 4 * u * (1 - u), 0.99)
    p, size = np.clip(mean, EDGE, 1 - EDGE), 1 / rho - 1
    hits = curve.y * curve.n
    a, b = p * size, (1 - p) * size
    return betaln(hits + a, curve.n - hits + b) - betaln(a, b)


def loglik_normal(curve: Curve, mean: np.ndarray, u: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Normal log-likelihood [G, J], noise = (s0, r)."""
    variance = noise[:, :1] ** 2 * (1 + noise[:, 1:] ** 2 * 4 * u * (1 - u))
    return -0.5 * ((curve.y - mean) ** 2 / variance + np.log(2 * np.pi * variance))


def _fit_continuous(curve: Curve, candidate: Candidate) -> Fit:
    """Given shape and r, the ends and s0 have closed forms, so only those are searched, by grids
    that close in: the likelihood has several optima, and a gradient finds any of them.
    """
    flat = candidate.name == "constant"
    box = [*candidate.box, (0.0, 0.0 if flat else 1.7)]  # log10(1 + r): s0 r <= half the range
    counts = [81, 12, 12][-len(box) :] if len(box) != 2 else [24, 12]
    for _ in range(5):
        axes = [np.linspace(*side, count) for side, count in zip(box, counts, strict=True)]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(box))
        total, ends, s0 = _profile(curve, candidate.position(grid[:, :-1], curve.x), grid[:, -1])
        best = int(total.argmax())
        reach = [1.5 * np.ptp(axis) / max(len(axis) - 1, 1) for axis in axes]
        box = [
            (max(low, at - near), min(high, at + near))
            for (low, high), at, near in zip(box, grid[best], reach, strict=True)
        ]
        counts = [9] * len(box)
    noise = np.array([s0[best], 10 ** grid[best, -1] - 1])
    k = len(candidate.box) + (2 if flat else 4)
    aicc = _aicc(float(total[best]), k, len(curve.y))
    found = (*ends[best].tolist(), grid[best, :-1], noise, float(total[best]), k, aicc)
    return Fit(candidate.name, candidate.sharp, *found)


def _profile(
    curve: Curve, u: np.ndarray, log_r: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-likelihood [G], best ends [G, 2] and s0 [G] at positions u [G, J] by weighted squares."""
    weight = 1 / (1 + (10 ** log_r[:, None] - 1) ** 2 * 4 * u * (1 - u))
    norm = weight.sum(1)
    u_mean, y_mean = (weight * u).sum(1) / norm, (weight * curve.y).sum(1) / norm
    du, dy = u - u_mean[:, None], curve.y - y_mean[:, None]
    spread = (weight * du**2).sum(1)
    slope = np.where(spread > 1e-12, (weight * du * dy).sum(1) / np.maximum(spread, 1e-12), 0.0)
    left = y_mean - slope * u_mean
    residual = dy - slope[:, None] * du
    least = LEAST_NOISE * max(float(np.ptp(curve.y)), 1e-6)
    s0 = np.maximum(np.sqrt((weight * residual**2).mean(1)), least)
    ends = np.stack([left, left + slope], -1)
    mean = left[:, None] + slope[:, None] * u
    noise = np.stack([s0, 10**log_r - 1], -1)
    return loglik_normal(curve, mean, u, noise).sum(1), ends, s0


def _fit_rate(curve: Curve, candidate: Candidate) -> Fit:
    """Differential evolution (vectorised, seeded), then a local polish."""
    level, flat = (EDGE, 1 - EDGE), candidate.name == "constant"
    left = (0.0, 0.0) if flat else level if candidate.name == "line" else (curve.floor, curve.floor)
    first = np.log([1e-5, 0.5])
    second = np.log([1e-5, 0.9]) if not flat else np.log([1e-5, 1e-5])
    box = [left, level, *candidate.box, tuple(first), tuple(second)]
    low, high = np.array(box).T
    free = high > low

    # Told from each seed's own rate: the search stops on a relative change, and the likelihood's
    # constant of thousands would hide all others.
    idle = np.zeros((1, len(curve.y)))
    own = loglik_rate(curve, curve.y[None], idle, np.log([[1e-5, 1e-5]])).sum()

    def unpack(z: np.ndarray) -> np.ndarray:  # [k, G] in the unit box -> [G, all]
        theta = np.tile(low, (z.shape[1], 1))
        theta[:, free] += z.T * (high - low)[free]
        return theta

    def cost(z: np.ndarray) -> np.ndarray:
        theta = unpack(z)
        u = candidate.position(theta[:, 2:-2], curve.x)
        mean = theta[:, :1] * (1 - u) + theta[:, 1:2] * u if not flat else theta[:, 1:2] + u
        return own - loglik_rate(curve, mean, u, theta[:, -2:]).sum(1)

    found = _minimise(cost, int(free.sum()))
    theta = unpack(found.x[:, None])[0]
    value, k = float(own - found.fun), int(free.sum())
    left_end = theta[1] if flat else theta[0]
    rest = (left_end, theta[1], theta[2:-2], theta[-2:], value, k, _aicc(value, k, len(curve.y)))
    return Fit(candidate.name, candidate.sharp, *rest)


def _minimise(cost: Callable[[np.ndarray], np.ndarray], k: int) -> OptimizeResult:
    """The global minimum over the unit box of `cost([k, G]) -> [G]`."""
    bounds, step = [(0.0, 1.0)] * k, 1e-6
    rough = differential_evolution(
        *(cost, bounds),
        **{"vectorized": True, "updating": "deferred", "polish": False, "init": "sobol"},
        **{"popsize": 10, "maxiter": 80, "tol": 1e-3, "rng": 0},
    )

    def slope(z: np.ndarray) -> tuple[float, np.ndarray]:
        nudges = np.hstack([np.zeros((k, 1)), step * np.eye(k), -step * np.eye(k)])
        values = cost(z[:, None] + nudges)
        return values[0], (values[1 : k + 1] - values[k + 1 :]) / (2 * step)

    # TNC, since L-BFGS-B calls a threaded BLAS thousands of times for five numbers.
    options = {"maxfun": 80}
    fine = minimize(slope, rough.x, jac=True, method="TNC", bounds=bounds, options=options)
    return fine if fine.fun < rough.fun else rough


def _aicc(loglik: float, k: int, n: int) -> float:
    if n <= k + 1:
        return float("inf")
    return -2 * loglik + 2 * k + 2 * k * (k + 1) / (n - k - 1)
