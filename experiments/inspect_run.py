"""`lm status`, `lm explain` and `lm verify`: what a run directory says about itself.

All three read files and nothing else: they work while the study runs, after it was killed, and on a
copy elsewhere. None of them imports JAX.
"""

import argparse
import hashlib
import json
import socket
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

from experiments.exits import QUIET
from lm.config import UserError, nearest
from lm.emergence import predict, table
from lm.rundir import MANIFEST, check_manifest, holder, read_json, read_lines, sha256

JSON_FILES = ("config.json", "environment.json", "progress.json", "result.json")
# Events that a person should see; the rest is routine.
NOTEWORTHY = (
    *("resume", "interrupted", "checkpoint_quarantined", "not_bit_exact"),
    *("diverged", "rows_damaged", "replay_mismatch", "failed"),
)
STATUS = (
    *("cell", "state", "points", "replicas", "step", "loss", "seconds", "attempts", "noteworthy"),
)
FIGURES = ("step", "loss", "seconds", "attempts")
SEEDS = ("seed_init", "seed_data", "seed_dropout", "seed_eval")


def status(argv: list[str]) -> int:
    """`lm status DIR [--json]`: every cell and how far it is."""
    parser = _parser("status", "Shows every cell of a run directory and how far it is.")
    args = parser.parse_args(argv)
    workdir, study = open_study(args.dir)
    cells = [cell_status(workdir / name, points) for name, points in study["cells"].items()]
    owner = holder(workdir / "lock")
    if args.json:
        print(
            json.dumps(
                {
                    "study": study["name"],
                    "held_by": owner,
                    "goodput": goodput(cells),
                    "cells": cells,
                }
            )
        )
    else:
        _print_status(study["name"], owner, cells)
    return 0


def explain(argv: list[str]) -> int:
    """`lm explain DIR POINT [--json]`: everything behind one point."""
    parser = _parser("explain", "Shows everything behind one point of a study.", " 2x16")
    parser.add_argument("point", help="the name of a point; `lm status DIR` lists them")
    args = parser.parse_args(argv)
    workdir, study = open_study(args.dir)
    found = explain_point(workdir, study, args.point)
    if args.json:
        print(json.dumps(found))
    else:
        _print_tree(found)
    return 0


def verify(argv: list[str]) -> int:
    """`lm verify DIR [--json]`: checks every checksum; exit code 1 if one fails."""
    parser = _parser("verify", "Checks every checksum of a run directory.")
    args = parser.parse_args(argv)
    workdir, study = open_study(args.dir)
    result = verify_study(workdir, study)
    if args.json:
        print(json.dumps(result))
    else:
        for problem in result["problems"]:
            print(problem)
        verdict = "all checksums hold" if result["ok"] else f"problems: {len(result['problems'])}"
        print(f"{workdir}: {result['cells']} cells, {verdict}")
        print(f"table {result['table_sha256']}")
        for cell, digest in result["params_sha256"].items():
            print(f"parameters of {cell} {digest or '(not done)'}")
    return 0 if result["ok"] else 1


def open_study(folder: str | Path) -> tuple[Path, dict[str, Any]]:
    """The workdir and its `study.json`; raises `UserError` if it is not the workdir of a study."""
    workdir = Path(folder)
    path = workdir / "study.json"
    if not path.is_file():
        what = "has no study.json" if workdir.is_dir() else "is not a folder"
        raise UserError(f"{workdir} {what}; give the --workdir of an `lm run`")
    study = read_json(path)
    if not isinstance(study, dict) or not {"name", "points", "cells"} <= study.keys():
        raise UserError(f"{path} is damaged (no name, points or cells); restore it")
    return workdir, study


def cell_status(cell: Path, points: list[str]) -> dict[str, Any]:
    """State, owner, progress and events of one cell, from its files."""
    events, _ = read_lines(cell / "events.jsonl")
    progress = _read_or(cell / "progress.json", {})
    result = _read_or(cell / "result.json", None)
    owner = holder(cell / "lock")
    replicas = result["replicas"] if result else []
    planned = _read_or(cell / "config.json", {}).get("replicas", [])
    # A replayed dispatch tells of a divergence again.
    lost = {(e["point"], e["replica"]) for e in events if e["event"] == "diverged"}
    kept = result["seconds"] if result else {}
    useful = kept["train"] + kept["eval"] if kept else progress.get("useful", 0.0)
    return {
        "cell": cell.name,
        "state": _state(result, owner, events, progress),
        "held_by": owner,
        "points": points,
        "replicas": len(replicas or planned) or None,
        "diverged": sum(r["status"] == "diverged" for r in replicas) if replicas else len(lost),
        "step": progress.get("step"),
        "steps": progress.get("steps"),
        "loss": progress.get("loss"),
        "seconds": result["seconds"]["total"] if result else progress.get("seconds"),
        "attempts": sum(event["event"] == "begin" for event in events),
        "useful": useful,
        "wall": _wall(events),
        "events": dict(Counter(event["event"] for event in events)),
    }


def goodput(cells: list[dict[str, Any]]) -> float | None:
    """Seconds of steps and evaluations that count, of those from the first attempt at each cell to
    its end, or to the last it told; None before there is anything to tell.

    What was trained twice, compiled, restored or waited for does not count, and neither does a
    night for which the study was stopped.
    """
    wall = sum(cell["wall"] for cell in cells)
    return sum(cell["useful"] for cell in cells) / wall if wall else None


def _wall(events: list[dict[str, Any]]) -> float:
    """Seconds from the first event that has a time to the last."""
    times = [event["time"] for event in events if "time" in event]
    if len(times) < 2:
        return 0.0
    first, last = (datetime.fromisoformat(time) for time in (times[0], times[-1]))
    return max(0.0, (last - first).total_seconds())  # a clock may be put back


def explain_point(workdir: Path, study: dict[str, Any], name: str) -> dict[str, Any]:
    """Settings, seeds, versions, commit, seconds and chance behind one point."""
    points = {point["name"]: point for point in study["points"]}
    if name not in points:
        raise UserError(f"{name!r} is not a point of {workdir}; {nearest(name, list(points))}")
    cell = next((cell for cell, members in study["cells"].items() if name in members), None)
    if cell is None:
        raise UserError(f"{workdir / 'study.json'} is damaged (no cell has {name}); restore it")
    rows, _ = read_lines(workdir / cell / "rows.jsonl")
    rows = [row for row in rows if row["point"] == name]
    result = _read_or(workdir / cell / "result.json", {})
    return {
        "study": study["name"],
        "point": name,
        "about": points[name],
        "cell": cell,
        "settings": _read_or(workdir / cell / "config.json", {}),
        "size": {key: rows[0][key] for key in ("layers", "width", "params")} if rows else {},
        "replicas": _replicas(rows, result, name),
        "attempts": _read_or(workdir / cell / "environment.json", []),
        "seconds": result.get("seconds", {}),
        "chance": _chance(rows),
    }


def verify_study(workdir: Path, study: dict[str, Any]) -> dict[str, Any]:
    """Checks lines, manifests and stored answers of a whole run directory."""
    problems = _check_data(workdir / "data")
    hashes: dict[str, str | None] = {}
    for name in study["cells"]:
        found, hashes[name] = _check_cell(workdir / name)
        problems += found
    problems += predict.frozen(workdir)[1]
    digest = None
    try:
        # These name the damaged lines of the rows and every replay with other bits.
        problems += table.problems(workdir)
        digest = table.table_sha256(table.load(workdir))
    except (ValueError, KeyError, TypeError) as error:
        problems.append(f"the table of {workdir} cannot be read: {error}")
    return {
        "ok": not problems,
        "cells": len(study["cells"]),
        "table_sha256": digest,
        "params_sha256": hashes,
        "problems": problems,
    }


def _check_data(data: Path) -> list[str]:
    if not data.is_dir():
        return []  # a dry run, or a study that was stopped before its data was made
    problems = []
    for manifest in sorted(data.rglob(MANIFEST)):
        problems += _check_json(manifest) or check_manifest(manifest.parent, read_json(manifest))
    for folder in sorted({path.parent for path in data.rglob("*.npy")}):
        if not (folder / MANIFEST).is_file():
            problems.append(f"{folder / MANIFEST} is missing")
    for path in sorted(data.rglob("tokenizer.json")):
        model = path.with_name("tokenizer.model")
        if not model.is_file() or sha256(model) != _read_or(path, {}).get("sha256"):
            problems.append(f"{model} is not the one of {path.name}")
    return problems


def _check_cell(cell: Path) -> tuple[list[str], str | None]:
    """The problems of a cell, and the combined hash of its final parameters (None if not done)."""
    events, problems = read_lines(cell / "events.jsonl")
    problems += [p for name in JSON_FILES for p in _check_json(cell / name)]
    for path in sorted(cell.glob("checkpoints/*.manifest.json")):
        folder = path.with_name(path.name.removesuffix(".manifest.json"))
        problems += _check_json(path) or check_manifest(folder, read_json(path))
    problems += _check_named(cell, events)
    result = _read_or(cell / "result.json", None)
    return problems, _params_sha256(result) if result else None


def _check_named(cell: Path, events: list[dict[str, Any]]) -> list[str]:
    """A sentence for every file whose latest event gives another SHA-256 than it has."""
    latest = {event["file"]: event for event in events if "file" in event and "sha256" in event}
    problems = []
    for name, event in latest.items():
        path = cell / name
        if path.is_file() and sha256(path) != event["sha256"]:
            problems.append(f"{path} has changed: its SHA-256 is not the one in the events")
        # The result is announced before it is written, so a kill in between leaves it out.
        elif not path.is_file() and event["event"] == "answers":
            problems.append(f"{path} is missing")
    return problems


def _check_json(path: Path) -> list[str]:
    """A sentence if the file is there and not JSON."""
    try:
        if path.is_file():
            read_json(path)
    except UserError as error:
        return [str(error)]
    return []


def _params_sha256(result: dict[str, Any]) -> str:
    """SHA-256 over point, replica and parameter hash of every replica, in order."""
    ordered = sorted(result["replicas"], key=lambda replica: (replica["point"], replica["replica"]))
    lines = [f"{r['point']}/{r['replica']} {r['params_sha256']}\n" for r in ordered]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _state(
    result: Any, owner: dict[str, Any] | None, events: list[Any], progress: dict[str, Any]
) -> str:
    if result:
        return "done"
    if owner:
        return "running"
    if events and events[-1]["event"] == "failed" and events[-1].get("kind") not in QUIET:
        return "failed"
    return "stopped" if progress or events else "waiting"


def _replicas(rows: list[Any], result: dict[str, Any], point: str) -> list[dict[str, Any]]:
    """Seeds and learning rate of each replica from its rows, its outcome from the result."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        keys = ("replica", *SEEDS, "learning_rate")
        found.setdefault(row["replica"], {key: row[key] for key in keys})
    for outcome in result.get("replicas", []):
        if outcome["point"] == point:
            found.setdefault(outcome["replica"], {}).update(outcome)
    return [found[replica] for replica in sorted(found)]


def _chance(rows: list[Any]) -> dict[str, float]:
    """The computed chance of every task and level, from the rows of exact match."""
    scored = [r for r in rows if r["metric"] == "exact_match" and r["chance"] is not None]
    return {f"{r['task']}.{r['level']}": r["chance"] for r in scored if r["format"] == 0}


def _read_or(path: Path, default: Any) -> Any:
    """The JSON at `path`, or `default` where it is not there or damaged (`verify` says that)."""
    try:
        return read_json(path)
    except (FileNotFoundError, UserError):
        return default


def _parser(verb: str, description: str, more: str = "") -> argparse.ArgumentParser:
    example = f"example: lm {verb} runs/desk{more} --json"
    parser = argparse.ArgumentParser(f"lm {verb}", description=description, epilog=example)
    parser.add_argument("dir", help="the --workdir of an `lm run`")
    parser.add_argument("--json", action="store_true", help="one JSON object, for machines")
    return parser


def _print_status(name: str, owner: dict[str, Any] | None, cells: list[dict[str, Any]]) -> None:
    from rich.console import Console

    from experiments.display import print_columns

    runner = f"held by pid {owner['pid']} on {owner['host']}" if owner else "no runner"
    done = sum(cell["state"] == "done" for cell in cells)
    attempts, share = sum(cell["attempts"] for cell in cells), goodput(cells)
    console = Console()
    console.print(
        f"{name}: {runner}; {done} of {len(cells)} cells done"
        + (f"; {attempts} attempts, goodput {share:.2f}" if share is not None else ""),
        highlight=False,
        soft_wrap=True,
    )
    rows = []
    for cell in cells:
        held, counts = cell["held_by"], cell["events"]
        there = "" if not held or held["host"] == socket.gethostname() else f" on {held['host']}"
        rows.append(
            (
                cell["cell"],
                f"running (pid {held['pid']}{there})" if held else cell["state"],
                " ".join(cell["points"]) if cell["points"] != [cell["cell"]] else "",
                _show(cell["replicas"], "d")
                + (f", {cell['diverged']} diverged" * bool(cell["diverged"])),
                "" if cell["step"] is None else f"{cell['step']}/{cell['steps']}",
                _show(cell["loss"], ".4f"),
                _show(cell["seconds"], ".1f"),
                _show(cell["attempts"] or None, "d"),
                ", ".join(f"{counts[e]} {_words(e)}" for e in NOTEWORTHY if e in counts),
            )
        )
    left = [heading for heading in STATUS if heading not in FIGURES]
    print_columns(console, STATUS, rows, left)


def _words(event: str) -> str:
    return event.removeprefix("checkpoint_").replace("_", " ")


def _show(value: Any, form: str) -> str:
    return "" if value is None else format(value, form)


def _print_tree(value: Any, indent: int = 0) -> None:
    """Nested mappings and lists, one value a line."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        if isinstance(item, dict) or (isinstance(item, list) and any(map(_nested, item))):
            print(f"{'  ' * indent}{key}:")
            _print_tree(item, indent + 1)
        else:
            print(f"{'  ' * indent}{key}: {item if item != '' else '(empty)'}")


def _nested(value: Any) -> bool:
    return isinstance(value, dict | list)
