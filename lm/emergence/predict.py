"""`lm predict DIR`: predictions of larger sizes, frozen before they are run and scored afterwards.

`freeze` predicts, from the finished replicas up to a size, what a new seed of every larger size of
the study will measure, and writes it to DIR/predictions/UP_TO-HASH.json: quantiles of
`lm.emergence.forecast` and of two naive baselines, the hash of the rows used, the code's version
and commit, the time, and which targets had begun. HASH is the start of the SHA-256 of that content
in canonical JSON, which also stands in the file; it is never written again, and a file that was
changed is named and not scored. A target whose training began before the prediction is *post hoc*:
scored, but never counted as pre-registered.
"""

import argparse
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from lm.config import UserError, nearest
from lm.emergence import table
from lm.rundir import AnyPath, environment, now, read_json, write_json

if TYPE_CHECKING:
    import pandas as pd

    from lm.emergence.predict_score import Score

FOLDER = "predictions"
KEPT = 12  # hex digits of the hash in a file's name
EXAMPLE = """examples:
  lm predict runs/desk --up_to=2x16                 freeze predictions of every larger size
  lm predict runs/desk --up_to=6e3 --sizes=1e5,1e6  and of sizes that are not in the study
  lm predict runs/desk                              score what was frozen
  lm predict runs/desk --backtest                   predict the rest from every part"""


class Frozen(NamedTuple):
    """A file of predictions whose hash holds."""

    path: Path
    content: dict[str, Any]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `lm predict --help` shows what there is")


def main(argv: list[str]) -> int:
    """The verb `predict`."""
    parser = _Parser(
        "lm predict",
        description="Predicts larger sizes from smaller ones, and scores what was predicted.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dir", help="the run directory of a study")
    parser.add_argument("--up_to", metavar="SIZE", help="the largest size used: 2x16, or 6e3")
    parser.add_argument("--sizes", default="", help="further sizes to predict, such as 1e5,1e6")
    parser.add_argument("--task", help="only this one: TASK or TASK/LEVEL")
    parser.add_argument("--backtest", action="store_true", help="score every cut of the ladder")
    parser.add_argument("--json", action="store_true", help="one JSON object, for machines")
    args = parser.parse_args(argv)
    if args.up_to is None and (args.sizes or not (args.backtest or _begun(args.dir))):
        raise UserError("--up_to is missing; say which sizes to predict from, such as --up_to=2x16")
    if args.up_to is not None and args.backtest:
        raise UserError("--up_to and --backtest exclude each other; a back-test takes every cut")
    if args.backtest:
        return _show_backtest(args.dir, args.task, args.json)
    if args.up_to is None:
        return _show_scores(args.dir, args.task, args.json)
    sizes = [size for size in args.sizes.split(",") if size]
    path, new = freeze(args.dir, args.up_to, args.task, sizes)
    content = read_json(path)["content"]
    if args.json:
        print(json.dumps({"path": str(path), "new": new, **content}))
    else:
        _print_frozen(content, path, new)
    return 0


def freeze(
    workdir: AnyPath, up_to: str, task: str | None = None, sizes: Sequence[str] = ()
) -> tuple[Path, bool]:
    """Predicts every larger size and writes the file; returns its path and whether it is new.

    The same prediction from the same rows is not written twice: the earlier one counts. Raises
    `UserError` if too few sizes are finished, or no size is larger.
    """
    from lm.emergence import forecast, predict_score

    workdir = Path(workdir)
    study = _study(workdir)
    limit = size_of(up_to, study)
    frame = finished(workdir)
    rows = predict_score.final(frame[frame["params"] <= limit])
    rows = rows[rows["metric"].isin(("exact_match", "nll"))]
    rows = _only(rows, task, workdir)
    seen = sorted(rows["params"].unique().tolist())
    if len(seen) < forecast.LEAST_SIZES:
        raise UserError(
            f"{len(seen)} sizes up to {up_to} are finished in {workdir}; a prediction needs"
            f" {forecast.LEAST_SIZES}"
        )
    goals = _goals(workdir, study, limit, [size_of(size, study) for size in sizes])
    if not goals:
        raise UserError(
            f"no size of {workdir} is larger than {up_to} ({limit:g} parameters); lower --up_to"
            " or give --sizes"
        )
    about = {
        "study": study["name"],
        "fingerprint": study.get("fingerprint"),
        "up_to": {"given": up_to, "params": limit},
        "task": task,
        "rows": len(rows),
        "rows_sha256": table.table_sha256(rows),
        "sizes": seen,
        "version": importlib.metadata.version("onset-lm"),
        **{key: environment()[key] for key in ("git_commit", "git_dirty")},
        "source_sha256": _source(),
    }
    for earlier in frozen(workdir)[0]:
        same = all(earlier.content.get(key) == value for key, value in about.items())
        if same and [g["params"] for g in earlier.content["targets"]] == [
            g["params"] for g in goals
        ]:
            return earlier.path, False
    x = np.log10([goal["params"] for goal in goals])
    found = []
    for target in predict_score.targets(rows):
        models = predict_score.predict(target, x)
        for i, goal in enumerate(goals):
            found.append(_entry(target, goal["params"], {m: q[i] for m, q in models.items()}))
    if not found:
        raise UserError(f"no task has {forecast.LEAST_SIZES} finished sizes up to {up_to}")
    content = {**about, "time": now(), "targets": goals, "predictions": found}
    digest = sha256(content)
    path = workdir / FOLDER / f"{_safe(up_to)}-{digest[:KEPT]}.json"
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"sha256": digest, "content": content})
    return path, True


def frozen(workdir: AnyPath) -> tuple[list[Frozen], list[str]]:
    """Every file of predictions, oldest first, and a sentence for each whose hash fails."""
    found, problems = [], []
    for path in sorted((Path(workdir) / FOLDER).glob("*.json")):
        try:
            file = read_json(path)
            holds = file["sha256"] == sha256(file["content"])
            if holds and path.stem.endswith(file["sha256"][:KEPT]):
                found.append(Frozen(path, file["content"]))
                continue
        except (UserError, KeyError, TypeError, AttributeError):
            pass
        problems.append(f"{path} has changed since it was written; it is not scored")
    return sorted(found, key=lambda f: f.content["time"]), problems


def score(workdir: AnyPath, rows: "pd.DataFrame | None" = None) -> tuple[list["Score"], list[str]]:
    """Every finished seed of a predicted size against every frozen prediction of it, and the
    sentences of `frozen`. `source` is the file's name; `registered` says that the target's training
    began after the prediction. `rows` are those of `finished`, where they are at hand.
    """
    from lm.emergence import predict_score

    workdir = Path(workdir)
    files, problems = frozen(workdir)
    rows = predict_score.final(finished(workdir) if rows is None else rows)
    begun = {cell.name: _first_attempt(cell) for cell in table.cells(workdir)}
    found = []
    for file in files:
        last = max(file.content["sizes"])
        targets = {goal["params"]: goal for goal in file.content["targets"]}
        for entry in file.content["predictions"]:
            keys = ("task", "level", "metric", "params")
            match = rows[np.logical_and.reduce([rows[key] == entry[key] for key in keys])]
            for cell, value in zip(match["cell"], match["value"], strict=True):
                before = cell in targets[entry["params"]]["begun"]
                late = before or begun.get(cell, "") <= file.content["time"]
                for model, quantiles in entry["quantiles"].items():
                    distance = float(np.log10(entry["params"] / last))
                    at = (entry["task"], entry["level"], entry["metric"], model, entry["params"])
                    found.append(
                        predict_score.score_one(
                            (*at, distance), np.array(quantiles), value, file.path.name, not late
                        )
                    )
    return found, problems


def finished(workdir: AnyPath) -> "pd.DataFrame":
    """The rows of the cells that have a result."""
    frame = table.load(workdir)
    done = [cell.name for cell in table.cells(workdir) if (cell / "result.json").exists()]
    return frame[frame["cell"].isin(done)]


def size_of(text: str, study: Mapping[str, Any]) -> float:
    """The non-embedding parameters that a size stands for: the name of a point, or a number."""
    points = {point["name"]: float(point["params"]) for point in study["points"]}
    shapes = {f"{p['layers']}x{p['width']}": float(p["params"]) for p in study["points"]}
    if text in points or text in shapes:
        return points.get(text, shapes.get(text, 0.0))
    try:
        value = float(text)
    except ValueError:
        raise UserError(
            f"{text!r} is no size of study {study['name']}; {nearest(text, list(points))}, or give"
            " its non-embedding parameters, such as 6e3"
        ) from None
    if not 0 < value < float("inf"):
        raise UserError(f"the size {text} must be a positive number of parameters")
    return value


def sha256(content: Any) -> str:
    """The hex SHA-256 of the canonical JSON of `content`: sorted keys, no spaces."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _entry(target: Any, params: float, models: Mapping[str, np.ndarray]) -> dict[str, Any]:
    from lm.emergence.predict_score import central

    own = models["onset"]
    return {
        **{"task": target.task, "level": target.level, "metric": target.metric},
        **{"params": params, "median": float(np.median(own))},
        **{"i80": list(central(own, 0.8)), "i95": list(central(own, 0.95))},
        "quantiles": {model: np.round(q, 9).tolist() for model, q in models.items()},
    }


def _goals(
    workdir: Path, study: Mapping[str, Any], limit: float, more: Sequence[float]
) -> list[dict[str, Any]]:
    """The sizes to predict: parameters, the points that have them, and their cells that begun."""
    cells = {point: cell for cell, points in study["cells"].items() for point in points}
    sizes: dict[float, list[str]] = {size: [] for size in more}
    for point in study["points"]:
        if point.get("role", "ladder") == "ladder":
            sizes.setdefault(float(point["params"]), []).append(point["name"])
    goals = []
    for params in sorted(size for size in sizes if size > limit):
        names = sorted({cells[point] for point in sizes[params] if point in cells})
        begun = [name for name in names if (workdir / name / "rows.jsonl").exists()]
        goals.append({"params": params, "points": sizes[params], "begun": begun})
    return goals


def _only(rows: "pd.DataFrame", task: str | None, workdir: Path) -> "pd.DataFrame":
    if task is None:
        return rows
    name, _, level = task.partition("/")
    chosen = rows[(rows["task"] == name) & ((rows["level"] == level) | (not level))]
    if chosen.empty:
        known = (rows["task"] + "/" + rows["level"]).drop_duplicates().tolist()
        raise UserError(f"no task {task!r} is finished in {workdir}; {nearest(task, known)}")
    return chosen


def _study(workdir: Path) -> dict[str, Any]:
    try:
        return read_json(workdir / "study.json")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{workdir} has no study.json; give the workdir of a study") from None


def _first_attempt(cell: Path) -> str:
    """When a cell began to train; empty if that is not known, which is before everything."""
    try:
        return str(read_json(cell / "environment.json")[0]["time"])
    except (OSError, UserError, LookupError, TypeError):
        return ""


def _begun(workdir: AnyPath) -> bool:
    """Whether anything was predicted; `UserError` if `workdir` is not that of a study."""
    _study(Path(workdir))
    return any((Path(workdir) / FOLDER).glob("*.json"))


def _source() -> str:
    """The hash of the files that a prediction is computed by."""
    names = (
        *("fits.py", "forecast.py", "locate.py", "onset.py"),
        *("predict.py", "predict_score.py", "shapes.py"),
    )
    content = b"".join((Path(__file__).parent / name).read_bytes() for name in names)
    return hashlib.sha256(content).hexdigest()


def _safe(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_.+" else "_" for c in text)[:40]


def _print_frozen(content: Mapping[str, Any], path: Path, new: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    from lm.emergence.words import si

    grid = Table("task", "metric", "size", "median", "80%", "95%", box=None)
    for p in content["predictions"]:
        ends = [f"{low:.3g} to {high:.3g}" for low, high in (p["i80"], p["i95"])]
        task = f"{p['task']}/{p['level']}"
        grid.add_row(task, p["metric"], si(p["params"]), f"{p['median']:.3g}", *ends)
    Console(width=100).print(grid)
    for goal in content["targets"]:
        if goal["begun"]:
            print(f"post hoc: {si(goal['params'])}, {', '.join(goal['begun'])} had begun")
    print(f"{'frozen' if new else 'frozen before, unchanged'}: {path}")


def _show_scores(workdir: AnyPath, task: str | None, as_json: bool) -> int:
    """Prints the scores; 1 if a file of predictions was changed."""
    scores, problems = score(workdir)
    if task is not None:
        scores = [s for s in scores if task in (s.task, f"{s.task}/{s.level}")]
    registered = [s for s in scores if s.registered]
    late = [s for s in scores if not s.registered]
    if as_json:
        parts = {"registered": _records(registered), "post_hoc": _records(late)}
        print(json.dumps({**parts, "problems": problems}))
    else:
        for title, part in (("pre-registered", registered), ("post hoc", late)):
            if part:
                _print_summary(title, part)
        if not scores:
            print("nothing that was predicted has finished yet")
        print(*problems, sep="\n", end="\n" * bool(problems))
    return 1 if problems else 0


def _show_backtest(workdir: AnyPath, task: str | None, as_json: bool) -> int:
    from lm.emergence import predict_score

    _study(Path(workdir))
    rows = _only(finished(workdir), task, Path(workdir))
    scores = predict_score.backtest(rows)
    if as_json:
        print(json.dumps({"backtest": _records(scores)}))
    else:
        _print_summary("back-test", scores)
    return 0


def _records(scores: list["Score"]) -> list[dict[str, Any]]:
    """The rows of `predict_score.summary`, NaN as None."""
    from lm.emergence import predict_score

    if not scores:
        return []
    rows = predict_score.summary(scores).to_dict("records")
    return [{k: None if v != v else v for k, v in row.items()} for row in rows]


def _print_summary(title: str, scores: list["Score"]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ("metric", "task", "decades", "model", "seeds", "in 80%", "in 95%", "CRPS", "skill")
    grid = Table(*columns, box=None, title=title, title_justify="left")
    for row in _records(scores):
        numbers = [f"{row[key]:.0%}" for key in ("in80", "in95")]
        skill = "–" if row["skill"] is None else f"{row['skill']:+.2f}"
        names = (row["metric"], row["task"], row["beyond"], row["model"], str(row["n"]))
        grid.add_row(*names, *numbers, f"{row['crps']:.4f}", skill)
    Console(width=100).print(grid)
