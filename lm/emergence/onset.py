"""Where an ability begins, and whether it begins at all: six verdicts, defined before the data.

The definition (after Wei et al. 2022, with the demand of Schaeffer et al. 2023 that a continuous
metric agree). An ability is `emergent` on a ladder of sizes if

    floor     at least 3 of the smallest sizes are at chance: not more than 0.05 above it, or not
              significantly so (one-sided, Bonferroni),
    ceiling   exact match ends more than 0.2 above chance,
    sharp     a curve with a 10-90% width below one decade of parameters beats every wider curve
              by 6 in AICc, for exact match and for a continuous metric of the same answers.

    metric-induced   exact match does all that, while the continuous metric is better described by
                     a wide curve (by 6 in AICc)
    smooth           it rises by a wide curve, or rises from above chance without a jump of 0.2
    flat             every size is at chance, or a constant is the best description, or the whole
                     change is below 0.05
    inverse          it falls with size
    undetermined     fewer than 5 sizes or than 1.25 decades, too few seeds, models that AICc
                     cannot tell apart, or a wide curve that mostly rises in its last step

Only replicas of ladder points that finished are fitted. Every function is pure: arrays and frames
in, records out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from lm.config import UserError
from lm.emergence import fits, shapes
from lm.emergence.fits import Curve, Fit
from lm.emergence.locate import locate
from lm.emergence.locate import resample as resample
from lm.emergence.seeds import LEAST_RISE, Interval
from lm.emergence.significance import against_chance

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
LEAST_SPAN = 1.25 * shapes.SHARP_WIDTH  # on a shorter ladder even a straight line looks sharp
# The loss of an answer falls while a model learns which answers are possible at all, long before it
# can tell which is right; normalised over the choices, that part is not counted.
CONTINUOUS = ("choice_brier", "nll", "brier")
NOWHERE = Interval(float("nan"), float("nan"))


@dataclass(frozen=True)
class Shape:
    """How one metric changes with size.

    `gain` AICc(constant) - AICc(best), `sharpness` AICc(best wide) - AICc(best sharp), `rise` of
    the best fit along the ladder (positive is better), `onset` and `width` the midpoint in
    parameters and 10-90% width in decades of the best transition, with 95% intervals. `left_out`
    is the log score with which the best few curves predict each size from all others, in nats.
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
    left_out: dict[str, float] = field(default_factory=dict)

    @property
    def word(self) -> str:
        """`flat`, `sharp`, `smooth` or `undecided`: the curve alone, without chance."""
        if not self.gain >= DECISIVE:
            return "flat" if self.gain <= 0 else "undecided"
        if abs(self.sharpness) < DECISIVE or np.isnan(self.sharpness):
            return "undecided"
        return "sharp" if self.sharpness > 0 else "smooth"


class Ladder(NamedTuple):
    """What the verdict needs of the rungs: how many there are, how many of the smallest are at
    chance, the ceiling above chance, the range of the means, and whether most of it is
    covered by the last step.
    """

    sizes: int
    floors: int
    height: float
    spread: float
    late: bool


@dataclass(frozen=True)
class Verdict:
    """One verdict with what it rests on; `reason` is a sentence for a reader.

    `p_holm` and `p_bh` say how surely any size of the task is above chance, corrected for all
    sizes and tasks of the table it was judged with (NaN where it was judged alone).
    """

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
    p_holm: float = float("nan")
    p_bh: float = float("nan")


def final_rows(frame: "pd.DataFrame") -> "pd.DataFrame":
    """The last evaluation of every replica; one that diverged is marked so on all its rows."""
    keys = ["point", "replica", "task", "level", "format", "metric"]
    last = frame[frame["step"] == frame.groupby(keys)["step"].transform("max")]
    last = last.drop_duplicates(keys, keep="last")
    diverged = set(
        frame.loc[frame["status"] == "diverged", ["point", "replica"]].itertuples(
            index=False, name=None
        )
    )
    replicas = zip(last["point"], last["replica"], strict=True)
    return last.assign(status=["diverged" if r in diverged else "ok" for r in replicas])


def verdicts(frame: "pd.DataFrame", seed: int = 0) -> list[Verdict]:
    """One verdict for every task and level that has exact match, in order of name.

    Only the canonical prompt format counts.
    """
    rows = final_rows(frame[(frame["role"] == "ladder") & (frame["format"] == 0)])
    tasks = rows[rows["metric"] == "exact_match"][["task", "level"]].drop_duplicates()
    tests = against_chance(rows[rows["metric"] == "exact_match"])
    made = []
    for task, level in sorted(tasks.itertuples(index=False, name=None)):
        verdict = judge(rows[(rows["task"] == task) & (rows["level"] == level)], seed)
        own = [test for test in tests if (test.task, test.level) == (task, level)]
        least = [min((getattr(t, name) for t in own), default=np.nan) for name in ("holm", "bh")]
        made.append(replace(verdict, p_holm=least[0], p_bh=least[1]))
    return made


def judge(rows: "pd.DataFrame", seed: int = 0) -> Verdict:
    """The verdict on one task and level from the final rows of its ladder replicas.

    Raises `UserError` where exact match was not measured.
    """
    exact = rows[rows["metric"] == "exact_match"]
    if exact.empty:
        raise UserError("no row of exact_match; a verdict needs it, so evaluate the task first")
    task, level, chance = exact[["task", "level", "chance"]].iloc[0]
    good = usable(exact)
    sizes, seeds = good["params"].nunique(), len(good)
    counts = (sizes, seeds, len(exact) - len(good))
    reason = _no_chance(chance) or _too_little(good)
    if reason:
        nothing = (float("nan"), NOWHERE, None, None, *counts, 0)
        return Verdict(task, level, "undetermined", reason, float(chance), *nothing)
    floors = floor_sizes(good)
    curve = rate_curve(good, chance)
    shape = describe(curve, "exact_match", 1, seed)
    continuous = _continuous(rows, seed)
    height, spread = curve.means[-2:].max() - chance, np.ptp(curve.means)
    late = curve.means[-1] - curve.means[-2] > 0.5 * spread
    ladder = Ladder(sizes, floors, float(height), float(spread), bool(late))
    name, reason = decide(shape, continuous, ladder)
    began = name in ("emergent", "metric-induced")
    onset = (shape.onset, shape.onset_ci) if began else (float("nan"), NOWHERE)
    return Verdict(
        *(task, level, name, reason, float(chance), *onset),
        *(shape, continuous[0] if continuous else None, *counts, floors),
    )


def decide(exact: Shape, continuous: Sequence[Shape], ladder: Ladder) -> tuple[Name, str]:
    """The decision tree of the definition, and the sentence that says why; of the continuous
    metrics, in order of worth, the first must agree to a jump, and any may show a wide curve where
    exact match is too coarse.
    """
    if exact.rise < -LEAST_CHANGE and exact.gain >= DECISIVE:
        return "inverse", f"exact match falls by {-exact.rise:.2f} along the ladder"
    if ladder.floors == ladder.sizes:
        if ladder.spread > LEAST_RISE and exact.gain >= DECISIVE:
            return "undetermined", "it changes, with too few items to tell any size from chance"
        return "flat", "every size is at chance"
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
    return _agreement(continuous[0] if continuous else None)


def usable(rows: "pd.DataFrame") -> "pd.DataFrame":
    """The rows that may be fitted: finished and finite."""
    return rows[(rows["status"] == "ok") & np.isfinite(rows["value"]) & (rows["n"] > 0)]


def floor_sizes(rows: "pd.DataFrame", level: float = 0.05) -> int:
    """How many sizes of one task, from the smallest up, are at chance: their mean is at most
    `LEAST_CHANGE` above it, or one exact test each (`against_chance`), at `level` / sizes, finds
    nothing. With thousands of items a test alone would find .005 to be above .002.
    """
    tests = against_chance(rows)
    above = (
        i
        for i, test in enumerate(tests)
        if test.p < level / len(tests) and test.value - test.chance > LEAST_CHANGE
    )
    return next(above, len(tests))


def rate_curve(rows: "pd.DataFrame", chance: float) -> Curve:
    """Exact match against size; guessing worse than chance lowers the floor, it is no ability."""
    x, y, n = _arrays(rows)
    smallest = [y[x == size].mean() for size in np.unique(x)[:FLOOR_SIZES]]
    floor = float(np.clip(min(chance, np.mean(smallest)), fits.EDGE, 1 - 2 * fits.EDGE))
    return Curve("rate", x, y, n, floor)


def describe(curve: Curve, metric: str, better: Literal[1, -1], seed: int = 0) -> Shape:
    """Fits all candidates and summarises them; `better` is -1 where less is better."""
    fitted = fits.fit_all(curve)
    steps = [f for f in fitted if f.name in (*shapes.TRANSITIONS, "step")]
    near = [f for f in steps if f.aicc <= steps[0].aicc + DECISIVE]
    (middle, middle_ci), (width, width_ci) = locate(curve, near, seed)
    return replace(
        _outline(curve, fitted, metric, better),
        onset=middle,
        onset_ci=middle_ci,
        width=width,
        width_ci=width_ci,
        left_out=fits.leave_one_size_out(curve, fitted),
    )


def outline(curve: Curve, metric: str, better: Literal[1, -1]) -> Shape:
    """`describe` without where it begins and what was left out, which are the most of its work:
    those are NaN and empty.
    """
    return _outline(curve, fits.fit_all(curve), metric, better)


def _outline(curve: Curve, fitted: Sequence[Fit], metric: str, better: Literal[1, -1]) -> Shape:
    best = fitted[0]
    wide = min(f.aicc for f in fitted if not f.sharp)
    sharp = min(f.aicc for f in fitted if f.sharp)
    constant = next(f.aicc for f in fitted if f.name == "constant")
    ends = fits.mean_at(curve, best, curve.x[[curve.x.argmin(), curve.x.argmax()]])
    rise = better * float(ends[1] - ends[0])
    with np.errstate(invalid="ignore"):  # inf - inf: too few seeds for any transition
        sharpness, gain = float(wide - sharp), float(constant - best.aicc)
    nowhere = (float("nan"), NOWHERE, float("nan"), NOWHERE)
    return Shape(metric, best.name, gain, sharpness, rise, *nowhere)


def _continuous(rows: "pd.DataFrame", seed: int) -> list[Shape]:
    """The shapes of the continuous metrics that were measured; the first has all there is to know,
    of the others only the word is asked.
    """
    found: list[Shape] = []
    for metric in CONTINUOUS:
        good = usable(rows[rows["metric"] == metric])
        if not _too_little(good):
            curve = Curve("continuous", *_arrays(good))
            whole = describe(curve, metric, -1, seed) if not found else outline(curve, metric, -1)
            found.append(whole)
    return found


def _arrays(rows: "pd.DataFrame") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows = rows.sort_values(["params", "point", "replica"])
    columns = np.log10(rows["params"]), rows["value"], rows["n"]
    return tuple(column.to_numpy(np.float64) for column in columns)


def _no_chance(chance: float) -> str:
    """Why nothing can be above this chance, or nothing."""
    if not np.isfinite(chance):
        return "its chance was not recorded"
    return "" if chance < 1 else f"a guess already scores {chance:g}; nothing can be above it"


def _too_little(rows: "pd.DataFrame") -> str:
    """Why these rows cannot carry a verdict, or nothing."""
    sizes = rows["params"].nunique()
    rates = rows.loc[rows["metric"] == "exact_match", "value"]
    if not rates.between(0, 1).all():
        return f"an exact match of {rates.max():g}; a rate lies between 0 and 1"
    if sizes < LEAST_SIZES:
        return f"{sizes} sizes finished; a verdict needs {LEAST_SIZES}"
    if len(rows) < LEAST_SEEDS:
        return f"{len(rows)} replicas finished; a verdict needs {LEAST_SEEDS}"
    span = np.log10(rows["params"].max() / rows["params"].min())
    if span < LEAST_SPAN:
        return f"the ladder spans {span:.2f} decades; a verdict needs {LEAST_SPAN}"
    return ""


def _without_floor(exact: Shape, continuous: Sequence[Shape], floors: int) -> tuple[Name, str]:
    """It rises with too few sizes at chance to speak of a floor: smooth, where anything says so.

    A rise below LEAST_RISE cannot be a jump; a continuous metric may show the curve that exact
    match is too coarse for.
    """
    where = "already above chance at the smallest size"
    if floors:
        where = f"only {floors} of the smallest sizes at chance; {FLOOR_SIZES} are needed"
    small = exact.rise < LEAST_RISE
    if exact.word == "smooth" or (small and floors == 0):
        return "smooth", f"it rises by {exact.rise:.2f}, {where}"
    wide = next((shape.metric for shape in continuous if shape.word == "smooth"), None)
    if small and wide:
        return "smooth", f"it rises by {exact.rise:.2f}, and {wide} by a wide curve"
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
