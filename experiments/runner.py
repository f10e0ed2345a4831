"""`lm run STUDY`: from a study file to a page, through a run directory that survives anything.

    study file -> points -> cells -> data -> workers -> rows -> table -> analysis -> report.html

The same command given again goes on where it was: finished cells are skipped, an unfinished one
resumes from its last checkpoint, and a study that is done only shows its report. A workdir belongs
to one study under one config; anything else is refused with a diff.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from experiments import cost, machine, own, refine, supervise
from experiments import workdir as shared
from experiments.study import Study, load, overridden, split_overrides
from lm.config import UserError, build, fingerprint, to_dict
from lm.rundir import lock, read_json, read_lines
from lm.sizes import flops_per_sequence, parameters
from lm.train import mixture
from lm.train.cell import Cell, Point, build_point, cells
from lm.train.checkpoint import disk_error

# The parts of a point but its model, whose size has to be looked up.
HINTS = typing.get_type_hints(Point)
PARTS = {key: HINTS[key] for key in ("optim", "data", "train", "eval", "seeds")}
EXAMPLE = """any setting of the study can be changed:
  --config.KEY=VALUE     such as --config.train.tokens=5e6, --config.seeds.replicas=5

  --where.KEY=VALUE      a setting of the place, such as --where=slurm --where.partition=gpu

examples:
  lm run experiments/desk.py --workdir=runs/desk --config.train.tokens=5e6
  lm run experiments/desk.py --workdir=runs/desk --refine=recall/5 --budget=30min"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `lm run --help` shows what there is")


def main(argv: list[str]) -> int:
    """The verb `run`."""
    overrides, rest = split_overrides(argv)
    told, rest = shared.split_settings(rest)
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
    parser.add_argument(
        "--where", choices=supervise.PLACES, default="local", help="what carries out the cells"
    )
    refine.add_arguments(parser)
    args = parser.parse_args(rest)
    where = args.where, shared.settings(args.where, told)
    study = load(args.study, overrides)
    if study.train:  # it trains something else than our language models
        if args.refine:
            raise UserError(f"--refine cannot extend {args.study}, which trains by itself; drop it")
        return own.main(study, args.workdir, args.workers, args.dry_run, where)
    points = points_of(study)
    goal = refine.read_goal(args.refine, args.precision, args.budget, points)
    by_cost = sorted(cells(study.name, points), key=cost.seconds, reverse=True)
    _check_devices(by_cost, where)
    if args.dry_run:
        cost.show(points, by_cost, Console())
        return 0
    if not args.workdir:
        raise UserError(
            "--workdir is missing; say where the run shall live, such as --workdir=runs/desk"
        )
    if args.where == "local":
        cost.check_memory(by_cost, machine.memory())
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers is {args.workers}; it must be at least 1")
    return run(study, points, by_cost, Path(args.workdir), args.workers, goal, where)


def run(
    study: Study,
    points: Sequence[Point],
    todo: Sequence[Cell],
    workdir: Path,
    workers: int | None,
    goal: refine.Goal | None = None,
    where: shared.Where | None = None,
) -> int:
    """Carries out what is left of a study in `workdir`, refines an onset if there is a goal, and
    reports; returns the exit code.
    """
    from lm.emergence import report  # it imports plots and statistics when it needs them

    console = Console()
    shared.refuse_file(workdir)
    shared.ready(where)
    description = _describe(study, points, todo)
    shared.check_owner(workdir, description)
    before = {p.name for p in workdir.iterdir()} if workdir.exists() else None
    workdir.mkdir(parents=True, exist_ok=True)
    with lock(workdir / "lock", f"lm run {study.name}"):
        shared.check_owner(workdir, description)  # the study may have been begun while we waited
        shared.choose(workdir, where)
        left = [c for c in todo if not (workdir / c.name / "result.json").exists()]
        if left:
            try:
                tasks = _prepare(left, workdir / "data", console)
            except UserError:
                shared.undo(workdir, before)
                raise
            shared.begin(workdir, description | {"tasks": tasks})
            if code := _train(left, workdir, workers, console):
                return code
        if goal:

            def more(cells: list[Cell]) -> int:
                _check_devices(cells, where)
                _prepare(cells, workdir / "data", console)
                return _train(cells, workdir, workers, console)

            try:
                describe = functools.partial(_describe, study)
                code = refine.carry_out(goal, points, workdir, more, describe, print)
            except UserError:  # there may be no onset, but there is a study
                report.main([str(workdir)])
                raise
            if code:
                return code
    return report.main([str(workdir)])


def _train(left: Sequence[Cell], workdir: Path, workers: int | None, console: Console) -> int:
    together = supervise.together(workdir)
    count = workers or max(1, min(len(left), machine.processors() // together))
    module = "experiments.processes" if together > 1 else "experiments.worker"
    command = shared.command(workdir, count * together, module)
    code = shared.work(left, workdir, count, command, console)
    if not code:
        _print_compiling(left, workdir, console)
    return code


def points_of(study: Study) -> list[Point]:
    """The points of a study: groups of its config are their settings, plain values are the study's
    own (`points` has read them). Raises UserError naming the point.
    """
    config = study.config.to_dict()
    read: dict[str, Any] = {}
    return [_point(config, overrides, read) for overrides in study.points]


def _point(config: Mapping[str, Any], overrides: Mapping[str, Any], read: dict[str, Any]) -> Point:
    """One point; groups that it does not change are read once, since there may be 10,000 points."""
    settings = overridden(config, overrides)
    groups = {key: value for key, value in settings.items() if isinstance(value, Mapping)}
    named = {"name": overrides["name"], "role": overrides.get("role", "ladder")}
    try:
        for key in PARTS.keys() & groups.keys():
            if groups[key] is config[key]:
                if key not in read:
                    read[key] = build(PARTS[key], groups[key], f"config.{key}")
                groups[key] = read[key]
        return build_point({**groups, **named}, "config")
    except UserError as error:
        raise UserError(f"point {overrides['name']}: {error}") from error


def _check_devices(todo: Sequence[Cell], where: shared.Where | None = None) -> None:
    """Refuses a batch that does not divide the devices before anything is written.

    One CPU device divides everything. Where there are more, a process of its own counts them: an
    accelerator belongs to one process at a time, and the workers need it. Processes that carry out
    a cell together are simulated, with the devices that each of them would have on a CPU.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    together = supervise.engine(where[0]).processes(where[1]) if where else 1
    several = "device_count" in flags or machine.accelerator() or together > 1
    if several or any(c.train.replica_devices > 1 for c in todo):
        command = [sys.executable, "-m", "experiments.worker", "--check"]
        environment = dict(os.environ)
        if together > 1 and not machine.accelerator():
            each = re.search(r"device_count=(\d+)", flags)
            count = together * int(each.group(1) if each else 1)
            environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}"
        cells = json.dumps([to_dict(c) for c in todo])
        done = subprocess.run(command, input=cells, capture_output=True, text=True, env=environment)
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


def _prepare(left: Sequence[Cell], data: Path, console: Console) -> list[dict[str, Any]]:
    """Prepares the data of every cell and checks each byte; returns what is known of the tasks."""
    known = {}
    try:
        for cell in left:
            mixture.prepare(cell, data, lambda text: console.print(f"  {text}", style="dim"))
        for cell in {mixture.folder(c, data): c for c in left}.values():
            for task in mixture.load(cell, data).tasks:
                known[task["task"], task["level"], task["format"]] = task
    except Exception as error:
        told = disk_error(error, data.parent)
        if told is error:
            raise
        raise told from error
    return list(known.values())


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
