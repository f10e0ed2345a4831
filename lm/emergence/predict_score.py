"""How good predictions were: scores of predictive draws beside naive baselines, and a back-test.

For a new seed's value y and a predictive distribution F, of which m quantiles at (k - 1/2)/m stand
for draws,

    CRPS      integral (F(v) - [v >= y])² dv, in the units of the metric; |median - y| for a point
    log score -ln f(y), f a normal kernel estimate on the draws; at most 10
    coverage  whether y lies in the central 80% and 95%

(Gneiting & Raftery 2007, by `scoringrules`). Two baselines know no curve: *last*, the mean of the
largest size seen, with the changes from size to size as its scatter; *line*, a regression on log10
parameters with its own prediction interval.

A back-test cuts the ladder after every size from the fourth on, predicts all larger sizes from
those below the cut, and scores every seed there. Targets are not independent: one onset missed is
missed by all seeds beyond it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from lm.config import UserError
from lm.emergence import forecast, onset
from lm.emergence.shapes import Curve

if TYPE_CHECKING:
    import pandas as pd

Model = Literal["onset", "last", "line"]
MODELS: tuple[Model, ...] = ("onset", "last", "line")
QUANTILES = 100
KERNEL = 0.01  # the least width of the log score's kernel, in units of the metric
WORST = 10.0  # of a log score: one miss by many kernel widths must not decide a mean
DISTANCES = (0.25, 0.5, 1.0, np.inf)  # decades beyond the cut, upper ends


class Target(NamedTuple):
    """What is predicted: a metric of a task and level, with the rows [J] it is predicted from."""

    task: str
    level: str
    metric: str
    kind: forecast.Kind
    curve: Curve


@dataclass(frozen=True)
class Score:
    """One seed's value against one prediction of one model.

    `distance` decades from the largest size seen, `error` (median - value)/|value| (NaN for 0),
    `width` of the 80% interval.
    """

    task: str
    level: str
    metric: str
    model: Model
    params: int
    distance: float
    value: float
    median: float
    crps: float
    log_score: float
    in80: bool
    in95: bool
    width: float
    error: float
    source: str = ""
    registered: bool = False


def final(frame: "pd.DataFrame") -> "pd.DataFrame":
    """The rows that are predicted and predicted from: the last evaluation of finished ladder
    replicas, canonical prompt format.
    """
    rows = frame[frame["role"] == "ladder"]
    if "format" in rows:
        rows = rows[rows["format"] == 0]
    return onset.usable(onset.final_rows(rows))


def targets(rows: "pd.DataFrame", least: int = forecast.LEAST_SIZES) -> Iterator[Target]:
    """Exact match and nll of every ability, and nll of text, wherever `least` sizes measured it."""
    for (task, level, metric), group in rows.groupby(["task", "level", "metric"]):
        if metric not in ("exact_match", "nll") or group["params"].nunique() < least:
            continue
        if metric == "nll":
            kind: forecast.Kind = "law" if task == "text" else "loss"
            group = group[group["value"] > 0] if kind == "law" else group
            curve = Curve("continuous", *onset._arrays(group))
        else:
            chance = float(group["chance"].iloc[0])
            if not np.isfinite(chance):
                continue
            kind, curve = "rate", onset.rate_curve(group, chance)
        yield Target(task, level, metric, kind, curve)


def predict(target: Target, x: np.ndarray, seed: int = 0) -> dict[Model, np.ndarray]:
    """Quantiles [len(x), QUANTILES] of one new seed at log10 sizes x, of every model."""
    at = (np.arange(QUANTILES) + 0.5) / QUANTILES
    draws = forecast.forecast(target.kind, target.curve, x, seed)
    own = np.quantile(draws, at, axis=1, method="inverted_cdf").T
    highest = 1.0 if target.kind == "rate" else np.inf
    naive = {"last": _last(target.curve, x, at), "line": _line(target.curve, x, at)}
    clipped = {name: np.clip(q, 0, highest) for name, q in naive.items()}
    return {"onset": own, "last": clipped["last"], "line": clipped["line"]}


def backtest(frame: "pd.DataFrame", seed: int = 0) -> list[Score]:
    """Scores of every seed beyond every cut; raises `UserError` if no task has sizes enough."""
    rows = final(frame)
    found = []
    for whole in targets(rows, forecast.LEAST_SIZES + 1):
        sizes = whole.curve.sizes
        for count in range(forecast.LEAST_SIZES, len(sizes)):
            seen = _part(whole, rows, sizes[count - 1])
            models = predict(seen, sizes[count:], seed)
            for i, x in enumerate(sizes[count:]):
                for value in whole.curve.y[whole.curve.x == x]:
                    for model in MODELS:
                        quantiles = models[model][i]
                        at = (*whole[:3], model, round(10**x), float(x - sizes[count - 1]))
                        found.append(score_one(at, quantiles, float(value)))
    if not found:
        least = forecast.LEAST_SIZES + 1
        raise UserError(f"no task has {least} finished sizes; a back-test needs as many")
    return found


def score_one(
    at: tuple[str, str, str, Model, int, float],
    quantiles: np.ndarray,
    value: float,
    source: str = "",
    registered: bool = False,
) -> Score:
    """The scores of one value against quantiles at (k - 1/2)/m."""
    import scoringrules

    low80, high80, low95, high95 = central(quantiles, 0.8) + central(quantiles, 0.95)
    median = float(np.median(quantiles))
    spread = min(quantiles.std(), np.subtract(*np.quantile(quantiles, [0.75, 0.25])) / 1.34)
    width = max(1.06 * float(spread) * len(quantiles) ** -0.2, KERNEL)  # Silverman's rule
    slack = 1e-9
    with np.errstate(divide="ignore"):
        log_score = scoringrules.logs_ensemble(value, quantiles, bw=width, backend="numpy")
    return Score(
        *at,
        value,
        median,
        float(scoringrules.crps_ensemble(value, quantiles, backend="numpy")),
        min(float(log_score), WORST),
        bool(low80 - slack <= value <= high80 + slack),
        bool(low95 - slack <= value <= high95 + slack),
        high80 - low80,
        (median - value) / abs(value) if value else float("nan"),
        source,
        registered,
    )


def central(quantiles: np.ndarray, share: float) -> tuple[float, float]:
    """The central interval that holds this share, between the quantiles."""
    at = (np.arange(len(quantiles)) + 0.5) / len(quantiles)
    low, high = np.interp([0.5 - share / 2, 0.5 + share / 2], at, quantiles)
    return float(low), float(high)


def summary(scores: list[Score]) -> "pd.DataFrame":
    """One row per metric, task, level, distance and model, `all` where pooled: seeds scored,
    coverage of both intervals and the means of the other scores; `skill` is 1 - CRPS/CRPS(line).
    """
    import pandas as pd

    frame = pd.DataFrame([vars(s) for s in scores])
    frame["beyond"] = [_bin(d) for d in frame["distance"]]
    frame["miss"] = frame["error"].abs()
    frame["task"] = frame["task"] + "/" + frame["level"]
    parts = []
    for by in (["metric"], ["metric", "beyond"], ["metric", "task"]):
        part = frame.groupby([*by, "model"], sort=False).agg(
            n=("crps", "size"),
            in80=("in80", "mean"),
            in95=("in95", "mean"),
            crps=("crps", "mean"),
            log_score=("log_score", "mean"),
            width=("width", "mean"),
            error=("miss", "median"),
        )
        parts.append(part.reset_index())
    table = pd.concat(parts, ignore_index=True).fillna({"beyond": "all", "task": "all"})
    keys = ["metric", "task", "beyond"]
    line = table[table["model"] == "line"].set_index(keys)["crps"]
    against = line.reindex(pd.MultiIndex.from_frame(table[keys])).to_numpy()
    table["skill"] = 1 - table["crps"] / np.where(against > 0, against, np.nan)
    return table[
        [*keys, "model", "n", "in80", "in95", "crps", "skill", *("log_score", "width", "error")]
    ]


def _bin(distance: float) -> str:
    """The distance in words: `0.25 to 0.5`."""
    edges = (0.0, *DISTANCES)
    i = int(np.searchsorted(DISTANCES, distance - 1e-9))
    return f"over {edges[i]:g}" if np.isinf(edges[i + 1]) else f"{edges[i]:g} to {edges[i + 1]:g}"


def _part(whole: Target, rows: "pd.DataFrame", last: float) -> Target:
    """The target as it was seen when `last` was the largest size; the floor is that of then."""
    if whole.kind == "rate":
        group = rows[
            (rows["task"] == whole.task)
            & (rows["level"] == whole.level)
            & (rows["metric"] == whole.metric)
            & (np.log10(rows["params"]) <= last + 1e-9)
        ]
        return whole._replace(curve=onset.rate_curve(group, float(group["chance"].iloc[0])))
    curve, seen = whole.curve, whole.curve.x <= last
    return whole._replace(curve=Curve(curve.kind, curve.x[seen], curve.y[seen], curve.n[seen]))


def _last(curve: Curve, x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The mean of the last size, plus how seeds differed from the mean one size before."""
    changes = [
        curve.y[curve.x == size] - before
        for size, before in zip(curve.sizes[1:], curve.means[:-1], strict=True)
    ]
    return np.tile(curve.means[-1] + np.quantile(np.concatenate(changes), at), (len(x), 1))


def _line(curve: Curve, x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Least squares on log10 parameters with Student's prediction interval."""
    from scipy import stats

    middle, n = curve.x.mean(), len(curve.x)
    slope, level = np.polyfit(curve.x - middle, curve.y, 1)
    residual = curve.y - level - slope * (curve.x - middle)
    variance = (residual**2).sum() / max(n - 2, 1)
    spread = ((curve.x - middle) ** 2).sum()
    sd = np.sqrt(variance * (1 + 1 / n + (x - middle) ** 2 / spread))
    return (level + slope * (x - middle))[:, None] + sd[:, None] * stats.t.ppf(at, max(n - 2, 1))
