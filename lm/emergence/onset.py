"""Where an ability begins, and whether it begins at all: six verdicts, defined before the data.

The definition (after Wei et al. 2022, with the demand of Schaeffer et al. 2023 that a continuous
metric agree). An ability is `emergent` on a ladder of sizes if

    floor     at least 3 of the smallest sizes are not above chance (one-sided, Bonferroni),
    ceiling   exact match ends more than 0.2 above chance,
    sharp     a curve with a 10-90% width below one decade of parameters beats every wider curve
              by 6 in AICc, for exact match and for a continuous metric of the same answers.

    metric-induced   exact match does all that, while the continuous metric is better described by
                     a wide curve (by 6 in AICc)
    smooth           it rises by a wide curve, or rises from above chance without a jump of 0.2
    flat             no size is above chance, or a constant is the best description, or the whole
                     change is below 0.05
    inverse          it falls with size
    undetermined     fewer than 5 sizes or than 1.25 decades, too few seeds, models that AICc
                     cannot tell apart, or a wide curve that mostly rises in its last step

Only replicas of ladder points that finished are fitted. Every function is pure: arrays and frames
in, records out.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from scipy import stats

from lm.emergence import fits
from lm.emergence.fits import Curve, Fit
from lm.emergence.seeds import LEAST_RISE, Interval

if TYPE_CHECKING:
    import pandas as pd

Name = Literal["emergent", "metric-induced", "smooth", "flat", "inverse", "undetermined"]
VERDICTS: tuple[Name, ...] = (
    *("emergent", "metric-induced", "smooth"),
    *("flat", "inverse", "undetermined"),
)
DECISIVE = 6.0  # a difference in AICc
LEAST_CHANGE = 0.05
FLOOR_SIZES = 3
LEAST_SIZES = 5
LEAST_SEEDS = 8  # on the whole ladder: with fewer, AICc of a transition is infinite
LEAST_SPAN = 1.25 * fits.SHARP_WIDTH  # on a shorter ladder even a straight line looks sharp
CONTINUOUS = ("nll", "brier")
RESAMPLES = 300
SPLIT = 0.2  # correlation of items within a seed in mid-transition, above which seeds are split
NOWHERE = Interval(float("nan"), float("nan"))


@dataclass(frozen=True)
class Shape:
    """How one metric changes with size.

    `gain` AICc(constant) - AICc(best), `sharpness` AICc(best wide) - AICc(best sharp), `rise` of
    the best fit along the ladder (positive is better), `onset` and `width` the midpoint in
    parameters and 10-90% width in decades of the best transition, with 95% intervals.
    """

    metric: str
    best: str
    gain: float
    sharpness: float
    rise: float
    onset: float
    onset_ci: Interval
    width: float
    width_ci: Interval

    @property
    def word(self) -> str:
        """`flat`, `sharp`, `smooth` or `undecided`: the curve alone, without chance."""
        if not self.gain >= DECISIVE:
            return "flat" if self.gain <= 0 else "undecided"
        if abs(self.sharpness) < DECISIVE or np.isnan(self.sharpness):
            return "undecided"
        return "sharp" if self.sharpness > 0 else "smooth"


class Ladder(NamedTuple):
    """What the verdict needs of the rungs: how many there are, how many of the smallest are not
    above chance, the ceiling above chance, the range of the means, and whether most of it is
    covered by the last step.
    """

    sizes: int
    floors: int
    height: float
    spread: float
    late: bool


@dataclass(frozen=True)
class Verdict:
    """One verdict with what it rests on; `reason` is a sentence for a reader."""

    task: str
    level: str
    verdict: Name
    reason: str
    chance: float
    onset: float
    ci95: Interval
    exact: Shape | None
    continuous: Shape | None
    sizes: int
    seeds: int
    diverged: int
    floor_sizes: int


def final_rows(frame: "pd.DataFrame") -> "pd.DataFrame":
    """The last evaluation of every replica; one that diverged is marked so on all its rows."""
    keys = ["point", "replica", "task", "level", "metric"]
    last = frame[frame["step"] == frame.groupby(keys)["step"].transform("max")]
    diverged = set(
        frame.loc[frame["status"] == "diverged", ["point", "replica"]].itertuples(
            index=False, name=None
        )
    )
    replicas = zip(last["point"], last["replica"], strict=True)
    return last.assign(status=["diverged" if r in diverged else "ok" for r in replicas])


def verdicts(frame: "pd.DataFrame", seed: int = 0) -> list[Verdict]:
    """One verdict for every task and level that has exact match, in order of name."""
    rows = final_rows(frame[frame["role"] == "ladder"])
    tasks = rows[rows["metric"] == "exact_match"][["task", "level"]].drop_duplicates()
    return [
        judge(rows[(rows["task"] == task) & (rows["level"] == level)], seed)
        for task, level in sorted(tasks.itertuples(index=False, name=None))
    ]


def judge(rows: "pd.DataFrame", seed: int = 0) -> Verdict:
    """The verdict on one task and level from the final rows of its ladder replicas."""
    exact = rows[rows["metric"] == "exact_match"]
    task, level, chance = exact[["task", "level", "chance"]].iloc[0]
    good = usable(exact)
    sizes, seeds = good["params"].nunique(), len(good)
    counts = (sizes, seeds, len(exact) - len(good))
    reason = _too_little(good) if np.isfinite(chance) else "its chance was not recorded"
    if reason:
        nothing = (float("nan"), NOWHERE, None, None, *counts, 0)
        return Verdict(task, level, "undetermined", reason, float(chance), *nothing)
    floors = floor_sizes(good, chance)
    curve = rate_curve(good, chance)
    shape = describe(curve, "exact_match", 1, seed)
    continuous = next((s for m in CONTINUOUS if (s := _continuous(rows, m, seed))), None)
    height, spread = curve.means[-2:].max() - chance, np.ptp(curve.means)
    late = curve.means[-1] - curve.means[-2] > 0.5 * spread
    ladder = Ladder(sizes, floors, float(height), float(spread), bool(late))
    name, reason = decide(shape, continuous, ladder)
    began = name in ("emergent", "metric-induced")
    onset = (shape.onset, shape.onset_ci) if began else (float("nan"), NOWHERE)
    return Verdict(
        *(task, level, name, reason, float(chance), *onset, shape, continuous, *counts, floors)
    )


def decide(exact: Shape, continuous: Shape | None, ladder: Ladder) -> tuple[Name, str]:
    """The decision tree of the definition, and the sentence that says why."""
    if exact.rise < -LEAST_CHANGE and exact.gain >= DECISIVE:
        return "inverse", f"exact match falls by {-exact.rise:.2f} along the ladder"
    if ladder.floors == ladder.sizes:
        if ladder.spread > LEAST_RISE and exact.gain >= DECISIVE:
            return "undetermined", "it changes, with too few items to tell any size from chance"
        return "flat", "no size is above chance"
    if exact.gain <= 0 or abs(exact.rise) < LEAST_CHANGE:
        if ladder.spread > LEAST_RISE:
            return "undetermined", f"sizes differ by {ladder.spread:.2f}, in no order"
        small = "not distinguishable from none" if exact.gain <= 0 else "too small to count"
        return "flat", f"the change with size, {exact.rise:+.2f}, is {small}"
    if exact.gain < DECISIVE:
        return "undetermined", f"a constant is only {exact.gain:.1f} in AICc behind a rise"
    if exact.word == "smooth" and ladder.late:
        return "undetermined", "most of its rise lies between the last two sizes"
    if ladder.floors < FLOOR_SIZES:
        return _without_floor(exact, continuous, ladder.floors)
    if exact.word == "smooth":
        return "smooth", f"a wide curve describes it better by {-exact.sharpness:.0f} in AICc"
    if exact.word == "undecided":
        return "undetermined", "sharp and wide curves describe exact match about equally well"
    if ladder.height <= LEAST_RISE:
        return "undetermined", f"it jumps, but ends only {ladder.height:.2f} above chance"
    return _agreement(continuous)


def usable(rows: "pd.DataFrame") -> "pd.DataFrame":
    """The rows that may be fitted: finished and finite."""
    return rows[(rows["status"] == "ok") & np.isfinite(rows["value"]) & (rows["n"] > 0)]


def floor_sizes(rows: "pd.DataFrame", chance: float, level: float = 0.05) -> int:
    """How many sizes, from the smallest up, are not above chance.

    A one-sided exact binomial test per size on the pooled items, at `level` / sizes. The items are
    discounted by the median over sizes of Pearson's dispersion between seeds, at least 1.
    """
    groups = [group for _, group in rows.groupby("params")]
    discount = max(1.0, float(np.median([_dispersion(group) for group in groups])))
    for count, group in enumerate(groups):
        n = max(1, round(group["n"].sum() / discount))
        hits = round(n * np.average(group["value"], weights=group["n"]))
        if stats.binom.sf(hits - 1, n, chance) < level / len(groups):
            return count
    return len(groups)


def rate_curve(rows: "pd.DataFrame", chance: float) -> Curve:
    """Exact match against size; guessing worse than chance lowers the floor, it is no ability."""
    x, y, n = _arrays(rows)
    smallest = [y[x == size].mean() for size in np.unique(x)[:FLOOR_SIZES]]
    floor = float(np.clip(min(chance, np.mean(smallest)), fits.EDGE, 1 - 2 * fits.EDGE))
    return Curve("rate", x, y, n, floor)


def describe(curve: Curve, metric: str, better: Literal[1, -1], seed: int = 0) -> Shape:
    """Fits all candidates and summarises them; `better` is -1 where less is better."""
    fitted = fits.fit_all(curve)
    best = fitted[0]
    wide = min(f.aicc for f in fitted if not f.sharp)
    sharp = min(f.aicc for f in fitted if f.sharp)
    constant = next(f.aicc for f in fitted if f.name == "constant")
    ends = fits.mean_at(curve, best, curve.x[[curve.x.argmin(), curve.x.argmax()]])
    rise = better * float(ends[1] - ends[0])
    steps = [f for f in fitted if f.name in ("logistic", "hinge")]
    near = [f for f in steps if f.aicc <= steps[0].aicc + DECISIVE]
    onset, width = locate(curve, near, seed)
    with np.errstate(invalid="ignore"):  # inf - inf: too few seeds for any transition
        sharpness, gain = wide - sharp, constant - best.aicc
    return Shape(metric, best.name, float(gain), float(sharpness), rise, *onset, *width)


def locate(curve: Curve, steps: list[Fit], seed: int = 0) -> list[tuple[float, Interval]]:
    """Midpoint (parameters) and 10-90% width (decades) of a transition, with their intervals.

    The values are those of the first of `steps`, the intervals the hull over all of them.
    """
    counts = np.vstack([np.ones(len(curve.x)), resample(curve.x, RESAMPLES, seed)])
    found = np.array([_locate(curve, step, counts) for step in steps])  # [steps, 2, 3]
    low, high = found[:, :, 1].min(0), found[:, :, 2].max(0)
    return [
        (float(10**v), Interval(float(10**a), float(10**b)))
        for v, a, b in zip(found[0, :, 0], low, high, strict=True)
    ]


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
        (np.log10(fits.NARROWEST), np.log10(4.0)),
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
    u = (fits.logistic if step.name == "logistic" else fits.hinge)(shape, curve.x)
    loglik = fits.loglik_rate if curve.kind == "rate" else fits.loglik_normal
    best = np.full((len(shape), len(counts)), -np.inf)
    for share in (0.95, 0.98, 1.0, 1.02, 1.05):
        right = step.left + share * (step.right - step.left)
        each = loglik(curve, step.left + (right - step.left) * u, u, step.noise[None])  # [G, J]
        # einsum, not @: the threads of a BLAS that fight for two cores made this 20 times slower.
        np.maximum(best, np.einsum("gj,bj->gb", each, counts), out=best)
    split = best[:, 0]
    if curve.kind == "rate" and np.exp(step.noise[1]) > SPLIT:
        through = curve.y > (step.left + step.right) / 2
        share = np.clip(u, 1e-3, 1 - 1e-3)
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


def _continuous(rows: "pd.DataFrame", metric: str, seed: int) -> Shape | None:
    """The shape of a metric where less is better, or None where it was not measured."""
    good = usable(rows[rows["metric"] == metric])
    if _too_little(good):
        return None
    return describe(Curve("continuous", *_arrays(good)), metric, -1, seed)


def _arrays(rows: "pd.DataFrame") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = rows.sort_values(["params", "point", "replica"])
    columns = np.log10(rows["params"]), rows["value"], rows["n"]
    return tuple(column.to_numpy(np.float64) for column in columns)


def _dispersion(group: "pd.DataFrame") -> float:
    """Pearson's chi² over its degrees of freedom between the seeds of one size; 1 for one seed."""
    value, n = group["value"].to_numpy(), group["n"].to_numpy()
    p = np.clip(np.average(value, weights=n), 0.5 / n.sum(), 1 - 0.5 / n.sum())
    if len(value) < 2:
        return 1.0
    return float(np.sum(n * (value - p) ** 2) / (p * (1 - p)) / (len(value) - 1))


def _too_little(rows: "pd.DataFrame") -> str:
    """Why these rows cannot carry a verdict, or nothing."""
    sizes = rows["params"].nunique()
    if sizes < LEAST_SIZES:
        return f"{sizes} sizes finished; a verdict needs {LEAST_SIZES}"
    if len(rows) < LEAST_SEEDS:
        return f"{len(rows)} replicas finished; a verdict needs {LEAST_SEEDS}"
    span = np.log10(rows["params"].max() / rows["params"].min())
    if span < LEAST_SPAN:
        return f"the ladder spans {span:.2f} decades; a verdict needs {LEAST_SPAN}"
    return ""


def _without_floor(exact: Shape, continuous: Shape | None, floors: int) -> tuple[Name, str]:
    """It rises with too few sizes at chance to speak of a floor: smooth, where anything says so.

    A rise below LEAST_RISE cannot be a jump; the continuous metric may show the curve that exact
    match is too coarse for.
    """
    where = "already above chance at the smallest size"
    if floors:
        where = f"only {floors} of the smallest sizes at chance; {FLOOR_SIZES} are needed"
    small = exact.rise < LEAST_RISE
    if exact.word == "smooth" or (small and floors == 0):
        return "smooth", f"it rises by {exact.rise:.2f}, {where}"
    if small and continuous is not None and continuous.word == "smooth":
        return "smooth", f"it rises by {exact.rise:.2f}, and {continuous.metric} by a wide curve"
    return "undetermined", f"it rises by {exact.rise:.2f}, {where}"


def _agreement(continuous: Shape | None) -> tuple[Name, str]:
    """Exact match is sharp from a floor: does a continuous metric of the same answers agree?"""
    if continuous is None:
        return "undetermined", "exact match jumps; no continuous metric was measured beside it"
    name = continuous.metric
    if continuous.word == "sharp" and continuous.rise > 0:
        return "emergent", f"exact match and {name} both change within a decade"
    if continuous.word in ("smooth", "flat"):
        return "metric-induced", f"exact match jumps while {name} changes by a wide curve"
    return "undetermined", f"exact match jumps; whether {name} does AICc cannot decide"
