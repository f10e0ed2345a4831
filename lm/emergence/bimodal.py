"""Do the seeds of one size fall into two groups?

Two answers beside each other. Hartigan's dip (Hartigan & Hartigan 1985) asks nothing of the shape,
and sees two halves from about 15 seeds on, but hardly a fifth. A mixture sees that too: S seeds
with k_s right of n_s items are

    one group     BetaBin(n_s; mu, rho)
    two groups    (1 - share) BetaBin(n_s; low, rho) + share BetaBin(n_s; high, rho)

and *bimodal* means that two groups are better by `DECISIVE` in BIC = -2 ln L + k ln S (k = 2, 4)
and lie apart: high - low > 3 sd of the wider group, or a ceiling that cuts a wide hill would make a
second one. A single seed far from all others is a group: whether it is the first of many, the seeds
at hand cannot say.

The components are of counts and not of rates: seeds at exactly 1.0 have no spread of their own, and
a normal component would close on them with infinite likelihood. rho is shared: with its own for
each, a spike within a wide hill is a second group. One group may lean on 0 or on 1 but not on both,
since a beta with two peaks is no single group.
"""

from typing import NamedTuple

import numpy as np
from scipy.special import gammaln, logsumexp

DECISIVE = 6.0  # a difference in BIC
APART = 3.0  # standard deviations of the wider group
LEAST_SEEDS = 4  # the dip is not defined below
RHO = np.exp(np.linspace(np.log(1e-5), np.log(0.6), 28))
STARTS, ROUNDS = 5, 15
EDGE = 1e-4


class Modes(NamedTuple):
    """The seeds of one size: `dip` and its p; the means of two groups and the weight of the upper
    one; `gain` BIC(one) - BIC(two). NaN with fewer than 4 seeds.
    """

    bimodal: bool
    dip: float
    dip_p: float
    low: float
    high: float
    share: float
    gain: float


def modes(values: np.ndarray, n: np.ndarray) -> Modes:
    """Tests rates `values` [S] of `n` items each [S] for two groups."""
    if len(values) < LEAST_SEEDS:
        return Modes(False, *[float("nan")] * 6)
    import diptest

    dip, dip_p = diptest.diptest(np.asarray(values, np.float64))
    hits, n = np.round(values * n), np.asarray(n, np.float64)
    if np.ptp(values) == 0:
        return Modes(False, float(dip), float(dip_p), values[0], values[0], 0.0, -np.inf)
    one = _one(hits, n)
    two, low, high, share, rho = _two(hits, n)
    gain = 2 * (two - one) - 2 * np.log(len(values))
    variance = [mu * (1 - mu) * (rho + (1 - rho) / n.mean()) for mu in (low, high)]
    apart = high - low > APART * np.sqrt(max(variance))
    found = bool(gain >= DECISIVE and apart)
    return Modes(found, *(float(v) for v in (dip, dip_p, low, high, share, gain)))


def _loglik(hits: np.ndarray, n: np.ndarray, mu: np.ndarray, rho: np.ndarray) -> np.ndarray:
    """Beta-binomial log-likelihood [..., S] without its binomial coefficient; mu, rho [...]."""
    mu = np.clip(mu, EDGE, 1 - EDGE)[..., None]
    size = (1 / rho - 1)[..., None]
    a, b = mu * size, (1 - mu) * size
    shared = gammaln(size) - gammaln(a) - gammaln(b)
    return shared + gammaln(hits + a) + gammaln(n - hits + b) - gammaln(n + size)


def _one(hits: np.ndarray, n: np.ndarray) -> float:
    """The best log-likelihood of one group, by grids of logit mu and ln rho that close in."""
    center = np.clip(hits.sum() / n.sum(), EDGE, 1 - EDGE)
    box = [np.log(center / (1 - center)) + np.array([-2.0, 2.0]), np.log(RHO[[0, -1]])]
    best = -np.inf
    for _ in range(4):
        axes = [np.linspace(side[0], side[1], 15) for side in box]
        z, log_rho = np.meshgrid(*axes, indexing="ij")
        mu, rho = 1 / (1 + np.exp(-z)), np.exp(log_rho)
        total = _loglik(hits, n, mu, rho).sum(-1)
        total[np.maximum(mu, 1 - mu) * (1 / rho - 1) < 1] = -np.inf  # two peaks
        i, j = np.unravel_index(total.argmax(), total.shape)
        best = max(best, float(total[i, j]))
        at = axes[0][i], axes[1][j]
        box = [
            v + 1.5 * np.diff(a[:2])[0] * np.array([-1, 1]) for v, a in zip(at, axes, strict=True)
        ]
        box[1] = np.clip(box[1], *np.log(RHO[[0, -1]]))
    return best


def _two(hits: np.ndarray, n: np.ndarray) -> tuple[float, float, float, float, float]:
    """Log-likelihood, low, high, share, rho of two groups: EM from cuts at the widest gaps between
    neighbours, for every rho side by side.
    """
    rate = hits / n
    ordered = np.sort(rate)
    gaps = np.argsort(-np.diff(ordered), kind="stable")[:STARTS]
    cuts = (ordered[gaps] + ordered[gaps + 1]) / 2
    above = (rate > cuts[:, None]).astype(np.float64)  # [starts, S]
    member = np.repeat(above[:, None], len(RHO), 1)  # [starts, rho, S]
    rho = np.broadcast_to(RHO, member.shape[:2])
    for _ in range(ROUNDS):
        share = np.clip(member.mean(-1), 1e-9, 1 - 1e-9)
        low, high = (
            (part * hits).sum(-1) / np.maximum((part * n).sum(-1), 1e-9)
            for part in (1 - member, member)
        )
        each = np.stack(
            [
                np.log(1 - share)[..., None] + _loglik(hits, n, low, rho),
                np.log(share)[..., None] + _loglik(hits, n, high, rho),
            ]
        )
        total = logsumexp(each, 0)
        member = np.exp(each[1] - total)
    total = total.sum(-1)
    i, j = np.unravel_index(total.argmax(), total.shape)
    found = (total[i, j], low[i, j], high[i, j], share[i, j], RHO[j])
    value, a, b, upper, correlation = (float(v) for v in found)
    return (value, a, b, upper, correlation) if a <= b else (value, b, a, 1 - upper, correlation)
