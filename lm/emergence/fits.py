"""Candidate curves for a metric against size, fitted to every seed by maximum likelihood.

The candidates of `lm.emergence.shapes` are mean(x) = left + (right - left) u(x), x = log10(N). They
are compared by AICc = -2 ln L + 2k + 2k(k+1)/(n-k-1), n = seeds (Burnham & Anderson 2002).

Around the mean, a rate is beta-binomial (its items are not independent given the size: seeds
differ) and a continuous metric is normal. Both get more scatter in the middle of a transition,

    rho = rho0 + (1 - rho0) rho1 4u(1-u)          sigma² = s0² (1 + r² 4u(1-u)),

because at a threshold some seeds have the ability and some do not; without the second term one
bimodal size would make every curve look impossible, or every curve look alike.

All functions are vectorised over candidate parameters, [G, k]; means and positions are taken at the
S sizes, since the J seeds of a size share them.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.optimize import differential_evolution, minimize
from scipy.special import gammaln

from lm.emergence.shapes import Candidate, candidates
from lm.emergence.shapes import Curve as Curve
from lm.emergence.shapes import logistic as logistic

EDGE = 1e-5  # a rate of 0 or 1 is never certain
LEAST_RHO = 1e-5
HOPELESS = 30.0  # in log-likelihood: no part of a median or of an interval
LEAST_NOISE = 0.01  # of the range of a continuous metric: what changes less is no shape


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


def fit_all(curve: Curve) -> list[Fit]:
    """Every candidate fitted to the curve, best AICc first."""
    fit, again = (
        (_fit_rate, _refit_rate) if curve.kind == "rate" else (_fit_continuous, _fit_continuous)
    )
    shapes = candidates(curve)
    fitted = [fit(curve, candidate) for candidate in shapes]
    # A sharp and a wide curve meet at one decade: what one search has found there, the other must.
    for i, (candidate, found) in enumerate(zip(shapes, fitted, strict=True)):
        twin = next((f for f in fitted if f.name == found.name and f.sharp != found.sharp), found)
        if twin.loglik > found.loglik:
            fitted[i] = max(found, again(curve, candidate, twin), key=lambda f: f.loglik)
    return sorted(fitted, key=lambda f: f.aicc)


def leave_one_size_out(
    curve: Curve, fitted: list[Fit] | None = None, best: int = 3
) -> dict[str, float]:
    """How well the best few candidates predict a size they have not seen: name -> log score.

    The score is the sum over sizes of the log probability (density, for a continuous metric) of
    its seeds under the curve fitted to all others, in nats; more is better. Each refit starts at
    the fit to all sizes and stays beside it. NaN with fewer than 3 sizes.
    """
    fitted = fit_all(curve) if fitted is None else fitted
    named = {fit.name: fit for fit in reversed(fitted)}  # the better of sharp and wide
    chosen = sorted(named.values(), key=lambda fit: fit.aicc)[:best]
    shapes = {(c.name, c.sharp): c for c in candidates(curve)}
    return {fit.name: _left_out(curve, shapes[fit.name, fit.sharp], fit) for fit in chosen}


def _left_out(curve: Curve, candidate: Candidate, fit: Fit) -> float:
    if len(curve.sizes) < 3:
        return float("nan")
    total = 0.0
    for size in curve.sizes:
        seen, unseen = (
            Curve(curve.kind, curve.x[rows], curve.y[rows], curve.n[rows], curve.floor)
            for rows in (curve.x != size, curve.x == size)
        )
        again = (_refit_rate if curve.kind == "rate" else _fit_continuous)(seen, candidate, fit)
        u = candidate.position(again.shape[None], unseen.sizes)
        mean = again.left + (again.right - again.left) * u
        if curve.kind == "rate":
            hits, misses = unseen.y * unseen.n, (1 - unseen.y) * unseen.n
            ways = gammaln(unseen.n + 1) - gammaln(hits + 1) - gammaln(misses + 1)
            total += float((ways + loglik_rate(unseen, mean, u, again.noise[None])).sum())
        else:
            total += float(loglik_normal(unseen, mean, u, again.noise[None]).sum())
    return total


def mean_at(curve: Curve, fit: Fit, x: np.ndarray) -> np.ndarray:
    """The fitted mean at log10 sizes x."""
    same = [c for c in candidates(curve) if (c.name, c.sharp) == (fit.name, fit.sharp)]
    return fit.left + (fit.right - fit.left) * same[0].position(fit.shape[None], x)[0]


def loglik_rate(curve: Curve, mean: np.ndarray, u: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Beta-binomial log-likelihood [G, J] (without its binomial coefficient) of mean and position
    at the sizes, [G, S], noise = log rho.
    """
    base, extra = np.exp(noise[:, :1]), np.exp(noise[:, 1:])
    rho = np.minimum(base + (1 - base) * extra * 4 * u * (1 - u), 0.99)
    p, size = np.clip(mean, EDGE, 1 - EDGE), 1 / rho - 1
    hits, at = curve.y * curve.n, curve.at
    a, b = p * size, (1 - p) * size
    # Six gamma functions, of which four are the same for all seeds of a size.
    shared = gammaln(size) - gammaln(a) - gammaln(b)
    if np.ptp(curve.n) == 0:
        total = (shared - gammaln(size + curve.n[0]))[:, at]
    else:
        total = shared[:, at] - gammaln(size[:, at] + curve.n)
    return total + gammaln(hits + a[:, at]) + gammaln(curve.n - hits + b[:, at])


def loglik_normal(curve: Curve, mean: np.ndarray, u: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Normal log-likelihood [G, J] of mean and position at the sizes, [G, S], noise = (s0, r)."""
    variance = noise[:, :1] ** 2 * (1 + noise[:, 1:] ** 2 * 4 * u * (1 - u))
    at, scale = curve.at, np.log(2 * np.pi * variance)
    return -0.5 * ((curve.y - mean[:, at]) ** 2 / variance[:, at] + scale[:, at])


def resampled(
    curve: Curve, mean: np.ndarray, u: np.ndarray, noise: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """Log-likelihood [G, B] where each seed counts as often as `counts` [B, J] says, as often in
    all at every size; -inf where it falls short of the best of the data by HOPELESS even if
    each size has drawn its kindest seed alone.

    einsum, not @: the threads of a BLAS that fight for two cores made this 20 times slower.
    """
    if curve.kind == "rate":
        each = loglik_rate(curve, mean, u, noise)
        order = np.argsort(curve.at, kind="stable")
        starts = np.searchsorted(curve.at[order], np.arange(len(curve.sizes)))
        gain = (each - each[each.sum(1).argmax()])[:, order]
        near = np.maximum.reduceat(gain, starts, 1) @ curve.moments[0] >= -HOPELESS
        total = np.full((len(mean), len(counts)), -np.inf)
        total[near] = np.einsum("gj,bj->gb", each[near], counts)
        return total
    variance = noise[:, :1] ** 2 * (1 + noise[:, 1:] ** 2 * 4 * u * (1 - u))
    count, y, _ = curve.moments
    away, apart = mean - y, curve.y - y[curve.at]
    at_size = (curve.at[:, None] == np.arange(len(y))).astype(np.float64)  # [J, S]
    once, twice = (np.einsum("bj,js->bs", counts * apart**power, at_size) for power in (1, 2))
    fixed = (count * (away**2 / variance + np.log(2 * np.pi * variance))).sum(1)
    squares = np.einsum("gs,bs->gb", 1 / variance, twice)
    squares -= 2 * np.einsum("gs,bs->gb", away / variance, once)
    return -0.5 * (fixed[:, None] + squares)


def _fit_continuous(curve: Curve, candidate: Candidate, near: Fit | None = None) -> Fit:
    """Given shape and r, the ends and s0 have closed forms, so only those are searched, by grids
    that close in: the likelihood has several optima, and a gradient finds any of them. With `near`
    they begin at a fifth of the box around that fit.
    """
    box = [*candidate.box, (0.0, 1.7 if candidate.mid else 0.0)]  # log10(1 + r): s0 r <= half range
    counts = {1: [12], 2: [24, 12], 3: [81, 12, 12], 4: [8, 8, 16, 8]}[len(box)]
    if candidate.name == "step":
        counts = [2 * len(curve.sizes), 1]
    if near is not None:
        center = [*near.shape, np.log10(1 + near.noise[1])]
        box = [
            _around(side, at, 0.1 * (side[1] - side[0]))
            for side, at in zip(box, center, strict=True)
        ]
        counts = [min(count, 9) for count in counts]
    for _ in range(5 if near is None else 3):
        axes = [np.linspace(*side, count) for side, count in zip(box, counts, strict=True)]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(box))
        total, ends, s0 = _profile(
            curve, candidate.position(grid[:, :-1], curve.sizes), grid[:, -1]
        )
        best = int(total.argmax())
        reach = [1.5 * np.ptp(axis) / max(len(axis) - 1, 1) for axis in axes]
        box = [_around(*sides) for sides in zip(box, grid[best], reach, strict=True)]
        counts = [9 if len(box) < 4 else 6] * len(box)
    noise = np.array([s0[best], 10 ** grid[best, -1] - 1])
    k = len(candidate.box) + (2 if candidate.name == "constant" else 3 + candidate.mid)
    aicc = _aicc(float(total[best]), k, len(curve.y))
    found = (*ends[best].tolist(), grid[best, :-1], noise, float(total[best]), k, aicc)
    return Fit(candidate.name, candidate.sharp, *found)


def _around(side: tuple[float, float], at: float, reach: float) -> tuple[float, float]:
    at = min(max(at, side[0]), side[1])
    return max(side[0], at - reach), min(side[1], at + reach)


def _profile(
    curve: Curve, u: np.ndarray, log_r: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-likelihood [G], best ends [G, 2] and s0 [G] at positions u [G, S] by weighted squares."""
    count, y, inside = curve.moments
    extra = 1 + (10 ** log_r[:, None] - 1) ** 2 * 4 * u * (1 - u)  # variance over s0²
    weight = count / extra
    norm = weight.sum(1)
    u_mean, y_mean = (weight * u).sum(1) / norm, (weight * y).sum(1) / norm
    du, dy = u - u_mean[:, None], y - y_mean[:, None]
    spread = (weight * du**2).sum(1)
    slope = np.where(spread > 1e-12, (weight * du * dy).sum(1) / np.maximum(spread, 1e-12), 0.0)
    left = y_mean - slope * u_mean
    square = (weight * (dy - slope[:, None] * du) ** 2 + inside / extra).sum(1)
    least = LEAST_NOISE * max(float(np.ptp(curve.y)), 1e-6)
    s0 = np.maximum(np.sqrt(square / len(curve.y)), least)
    scale = (count * np.log(2 * np.pi * extra)).sum(1) + 2 * len(curve.y) * np.log(s0)
    return -0.5 * (square / s0**2 + scale), np.stack([left, left + slope], -1), s0


def _fit_rate(curve: Curve, candidate: Candidate) -> Fit:
    """Differential evolution (vectorised, seeded), then a local polish."""
    low, high = _bounds(curve, candidate)
    free = high > low
    cost = _cost(curve, candidate)
    z = _minimise(lambda z: cost(_unpack(z, low, high)), int(free.sum()))
    return _fitted(curve, candidate, _unpack(z[:, None], low, high)[0])


def _refit_rate(curve: Curve, candidate: Candidate, near: Fit) -> Fit:
    """The local optimum beside another curve's fit."""
    low, high = _bounds(curve, candidate)
    free = high > low
    theta = np.array([near.left, near.right, *near.shape, *near.noise])
    start = np.clip((theta - low)[free] / (high - low)[free], 0, 1)
    cost = _cost(curve, candidate)
    z = _polish(lambda z: cost(_unpack(z, low, high)), start, 30)
    return _fitted(curve, candidate, _unpack(z[:, None], low, high)[0])


def _bounds(curve: Curve, candidate: Candidate) -> tuple[np.ndarray, np.ndarray]:
    """The box of a rate's parameters: both ends, the shape, log rho0 and log rho1."""
    level = (EDGE, 1 - EDGE)
    left = {"constant": (0.0, 0.0), "line": level}.get(candidate.name, (curve.floor, curve.floor))
    extra = (LEAST_RHO, 0.9 if candidate.mid else LEAST_RHO)
    box = [left, level, *candidate.box, np.log([LEAST_RHO, 0.5]), np.log(extra)]
    low, high = np.array(box).T
    return low, high


def _unpack(z: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """From the unit box of the free parameters, [k, G], to all parameters, [G, all]."""
    free = high > low
    theta = np.tile(low, (z.shape[1], 1))
    theta[:, free] += z.T * (high - low)[free]
    return theta


def _cost(curve: Curve, candidate: Candidate) -> Callable[[np.ndarray], np.ndarray]:
    """What a fit minimises: from parameters [G, all] to [G].

    Told from each seed's own rate: the search stops on a relative change, and the likelihood's
    constant of thousands would hide all others.
    """
    own = _own(curve)

    def cost(theta: np.ndarray) -> np.ndarray:
        mean, u = _rates(curve, candidate, theta)
        return own - loglik_rate(curve, mean, u, theta[:, -2:]).sum(1)

    return cost


def _own(curve: Curve) -> float:
    """The log-likelihood of a rate where each seed has its own."""
    p, size = np.clip(curve.y, EDGE, 1 - EDGE), 1 / LEAST_RHO - 1
    a, b, hits = p * size, (1 - p) * size, curve.y * curve.n
    each = gammaln(hits + a) + gammaln(curve.n - hits + b) - gammaln(size + curve.n)
    return float((each + gammaln(size) - gammaln(a) - gammaln(b)).sum())


def _rates(curve: Curve, candidate: Candidate, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and position at the sizes, [G, S]."""
    u = candidate.position(theta[:, 2:-2], curve.sizes)
    left = theta[:, 1:2] if candidate.name == "constant" else theta[:, :1]
    return left + (theta[:, 1:2] - left) * u, u


def _fitted(curve: Curve, candidate: Candidate, theta: np.ndarray) -> Fit:
    low, high = _bounds(curve, candidate)
    mean, u = _rates(curve, candidate, theta[None])
    value = float(loglik_rate(curve, mean, u, theta[None, -2:]).sum())
    k = int((high > low).sum())
    left = theta[1] if candidate.name == "constant" else theta[0]
    rest = (left, theta[1], theta[2:-2], theta[-2:], value, k, _aicc(value, k, len(curve.y)))
    return Fit(candidate.name, candidate.sharp, *rest)


def _minimise(cost: Callable[[np.ndarray], np.ndarray], k: int) -> np.ndarray:
    """The place of the global minimum over the unit box of `cost([k, G]) -> [G]`."""
    rough = differential_evolution(
        *(cost, [(0.0, 1.0)] * k),
        **{"vectorized": True, "updating": "deferred", "polish": False, "init": "sobol"},
        **{"popsize": 10, "maxiter": 80, "tol": 1e-3, "rng": 0},
    )
    return _polish(cost, rough.x)


def _polish(
    cost: Callable[[np.ndarray], np.ndarray], start: np.ndarray, calls: int = 80
) -> np.ndarray:
    """The place of the local minimum beside `start` [k] in the unit box."""
    k, step = len(start), 1e-6

    def slope(z: np.ndarray) -> tuple[float, np.ndarray]:
        nudges = np.hstack([np.zeros((k, 1)), step * np.eye(k), -step * np.eye(k)])
        values = cost(z[:, None] + nudges)
        return values[0], (values[1 : k + 1] - values[k + 1 :]) / (2 * step)

    # TNC, since L-BFGS-B calls a threaded BLAS thousands of times for five numbers.
    options, bounds = {"maxfun": calls}, [(0.0, 1.0)] * k
    found = minimize(slope, start, jac=True, method="TNC", bounds=bounds, options=options)
    return found.x if found.fun < cost(start[:, None])[0] else start


def _aicc(loglik: float, k: int, n: int) -> float:
    if n <= k + 1:
        return float("inf")
    return -2 * loglik + 2 * k + 2 * k * (k + 1) / (n - k - 1)
