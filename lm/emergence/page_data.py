"""What a page or a figure is made of: the tables of a study, cut for one chart at a time.

A million measured values must fit on a page, so the browser gets every evaluation of a replica
once (step, tokens, FLOPs, text loss), and of each metric one value per evaluation in that order, in
four digits. What a chart needs is joined there. PNG figures are filled here.
"""

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from lm.emergence import page_charts, plots
from lm.emergence.page_facts import Share
from lm.emergence.words import STYLE, ability_order, si

MOST_VALUES = 1_500_000  # on a page; above that early evaluations are thinned
COMPACT = (206, 122)
BASELINES = ("copy", "lead")  # what a study of pairs measures as `copy_bleu` and so on


@dataclass(frozen=True)
class Content:
    """All that a page or a figure is made of; verdicts in the order they are shown, `folder` the
    name of the run directory.
    """

    analysis: dict[str, Any]
    study: dict[str, Any]
    cells: dict[str, dict[str, Any]]
    replicas: pd.DataFrame
    seeds: pd.DataFrame
    rungs: pd.DataFrame
    sizes: list[int]
    scores: list[dict[str, Any]]
    folder: str


def content(
    frame: pd.DataFrame,
    analysis: dict[str, Any],
    study: dict[str, Any],
    cells: dict[str, dict[str, Any]],
    folder: str,
) -> Content:
    """The tables behind the charts, made once."""
    seeds, rungs = plots.seed_table(frame), plots.rung_table(frame)
    order = {name: place for place, name in enumerate(STYLE)}

    def place(verdict: dict[str, Any]) -> tuple[Any, ...]:
        begins = verdict["onset_params"] or math.inf
        name = verdict["task"], verdict["level"]
        return (*ability_order(verdict["ability"]), order[verdict["verdict"]], begins, *name)

    analysis = analysis | {"verdicts": sorted(analysis["verdicts"], key=place)}
    columns = ["cell", "point", "replica", "role", "layers", "width", "params", "learning_rate"]
    columns += [f"seed_{axis}" for axis in ("init", "data", "dropout", "eval")]
    replicas = frame[columns].drop_duplicates(["point", "replica"])
    replicas = replicas.sort_values(["params", "point", "replica"], ignore_index=True)
    sizes = sorted(int(n) for n in replicas["params"].unique())
    found = scores(frame, rungs)
    return Content(analysis, study, cells, replicas, seeds, rungs, sizes, found, folder)


def scores(frame: pd.DataFrame, rungs: pd.DataFrame) -> list[dict[str, Any]]:
    """Each task, level and metric of `plots.SCORES` that has rungs, with a title and the baseline:
    the `chance` of its rows, or the metric of a copy or a lead that the study measured beside it.
    """
    measured = rungs.groupby(plots.KEYS, observed=True)["mean"].mean()
    made = []
    for task, level, metric in measured.index:
        if metric not in plots.SCORES:
            continue
        rows = _where(frame, {"task": task, "level": level, "metric": metric})
        baselines = {"baseline": float(rows["chance"].mean())} | {
            name: measured.get((task, level, f"{name}_{metric}"), math.nan) for name in BASELINES
        }
        where = f"{task} {level}".replace("_", " ")
        made.append(
            {
                **{"task": task, "level": level, "metric": metric},
                "title": f"{where}: {plots.SCORES[metric]}",
                "chance": [
                    {"value": value, "label": name}
                    for name, value in baselines.items()
                    if math.isfinite(value)
                ],
            }
        )
    order = list(plots.SCORES)
    return sorted(made, key=lambda s: (s["task"], s["level"], order.index(s["metric"])))


def figures(page: Content, share: Share = map) -> dict[str, bytes]:
    """PNG by name: every ability in exact match and its loss, every share, the text law."""
    templates, specs = plots.templates(), {}
    template = page_charts.closer(page.sizes)["share"]
    for verdict in page.analysis["verdicts"]:
        task, level = verdict["task"], verdict["level"]
        for metric in ("exact_match", "nll"):
            data = datasets(page, verdict, metric)
            if not data["seeds"]:
                continue
            title = f"{words(page, task, level)}: {plots.METRICS[metric]}"
            spec = plots.fill(templates["params"], title, **data)
            specs[f"{task}-{level}-{metric}"] = spec
        title = f"{words(page, task, level)}: share of seeds that broke through"
        specs[f"{task}-{level}-share"] = plots.fill(template, title, rungs=shares(verdict))
    for score in page.scores:
        name = "-".join(score[key] for key in ("task", "level", "metric"))
        specs[name] = _score(page, score, templates["params"])
    if page.analysis["scaling"]["alpha"] is not None:
        specs["text-law"] = law(page)
    return dict(zip(specs, share(plots.png, specs.values()), strict=True))


def datasets(page: Content, verdict: dict[str, Any], metric: str) -> dict[str, list[Any]]:
    """What fills a template against size for one ability and metric."""
    keys = {"task": verdict["task"], "level": verdict["level"], "metric": metric}
    seeds = _where(page.seeds, keys)
    return {
        "seeds": _records(seeds[seeds["final"]]),
        "rungs": _records(_where(page.rungs, keys)),
        "onset": _onset(verdict),
        "chance": [{"value": verdict["chance"], "label": "chance"}]
        if metric == "exact_match"
        else [],
        "limits": [{"value": v} for v in (0, 1)] if metric in plots.RATES else [],
    }


def _score(page: Content, score: dict[str, Any], template: dict[str, Any]) -> dict[str, Any]:
    keys = {key: score[key] for key in ("task", "level", "metric")}
    seeds = _where(page.seeds, keys)
    data = {"seeds": _records(seeds[seeds["final"]]), "rungs": _records(_where(page.rungs, keys))}
    return plots.fill(template, score["title"], **data, chance=score["chance"])


def law(page: Content) -> dict[str, Any]:
    """The text loss of every ladder seed against size, with the fitted law."""
    fit = page.analysis["scaling"]
    keys = {"task": "text", "level": "test", "metric": "nll"}
    seeds = _where(page.seeds, keys)
    sizes = _where(page.rungs, keys)["params"]
    low, high = math.log10(sizes.min()), math.log10(sizes.max())
    line = [10 ** (low + (high - low) * i / 60) for i in range(61)]
    fitted = [{"params": n, "fitted": fit["E"] + fit["A"] * n ** -fit["alpha"]} for n in line]
    data = {"seeds": _records(seeds[seeds["final"]]), "rungs": fitted}
    return plots.fill(plots.law_chart(), plots.LOSSES["text"], **data)


def shares(verdict: dict[str, Any]) -> list[dict[str, Any]]:
    """The rungs of an ability with the share that broke through, as the charts name it."""
    return [
        {
            **rung,
            "share": rung["through"] / rung["seeds"],
            "count": f"{rung['through']}/{rung['seeds']}",
        }
        for rung in verdict["rungs"]
    ]


def browser_data(page: Content) -> dict[str, Any]:
    """All that the page's script draws from."""
    evaluations, values = _values(page)
    width, height = COMPACT
    return {
        "compact": plots.templates(width, height, page.sizes, compact=True),
        "middle": plots.templates(320, 150, page.sizes, compact=True),
        "large": plots.templates(400, 250, page.sizes),
        "closer": page_charts.closer(page.sizes),
        "law": law(page) if page.analysis["scaling"]["alpha"] is not None else None,
        "metrics": plots.METRICS,
        "scores": page.scores,
        "losses": plots.LOSSES,
        "rates": plots.RATES,
        "tasks": {f"{v['task']}/{v['level']}": _task(page, v) for v in page.analysis["verdicts"]},
        "replicas": _columns(page.replicas),
        "evaluations": evaluations,
        "values": values,
        "rungs": _rungs(page),
        "attempts": {
            name: [_commit(entry) for entry in cell["environment"]]
            for name, cell in page.cells.items()
        },
        "folder": page.folder,
    }


def _task(page: Content, verdict: dict[str, Any]) -> dict[str, Any]:
    """What charts need of one ability beside its values."""
    task, level = verdict["task"], verdict["level"]
    survival = verdict["survival"] or {"sizes": [], "censored": [], "threshold": None}
    watched = [(size["watched"] or 0.0, *size["times"]) for size in survival["sizes"]]
    last = max((time for times in watched for time in times), default=1.0)
    first = min((t for size in survival["sizes"] for t in size["times"]), default=1.0) / 1.6
    curves = [row for size in survival["sizes"] for row in _steps(size, first, last)]
    level_of = {
        size["params"]: list(zip(size["times"], size["survival"], strict=True))
        for size in survival["sizes"]
    }
    censored = [
        {
            **c,
            "emerged": 1 - min((s for t, s in level_of[c["params"]] if t <= c["time"]), default=1),
        }
        for c in survival["censored"]
    ]
    return {
        **{"label": words(page, task, level), "chance": verdict["chance"]},
        **{"onset": _onset(verdict), "mark": survival["threshold"], "shares": shares(verdict)},
        **{"curves": curves, "censored": censored, "predictions": _predicted(page, verdict)},
    }


def _steps(size: dict[str, Any], first: float, last: float) -> list[dict[str, Any]]:
    """The curve 1 - S(t) of one size from `first` to `last`."""
    points = [(first, 1.0), *zip(size["times"], size["survival"], strict=True)]
    points.append((last, points[-1][1]))
    params = size["params"]
    return [{"params": params, "time": t, "emerged": 1 - s} for t, s in points if t > 0]


def _predicted(page: Content, verdict: dict[str, Any]) -> list[dict[str, Any]]:
    """The exact match that each frozen file predicted of this ability, and what came."""
    made = []
    for file in page.analysis["predictions"]["files"]:
        own = [
            p
            for p in file["predictions"]
            if (p["task"], p["level"]) == (verdict["task"], verdict["level"])
            and p["metric"] == "exact_match"
        ]
        bands = [
            {
                **{"params": p["params"], "median": p["median"]},
                **dict(zip(("low80", "high80"), p["i80"], strict=True)),
                **dict(zip(("low95", "high95"), p["i95"], strict=True)),
            }
            for p in own
        ]
        began = {t["params"]: bool(t["begun"]) for t in file["targets"]}
        late = {
            c["params"]: not c["registered"]
            for c in page.analysis["predictions"]["came"]
            if c["source"] == file["name"]
        }
        made.append(
            {
                "name": file["name"],
                "seen": file["sizes"],
                "bands": bands,
                "late": [n for n in began if late.get(n, began[n])],
            }
        )
    return [one for one in made if one["bands"]]


def _values(page: Content) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every evaluation once, and for TASK/LEVEL/METRIC its values in that order."""
    table = page.seeds
    steps = sorted(table["step"].unique())
    while len(table) > MOST_VALUES and len(steps) > 2:
        steps = steps[::2]
        table = table[table["step"].isin(steps) | table["final"]]
    about = ["step", "tokens", "flops", "text_loss", "attempt"]
    who = pd.MultiIndex.from_frame(page.replicas[["point", "replica"]])
    replica = who.get_indexer(pd.MultiIndex.from_frame(table[["point", "replica"]]))
    code = replica.astype(np.int64) * (int(table["step"].max()) + 1) + table["step"].to_numpy()
    unique, first, at = np.unique(code, return_index=True, return_inverse=True)
    evaluations = table.iloc[first][about].assign(replica=replica[first])
    found: dict[str, Any] = {}
    grids: dict[bytes, int] = {}  # metrics are measured at the same evaluations
    value, stderr = table["value"].to_numpy(), table["stderr"].to_numpy()
    final, count = table["final"].to_numpy(), table["n"].to_numpy()
    for key, rows in table.groupby(plots.KEYS, observed=True).indices.items():
        rows = rows[np.argsort(at[rows], kind="stable")]
        ends = rows[final[rows]]
        counts = count[ends].tolist()
        grid = at[rows].astype(np.int64)
        found["/".join(key)] = {
            **{"grid": grids.setdefault(grid.tobytes(), len(grids)), "v": _short(value[rows])},
            **{"last": at[ends].tolist(), "se": _short(stderr[ends], 2)},
            "n": counts if len(set(counts)) > 1 else counts[0],
        }
    made = _columns(evaluations)
    made["grids"] = [np.frombuffer(grid, np.int64).tolist() for grid in grids]
    return made, found


def _rungs(page: Content) -> dict[str, Any]:
    """Mean and interval of every size by TASK/LEVEL/METRIC."""
    return {
        "/".join(key): {
            name: [int(n) for n in group[name]] if name == "params" else _short(group[name])
            for name in ("params", "mean", "low", "high")
        }
        for key, group in page.rungs.groupby(plots.KEYS)
    }


def _short(values: Any, digits: int = 4) -> list[float | None]:
    """Values in so many significant digits; None for NaN and infinity."""
    found = np.asarray(values, np.float64)
    with np.errstate(all="ignore"):
        places = digits - 1 - np.floor(np.log10(np.abs(found)))
        # Multiplied and divided by an exact power of ten, so that JSON needs no more digits.
        scale = 10.0 ** np.abs(places)
        up, down = np.round(found * scale) / scale, np.round(found / scale) * scale
    short = np.where(found == 0, 0.0, np.where(places >= 0, up, down))
    finite = np.isfinite(short)
    if finite.all():
        return short.tolist()
    return [v if ok else None for v, ok in zip(short.tolist(), finite.tolist(), strict=True)]


def _columns(frame: pd.DataFrame) -> dict[str, Any]:
    """A frame as {column: values}; a text column as {"of": distinct values, "at": indices}."""
    made: dict[str, Any] = {}
    for name in frame:
        column = frame[name]
        if column.dtype == "float64":
            made[name] = _short(column, 6)
        elif column.dtype in ("int64", "bool"):
            made[name] = column.tolist()
        else:
            codes, values = pd.factorize(column.astype("str"))
            made[name] = {"of": list(values), "at": codes.tolist()}
    return made


def _commit(entry: dict[str, Any]) -> str:
    commit = entry.get("git_commit")
    return f"{commit}{' (changed)' if entry.get('git_dirty') else ''}" if commit else "unknown"


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON values; NaN is None."""
    return json.loads(frame.to_json(orient="records", double_precision=10))


def _where(frame: pd.DataFrame, keys: dict[str, str]) -> pd.DataFrame:
    mask = np.logical_and.reduce(
        [(frame[name] == value).to_numpy() for name, value in keys.items()]
    )
    return frame[mask]


def _onset(verdict: dict[str, Any]) -> list[dict[str, Any]]:
    if verdict["onset_params"] is None:
        return []
    at = verdict["onset_params"]
    low, high = verdict["ci95"] or (at, at)
    return [{"low": low, "high": high, "onset": at, "label": f"begins at {si(at)}"}]


def words(page: Content, task: str, level: str) -> str:
    """The task in words, with its level where it has several."""
    several = len({v["level"] for v in page.analysis["verdicts"] if v["task"] == task}) > 1
    words = task.replace("_", " ")
    return f"{words} {level}" if several else words
