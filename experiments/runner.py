"""`lm run STUDY`: from a study file to a page, through a run directory that survives anything.

    study file -> points -> cells -> data -> workers -> rows -> table -> analysis -> report.html

The same command given again goes on where it was: finished cells are skipped, an unfinished one
resumes from its last checkpoint, and a study that is done only shows its report. A workdir belongs
to one study under one config; anything else is refused with a diff.
"""

import argparse
import contextlib
import errno
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from experiments import cost
from experiments.display import Display
from experiments.study import Study, load, split_overrides, with_overrides
from experiments.worker import LAUNCHER
from launch import local
from lm.config import UserError, diff, fingerprint, to_dict
from lm.rundir import cache_folder, holder, lock, now, read_json, read_lines, write_json
from lm.sizes import flops_per_sequence, parameters
from lm.train import mixture
from lm.train.cell import Cell, Point, build_point, cells
from lm.train.checkpoint import disk_error

RESTARTS = 2  # of workers that ended without bringing any cell further

EXAMPLE = """any setting of the study can be changed:
  --config.KEY=VALUE     such as --config.train.tokens=5e6, --config.seeds.replicas=5

example:
  lm run experiments/desk.py --workdir=runs/desk --config.train.tokens=5e6"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `lm run --help` shows what there is")


def main(argv: list[str]) -> int:
    """The verb `run`."""
    overrides, rest = split_overrides(argv)
    parser = _Parser(
        "lm run",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", help="a study file, such as experiments/desk.py")
    parser.add_argument("--workdir", help="the run directory; made if it is not there")
    parser.add_argument("--workers", type=int, help="processes that train cells side by side")
    parser.add_argument(
        "--dry_run", action="store_true", help="print every point and its cost; write nothing"
    )
    args = parser.parse_args(rest)
    study = load(args.study, overrides)
    points = [_point(study, p) for p in study.points]
    by_cost = sorted(cells(study.name, points), key=cost.seconds, reverse=True)
    _check_devices(by_cost)
    if args.dry_run:
        cost.show(points, by_cost, Console())
        return 0
    if not args.workdir:
        raise UserError(
            "--workdir is missing; say where the run shall live, such as --workdir=runs/desk"
        )
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers is {args.workers}; it must be at least 1")
    return run(study, points, by_cost, Path(args.workdir), args.workers)


def run(
    study: Study, points: Sequence[Point], todo: Sequence[Cell], workdir: Path, workers: int | None
) -> int:
    """Carries out what is left of a study in `workdir` and reports; returns the exit code."""
    console = Console()
    _refuse_file(workdir)
    description = _describe(study, points, todo)
    _check_owner(workdir, description)
    before = {p.name for p in workdir.iterdir()} if workdir.exists() else None
    workdir.mkdir(parents=True, exist_ok=True)
    with lock(workdir / "lock", f"lm run {study.name}"):
        _check_owner(workdir, description)  # the study may have been begun while we waited
        left = [c for c in todo if not (workdir / c.name / "result.json").exists()]
        if left:
            try:
                tasks = _prepare(left, workdir / "data", console)
            except UserError:
                _undo(workdir, before)
                raise
            _begin(workdir, description | {"tasks": tasks})
            code = _work(left, workdir, workers or min(len(left), _processors()), console)
            if code:
                return code
            _print_compiling(left, workdir, console)
    from lm.emergence import report  # plots and statistics: not before they are needed

    return report.main([str(workdir)])


def _point(study: Study, overrides: Mapping[str, Any]) -> Point:
    """One point: groups of the config are its settings, plain values are the study's own (`points`
    has read them).
    """
    config = with_overrides(study.config, overrides).to_dict()
    groups = {key: value for key, value in config.items() if isinstance(value, Mapping)}
    named = {"name": overrides["name"], "role": overrides.get("role", "ladder")}
    try:
        return build_point({**groups, **named}, "config")
    except UserError as error:
        raise UserError(f"point {overrides['name']}: {error}") from error


def _check_devices(todo: Sequence[Cell]) -> None:
    """Refuses a batch that does not divide the devices before anything is written.

    One CPU device divides everything. Where there are more, a process of its own counts them: an
    accelerator belongs to one process at a time, and the workers need it.
    """
    several = "device_count" in os.environ.get("XLA_FLAGS", "") or _accelerator()
    if several or any(c.train.replica_devices > 1 for c in todo):
        command = [sys.executable, "-m", "experiments.worker", "--check"]
        cells = json.dumps([to_dict(c) for c in todo])
        done = subprocess.run(command, input=cells, capture_output=True, text=True)
        if done.returncode == 2:
            raise UserError(done.stderr.splitlines()[-1])


def _describe(study: Study, points: Sequence[Point], todo: Sequence[Cell]) -> dict[str, Any]:
    """What `study.json` says, without the time and the tasks' measured chance."""
    config = {p.name: to_dict(p) for p in points}
    return {
        "name": study.name,
        "docstring": study.docstring,
        "fingerprint": fingerprint(config),
        "config": config,
        "points": [
            {
                "name": p.name,
                "role": p.role,
                "layers": p.model.layers,
                "width": p.model.width,
                "params": parameters(p.model).non_embedding,
                "params_total": parameters(p.model).total,
                "flops_per_token": flops_per_sequence(p.model, p.data.length) / p.data.length,
            }
            for p in points
        ],
        "cells": {c.name: sorted({r.point for r in c.replicas}) for c in todo},
        "cell_configs": {c.name: to_dict(c) for c in todo},
    }


def _refuse_file(workdir: Path) -> None:
    for path in (workdir, *workdir.parents):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file; give --workdir a folder")


def _check_owner(workdir: Path, description: Mapping[str, Any]) -> None:
    """Refuses a workdir that holds something else: other files, another study, or this one under
    another config. What a killed writer left (`.NAME.tmp`) does not count.
    """
    if not workdir.exists():
        return
    if not (workdir / "study.json").exists():
        foreign = sorted(
            p.name
            for p in workdir.iterdir()
            if p.name not in ("lock", "data") and not (p.name[0] == "." and p.suffix == ".tmp")
        )
        if foreign:
            raise UserError(
                f"{workdir} holds {foreign[0]!r} and no study; choose an empty --workdir"
            )
        return
    there = read_json(workdir / "study.json")
    if not isinstance(there, dict) or not {"name", "fingerprint", "config"} <= there.keys():
        raise UserError(
            f"{workdir / 'study.json'} is damaged; restore it, or choose another folder"
        )
    if there["name"] != description["name"]:
        raise UserError(
            f"{workdir} belongs to study {there['name']!r}, not {description['name']!r};"
            " choose another --workdir"
        )
    if there["fingerprint"] != description["fingerprint"]:
        lines = diff(there["config"], to_dict(description["config"]))
        shown = "\n  ".join(lines[:20] + [f"… and {len(lines) - 20} more"] * (len(lines) > 20))
        raise UserError(
            f"{workdir} was begun with another config; undo the change or choose another --workdir:"
            f"\n  {shown}"
        )


def _undo(workdir: Path, before: set[str] | None) -> None:
    """Takes away what was made since the folder held `before` (None: since it was not there)."""
    if before is None:
        shutil.rmtree(workdir)
        return
    for path in workdir.iterdir():
        if path.name not in before:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _prepare(left: Sequence[Cell], data: Path, console: Console) -> list[dict[str, Any]]:
    """Prepares the data of every cell and checks each byte; returns what is known of the tasks."""
    known = {}
    try:
        for cell in left:
            mixture.prepare(cell, data, lambda text: console.print(f"  {text}", style="dim"))
        for cell in {mixture.folder(c, data): c for c in left}.values():
            for task in mixture.load(cell, data).tasks:
                known[task["task"], task["level"]] = task
    except Exception as error:
        told = disk_error(error, data.parent)
        if told is error:
            raise
        raise told from error
    return list(known.values())


def _begin(workdir: Path, description: Mapping[str, Any]) -> None:
    """Writes `study.json` once; what pins the bits of the results is in it, so a resume takes the
    same.
    """
    if not (workdir / "study.json").exists():
        write_json(workdir / "study.json", {**description, "begun": now()})


def _accelerator() -> bool:
    """Whether JAX has a plugin for one; to ask JAX itself would be to take it."""
    plugins = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")
    return any(importlib.util.find_spec(name) for name in plugins)


def _processors() -> int:
    """Workers that fit this machine: one with an accelerator, else one per processor we may use."""
    if _accelerator():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _work(left: Sequence[Cell], workdir: Path, workers: int, console: Console) -> int:
    """Keeps workers running until every cell has a result; returns the exit code."""
    command = _command(workdir, workers)
    restarts, before = 0, _progress(left, workdir)
    with _signals_raise(), Display(left, workdir, console) as display:
        _wait(left, workdir, console)
        handles = local.submit([command] * workers)
        try:
            while True:
                time.sleep(0.2)
                display.update()
                if "running" in local.status(handles):
                    continue
                if all((workdir / c.name / "result.json").exists() for c in left):
                    return 0
                after = _progress(left, workdir)
                restarts = 0 if after > before else restarts + 1
                before = after
                codes = {h.process.returncode for h in handles}
                if 2 in codes or restarts > RESTARTS:
                    break
                _wait(left, workdir, console)
                handles = local.submit([command] * workers)
        finally:
            local.cancel(handles)
    return _explain_failure(left, workdir, command.log)


def _print_compiling(done: Sequence[Cell], workdir: Path, console: Console) -> None:
    """What compiling cost: the time that cells waited, and the work, most of it beside training."""
    seconds = [read_json(workdir / c.name / "result.json")["seconds"] for c in done]
    lines = [line for c in done for line in read_lines(workdir / c.name / "events.jsonl")[0]]
    made = [line for line in lines if line["event"] == "compiled"]
    waited, total = (sum(s[kind] for s in seconds) for kind in ("compile", "total"))
    work = sum(e[kind] for e in made for kind in ("trace", "lower", "compile"))
    programs, cached = (sum(e[kind] for e in made) for kind in ("programs", "cached"))
    console.print(
        f"compiling: cells waited {waited:.1f} of {total:.0f} s ({waited / total:.1%}) for"
        f" {work:.1f} s of it; {cached} of {programs} programs came from the cache",
        highlight=False,
    )


def _wait(left: Sequence[Cell], workdir: Path, console: Console) -> None:
    """Waits for workers that a killed runner left behind; they stop after their next checkpoint."""
    for cell in left:
        told = False
        while owner := holder(workdir / cell.name / "lock"):
            if not told:
                console.print(
                    f"{cell.name}: waiting for pid {owner['pid']} on {owner['host']}, which an"
                    " earlier run left behind, to checkpoint and stop",
                    highlight=False,
                )
            told = True
            time.sleep(0.2)


def _command(workdir: Path, workers: int) -> local.Command:
    """The worker's command. NPROC sets XLA's thread pool, and with it the order of sums: it is
    pinned at the first run.
    """
    pins = workdir / "pins.json"
    if not pins.exists():
        per_worker = max(1, (os.cpu_count() or 1) // workers)
        write_json(pins, {"NPROC": os.environ.get("NPROC", str(per_worker))})
    env = {
        "NPROC": read_json(pins)["NPROC"],
        LAUNCHER: str(os.getpid()),
        "JAX_COMPILATION_CACHE_DIR": os.environ.get(
            "JAX_COMPILATION_CACHE_DIR", str(cache_folder("xla"))
        ),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    return local.Command(
        (sys.executable, "-m", "experiments.worker", str(workdir)),
        workdir / "logs" / "worker.log",
        env,
    )


def _progress(left: Sequence[Cell], workdir: Path) -> int:
    """A number that grows when any cell gets further."""
    total = 0
    for cell in left:
        folder = workdir / cell.name
        sealed = [
            int(p.name.split(".")[0]) for p in (folder / "checkpoints").glob("[0-9]*.manifest.json")
        ]
        total += max(sealed, default=0) + 1 + (folder / "result.json").exists()
    return total


def _explain_failure(left: Sequence[Cell], workdir: Path, log: Path) -> int:
    """Raises what is the user's to mend; else one sentence for each cell that has no result."""
    if shutil.disk_usage(workdir).free < 1 << 16:  # too little for an event that would say so
        raise disk_error(OSError(errno.ENOSPC, "disk full"), workdir)
    sentences = []
    for cell in left:
        if (workdir / cell.name / "result.json").exists():
            continue
        events, _ = read_lines(workdir / cell.name / "events.jsonl")
        last = events[-1] if events and events[-1]["event"] == "failed" else {}
        if last.get("kind") == "user":
            raise UserError(f"cell {cell.name}: {last['message']}")
        why = f"failed ({last['message']})" if last else "did not finish"
        sentences.append(f"cell {cell.name} {why}; {log} has the output of its worker")
    print(*sentences, sep="\n", file=sys.stderr)
    return 1


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM ends the runner the way Ctrl-C does, so that workers get to checkpoint."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
