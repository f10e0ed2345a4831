"""What the report knows of every ability, computed once and kept in `analysis.json`.

One ability after the other, from its final rows and its exact match during training: verdict with
corrected p, minimum detectable effect, screening statistics, the shape of every metric, the seeds
of every size, time to emergence, collapse, and, where several prompt formats were tested, variance
components. Each is a pure function of its own rows, so abilities may be shared out among processes.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from lm.config import UserError
from lm.emergence import bimodal, onset, screening, seeds, significance
from lm.emergence.words import OTHER, ability_order

if TYPE_CHECKING:
    from lm.emergence.onset import Shape, Verdict
    from lm.emergence.survival import KaplanMeier

# One set of outputs under several metrics; whether more of it is better.
MIRAGE: dict[str, Literal[1, -1]] = {
    **{"token_accuracy": 1, "edit_similarity": 1, "answer_probability": 1},
    **{"log_likelihood": 1, "brier": -1},
}
COLLAPSE_AXES = ("loss", "flops", "params")
MOST_CHECKPOINTS = 300  # of a collapse: an isotonic fit for every size and resample
COLLAPSE_RESAMPLES = 100
MOST_ANSWERS = 1000  # files that are opened for the variance of items

# Applies a function to every item, here or in other processes.
type Share = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Ability:
    """The rows of one task and level: `final` of all formats and metrics, `runs` every evaluation
    of exact match and of the text's loss, and hits [size, seed, format, item] where stored.
    """

    task: str
    level: str
    final: pd.DataFrame
    runs: pd.DataFrame
    hits: np.ndarray | None


def abilities(
    frame: pd.DataFrame, study: Mapping[str, Any], workdir: Path, share: Share = map
) -> list[dict[str, Any]]:
    """The facts of every task and level with exact match, in order of ability and name.

    `frame` holds all rows of finished cells.
    """
    ladder = frame[frame["role"] == "ladder"]
    if ladder.empty:
        return []
    final = onset.final_rows(ladder)
    exact = final[(final["metric"] == "exact_match") & (final["format"] == 0)]
    kinds = {(t["task"], t["level"]): t.get("ability") or OTHER for t in study.get("tasks", [])}
    found = list(share(facts, _jobs(ladder, final, workdir)))
    tests = significance.against_chance(exact)
    rises = {(d.task, d.level): d for d in significance.detectable(exact)}
    for one in found:
        key = one["task"], one["level"]
        own = [test for test in tests if (test.task, test.level) == key]
        one["ability"] = kinds.get(key, OTHER)
        one["p_holm"] = number(min((t.holm for t in own), default=math.nan))
        one["p_bh"] = number(min((t.bh for t in own), default=math.nan))
        one["tests"] = len(tests)
        one["detectable"] = number(rises[key].rise) if key in rises else None
    return sorted(found, key=lambda v: (*ability_order(v["ability"]), v["task"], v["level"]))


def facts(ability: Ability) -> dict[str, Any]:
    """Everything about one ability that needs no other, as JSON values."""
    task, level = ability.task, ability.level
    canonical = ability.final[ability.final["format"] == 0]
    verdict = onset.judge(canonical)
    found = _verdict(replace(verdict, task=task, level=level))
    exact = onset.usable(canonical[canonical["metric"] == "exact_match"])
    found["metrics"] = _metrics(canonical, verdict)
    found["screen"] = _screen(exact)
    found["rungs"] = _rungs(exact)
    found["survival"] = _survival(ability)
    found["collapse"] = _collapse(ability)
    found["variance"] = _variance(ability)
    return found


def _jobs(ladder: pd.DataFrame, final: pd.DataFrame, workdir: Path) -> list[Ability]:
    needed = ["point", "replica", "role", "params", "step", "tokens", "flops"]
    needed += ["task", "level", "format", "metric", "value", "stderr", "n", "chance", "status"]
    runs = ladder.loc[
        (ladder["format"] == 0)
        & (
            (ladder["metric"] == "exact_match")
            | ((ladder["task"] == "text") & (ladder["metric"] == "nll"))
        ),
        needed,
    ]
    text = runs[runs["task"] == "text"]
    keys = final.loc[final["metric"] == "exact_match", ["task", "level"]].drop_duplicates()
    several = final.groupby(["task", "level"], observed=True)["format"].nunique()
    wanted = {key for key, count in several.items() if count > 1}
    hits = _hits(final, wanted, workdir) if wanted else {}
    by_run = dict(iter(runs.groupby(["task", "level"], observed=True)))
    by_final = dict(iter(final[needed].groupby(["task", "level"], observed=True)))
    made = []
    for key in sorted(keys.itertuples(index=False, name=None)):
        both = pd.concat([by_run[key], text]) if key in by_run else text
        # As plain strings: a category that is not there is not sent and not counted.
        parts = [part.astype(dict.fromkeys(_texts(part), "str")) for part in (by_final[key], both)]
        made.append(Ability(key[0], key[1], parts[0], parts[1], hits.get(key)))
    return made


def _texts(frame: pd.DataFrame) -> list[str]:
    return [name for name in frame if isinstance(frame[name].dtype, pd.CategoricalDtype)]


def _hits(
    final: pd.DataFrame, wanted: set[tuple[str, str]], workdir: Path
) -> dict[tuple[str, str], np.ndarray]:
    """Right or wrong for every item, [size, seed, format, item], from the stored answers.

    A size takes part with as many seeds as the smallest has. Empty where a file is not there, or
    there are too many of them.
    """
    from lm.emergence import metrics

    good = onset.usable(final[final["metric"] == "exact_match"])
    who = ["params", "cell", "point", "replica", "step"]
    replicas = good[who].drop_duplicates(["params", "point", "replica"])
    replicas = replicas.sort_values(["params", "point", "replica"])
    fewest = int(replicas.groupby("params").size().min()) if len(replicas) else 0
    replicas = replicas.groupby("params").head(fewest)
    paths = [
        workdir / r.cell / metrics.answers_file(r.step, r.point, r.replica)
        for r in replicas.itertuples()
    ]
    if not paths or len(paths) > MOST_ANSWERS or not all(path.exists() for path in paths):
        return {}
    stacked: dict[tuple[str, str], list[np.ndarray]] = {key: [] for key in wanted}
    for path in paths:
        with np.load(path, allow_pickle=False) as stored:
            for key in wanted:
                names = sorted(n[:-7] for n in stored.files if n.endswith(".target"))
                own = [n for n in names if n.rpartition(".")[0] == ".".join(key)]
                stacked[key].append(
                    np.stack([_right(stored[f"{n}.greedy"], stored[f"{n}.target"]) for n in own])
                    if own
                    else np.empty((0, 0))
                )
    assert metrics.PAD == -1
    sizes = replicas["params"].nunique()
    return {
        key: np.stack(parts).reshape(sizes, fewest, *parts[0].shape)
        for key, parts in stacked.items()
        if len({part.shape for part in parts}) == 1 and parts[0].size
    }


def _right(greedy: np.ndarray, target: np.ndarray) -> np.ndarray:
    return ((greedy == target) | (target < 0)).all(1).astype(np.float64)


def _metrics(final: pd.DataFrame, verdict: "Verdict") -> dict[str, Any]:
    """The shape of every metric of `MIRAGE` that was measured, beside exact match."""
    found: dict[str, Any] = {"exact_match": shape(verdict.exact)}
    if verdict.exact is None:
        return found
    for metric, better in MIRAGE.items():
        good = onset.usable(final[final["metric"] == metric])
        if good.empty or onset._too_little(good):
            continue
        if verdict.continuous is not None and verdict.continuous.metric == metric:
            found[metric] = shape(verdict.continuous)
            continue
        curve = onset.Curve("continuous", *onset._arrays(good))
        found[metric] = shape(onset.outline(curve, metric, better))
    independent = onset.usable(final[final["metric"] == "independent_match"])
    found["tokens"] = "several" if len(independent) else "one"  # an answer's
    return found


def _rungs(exact: pd.DataFrame) -> list[dict[str, Any]]:
    """The seeds of every size; `groups` are the means of the two that the mixture finds."""
    made = []
    for rung in seeds.rungs(exact):
        groups: list[float] = []
        if rung.bimodal:
            own = exact[exact["params"] == rung.params]
            split = bimodal.modes(own["value"].to_numpy(), own["n"].to_numpy())
            groups = [split.low, split.high]
        made.append({**{k: plain(v) for k, v in rung._asdict().items()}, "groups": groups})
    return made


def _screen(exact: pd.DataFrame) -> dict[str, Any] | None:
    if exact.empty:
        return None
    by_size = {n: rung["value"].tolist() for n, rung in exact.groupby("params")}
    found = screening.screen(by_size)
    return {
        "improvement": number(found.improvement),
        **{
            name: {
                **{"value": number(score.value), "flag": score.flag, "p": number(score.p)},
                "ci": [number(end) for end in score.ci],
            }
            for name, score in (
                ("linearity", found.linearity),
                ("breakthroughness", found.breakthrough),
            )
        },
    }


def _survival(ability: Ability) -> dict[str, Any] | None:
    from lm.emergence import survival

    try:
        found = survival.survival(ability.runs, ability.task, ability.level)
    except UserError:
        return None
    good = survival._curves(ability.runs, ability.task, ability.level, "exact_match")
    times = survival.emergence_times(good, "tokens", found.threshold)
    return {
        "axis": found.axis,
        "threshold": found.threshold,
        "log_rank": {k: plain(v) for k, v in found.log_rank._asdict().items()},
        "sizes": [
            {
                **{"params": size.params, "outcome": size.outcome, "grid": number(size.grid)},
                **{"watched": number(size.watched), **_kaplan_meier(size.curve)},
            }
            for size in found.sizes
        ],
        "censored": [
            {"point": t.point, "replica": t.replica, "params": t.params, "time": t.time}
            for t in times
            if not t.emerged
        ],
    }


def _kaplan_meier(curve: "KaplanMeier") -> dict[str, Any]:
    ends = [number(end) for end in curve.median_ci]
    return {
        **{"replicas": curve.replicas, "emerged": curve.emerged},
        **{"median": number(curve.median), "median_ci": ends},
        **{name: getattr(curve, name).tolist() for name in ("times", "survival", "low", "high")},
    }


def _collapse(ability: Ability) -> list[dict[str, Any]]:
    from lm.emergence import collapse

    runs = ability.runs
    steps = sorted(runs.loc[runs["task"] != "text", "step"].unique())
    replicas = len(runs[["point", "replica"]].drop_duplicates())
    thin = max(1, math.ceil(len(steps) * replicas / MOST_CHECKPOINTS))
    kept = runs[runs["step"].isin(steps[::-1][::thin])]
    try:
        found = collapse.compare(
            *(kept, ability.task, ability.level, "exact_match", COLLAPSE_AXES),
            resamples=COLLAPSE_RESAMPLES,
        )
    except UserError:
        return []
    return [{k: plain(v) for k, v in asdict(c).items()} for c in found]


def _variance(ability: Ability) -> dict[str, Any] | None:
    """Components over formats, with items where the answers are there; None for one format."""
    from lm.emergence import variance

    rates = onset.usable(ability.final[ability.final["metric"] == "exact_match"])
    if rates["format"].nunique() < 2:
        return None
    long = rates.rename(columns={"params": "size"})
    long = long.assign(seed=long["point"] + "/" + long["replica"].astype(str))
    try:
        if ability.hits is not None:
            found = variance.decompose(ability.hits)
        else:
            found = variance.components(long[["size", "seed", "format", "value"]])
    except UserError:
        return None
    means = rates.groupby("format")["value"].mean()
    return {
        **{"mean": found.mean, "total": found.total, "counts": found.counts},
        "dropped": found.dropped,
        "components": [
            {**asdict(c), "ci": list(c.ci), "share": number(c.share)} for c in found.components
        ],
        "formats": {str(f): float(v) for f, v in means.items()},
    }


def _verdict(verdict: "Verdict") -> dict[str, Any]:
    return {
        "task": verdict.task,
        "level": verdict.level,
        "metric": "exact_match",
        "verdict": verdict.verdict,
        "onset_params": number(verdict.onset),
        "ci95": ends(verdict.ci95),
        "chance": number(verdict.chance),
        "reason": verdict.reason,
        "exact_match": shape(verdict.exact),
        "continuous": shape(verdict.continuous),
        "sizes": verdict.sizes,
        "floor_sizes": verdict.floor_sizes,
        "seeds": verdict.seeds,
        "diverged": verdict.diverged,
    }


def shape(found: "Shape | None") -> dict[str, Any] | None:
    """A shape as JSON values."""
    if found is None:
        return None
    numbers = {k: number(v) for k, v in asdict(found).items() if isinstance(v, float)}
    intervals = {"onset_ci": ends(found.onset_ci), "width_ci": ends(found.width_ci)}
    scores = {name: number(score) for name, score in found.left_out.items()}
    named = {"metric": found.metric, "best": found.best, "word": found.word}
    return {**named, **numbers, **intervals, "left_out": scores}


def number(value: float) -> float | None:
    """None for NaN and infinity."""
    return float(value) if abs(value) < math.inf else None


def ends(pair: tuple[float, float]) -> list[float] | None:
    """An interval, or None if an end is not finite."""
    low, high = map(number, pair)
    return None if low is None or high is None else [low, high]


def plain(value: Any) -> Any:
    """A NumPy or Python scalar or interval as JSON has it; NaN and infinity are None."""
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    return number(value) if isinstance(value, float) else value
