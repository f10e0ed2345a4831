"""The scaling law of loss in parameters and data (Hoffmann et al. 2022, approach 3).

For J training runs of N parameters and D tokens,

    L(N, D) = E + A N^-alpha + B D^-beta
    minimise sum_j h(ln L_j - ln L(N_j, D_j)),     h Huber's loss with delta = 1e-3

The trap. Averaged over the runs and left to a default optimiser, the objective is so small that
L-BFGS-B stops after two iterations, near where it was started; that is how the first published
fit went wrong (Besiroglu et al. 2024). Here the loss is a sum, ln N and ln D are centred (which
takes the correlation out of A and alpha), hundreds of starts are descended together, and the best
of them are polished on an objective scaled by 1e6.

The likelihood variant gives Huber's loss a free scale s, as a density:

    ln p(r) = -h(r / s) - ln s - ln(sqrt(2 pi) erf(delta / sqrt 2) + 2 exp(-delta^2 / 2) / delta)

With delta = 1e-3 nearly every residual lies in the linear part, so it is a Laplace density in all
but name: its optimum is that of the least absolute residuals.

Intervals: bootstrap over the runs, every resample descended from the optimum in one batch. At a
budget of C = 6 N D FLOPs the loss is least at

    N* = G (C/6)^a,   D* = (C/6)^(1-a) / G,   a = beta / (alpha + beta),
    G = (alpha A / (beta B))^(1 / (alpha + beta))
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize
from scipy.special import erf
from scipy.stats import chi2

from lm.config import UserError
from lm.emergence.seeds import Interval, interval

DELTA = 1e-3
SCALE = 1e6  # of the objective in the last polish: L-BFGS-B's tolerances are absolute
LEAST_RUNS = 7  # two more than parameters
CHUNK = 250  # resamples descended at once: what fits into a core's cache


class Optimum(NamedTuple):
    """The compute-optimal run at a budget: parameters, tokens, tokens per parameter."""

    params: float
    tokens: float
    ratio: float


@dataclass(frozen=True)
class Chinchilla:
    """L(N, D) = e + a N^-alpha + b D^-beta, in nats per token."""

    a: float
    b: float
    e: float
    alpha: float
    beta: float

    def at(self, params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The loss of runs of these parameters and tokens."""
        n, d = np.asarray(params, np.float64), np.asarray(tokens, np.float64)
        return self.e + self.a * n**-self.alpha + self.b * d**-self.beta

    @property
    def exponent(self) -> float:
        """a of N* ~ C^a."""
        return self.beta / (self.alpha + self.beta)

    def optimal(self, flops: float) -> Optimum:
        """Where the loss is least on 6 N D = `flops`; NaN for a law that does not fall in both."""
        if min(self.alpha, self.beta, self.a, self.b) <= 0:
            return Optimum(float("nan"), float("nan"), float("nan"))
        total = self.alpha + self.beta
        g = (self.alpha * self.a / (self.beta * self.b)) ** (1 / total)
        params = g * (flops / 6) ** self.exponent
        tokens = flops / 6 / params
        return Optimum(params, tokens, tokens / params)


class LikelihoodFit(NamedTuple):
    """A maximum-likelihood fit: the law, the scale of the residuals of ln L, and ln likelihood."""

    law: Chinchilla
    scale: float
    loglik: float


class LikelihoodRatio(NamedTuple):
    """A likelihood-ratio test: statistic, degrees of freedom, p."""

    statistic: float
    df: int
    p: float


class Runs(NamedTuple):
    """ln N, ln D and ln L of J runs, the first two centred; and the centres."""

    x: np.ndarray
    z: np.ndarray
    y: np.ndarray
    mid_n: float
    mid_d: float


def fit_chinchilla(params: np.ndarray, tokens: np.ndarray, loss: np.ndarray) -> Chinchilla:
    """Approach 3 from runs [J] of `params`, `tokens` and `loss` (nats per token).

    Raises `UserError` for fewer than seven runs, for values that are not positive and finite, and
    where all runs have one size, one number of tokens or one loss.
    """
    runs = _runs(params, tokens, loss)
    return _law(_optimum(runs), runs)


def huber(
    law: Chinchilla, params: np.ndarray, tokens: np.ndarray, loss: np.ndarray, delta: float = DELTA
) -> float:
    """The summed Huber loss of a law on runs [J]."""
    residual = np.log(loss) - np.log(law.at(params, tokens))
    return float(_huber(residual, delta).sum())


def fit_likelihood(params: np.ndarray, tokens: np.ndarray, loss: np.ndarray) -> LikelihoodFit:
    """The same law by maximum likelihood with a free scale (see the module); raises as above."""
    runs = _runs(params, tokens, loss)
    theta, delta = _optimum(runs)[None], DELTA
    while delta > 1e-10:  # towards the threshold delta s, of which s is not known before
        delta /= 3
        theta = _descend(theta, runs, delta, steps=40)
    theta = theta[0]
    return LikelihoodFit(_law(theta, runs), *_free_scale(_residual(theta, runs)))


def likelihood_ratio(
    given: Chinchilla,
    fitted: LikelihoodFit,
    params: np.ndarray,
    tokens: np.ndarray,
    loss: np.ndarray,
) -> LikelihoodRatio:
    """Tests whether `given` parameters could be the true ones; both sides fit their own scale."""
    residual = np.log(loss) - np.log(given.at(params, tokens))
    statistic = max(2 * (fitted.loglik - _free_scale(residual)[1]), 0.0)
    return LikelihoodRatio(statistic, 5, float(chi2.sf(statistic, 5)))


def bootstrap(
    law: Chinchilla,
    params: np.ndarray,
    tokens: np.ndarray,
    loss: np.ndarray,
    resamples: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """Approach 3 on resampled runs, from the optimum `law`: (a, b, e, alpha, beta) [resamples, 5].

    4000 resamples of 240 runs take seconds.
    """
    runs = _runs(params, tokens, loss)
    start, size = _theta(law, runs), len(runs.y)
    rng, draws = np.random.default_rng(seed), []
    for first in range(0, resamples, CHUNK):
        count = min(CHUNK, resamples - first)
        weight = rng.multinomial(size, np.full(size, 1 / size), count).astype(np.float64)
        theta = np.tile(start, (count, 1))
        for delta in (10 * DELTA, 3 * DELTA, DELTA):
            theta = _descend(theta, runs, delta, weight, steps=60 if delta == DELTA else 8)
        draws.append(theta)
    theta = np.concatenate(draws)
    a = np.exp(theta[:, 0] + theta[:, 3] * runs.mid_n)
    b = np.exp(theta[:, 1] + theta[:, 4] * runs.mid_d)
    return np.stack([a, b, np.exp(theta[:, 2]), theta[:, 3], theta[:, 4]], 1)


class Spread(NamedTuple):
    """What a bootstrap says: standard error and 95% interval of each parameter, and of a."""

    se: dict[str, float]
    ci95: dict[str, Interval]


def spread(draws: np.ndarray) -> Spread:
    """The standard errors and intervals of bootstrap draws [R, 5]; `exponent` is a of N* ~ C^a."""
    columns = dict(zip(("a", "b", "e", "alpha", "beta"), draws.T, strict=True))
    columns["exponent"] = columns["beta"] / (columns["alpha"] + columns["beta"])
    se = {name: float(values.std(ddof=1)) for name, values in columns.items()}
    return Spread(se, {name: interval(values) for name, values in columns.items()})


def standard_errors(
    law: Chinchilla, params: np.ndarray, tokens: np.ndarray, loss: np.ndarray
) -> dict[str, float]:
    """Standard errors without resampling: the sandwich H^-1 V H^-1 of an M-estimator (Huber 1967).

    H counts the few residuals inside delta, so it is rougher than the bootstrap.
    """
    runs = _runs(params, tokens, loss)
    theta, ones = _theta(law, runs), np.ones((1, len(runs.y)))
    _, _, hessian = _expand(theta[None], runs, DELTA, ones)
    push = np.clip(_residual(theta, runs), -DELTA, DELTA)
    scores = push[:, None] * _slopes(theta, runs)
    inverse = np.linalg.pinv(hessian[0])
    cov = inverse @ (scores.T @ scores) @ inverse
    # To a = exp(theta0 + alpha mid_n) and its like, by the delta method.
    jac = np.zeros((5, 5))
    jac[0, [0, 3]] = law.a, law.a * runs.mid_n
    jac[1, [1, 4]] = law.b, law.b * runs.mid_d
    jac[2, 2], jac[3, 3], jac[4, 4] = law.e, 1.0, 1.0
    se = np.sqrt(np.diag(jac @ cov @ jac.T))
    return {name: float(v) for name, v in zip(("a", "b", "e", "alpha", "beta"), se, strict=True)}


def _runs(params: np.ndarray, tokens: np.ndarray, loss: np.ndarray) -> Runs:
    """The runs as logarithms, or why no law can be fitted to them."""
    columns = [np.asarray(c, np.float64) for c in (params, tokens, loss)]
    if len({len(c) for c in columns}) > 1:
        raise UserError("parameters, tokens and losses differ in number; give one of each per run")
    if len(columns[2]) < LEAST_RUNS:
        raise UserError(f"a law of five parameters has {len(columns[2])} runs; give {LEAST_RUNS}")
    for name, column in zip(("params", "tokens", "loss"), columns, strict=True):
        bad = column[~(np.isfinite(column) & (column > 0))]
        if len(bad):
            raise UserError(f"{name} holds {bad[0]}; a scaling law takes finite values above 0")
    x, z, y = (np.log(c) for c in columns)
    for name, log in (("parameters", x), ("tokens", z), ("loss", y)):
        if np.ptp(log) < 1e-9:
            raise UserError(f"all runs have the same {name}; give runs that differ in them")
    return Runs(x - x.mean(), z - z.mean(), y, float(x.mean()), float(z.mean()))


def _law(theta: np.ndarray, runs: Runs) -> Chinchilla:
    a = np.exp(theta[0] + theta[3] * runs.mid_n)
    b = np.exp(theta[1] + theta[4] * runs.mid_d)
    return Chinchilla(float(a), float(b), float(np.exp(theta[2])), float(theta[3]), float(theta[4]))


def _theta(law: Chinchilla, runs: Runs) -> np.ndarray:
    """(ln A - alpha mid_n, ln B - beta mid_d, ln E, alpha, beta)."""
    a, b = np.log(law.a) - law.alpha * runs.mid_n, np.log(law.b) - law.beta * runs.mid_d
    return np.array([a, b, np.log(law.e), law.alpha, law.beta])


def _optimum(runs: Runs) -> np.ndarray:
    """The best of several hundred starts, theta [5]."""
    least, mean = np.exp(runs.y.min()), np.exp(runs.y.mean())
    grid = np.stack(
        np.meshgrid(
            (0.15, 0.35, 0.6, 1.0), (0.15, 0.35, 0.6, 1.0), (0.2, 0.5, 0.75, 0.95), (0.1, 0.5, 0.9)
        ),
        -1,
    ).reshape(-1, 4)
    alpha, beta, limit, share = grid.T
    above = mean - limit * least
    theta = np.stack(
        [np.log(share * above), np.log((1 - share) * above), np.log(limit * least), alpha, beta], 1
    )
    for delta, keep in ((0.1, 48), (10 * DELTA, 16), (DELTA, 6)):
        theta = _descend(theta, runs, delta, steps=40)
        values = _huber(_residual(theta, runs), delta).sum(-1)
        theta = theta[np.argsort(values)[:keep]]
    found = [_polish(start, runs) for start in theta]
    return min(found, key=lambda pair: pair[0])[1]


def _polish(theta: np.ndarray, runs: Runs) -> tuple[float, np.ndarray]:
    """L-BFGS-B on the scaled sum, tolerances at the end of what floats resolve."""

    def cost(point: np.ndarray) -> tuple[float, np.ndarray]:
        residual = _residual(point, runs)
        slope = -np.clip(residual, -DELTA, DELTA) @ _slopes(point, runs)
        return SCALE * float(_huber(residual, DELTA).sum()), SCALE * slope

    options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 2000, "maxcor": 20}
    found = minimize(cost, theta, jac=True, method="L-BFGS-B", options=options)
    return float(found.fun), found.x


def _terms(theta: np.ndarray, runs: Runs) -> tuple[np.ndarray, ...]:
    """The logs of the three terms of L, [..., J]."""
    t = theta[..., None]
    a, b = t[..., 0, :] - t[..., 3, :] * runs.x, t[..., 1, :] - t[..., 4, :] * runs.z
    return a, b, np.broadcast_to(t[..., 2, :], a.shape)


def _residual(theta: np.ndarray, runs: Runs) -> np.ndarray:
    """ln L_j minus the law's, theta [..., 5] -> [..., J]."""
    a, b, e = _terms(theta, runs)
    return runs.y - np.logaddexp(np.logaddexp(a, b), e)


def _slopes(theta: np.ndarray, runs: Runs) -> np.ndarray:
    """The derivative of the law's ln L by theta [5], [J, 5]."""
    a, b, e = _terms(theta, runs)
    total = np.logaddexp(np.logaddexp(a, b), e)
    p, q, s = np.exp(a - total), np.exp(b - total), np.exp(e - total)
    return np.stack([p, q, s, -runs.x * p, -runs.z * q], 1)


def _huber(residual: np.ndarray, delta: float) -> np.ndarray:
    size = np.abs(residual)
    return np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))


def _free_scale(residual: np.ndarray) -> tuple[float, float]:
    """The likeliest scale of residuals [J] and their log-likelihood with it."""
    norm = np.log(
        np.sqrt(2 * np.pi) * erf(DELTA / np.sqrt(2)) + 2 * np.exp(-0.5 * DELTA**2) / DELTA
    )
    scale = DELTA * float(np.abs(residual).mean()) + 1e-300
    for _ in range(50):  # the likelihood is stationary in s where s = mean of psi(r / s) r
        push = np.clip(residual / scale, -DELTA, DELTA)
        scale = float(np.mean(push * residual)) + 1e-300
    fit = -_huber(residual / scale, DELTA).sum() - len(residual) * (np.log(scale) + norm)
    return scale, float(fit)


def _descend(
    theta: np.ndarray,
    runs: Runs,
    delta: float,
    weight: np.ndarray | None = None,
    steps: int = 40,
) -> np.ndarray:
    """Damped Newton steps of R problems at once, theta [R, 5], weights of the runs [R, J] or none.

    The damping of each problem rises until its step goes down, and falls while steps go well
    (Levenberg 1944).
    """
    theta = theta.copy()
    weight = np.ones((len(theta), len(runs.y))) if weight is None else weight
    damping = np.full(len(theta), 1e-2)
    active = np.arange(len(theta))
    value, slope, curve = _expand(theta, runs, delta, weight)
    for _ in range(steps):
        size = np.maximum(np.abs(np.diagonal(curve, 0, 1, 2)), 1e-12)
        matrix = curve + (damping[active, None] * size)[:, :, None] * np.eye(5)
        step = -np.linalg.solve(matrix, slope[:, :, None])[:, :, 0]
        step = np.clip(step, -1.0, 1.0)
        tried = theta[active] + step
        new_value, new_slope, new_curve = _expand(tried, runs, delta, weight[active])
        good = new_value < value
        moved = active[good]
        theta[moved] = tried[good]
        damping[active] = np.where(good, damping[active] / 5, damping[active] * 4)
        gain = value - np.where(good, new_value, value)
        done = (good & (gain < 1e-12 * np.abs(value))) | (damping[active] > 1e8)
        value = np.where(good, new_value, value)
        slope = np.where(good[:, None], new_slope, slope)
        curve = np.where(good[:, None, None], new_curve, curve)
        if done.any():
            left = ~done
            active, value, slope, curve = active[left], value[left], slope[left], curve[left]
        if not len(active):
            break
    return theta


def _expand(
    theta: np.ndarray, runs: Runs, delta: float, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value [R], gradient [R, 5] and Hessian [R, 5, 5] of the weighted sum at theta [R, 5].

    f = ln(sum_k exp u_k) with u_k linear in theta, so f'' = sum_kl (diag(p) - p p^T)_kl u_k' u_l'.
    """
    x, z = runs.x, runs.z
    a, b, e = _terms(theta, runs)
    total = np.logaddexp(np.logaddexp(a, b), e)
    p, q, s = np.exp(a - total), np.exp(b - total), np.exp(e - total)
    residual = runs.y - total
    push = weight * np.clip(residual, -delta, delta)
    both = weight * (np.abs(residual) <= delta) + push
    value = (weight * _huber(residual, delta)).sum(1)
    gp, gq, gs = push * p, push * q, push * s
    slope = -np.stack([gp.sum(1), gq.sum(1), gs.sum(1), -gp @ x, -gq @ z], 1)
    hessian = np.empty((len(theta), 5, 5))
    aa, bb, ee = both * p * p - gp, both * q * q - gq, both * s * s - gs
    ab, ae, be = both * p * q, both * p * s, both * q * s
    entries = {
        (0, 0): aa.sum(1), (0, 3): -aa @ x, (3, 3): aa @ (x * x),
        (1, 1): bb.sum(1), (1, 4): -bb @ z, (4, 4): bb @ (z * z),
        (0, 1): ab.sum(1), (0, 4): -ab @ z, (1, 3): -ab @ x, (3, 4): ab @ (x * z),
        (2, 2): ee.sum(1), (0, 2): ae.sum(1), (2, 3): -ae @ x, (1, 2): be.sum(1), (2, 4): -be @ z,
    }  # fmt: skip
    for (i, j), values in entries.items():
        hessian[:, i, j] = hessian[:, j, i] = values
    return value, slope, hessian
