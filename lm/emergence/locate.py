"""Midpoint and width of a transition, with intervals: profile likelihood and bootstrap together.

The profile knows the gap between two sizes, in which nothing was measured; a bootstrap of seeds
within sizes knows how much seeds differ. Neither alone covers a planted onset as often as it says.
"""

import numpy as np
from scipy import stats

from lm.emergence import fits, shapes
from lm.emergence.fits import Curve, Fit
from lm.emergence.seeds import Interval

RESAMPLES = 300
SPLIT = 0.2  # correlation of items within a seed in mid-transition, above which seeds are split


def locate(curve: Curve, steps: list[Fit], seed: int = 0) -> list[tuple[float, Interval]]:
    """Midpoint (parameters) and 10-90% width (decades) of a transition, with their intervals.

    The values are those of the first of `steps`, the intervals the hull over all of them.
    """
    counts = np.vstack([np.ones(len(curve.x)), resample(curve.x, RESAMPLES, seed)])
    found = np.array(
        [
            _gap(curve, step) if step.name == "step" else _locate(curve, step, counts)
            for step in steps
        ]
    )  # [steps, 2, 3]
    low, high = found[:, :, 1].min(0), found[:, :, 2].max(0)
    return [
        (float(10**v), Interval(float(10**a), float(10**b)))
        for v, a, b in zip(found[0, :, 0], low, high, strict=True)
    ]


def _gap(curve: Curve, step: Fit) -> np.ndarray:
    """As `_locate`, of a step: anywhere between two sizes, and anything that fits there.

    A logistic cannot say this where it has leant on a size for its scatter: with that noise held,
    its profile finds the far side of the gap impossible.
    """
    left = int(min(step.shape[0], len(curve.sizes) - 2))
    low, high = curve.sizes[left : left + 2]
    narrow, wide = np.log10([shapes.NARROWEST, max(high - low, 2 * shapes.NARROWEST)])
    return np.array([[(low + high) / 2, low, high], [(narrow + wide) / 2, narrow, wide]])


def _locate(curve: Curve, step: Fit, counts: np.ndarray) -> np.ndarray:
    """[(midpoint, low, high), (width, low, high)] of one fitted shape, in log10.

    On a grid of midpoints, widths and right ends, refined once, with the rest as fitted. The value
    is the median of the normalised profile likelihood, which is the middle of a gap that no size
    lies in. The interval is the hull of the profile's (a drop of 1.92) and the percentile interval
    of a bootstrap of seeds within sizes: one knows the gap between sizes, the other the seeds.
    Where seeds are split, it also covers the profile of the share that broke through: three
    failures of three are no proof that a size never succeeds, and a beta-binomial takes them so.
    """
    reach = 0.25 * curve.span
    per_size = len(curve.x) / len(curve.sizes)
    # Resampling S seeds underestimates their variance by (S - 1)/S, a third at three seeds.
    stretch = np.sqrt(per_size / (per_size - 1)) if per_size > 1 else 1.0
    box = [
        (curve.sizes[0] - reach, curve.sizes[-1] + reach),
        (np.log10(shapes.NARROWEST), np.log10(4.0)),
    ]
    for x50s, widths in ((61, 12), (61, 16)):
        axes = [np.linspace(*side, n) for side, n in zip(box, (x50s, widths), strict=True)]
        total, split = _profile_grid(curve, step, axes, counts)
        found = np.stack(
            [_summary(axes[i], total.max(1 - i), split.max(1 - i), stretch) for i in (0, 1)]
        )
        cell = np.array([axis[1] - axis[0] for axis in axes])
        sides = zip(box, found[:, 1] - 2 * cell, found[:, 2] + 2 * cell, strict=True)
        box = [(max(old[0], low), min(old[1], high)) for old, low, high in sides]
    return found


def _profile_grid(
    curve: Curve, step: Fit, axes: list[np.ndarray], counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Log-likelihoods [x50, width, resamples] at the best of a few right ends near the fitted, and
    [x50, width] of which seeds broke through (that of the data again where seeds are not split).
    """
    shape = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    u = shapes.TRANSITIONS[step.name](shape, curve.sizes)
    best = np.full((len(shape), len(counts)), -np.inf)
    for share in (0.95, 0.98, 1.0, 1.02, 1.05):
        right = step.left + share * (step.right - step.left)
        mean = step.left + (right - step.left) * u
        np.maximum(best, fits.resampled(curve, mean, u, step.noise[None], counts), out=best)
    split = best[:, 0]
    if curve.kind == "rate" and np.exp(step.noise[1]) > SPLIT:
        through = curve.y > (step.left + step.right) / 2
        share = np.clip(u, 1e-3, 1 - 1e-3)[:, curve.at]
        split = np.where(through, np.log(share), np.log(1 - share)).sum(1)
    sides = [len(axis) for axis in axes]
    return best.reshape(*sides, -1), split.reshape(sides)


def _summary(
    axis: np.ndarray, profile: np.ndarray, split: np.ndarray, stretch: float
) -> np.ndarray:
    """Median and hull interval of profiles [axis, 1 + resamples], the data's own first."""
    medians = _median(axis, profile)
    drop = stats.chi2.ppf(0.95, 1) / 2
    inside = (profile[:, 0] >= profile[:, 0].max() - drop) | (split >= split.max() - drop)
    low, high = medians[0] + stretch * (np.quantile(medians[1:], [0.025, 0.975]) - medians[0])
    return np.array([medians[0], min(low, axis[inside].min()), max(high, axis[inside].max())])


def _median(axis: np.ndarray, profile: np.ndarray) -> np.ndarray:
    weight = np.exp(profile - profile.max(0))
    cumulative = np.cumsum(weight, 0) - weight / 2
    half = weight.sum(0) / 2
    return np.array([np.interp(h, c, axis) for h, c in zip(half, cumulative.T, strict=True)])


def resample(x: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """How often each seed is drawn [resamples, J] when seeds are resampled within sizes."""
    rng = np.random.default_rng(seed)
    counts = np.zeros((resamples, len(x)))
    for size in np.unique(x):
        (where,) = np.nonzero(x == size)
        share = np.full(len(where), 1 / len(where))
        counts[:, where] = rng.multinomial(len(where), share, size=resamples)
    return counts
