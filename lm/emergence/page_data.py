"""What a page or a figure is made of: the tables of a study, cut for one chart at a time.

The browser gets the tables in columns, since most of a row repeats the row before, and the chart
templates of `plots`; PNG figures are filled here.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import pandas as pd

from lm.emergence import plots
from lm.emergence.words import STYLE, si


@dataclass(frozen=True)
class Content:
    """All that a page or a figure is made of; verdicts in the order they are shown."""

    analysis: dict[str, Any]
    study: dict[str, Any]
    cells: dict[str, dict[str, Any]]
    frame: pd.DataFrame
    seeds: pd.DataFrame
    rungs: pd.DataFrame


def content(
    frame: pd.DataFrame,
    analysis: dict[str, Any],
    study: dict[str, Any],
    cells: dict[str, dict[str, Any]],
) -> Content:
    """The tables behind the charts, made once."""
    seeds, rungs = plots.seed_table(frame), plots.rung_table(frame)
    order = {name: place for place, name in enumerate(STYLE)}
    found = sorted(analysis["verdicts"], key=lambda v: order[v["verdict"]])
    analysis = analysis | {"verdicts": found}
    return Content(analysis, study, cells, frame, seeds, rungs)


def figures(page: Content) -> dict[str, bytes]:
    """PNG by name: every ability in exact match and its loss, every share, the text law."""
    templates, made = plots.templates(), {}
    for verdict in page.analysis["verdicts"]:
        task, level = verdict["task"], verdict["level"]
        for metric in ("exact_match", "nll"):
            data = datasets(page, task, level, metric)
            if not data["seeds"]:
                continue
            title = f"{words(page, task, level)}: {plots.METRICS[metric]}"
            spec = plots.fill(templates["params"], title, **data)
            made[f"{task}-{level}-{metric}"] = plots.png(spec)
        title = f"{words(page, task, level)}: share of seeds that broke through"
        made[f"{task}-{level}-share"] = plots.png(
            plots.fill(plots.share_chart(), title, rungs=shares(page, task, level))
        )
    if page.analysis["scaling"]["alpha"] is not None:
        made["text-law"] = plots.png(law(page))
    return made


def datasets(page: Content, task: str, level: str, metric: str) -> dict[str, list[dict[str, Any]]]:
    """What fills a template for one task, level and metric."""
    keys = {"task": task, "level": level, "metric": metric}
    verdict = next((v for v in page.analysis["verdicts"] if _is(v, task, level)), None)
    return {
        "seeds": _records(_where(page.seeds, keys)),
        "rungs": _records(_where(page.rungs, keys)),
        "onset": _onset(verdict),
        "chance": [{"value": verdict["chance"]}] if verdict and metric == "exact_match" else [],
        "limits": [{"value": v} for v in (0, 1)] if metric in plots.RATES else [],
    }


def law(page: Content) -> dict[str, Any]:
    """The text loss of every ladder seed against size, with the fitted law."""
    fit = page.analysis["scaling"]
    data = datasets(page, "text", "test", "nll")
    sizes = [row["params"] for row in data["rungs"]]
    low, high = math.log10(min(sizes)), math.log10(max(sizes))
    line = [10 ** (low + (high - low) * i / 60) for i in range(61)]
    data["rungs"] = [
        {"params": n, "fitted": fit["E"] + fit["A"] * n ** -fit["alpha"]} for n in line
    ]
    return plots.fill(plots.law_chart(), plots.LOSSES["text"], **data)


def browser_data(page: Content) -> dict[str, Any]:
    drawn = page.seeds[page.seeds["metric"].isin([*plots.METRICS, "loss"])]
    return {
        "templates": plots.templates(),
        "law": law(page) if page.analysis["scaling"]["alpha"] is not None else None,
        "metrics": plots.METRICS,
        "titles": plots.LOSSES,
        "rates": plots.RATES,
        "onsets": [
            {
                **{"task": v["task"], "level": v["level"], "chance": v["chance"]},
                **{"label": words(page, v["task"], v["level"]), "onset": _onset(v)},
            }
            for v in page.analysis["verdicts"]
        ],
        "seeds": _columns(drawn),
        "rungs": _columns(page.rungs),
    }


def _columns(frame: pd.DataFrame) -> dict[str, Any]:
    """A frame as {column: values}; a text column as {"of": distinct values, "at": indices}."""
    made: dict[str, Any] = {}
    for name in frame:
        column = frame[name]
        if column.dtype == "float64":
            made[name] = [float(f"{v:.6g}") if math.isfinite(v) else None for v in column]
        elif column.dtype in ("int64", "bool"):
            made[name] = column.tolist()
        else:
            codes, values = pd.factorize(column)
            made[name] = {"of": list(values), "at": codes.tolist()}
    return made


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON values; NaN is None."""
    return json.loads(frame.to_json(orient="records", double_precision=10))


def _where(frame: pd.DataFrame, keys: dict[str, str]) -> pd.DataFrame:
    mask = pd.Series(True, index=frame.index)
    for name, value in keys.items():
        mask &= frame[name] == value
    return frame[mask]


def shares(page: Content, task: str, level: str) -> list[dict[str, Any]]:
    rungs = _where(page.rungs, {"task": task, "level": level, "metric": "exact_match"})
    share = rungs["through"] / rungs["seeds"]
    label = [f"{a}/{b}" for a, b in zip(rungs["through"], rungs["seeds"], strict=True)]
    return _records(rungs.assign(share=share, label=label))


def _onset(verdict: dict[str, Any] | None) -> list[dict[str, Any]]:
    if not verdict or verdict["onset_params"] is None:
        return []
    at = verdict["onset_params"]
    low, high = verdict["ci95"] or (at, at)
    return [{"low": low, "high": high, "onset": at, "label": f"begins at {si(at)}"}]


def words(page: Content, task: str, level: str) -> str:
    """The task in words, with its level where it has several."""
    several = len({v["level"] for v in page.analysis["verdicts"] if v["task"] == task}) > 1
    words = task.replace("_", " ")
    return f"{words} {level}" if several else words


def _is(verdict: dict[str, Any], task: str, level: str) -> bool:
    return (verdict["task"], verdict["level"]) == (task, level)
