"""Studies whose replicas are not our language models: `lm run` of a file that trains by itself.

Beside `get_config()` and `points(config)` such a study file defines

    plan(config, point) -> Plan       what one point will be and cost, known before it is trained
    train(config, plan, record)       trains all replicas of one point and records what it measures;
                                      gives the SHA-256 of every replica's parameters, None where
                                      the replica diverged

`config` is that of the point, `point` its entry of `points`. Everything else is as for any study:
one run directory in the same contract, two single-threaded processes on two cores, locks, a skip of
what is done, one row table, the same report. A point is one cell. There are no checkpoints, since a
cell of such a study lasts seconds: one that was killed begins again from step 0, and rows that are
there already with the same bits are not written again.

`python -m experiments.own WORKDIR STUDY` is a worker. It exits like `experiments.worker`.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from experiments import exits, machine, supervise
from experiments import workdir as shared
from experiments.display import print_columns
from experiments.study import Study, load, with_overrides
from experiments.worker import CODES, arguments, through, watched
from lm import lease
from lm.config import UserError, fingerprint, to_dict
from lm.emergence.metrics import Measure
from lm.emergence.table import RowWriter
from lm.rundir import JsonLines, environment, inside, lock, now, read_json, write_json
from lm.train.cell import Replica
from lm.train.loop import Interrupted

COLUMNS = ("point", "params", "replicas", "examples", "steps", "FLOPs", "s")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a study says of one point before it is trained.

    `params_total` counts all parameters and `params` those that the ladder is drawn over;
    `flops_per_token` is forward and backward; `seconds` is a guess, of one core, for all replicas;
    `tasks` are the records of `study.json`.
    """

    name: str
    role: str
    layers: int
    width: int
    params: int
    params_total: int
    steps: int
    tokens_per_step: int
    flops_per_token: float
    seconds: float
    replicas: tuple[Replica, ...]
    tasks: tuple[Mapping[str, Any], ...] = ()


class Record:
    """What one attempt writes into its cell's folder."""

    def __init__(
        self,
        study: str,
        plan: Plan,
        folder: Path,
        stop: Callable[[], bool] = lambda: False,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.study, self.plan, self.folder, self.stop, self.check = study, plan, folder, stop, check
        path = folder / "environment.json"
        before = read_json(path) if path.exists() else []
        write_json(path, [*before, {**environment(), "time": now()}])
        self.attempt = len(before) + 1
        self.seconds = {"compile": 0.0, "train": 0.0, "eval": 0.0, "total": 0.0}
        self._begin = time.monotonic()
        self._told = 0.0
        self._rows = RowWriter(folder / "rows.jsonl")
        self._events = JsonLines(folder / "events.jsonl")
        self.event("begin")
        for problem in self._rows.problems:
            self.event("rows_damaged", what=problem)

    def event(self, event: str, **fields: Any) -> None:
        self._events.append({"event": event, "time": now(), "attempt": self.attempt, **fields})

    def spent(self) -> float:
        """Seconds since this attempt began."""
        return time.monotonic() - self._begin

    def measure(
        self,
        who: Replica,
        step: int,
        task: str,
        level: str,
        found: Mapping[str, Measure],
        chance: float | None = None,
    ) -> None:
        """Rows of one replica at one step; `chance` goes with exact match. A replica whose value is
        not finite has diverged.
        """
        self.check()
        plan, tokens = self.plan, step * self.plan.tokens_per_step
        rows = [
            {
                **{"study": self.study, "cell": plan.name, "point": who.point},
                **{"replica": who.index, "role": who.role},
                **{"layers": plan.layers, "width": plan.width},
                **{"params": plan.params, "params_total": plan.params_total},
                **{"seed_init": who.init, "seed_data": who.data},
                **{"seed_dropout": who.dropout, "seed_eval": who.eval},
                **{"learning_rate": who.learning_rate, "step": step, "tokens": tokens},
                "flops": float(tokens * plan.flops_per_token),
                **{"task": task, "level": level, "format": 0, "metric": metric},
                **{"value": m.value, "stderr": m.stderr, "n": m.n},
                "chance": chance if metric == "exact_match" else None,
                "status": "ok" if abs(m.value) < float("inf") else "diverged",
                **{"attempt": self.attempt, "seconds": round(self.spent(), 3)},
            }
            for metric, m in found.items()
        ]
        for mismatch in self._rows.append(rows):
            self.event("replay_mismatch", what=str(mismatch))

    def progress(self, step: int, loss: float) -> None:
        """For whoever looks, at most once a second. Raises Interrupted when the worker was asked to
        stop.
        """
        self.check()
        if self.stop():
            raise Interrupted
        if step == self.plan.steps or time.monotonic() - self._told > 1:
            self._told = time.monotonic()
            now_at = {"step": step, "steps": self.plan.steps, "loss": loss}
            write_json(self.folder / "progress.json", {**now_at, "seconds": round(self.spent(), 1)})

    def finish(self, hashes: Sequence[str | None]) -> None:
        """Writes the result, when all that it vouches for is on the disk."""
        self.seconds["total"] = self.spent()
        replicas = [
            {
                **{"point": who.point, "replica": who.index},
                **{"status": "ok" if digest else "diverged", "params_sha256": digest},
            }
            for who, digest in zip(self.plan.replicas, hashes, strict=True)
        ]
        self.event("done", step=self.plan.steps)
        self._rows.sync()
        self._events.sync()
        self.check()
        seconds = {kind: round(value, 3) for kind, value in self.seconds.items()}
        result = {"status": "done", "replicas": replicas, "seconds": seconds}
        write_json(self.folder / "result.json", {**result, "attempts": self.attempt})

    def close(self) -> None:
        self._rows.close()
        self._events.close()


def main(
    study: Study,
    workdir: str | None,
    workers: int | None,
    dry_run: bool,
    where: shared.Where | None = None,
) -> int:
    """Carries out what is left of such a study in `workdir` and reports; returns the exit code."""
    plans = [plan(study, point) for point in study.points]
    todo = sorted(plans, key=lambda p: p.seconds, reverse=True)
    console = Console()
    if dry_run:
        show(plans, console)
        return 0
    if not workdir:
        raise UserError(
            "--workdir is missing; say where the run shall live, such as"
            f" --workdir=runs/{study.name}"
        )
    if workers is not None and workers < 1:
        raise UserError(f"--workers is {workers}; it must be at least 1")
    folder = Path(workdir)
    shared.refuse_file(folder)
    shared.ready(where)
    if where and supervise.engine(where[0]).processes(where[1]) > 1:
        raise UserError(f"{study.path} trains by itself, on one process; leave out processes")
    description = describe(study, plans, todo)
    shared.check_owner(folder, description)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / "lock", f"lm run {study.name}"):
        shared.check_owner(folder, description)  # it may have been begun while we waited
        shared.choose(folder, where)
        left = [p for p in todo if not (folder / p.name / "result.json").exists()]
        if left:
            shared.begin(folder, description)
            count = workers or min(len(left), machine.processors())
            command = shared.command(folder, count, "experiments.own", str(study.path))
            if code := shared.work(left, folder, count, command, console):
                return code
    from lm.emergence import report  # plots and statistics: not before they are needed

    return report.main([str(folder)])


def plan(study: Study, point: Mapping[str, Any]) -> Plan:
    """What the study says of one point; raises `UserError` naming the point."""
    assert study.plan is not None
    try:
        return study.plan(with_overrides(study.config, point), point)
    except UserError as error:
        raise UserError(f"point {point['name']}: {error}") from error


def describe(study: Study, plans: Sequence[Plan], todo: Sequence[Plan]) -> dict[str, Any]:
    """What `study.json` says, without the time; cells in the order in which they are trained."""
    config = {point["name"]: _groups(study, point) for point in study.points}
    fields = ("name", "role", "layers", "width", "params", "params_total", "flops_per_token")
    tasks = {fingerprint(task): dict(task) for p in plans for task in p.tasks}
    return {
        "name": study.name,
        "docstring": study.docstring,
        "fingerprint": fingerprint(config),
        "config": config,
        "points": [{name: getattr(p, name) for name in fields} for p in plans],
        "cells": {p.name: [p.name] for p in todo},
        "cell_configs": {
            p.name: {
                "study": study.name,
                "name": p.name,
                "config": config[p.name],
                "replicas": to_dict(p.replicas),
            }
            for p in todo
        },
        "tasks": list(tasks.values()),
    }


def _groups(study: Study, point: Mapping[str, Any]) -> dict[str, Any]:
    """The groups of a point's config; plain values are the study's own (`points` has read them)."""
    config = with_overrides(study.config, point).to_dict()
    return {key: to_dict(value) for key, value in config.items() if isinstance(value, Mapping)}


def show(plans: Sequence[Plan], console: Console) -> None:
    """Prints a table of all points and the sum."""
    rows = [
        (
            p.name + (" (control)" if p.role == "control" else ""),
            f"{p.params:,}",
            str(len(p.replicas)),
            f"{p.steps * p.tokens_per_step:,}",
            f"{p.steps:,}",
            f"{p.flops_per_token * p.steps * p.tokens_per_step * len(p.replicas):.2e}",
            f"{p.seconds:.0f}",
        )
        for p in plans
    ]
    print_columns(console, COLUMNS, rows, left=COLUMNS[:1])
    console.print(
        f"{len(plans)} points, {sum(len(p.replicas) for p in plans)} replicas",
        f"about {sum(p.seconds for p in plans) / 60:.1f} minutes of one core (give or take a factor"
        " of two)",
        "dry run: nothing was written",
        sep="; ",
        highlight=False,
    )


def worker(argv: Sequence[str], stop: Callable[[], bool] = lambda: False) -> int:
    """Works through the cells of the run directory `argv[0]` with the study file `argv[1]`; with
    `--cells NAME,NAME` through those.
    """
    workdir, chosen = arguments(list(argv))
    study = load(argv[1])
    there = read_json(workdir / "study.json")
    roles = {point["name"]: point["role"] for point in there["points"]}

    def carry_out(name: str, held: lease.Lease) -> int:
        folder, config = inside(workdir, name), there["cell_configs"][name]
        point = {"name": name, "role": roles[name]}
        with watched(folder, held) as check:
            write_json(folder / "config.json", config)
            _train(study, ConfigDict(config["config"]), point, folder, stop, check)
        return CODES.get(held.ended, 0)

    names = (name for name in there["cells"] if chosen is None or name in chosen)
    left = (name for name in names if not (workdir / name / "result.json").exists())
    return through(workdir, left, carry_out, stop)


def _train(
    study: Study,
    config: ConfigDict,
    point: Mapping[str, Any],
    folder: Path,
    stop: Callable[[], bool],
    check: Callable[[], None],
) -> None:
    assert study.plan is not None and study.train is not None
    plan = study.plan(config, point)
    check()
    record = Record(study.name, plan, folder, stop, check)
    try:
        record.finish(study.train(config, plan, record))
    finally:
        record.close()


if __name__ == "__main__":
    sys.exit(worker(sys.argv[1:], exits.stop_signal()))
