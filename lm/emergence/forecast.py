"""What a new seed will measure at a size not yet trained: a predictive distribution.

A curve that only describes the sizes seen is sure of what it cannot know: at chance so far, it says
"flat forever". Here every curve has a prior, and what no size has excluded stays possible. With x =
log10(parameters), seen from `first` to `last`, a rate follows one of

    never   left so far; beyond, it may begin
    line    a line in x between its values at first and last, each U(0, 1)
    power   left + rise 10^(c (x - last)), c ~ U(0.05, 1)
    slide   left + rise u(x), u logistic with midpoint x50 and 10-90% width w; all seeds move
    split   a seed is at left + rise with probability u(x), else at left

    x50 ~ U(first - 0.5, last + 0.1)     log10 w ~ U(log10 0.03, log10 4)     left = floor +- 20%

A rise ends with all items right with probability 3/8, else uniformly. *The onset not yet seen*:
it lies within 3 decades beyond the last size with probability 3/4, log-uniformly (1/4 a decade), as
`slide` or `split` with equal odds, no wider than a decade, with the same rise. Both numbers were
set on planted ladders and are the same for every study. Seeds are beta-binomial, in `slide` half of
the time with more scatter in mid-transition.

A loss follows a slow line, any line or a decay to a limit (all of which may jump beyond the ladder,
with the same odds), or a `slide` or `split` from a slow line to another level: with probability 3/4
a lower one, else one up to ten times higher, since a model that memorises what it cannot learn is
sure of wrong answers. Sizes scatter around their curve by tau and seeds around their size by s. The
loss of text is a law, ln L of L = A N^-alpha or E + A N^-alpha or a power law that bends, with tau
and s.

The posterior is sampled by tempering (sequential Monte Carlo, Del Moral et al. 2006; temperatures
by halves of the effective sample), which also gives each curve's marginal likelihood, and curves
are averaged with it (equal prior odds). All priors are uniform in the unit cube that is searched.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import expit, gammaln, logsumexp

from lm.emergence.shapes import Curve

Kind = Literal["rate", "loss", "law"]
REACH = 3.0  # decades beyond the last size in which an onset may lie; see the module
BEGINS = 0.75  # the prior probability that it begins there at all
LEAST_SIZES = 4  # of fewer, a line and a jump are the same thing
FIRST = 8000  # draws from the prior: a jump is a small part of it
PARTICLES = 500
MOVES = 5
DRAWS = 4000
WIDTHS = (float(np.log10(0.03)), float(np.log10(4.0)))
EDGE = 1e-5  # a rate of 0 or 1 is never certain
RHO = (-4.5, -0.7)  # log10 of the correlation of items within a seed
NOISE = (-3.5, 0.0)  # log10 of tau and s in units of the range of the values


class Family(NamedTuple):
    """A curve with its prior: d coordinates in the unit cube, a log-likelihood `[G, d] -> [G]` and
    `draw([M, d], x, rng) -> [M]`, one new seed's value at log10 size x for each.
    """

    name: str
    d: int
    loglik: Callable[[np.ndarray], np.ndarray]
    draw: Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


def forecast(kind: Kind, curve: Curve, x: np.ndarray, seed: int = 0) -> np.ndarray:
    """Sorted draws [len(x), DRAWS] of one new seed's value at log10 sizes x, given a curve of at
    least LEAST_SIZES sizes. A rate is in [0, 1], a loss at least 0; finite for any finite values.
    """
    rng = np.random.default_rng(seed)
    found = {"rate": _rates, "loss": _losses, "law": _laws}[kind](curve)
    sampled = [temper(f.loglik, f.d, rng) for f in found]
    evidence = np.array([e for _, e in sampled])
    share = np.exp(evidence - evidence.max())
    counts = rng.multinomial(DRAWS, share / share.sum())
    draws = np.empty((len(x), DRAWS))
    for i, at in enumerate(x):
        parts = [
            family.draw(z[rng.integers(len(z), size=count)], float(at), rng)
            for family, (z, _), count in zip(found, sampled, counts, strict=True)
        ]
        draws[i] = np.sort(np.concatenate(parts))
    return draws


def temper(
    loglik: Callable[[np.ndarray], np.ndarray], d: int, rng: np.random.Generator
) -> tuple[np.ndarray, float]:
    """Posterior samples [PARTICLES, d] under a uniform prior on the unit cube, and the log of the
    marginal likelihood.
    """
    z = rng.random((FIRST, d))
    value, heat, evidence = loglik(z), 0.0, 0.0
    while heat < 1:
        step = _next(value, 1 - heat)
        weight = step * value
        evidence += float(logsumexp(weight)) - np.log(len(z))
        heat += step
        share = np.cumsum(np.exp(weight - logsumexp(weight)))
        at = (np.arange(PARTICLES) + rng.random()) / PARTICLES
        chosen = np.minimum(np.searchsorted(share, at), len(z) - 1)
        z, value = z[chosen], value[chosen]
        spread = np.linalg.cholesky(np.cov(z.T).reshape(d, d) + 1e-10 * np.eye(d))
        for move in range(MOVES):
            stride = 2.4 / np.sqrt(d) * (0.2 if move % 2 else 1.0)
            # Folded at the walls, which keeps the step symmetric.
            new = np.abs((z + stride * rng.standard_normal(z.shape) @ spread.T + 1) % 2 - 1)
            there = loglik(new)
            take = np.log(rng.random(PARTICLES)) < heat * (there - value)
            z, value = np.where(take[:, None], new, z), np.where(take, there, value)
    return z, evidence


def _next(value: np.ndarray, most: float) -> float:
    """The step in temperature that halves the effective number of particles."""

    def effective(step: float) -> float:
        weight = np.exp(step * (value - value.max()))
        return float(weight.sum() ** 2 / (weight**2).sum())

    if effective(most) >= PARTICLES / 2:
        return most
    low, high = 0.0, most
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if effective(middle) >= PARTICLES / 2 else (low, middle)
    return max(low, 1e-9)


def _between(z: np.ndarray, low: float, high: float) -> np.ndarray:
    return low + (high - low) * z


def _half(z: np.ndarray) -> np.ndarray:
    """Nothing with probability 1/2, else uniform on [0, 0.9]."""
    return 0.9 * np.maximum(2 * z - 1, 0)


def _other(z: np.ndarray) -> np.ndarray:
    """The level a loss jumps to, in units of the one it leaves: lower with probability 3/4."""
    return np.where(z < 0.75, (z / 0.75) ** 2, 10 ** (4 * z - 3))


def _step(z: np.ndarray, x: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """u [G, X] of a logistic from two coordinates [G, 2]: x50 and log10 width under their prior."""
    x50 = _between(z[:, 0], sizes[0] - 0.5, sizes[-1] + 0.1)
    return _logistic(x50, _between(z[:, 1], *WIDTHS), x)


def _logistic(x50: np.ndarray, log_width: np.ndarray, x: np.ndarray) -> np.ndarray:
    return expit(2 * np.log(9) * (x - x50[:, None]) / 10 ** log_width[:, None])


def _begun(x: float, last: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """How far [count] an onset beyond the ladder has come at x: 0 or 1 where seeds split."""
    x50 = last + REACH * rng.random(count)
    u = _logistic(x50, rng.uniform(WIDTHS[0], 0.0, count), np.array([x]))[:, 0]
    slides = rng.random(count) < 0.5
    u = np.where(slides, u, rng.random(count) < u)
    return np.where(rng.random(count) < BEGINS, u, 0.0)


def _rates(curve: Curve) -> list[Family]:
    groups, index = np.unique(np.stack([curve.x, curve.n]), axis=1, return_inverse=True)
    at, n = groups
    hits = curve.y * curve.n
    sizes, items = curve.sizes, float(np.median(curve.n))

    def total(p: np.ndarray, rho: np.ndarray) -> np.ndarray:
        """Beta-binomial log-likelihood of each seed [G, J] at means p and correlations rho."""
        p, size = np.clip(p, EDGE, 1 - EDGE), 1 / rho - 1
        a, b = np.broadcast_arrays(p * size, (1 - p) * size)
        fixed = gammaln(a + b) - gammaln(n + a + b) - gammaln(a) - gammaln(b)
        a, b = a[:, index], b[:, index]
        return fixed[:, index] + gammaln(hits + a) + gammaln(curve.n - hits + b)

    def scatter(p: np.ndarray, rho: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        p, size = np.clip(p, EDGE, 1 - EDGE), 1 / rho - 1
        chosen = rng.beta(np.maximum(p * size, 1e-3), np.maximum((1 - p) * size, 1e-3))
        return rng.binomial(max(round(items), 1), chosen) / max(round(items), 1)

    def left(z: np.ndarray) -> np.ndarray:
        return np.clip(curve.floor * _between(z, 0.8, 1.2), 0, 1)

    def right(z: np.ndarray) -> np.ndarray:
        return left(z[:, 0]) + (1 - left(z[:, 0])) * np.clip(1.6 * z[:, 1], 0, 1)

    def rho0(z: np.ndarray) -> np.ndarray:
        return 10 ** _between(z[:, -1:], *RHO)

    def mean(name: str, z: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The mean and the correlation [G, X]."""
        if name == "never":
            return np.repeat(left(z[:, :1]), len(x), 1), rho0(z)
        if name == "line":
            share = (x - sizes[0]) / (sizes[-1] - sizes[0])
            return np.clip(z[:, :1] + (z[:, 1:2] - z[:, :1]) * share, 0, 1), rho0(z)
        low, high = left(z[:, :1]), right(z)[:, None]
        if name == "power":
            steep = _between(z[:, 2:3], 0.05, 1.0)
            return np.clip(low + (high - low) * 10 ** (steep * (x - sizes[-1])), 0, 1), rho0(z)
        u, base = _step(z[:, 2:4], x, sizes), rho0(z)
        extra = _half(z[:, 4:5])
        return low + (high - low) * u, base + (1 - base) * extra * 4 * u * (1 - u)

    def draw_never(z: np.ndarray, x: float, rng: np.random.Generator) -> np.ndarray:
        low, u = left(z[:, 0]), _begun(x, sizes[-1], len(z), rng)
        high = right(np.stack([z[:, 0], rng.random(len(z))], 1))
        return scatter(low + (high - low) * u, rho0(z)[:, 0], rng)

    def plain(name: str, d: int) -> Family:
        def draw(z: np.ndarray, x: float, rng: np.random.Generator) -> np.ndarray:
            p, rho = mean(name, z, np.array([x]))
            return scatter(p[:, 0], rho[:, 0], rng)

        return Family(name, d, lambda z: total(*mean(name, z, at)).sum(1), draw)

    def split(z: np.ndarray) -> np.ndarray:
        u = np.clip(_step(z[:, 2:4], at, sizes), 1e-9, 1 - 1e-9)[:, index]
        through = total(right(z)[:, None] + 0 * at, rho0(z))
        failed = total(left(z[:, :1]) + 0 * at, rho0(z))
        return np.logaddexp(np.log(u) + through, np.log1p(-u) + failed).sum(1)

    def draw_split(z: np.ndarray, x: float, rng: np.random.Generator) -> np.ndarray:
        u = _step(z[:, 2:4], np.array([x]), sizes)[:, 0]
        p = np.where(rng.random(len(z)) < u, right(z), left(z[:, 0]))
        return scatter(p, rho0(z)[:, 0], rng)

    few = [plain("line", 3), plain("power", 4), plain("slide", 6)]
    few = [plain("never", 2)._replace(draw=draw_never), *few]
    return [*few, Family("split", 5, split, draw_split)]


def _losses(curve: Curve) -> list[Family]:
    sizes, groups = curve.sizes, _Groups(curve.x, curve.y)
    reach = groups.range
    low, high = max(0.0, curve.y.min() - reach / 2), curve.y.max() + reach / 2

    def noise(z: np.ndarray) -> np.ndarray:
        return reach * 10 ** _between(z, *NOISE)

    def start(z: np.ndarray) -> np.ndarray:
        return np.maximum(groups.mean[0] + 0.4 * (z[:, :1] - 0.5) * reach, 0)

    def baseline(z: np.ndarray, x: np.ndarray) -> np.ndarray:
        """The line [G, X] that a jump leaves: a loss falls a little before it."""
        share = (x - sizes[0]) / (sizes[-1] - sizes[0])
        return np.maximum(start(z) + 0.6 * (z[:, 1:2] - 0.7) * reach * share, 0)

    def level(z: np.ndarray) -> np.ndarray:
        return _other(z[:, 4]) * start(z)[:, 0]

    def mean(name: str, z: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The mean [G, X] and the factor [G, X] by which seeds scatter more."""
        share = (x - sizes[0]) / (sizes[-1] - sizes[0])
        left, right = _between(z[:, :1], low, high), _between(z[:, 1:2], low, high)
        if name == "decay":
            limit = np.minimum(left, right) * z[:, 2:3]
            drop = np.log(np.maximum(left - limit, 1e-9) / np.maximum(right - limit, 1e-9))
            return limit + (left - limit) * np.exp(-drop * share), np.ones((1, 1))
        if name == "line":
            return left + (right - left) * share, np.ones((1, 1))
        if name == "still":
            return baseline(z, x), np.ones((1, 1))
        line, u = baseline(z, x), _step(z[:, 2:4], x, sizes)
        more = 1 + (10 ** (1.5 * _half(z[:, 5:6])) - 1) * 4 * u * (1 - u)
        return line + (level(z)[:, None] - line) * u, more

    def tau(name: str, z: np.ndarray) -> np.ndarray:
        """[G, 1]; where a jump explains the sizes, a tenth: else it would explain them twice."""
        return noise(z[:, -2:-1]) * (0.1 if name in ("still", "slide") else 1.0)

    def plain(name: str, d: int) -> Family:
        def loglik(z: np.ndarray) -> np.ndarray:
            middle, more = mean(name, z, sizes)
            return groups.loglik(middle, noise(z[:, -1:]) * more, tau(name, z))

        def draw(z: np.ndarray, x: float, rng: np.random.Generator) -> np.ndarray:
            middle, more = (v[:, 0] for v in mean(name, z, np.array([x])))
            sd = np.hypot(noise(z[:, -1]) * more, tau(name, z)[:, 0])
            if name != "slide":
                middle = np.maximum(middle, 0)
                change = middle * (_other(rng.random(len(z))) - 1)
                middle = middle + change * _begun(x, sizes[-1], len(z), rng)
            return np.maximum(middle + sd * rng.standard_normal(len(z)), 0)

        return Family(name, d, loglik, draw)

    def split(z: np.ndarray) -> np.ndarray:
        u = np.clip(_step(z[:, 2:4], sizes, sizes), 1e-9, 1 - 1e-9)[:, groups.index]
        line = baseline(z, sizes)[:, groups.index]
        failed = _normal(curve.y - line, noise(z[:, 6:7]))
        through = _normal(curve.y - level(z)[:, None], noise(z[:, 5:6]))
        return np.logaddexp(np.log(u) + through, np.log1p(-u) + failed).sum(1)

    def draw_split(z: np.ndarray, x: float, rng: np.random.Generator) -> np.ndarray:
        through = rng.random(len(z)) < _step(z[:, 2:4], np.array([x]), sizes)[:, 0]
        line = baseline(z, np.array([x]))[:, 0]
        middle = np.where(through, level(z), line)
        sd = noise(np.where(through, z[:, 5], z[:, 6]))
        return np.maximum(middle + sd * rng.standard_normal(len(z)), 0)

    few = [plain("still", 4), plain("line", 4), plain("decay", 5), plain("slide", 8)]
    return [*few, Family("split", 7, split, draw_split)]


def _laws(curve: Curve) -> list[Family]:
    y = np.log(np.maximum(curve.y, 1e-9))
    groups, middle = _Groups(curve.x, y), float(curve.sizes.mean())
    reach, lowest = groups.range, float(np.maximum(curve.y, 1e-9).min())

    def noise(z: np.ndarray) -> np.ndarray:
        return reach * 10 ** _between(z, *NOISE)

    def mean(name: str, z: np.ndarray, x: np.ndarray) -> np.ndarray:
        """ln L [G, X]: its level at the middle, alpha, and E or how alpha changes in a decade."""
        level = _between(z[:, :1], y.min() - reach / 2, y.max() + reach / 2)
        if name == "bent":
            bend = _between(z[:, 4:5], -0.05, 0.05) * (x - middle)
            return level - (z[:, 1:2] + bend) * np.log(10) * (x - middle)
        e = lowest * z[:, 4:5] if name == "limit" else np.zeros((len(z), 1))
        above = np.log(np.maximum(np.exp(level) - e, 1e-3 * lowest))
        power = above - z[:, 1:2] * np.log(10) * (x - middle)
        return np.log(e + np.exp(power))

    def law(name: str, d: int) -> Family:
        def loglik(z: np.ndarray) -> np.ndarray:
            return groups.loglik(mean(name, z, curve.sizes), noise(z[:, 2:3]), noise(z[:, 3:4]))

        def draw(z: np.ndarray, x: float, rng: np.random.Generator) -> np.ndarray:
            sd = np.hypot(noise(z[:, 2]), noise(z[:, 3]))
            return np.exp(mean(name, z, np.array([x]))[:, 0] + sd * rng.standard_normal(len(z)))

        return Family(name, d, loglik, draw)

    return [law("power", 4), law("limit", 5), law("bent", 5)]


def _normal(residual: np.ndarray, sd: np.ndarray) -> np.ndarray:
    return -0.5 * (residual / sd) ** 2 - np.log(sd * np.sqrt(2 * np.pi))


class _Groups:
    """Seeds [J] by size: the likelihood of a mean per size, with scatter of sizes and of seeds."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        sizes, self.index, self.count = np.unique(x, return_inverse=True, return_counts=True)
        self.mean = np.bincount(self.index, y) / self.count
        self.within = np.bincount(self.index, (y - self.mean[self.index]) ** 2)
        self.range = max(float(np.ptp(y)), 0.01 * float(np.abs(y).max()), 1e-6)

    def loglik(self, mean: np.ndarray, s: np.ndarray, tau: np.ndarray) -> np.ndarray:
        """[G] of means [G, S], scatter s of seeds and tau of sizes, [G, 1] or [G, S]: seeds of a
        size are normal with variance s² and covariance tau².
        """
        of_mean = _normal(self.mean - mean, np.sqrt(tau**2 + s**2 / self.count))
        inside = -0.5 * self.within / s**2 - (self.count - 1) * np.log(s * np.sqrt(2 * np.pi))
        return (of_mean + inside - 0.5 * np.log(self.count)).sum(1)
