"""Time to emergence: how long a replica trains before it has the ability, and who never did.

A replica *emerges* at the first evaluation where its metric exceeds the threshold of
`lm.emergence.seeds`. It is seen at evaluations only, so the time lies in (before, time], one step
of the grid; the estimates use `time`, late by at most that step, and both are reported. A replica
that never does is censored at its last evaluation, one that diverged at its last good one: it
says "not until then", which a mean of times or a share of successes cannot say.

    S(t) = Π_{t_i <= t} (1 - d_i / n_i)          Kaplan & Meier 1958; d_i of n_i emerge at t_i

with Greenwood's variance on the scale ln(-ln S), and the log-rank test across sizes, by
permutation. "Cannot" and "not yet" are told apart by patience: a size of which no replica emerged

    cannot     was watched, every replica of it, for at least 4 times the median of the nearest
               larger size that has one: what is a matter of waiting would have begun
    not yet    was not, so longer training may decide

which is a statement about waiting times like those, and no proof.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from scipy import stats

from lm.config import UserError
from lm.emergence.seeds import Interval, threshold

if TYPE_CHECKING:
    import pandas as pd

PATIENCE = 4.0
Axis = Literal["tokens", "step", "flops"]
Outcome = Literal["emerged", "split", "not yet", "cannot"]


class Time(NamedTuple):
    """One replica: it emerged in (before, time], or had not until `time`. `before` is 0 where the
    first evaluation already exceeds the threshold.
    """

    point: str
    replica: int
    params: int
    before: float
    time: float
    emerged: bool


@dataclass(frozen=True)
class KaplanMeier:
    """A survival curve that falls to `survival` at `times` [E], with its pointwise 95% band.

    `median` is NaN where fewer than half emerged; an end of its interval may be infinite.
    """

    times: np.ndarray
    survival: np.ndarray
    low: np.ndarray
    high: np.ndarray
    replicas: int
    emerged: int
    median: float
    median_ci: Interval


@dataclass(frozen=True)
class Size:
    """The times of one size. `grid` is the longest step of evaluations in which one emerged, NaN
    without any; `watched` the shortest time that a replica without the ability was trained.
    """

    params: int
    curve: KaplanMeier
    outcome: Outcome
    grid: float
    watched: float


class LogRank(NamedTuple):
    """The test that all sizes have one curve; NaN where fewer than two can be compared.

    `p` is by permutation, `p_chi2` the approximation for many replicas.
    """

    chi2: float
    freedom: int
    p: float
    p_chi2: float


@dataclass(frozen=True)
class Survival:
    """Time to emergence on one task and level, smallest size first."""

    task: str
    level: str
    metric: str
    axis: Axis
    threshold: float
    sizes: tuple[Size, ...]
    log_rank: LogRank


def survival(
    rows: "pd.DataFrame",
    task: str,
    level: str,
    metric: str = "exact_match",
    axis: Axis = "tokens",
    mark: float | None = None,
) -> Survival:
    """Time to emergence from all rows of a study (every evaluation, not the last alone).

    Ladder rows of the canonical format count. `mark` is the threshold, by default halfway from
    chance to the ceiling of the final scores.

    Raises `UserError` if there is no finite row, or no chance and no `mark`.
    """
    good = _curves(rows, task, level, metric)
    if mark is None:
        mark = _threshold(good, f"{task} {level} {metric}")
    times = emergence_times(good, axis, mark)
    groups = {params: [t for t in times if t.params == params] for params in _sizes(times)}
    curves = {params: kaplan_meier(*_arrays(group)[:2]) for params, group in groups.items()}
    found = tuple(
        Size(params, curves[params], *_outcome(params, groups[params], curves)) for params in groups
    )
    return Survival(task, level, metric, axis, mark, found, log_rank(*_arrays(times)))


def emergence_times(rows: "pd.DataFrame", axis: Axis, mark: float) -> list[Time]:
    """One `Time` for every replica of the finite, not diverged rows of one curve."""
    found = []
    for (point, replica), run in rows.groupby(["point", "replica"]):
        run = run.sort_values("step")
        when, above = run[axis].to_numpy(np.float64), run["value"].to_numpy() > mark
        first = int(above.argmax()) if above.any() else len(when) - 1
        before = when[first - 1] if above.any() and first else 0.0 if above.any() else when[-1]
        who = str(point), int(replica), int(run["params"].iloc[0])
        found.append(Time(*who, float(before), float(when[first]), bool(above.any())))
    return found


def kaplan_meier(time: np.ndarray, emerged: np.ndarray, level: float = 0.95) -> KaplanMeier:
    """The curve of times [R]; `emerged` [R] is False where the time is censored.

    The median is the first time with S <= 1/2, its interval the times at which the band's ends
    reach 1/2 (Brookmeyer & Crowley 1982). Raises `UserError` without replicas or on a time that is
    not finite and >= 0.
    """
    time, emerged = np.asarray(time, np.float64), np.asarray(emerged, bool)
    if len(time) == 0 or not (np.isfinite(time) & (time >= 0)).all():
        raise UserError("times must be finite, at least 0, and of at least one replica")
    if not emerged.any():
        none, nan = np.empty(0), float("nan")
        return KaplanMeier(none, none, none, none, len(time), 0, nan, Interval(nan, np.inf))
    from statsmodels.duration.survfunc import SurvfuncRight

    found = SurvfuncRight(time, emerged.astype(int))
    s = np.where(found.surv_prob < 1e-12, 0.0, found.surv_prob)
    with np.errstate(divide="ignore", invalid="ignore"):
        spread = found.surv_prob_se / (s * np.abs(np.log(s)))
        reach = np.exp(stats.norm.ppf(0.5 + level / 2) * spread)
    inner = (s > 0) & (s < 1)
    low, high = np.zeros(len(s)), np.ones(len(s))
    low[inner], high[inner] = s[inner] ** reach[inner], s[inner] ** (1 / reach[inner])
    high = np.minimum.accumulate(high)  # where all emerged the variance is 0: the last band stays
    low = np.minimum.accumulate(low)

    def falls(curve: np.ndarray, otherwise: float) -> float:
        (where,) = np.nonzero(curve <= 0.5 + 1e-12)
        return float(found.surv_times[where[0]]) if len(where) else otherwise

    median = falls(s, float("nan"))
    ends = Interval(falls(low, float("nan")), falls(high, float("inf")))
    counts = len(time), int(emerged.sum())
    return KaplanMeier(np.asarray(found.surv_times), s, low, high, *counts, median, ends)


def log_rank(
    time: np.ndarray, emerged: np.ndarray, group: np.ndarray, permutations: int = 999, seed: int = 0
) -> LogRank:
    """Whether the groups of times [R] have one survival curve (Mantel 1966).

    `p` permutes the groups' labels, which is exact where all are censored by one rule, such as an
    equal budget of tokens. The chi² approximation is given beside it and is not to be relied on:
    with three replicas in each of four groups it rejected 16% of nulls at 5%.
    """
    time, emerged, group = np.asarray(time), np.asarray(emerged, bool), np.asarray(group)
    names, index = np.unique(group, return_inverse=True)
    if len(names) < 2 or not emerged.any():
        return LogRank(float("nan"), 0, float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    orders = np.vstack([index, rng.permuted(np.tile(index, (permutations, 1)), axis=1)])
    member = np.eye(len(names))[orders]  # [1 + permutations, R, G]
    events = np.unique(time[emerged])
    at_risk = (time >= events[:, None]).astype(np.float64)  # [E, R]
    fell = ((time == events[:, None]) & emerged).astype(np.float64)
    n, d = at_risk.sum(1), fell.sum(1)
    share = np.einsum("er,prg->peg", at_risk, member) / n[:, None]
    excess = np.einsum("er,prg->pg", fell, member) - np.einsum("e,peg->pg", d, share)
    scale = d * (n - d) / np.maximum(n - 1, 1)
    within = np.einsum("e,peg->pg", scale, share)[..., None] * np.eye(len(names))
    variance = within - np.einsum("e,peg,peh->pgh", scale, share, share)
    # The groups' excesses add up to 0, so the matrix is singular as it stands.
    inverse = np.linalg.pinv(variance, rcond=1e-9, hermitian=True)
    chi2 = np.einsum("pg,pgh,ph->p", excess, inverse, excess)
    freedom = int((share[0] > 0).any(0).sum()) - 1  # groups that are gone before the first event
    if freedom < 1:
        return LogRank(float("nan"), 0, float("nan"), float("nan"))
    p = (1 + np.sum(chi2[1:] >= chi2[0] * (1 - 1e-9))) / (1 + permutations)
    return LogRank(float(chi2[0]), freedom, float(p), float(stats.chi2.sf(chi2[0], freedom)))


def _curves(rows: "pd.DataFrame", task: str, level: str, metric: str) -> "pd.DataFrame":
    good = rows[(rows["task"] == task) & (rows["level"] == level) & (rows["metric"] == metric)]
    good = good[(good["role"] == "ladder") & (good["format"] == 0)]
    good = good[(good["status"] == "ok") & np.isfinite(good["value"])]
    if good.empty:
        raise UserError(f"no finite {metric} of {task} {level}; see the names in the table")
    return good


def _threshold(good: "pd.DataFrame", name: str) -> float:
    chance = float(good["chance"].iloc[0])
    if not np.isfinite(chance):
        raise UserError(f"{name} has no chance; give the threshold as mark")
    last = good.sort_values("step").groupby(["point", "replica"]).tail(1)
    return threshold(chance, last.groupby("params")["value"].mean().to_numpy())


def _outcome(
    params: int, group: Sequence[Time], curves: dict[int, KaplanMeier]
) -> tuple[Outcome, float, float]:
    steps = [t.time - t.before for t in group if t.emerged]
    waits = [t.time for t in group if not t.emerged]
    grid, watched = max(steps, default=np.nan), min(waits, default=np.nan)
    if not waits:
        return "emerged", grid, watched
    if steps:
        return "split", grid, watched
    larger = [curves[p].median for p in sorted(curves) if p > params]
    usual = next((median for median in larger if np.isfinite(median)), np.inf)
    return ("cannot" if watched >= PATIENCE * usual else "not yet"), grid, watched


def _sizes(times: Sequence[Time]) -> list[int]:
    return sorted({t.params for t in times})


def _arrays(times: Sequence[Time]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Times, whether each is an event, and sizes [R]."""
    when, emerged = np.array([t.time for t in times]), np.array([t.emerged for t in times])
    return when, emerged, np.array([t.params for t in times])
