"""The report of a study: verdicts, scaling law and one page that needs nothing but itself.

`write` leaves in the run directory what can be rebuilt from it at any time: `analysis.json`,
`table.parquet`, `figures/*.png` and `report.html`. Nothing is computed twice: `analysis.json`
holds the hash of everything it was made from (rows, results, predictions, study, and the
analysis's own source), and where that still holds `write` returns at once, without pandas.

A study may be unfinished: only cells with a result are fitted, every row is drawn, and the page
says what is missing.
"""

import argparse
import concurrent.futures
import contextlib
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm.config import UserError
from lm.emergence import table
from lm.rundir import AnyPath, read_json, write_bytes, write_json

if TYPE_CHECKING:
    import pandas as pd

    from lm.emergence.page_facts import Share
    from lm.emergence.scaling import Law

SECONDS = ("compile", "train", "eval", "total")
INPUTS = ("config.json", "environment.json", "rows.jsonl", "result.json")
LIBRARIES = ("altair", "numpy", "pandas", "scipy", "vl-convert-python")
MADE = ("table.parquet", "report.html")
MOST_PROCESSES = 8  # more wait for the slowest ability
FEW = 4  # abilities or figures that are not worth a process


@contextlib.contextmanager
def _pool(processes: int) -> "Iterator[Share]":
    """A `map` that shares out its items among processes where that is worth their start."""
    # Not forked: a caller may have threads.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        processes, mp_context=context, initializer=_end_with, initargs=(os.getpid(),)
    ) as pool:

        def share(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterable[Any]:
            items = list(items)
            return map(function, items) if len(items) <= FEW else pool.map(function, items)

        yield share if processes > 1 else map


def _end_with(parent: int) -> None:
    """Ends this process when its parent is gone: one that was killed cannot say so to its pool."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def analyse(workdir: AnyPath) -> dict[str, Any]:
    """Everything the page says in words and numbers, as JSON-ready values (NaN is None)."""
    return _analyse(Path(workdir), *_load(workdir))


def write(workdir: AnyPath, processes: int = 1) -> Path:
    """Writes analysis, table, figures and page unless they are up to date; returns the page.

    With several processes abilities are shared out; the caller's script must then be importable
    (`if __name__ == "__main__"`), as `multiprocessing` asks.
    """
    workdir = Path(workdir)
    target = workdir / "report.html"
    if _fresh(workdir):
        return target
    from lm.emergence import page, page_data

    (workdir / "analysis.json").unlink(missing_ok=True)
    frame, problems = _load(workdir)
    with _pool(processes) as share:
        analysis = _analyse(workdir, frame, problems, share)
        table.write_cache(workdir, frame)
        about = _study(workdir), _cells(workdir), workdir.resolve().name
        content = page_data.content(frame, analysis, *about)
        figures = page_data.figures(content, share)
    (workdir / "figures").mkdir(exist_ok=True)
    for name, data in figures.items():
        write_bytes(workdir / "figures" / f"{name}.png", data)
    write_bytes(target, page.render(content).encode())
    write_json(workdir / "analysis.json", analysis)  # last: it vouches for the rest
    return target


def main(argv: list[str]) -> int:
    """`lm report DIR [--json]`."""
    parser = argparse.ArgumentParser(
        prog="lm report",
        description="Analyses a run directory and writes report.html, figures and analysis.json.",
        epilog="example: lm report runs/desk",
    )
    parser.add_argument("workdir", help="the run directory of a study")
    parser.add_argument("--json", action="store_true", help="print the analysis as JSON")
    arguments = parser.parse_args(argv)
    page = write(arguments.workdir, min(os.cpu_count() or 1, MOST_PROCESSES))
    analysis = read_json(page.with_name("analysis.json"))
    if arguments.json:
        print(json.dumps(analysis, indent=2))
    else:
        show(analysis, page)
    return 0


def show(analysis: dict[str, Any], page: Path) -> None:
    """Prints the verdicts and the path of the page."""
    from rich.console import Console
    from rich.table import Table

    from lm.emergence.words import STYLE, between, p_value, si

    console = Console(width=100)
    grid = Table(box=None, pad_edge=False)
    for name in ("task", "level", "verdict", "begins at", "95% interval", "p"):
        grid.add_column(name, no_wrap=True)
    grid.add_column("why", ratio=1)
    ability = None
    for row in analysis["verdicts"]:
        if row["ability"] != ability and len({v["ability"] for v in analysis["verdicts"]}) > 1:
            ability = row["ability"]
            grid.add_row(f"[dim]{ability}[/]")
        verdict = f"[{STYLE[row['verdict']].terminal}]{row['verdict']}[/]"
        cells = (si(row["onset_params"]), between(row["ci95"]), p_value(row["p_holm"]))
        grid.add_row(row["task"], row["level"], verdict, *cells, row["reason"])
    if analysis["verdicts"]:
        console.print(grid)
    law = analysis["scaling"]
    if law["alpha"] is not None:
        low_high = law["ci95"] and [-end for end in reversed(law["ci95"])]
        ends = " [{:.3f}, {:.3f}]".format(*low_high) if low_high else ""
        console.print(f"text loss ~ N^{-law['alpha']:.3f}{ends} over {law['n']} replicas")
    for sentence in analysis["notes"]:
        console.print(sentence)
    # Not wrapped: a path that is cut in two cannot be clicked.
    print(f"page: {page}")


def _load(workdir: AnyPath) -> tuple["pd.DataFrame", list[str]]:
    """All rows and the problems; refuses a folder without any."""
    _study(Path(workdir))
    frame, problems = table.read(workdir)
    if frame.empty:
        raise UserError(f"{workdir} has no rows yet; report it when a cell has been evaluated")
    return frame, problems


def _analyse(
    workdir: Path, frame: "pd.DataFrame", problems: list[str], share: "Share" = map
) -> dict[str, Any]:
    from lm.emergence import page_facts, scaling

    study, cells = _study(workdir), _cells(workdir)
    sha256, inputs = table.table_sha256(frame), _inputs(workdir)
    done = {name for name, cell in cells.items() if cell["status"] == "done"}
    finished = frame[frame["cell"].isin(done)]
    laws = {axis: scaling.text_law(finished, axis) for axis in ("params", "flops")}
    return {
        "study": study["name"],
        "points": int(frame["point"].nunique()),
        "replicas": len(frame[["point", "replica"]].drop_duplicates()),
        "rows": len(frame),
        "verdicts": page_facts.abilities(finished, study, workdir, share),
        "scaling": _law(laws["params"]),
        "scaling_flops": _law(laws["flops"]),
        "predictions": _predictions(workdir, finished),
        "seconds": {
            key: sum(cell["seconds"].get(key) or 0.0 for cell in cells.values()) for key in SECONDS
        },
        "notes": _notes(study, cells, frame) + problems,
        "fingerprint": study.get("fingerprint"),
        "table_sha256": sha256,
        "inputs_sha256": inputs,
    }


def _predictions(workdir: Path, finished: "pd.DataFrame") -> dict[str, Any]:
    """What was frozen, the scores of what came, and a sentence for every file that was changed."""
    nothing: dict[str, Any] = {"files": [], "scores": [], "problems": []}
    if not any((workdir / "predictions").glob("*.json")):
        return nothing
    from lm.emergence import predict

    frozen, problems = predict.frozen(workdir)
    scores, _ = predict.score(workdir, finished)
    files = [
        {
            **{"name": file.path.name, "sha256": read_json(file.path)["sha256"]},
            **{key: file.content[key] for key in ("time", "up_to", "sizes", "targets", "rows")},
            **{key: file.content.get(key) for key in ("git_commit", "version")},
            "predictions": [
                {key: p[key] for key in p if key != "quantiles"}
                for p in file.content["predictions"]
            ],
        }
        for file in frozen
    ]
    parts = [
        {"registered": registered, **row}
        for registered in (True, False)
        for row in predict._records([s for s in scores if s.registered == registered])
    ]
    came = [
        {
            **{"source": s.source, "task": s.task, "level": s.level, "metric": s.metric},
            **{"params": s.params, "value": s.value, "registered": s.registered},
        }
        for s in scores
        if s.model == "onset"
    ]
    return {"files": files, "scores": parts, "came": came, "problems": problems}


def _notes(study: dict[str, Any], cells: dict[str, Any], frame: "pd.DataFrame") -> list[str]:
    """What a reader must know before believing the rest."""
    planned = study.get("cells") or list(cells)
    done = sum(cells.get(name, {}).get("status") == "done" for name in planned)
    notes = []
    if done < len(planned):
        notes.append(f"Unfinished: {done} of {len(planned)} cells are done; only those are fitted.")
    lost = frame[frame["status"] == "diverged"][["point", "replica"]].drop_duplicates()
    if len(lost):
        notes.append(f"Diverged replicas: {len(lost)}; drawn as far as they came, not fitted.")
    return notes


def _law(law: "Law | None") -> dict[str, Any]:
    from lm.emergence import page_facts

    if law is None:
        return {"alpha": None, "ci95": None, "n": 0}
    numbers = {"alpha": law.alpha, "ci95": page_facts.ends(law.ci95), "n": law.n}
    return {**numbers, "form": law.form, "E": law.e, "A": law.a, "sizes": law.sizes}


def _study(workdir: Path) -> dict[str, Any]:
    try:
        return read_json(workdir / "study.json")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{workdir} has no study.json; give the workdir of a study") from None


def _cells(workdir: Path) -> dict[str, dict[str, Any]]:
    """Per cell that has begun: status, seconds, attempts, replicas, environment of each attempt."""
    found = {}
    for folder in table.cells(workdir):
        result, environment = folder / "result.json", folder / "environment.json"
        cell = {"status": "unfinished", "seconds": {}, "attempts": 0, "replicas": []}
        cell |= read_json(result) if result.exists() else {}
        attempts = read_json(environment) if environment.exists() else []
        cell["environment"] = attempts if isinstance(attempts, list) else [attempts]
        found[folder.name] = cell
    return found


def _fresh(workdir: Path) -> bool:
    """Whether what `write` made is there and was made from what is there now."""
    try:
        analysis = read_json(workdir / "analysis.json")
        made = all((workdir / name).exists() for name in MADE)
        return made and analysis["inputs_sha256"] == _inputs(workdir)
    except (OSError, UserError, KeyError, TypeError):
        return False


def _inputs(workdir: Path) -> str:
    """The hash of the files an analysis reads, of its own source and of the libraries it uses."""
    digest = hashlib.sha256()
    own = sorted(Path(__file__).parent.glob("*.py"))
    read = [cell / name for cell in table.cells(workdir) for name in INPUTS]
    predicted = sorted((workdir / "predictions").glob("*.json"))
    for path in [*own, workdir / "study.json", *predicted, *read]:
        content = path.read_bytes() if path.exists() else b""
        digest.update(f"{path.parent.name}/{path.name}:{len(content)}\n".encode() + content)
    for name in LIBRARIES:
        digest.update(f"{name}:{importlib.metadata.version(name)}\n".encode())
    return digest.hexdigest()
