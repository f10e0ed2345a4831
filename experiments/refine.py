"""`lm run STUDY --refine=TASK/LEVEL`: adds sizes and seeds where an onset is least certain.

After the study is done: find the onset's 95% interval, add what should narrow it, train that, and
look again, until the interval is narrower than `--precision` decades or `--budget` is spent.
`experiments.rungs` decides what is added.

What is added has cells of its own (`2x10`, `2x8+1`), so that finished cells keep their bits, and
stands in study.json: with the other points and cells, and by rounds with its reasons under
`refined`. The config and fingerprint of the study stay what they were; the same command goes on
where it was, and the budget is that of all rounds for this task.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from experiments import cost
from experiments.rungs import PRECISION, Proposal, propose, same
from lm.config import UserError, build, nearest, to_dict
from lm.rundir import now, read_json, write_json
from lm.train.cell import TEXT, Axis, Cell, Point, cells

if TYPE_CHECKING:
    import pandas as pd

    from lm.emergence.onset import Verdict


@dataclasses.dataclass(frozen=True)
class Goal:
    """What is asked for: the task, the interval's width in decades, and what it may cost in tokens
    or in minutes of one core; with neither, as many tokens as the study itself.
    """

    task: str
    level: str
    precision: float = PRECISION
    tokens: float | None = None
    minutes: float | None = None

    @property
    def name(self) -> str:
        """`recall/5`."""
        return f"{self.task}/{self.level}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `lm run` that belong to this module."""
    parser.add_argument(
        "--refine", metavar="TASK/LEVEL", help="then add sizes and seeds around its onset"
    )
    parser.add_argument(
        "--precision",
        type=float,
        help=f"decades its 95%% interval may be wide, {PRECISION} unless said",
    )
    parser.add_argument("--budget", help="what that may cost: tokens, as 5e6, or minutes, as 30min")


def read_goal(
    task: str | None, precision: float | None, budget: str | None, points: Sequence[Point]
) -> Goal | None:
    """The goal from the command line, if there is one; raises `UserError` on a task that the study
    has not, and on a precision or a budget that is not positive.
    """
    if task is None:
        if precision is not None or budget is not None:
            raise UserError("--precision and --budget need --refine=TASK; name the ability")
        return None
    precision = PRECISION if precision is None else precision
    known = sorted(
        {(m.task, m.level) for p in points for m in p.data.mixture.values() if m.task != TEXT}
    )
    name, _, level = task.partition("/")
    levels = [each for other, each in known if other == name]
    if not levels or (level and level not in levels):
        every = [f"{t}/{each}" for t, each in known]
        raise UserError(f"--refine={task} is not an ability of the study; {nearest(task, every)}")
    if not level and len(levels) > 1:
        raise UserError(
            f"--refine={task} has the levels {', '.join(levels)}; name one, such as"
            f" --refine={name}/{levels[-1]}"
        )
    if not 0 < precision < math.inf:
        raise UserError(f"--precision is {precision:g}; it must be a positive number of decades")
    goal = Goal(name, level or levels[0], precision)
    if budget is None:
        return goal
    unit = budget.removesuffix("min")
    try:
        value = float(unit)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"--budget is {budget!r}; give tokens, such as 5e6, or minutes, as 30min")
    if unit == budget:
        return dataclasses.replace(goal, tokens=value)
    return dataclasses.replace(goal, minutes=value)


def carry_out(
    goal: Goal,
    points: Sequence[Point],
    workdir: Path,
    train: Callable[[list[Cell]], int],
    describe: Callable[[Sequence[Point], Sequence[Cell]], Mapping[str, Any]],
    say: Callable[[str], object],
) -> int:
    """Rounds of analysis and training until the goal is met; returns the exit code.

    `train` carries out cells that stand in study.json, `describe` gives their part of it. Raises
    `UserError` if the task has no onset.
    """
    while True:
        study = read_json(workdir / "study.json")
        added = [build(Point, p, p["name"]) for r in rounds(study) for p in r["points"]]
        left = [c for c in _cells(study, added) if not _done(workdir, c)]
        if left and (code := train(left)):
            return code
        frame, verdict = judge(workdir, goal)
        low, high = verdict.ci95
        width = math.log10(high / low)
        found = (
            f"{goal.name} begins between {low:.3g} and {high:.3g} parameters ({width:.2f} decades)"
        )
        if width <= goal.precision:
            say(f"{found}: the precision of {goal.precision:g} is met")
            return 0
        ours = [p for p in (*points, *added) if _has(p, goal)]
        taken = set(study["cells"]) | {p["name"] for p in study["points"]}
        plan = propose(frame, verdict, ours, taken, goal.precision)
        if not plan:
            say(f"{found}: no width and no seed is left to add")
            return 0
        new = [_cell(study["name"], p.point, [*points, *added]) for p in plan]
        count = _affordable(goal, study, workdir, points, new)
        if not count:
            say(f"{found}: the budget is spent")
            return 0
        for p in plan[:count]:
            say(f"{found}: adding {p.point.name}, {p.reason}")
        described = describe([p.point for p in plan[:count]], new[:count])
        _record(workdir, study, goal, verdict, plan[:count], described)


def judge(workdir: Path, goal: Goal) -> tuple["pd.DataFrame", "Verdict"]:
    """The finished rows of the task and the verdict on it; `UserError` if it has no onset."""
    from lm.emergence import onset, predict

    frame = predict.finished(workdir)
    frame = frame[(frame["task"] == goal.task) & (frame["level"] == goal.level)]
    verdict = next(iter(onset.verdicts(frame)), None) if len(frame) else None
    if verdict is None:
        raise UserError(f"{goal.name} has no finished rows in {workdir}; nothing can be refined")
    if not (np.isfinite(verdict.ci95).all() and verdict.ci95.low > 0):
        raise UserError(
            f"{goal.name} is {verdict.verdict} ({verdict.reason}), so it has no onset to refine;"
            f" {REMEDY.get(verdict.verdict, REMEDY['undetermined'])}"
        )
    return frame, verdict


REMEDY = {
    "flat": "larger sizes, more tokens or more rows of it in the mixture may show one",
    "smooth": "smaller sizes may show where it is at chance",
    "inverse": "it gets worse with size, look at smaller ones",
    "undetermined": "give the study more sizes or seeds where it changes",
}


def _has(point: Point, goal: Goal) -> bool:
    """Whether a point learns the task; in some studies every ability has points of its own."""
    return any((m.task, m.level) == (goal.task, goal.level) for m in point.data.mixture.values())


def rounds(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was added to a study so far, by rounds."""
    return list(study.get("refined", []))


def _record(
    workdir: Path,
    study: dict[str, Any],
    goal: Goal,
    verdict: "Verdict",
    plan: Sequence[Proposal],
    described: Mapping[str, Any],
) -> None:
    """Adds a round to study.json, whole or not at all, before any of it is trained."""
    entry = {
        "round": len(rounds(study)) + 1,
        **{"task": goal.task, "level": goal.level, "time": now()},
        "ci95": list(verdict.ci95),
        "reasons": {p.point.name: p.reason for p in plan},
        "points": [to_dict(p.point) for p in plan],
    }
    write_json(
        workdir / "study.json",
        study
        | {
            "points": study["points"] + described["points"],
            "cells": study["cells"] | described["cells"],
            "cell_configs": study["cell_configs"] | described["cell_configs"],
            "refined": [*rounds(study), entry],
        },
    )


def _cells(study: Mapping[str, Any], added: Sequence[Point]) -> list[Cell]:
    names = [p.name for p in added]
    return [build(Cell, study["cell_configs"][name], name) for name in names]


def _done(workdir: Path, cell: Cell) -> bool:
    return (workdir / cell.name / "result.json").exists()


def _affordable(
    goal: Goal, study: Mapping[str, Any], workdir: Path, points: Sequence[Point], new: list[Cell]
) -> int:
    """How many of the new cells the budget covers, beside all that was added for this task."""
    ours = [r for r in rounds(study) if (r["task"], r["level"]) == (goal.task, goal.level)]
    before = [p["name"] for r in ours for p in r["points"]]
    if goal.minutes is not None:
        results = [read_json(workdir / name / "result.json") for name in before]
        left = goal.minutes * 60 - sum(r["seconds"]["total"] for r in results)
        price: Callable[[Cell], float] = cost.seconds
    else:
        left = goal.tokens or sum(map(_tokens, cells(study["name"], points)))
        left -= sum(_tokens(build(Cell, study["cell_configs"][n], n)) for n in before)
        price = _tokens
    return int((np.cumsum([price(cell) for cell in new]) <= left).sum())


def _tokens(cell: Cell) -> int:
    return len(cell.replicas) * cell.steps * cell.tokens_per_step


def _cell(study: str, point: Point, points: Sequence[Point]) -> Cell:
    """The cell of one added point. An axis of seeds that does not vary keeps what it is in the
    point that is continued, though `seeds.first` is another.
    """
    (cell,) = cells(study, [point])
    first = next((p.seeds.first for p in points if same(p, point)), point.seeds.first)
    fixed: dict[str, Any] = {axis: first for axis in get_args(Axis) if axis not in point.seeds.vary}
    replicas = tuple(dataclasses.replace(r, **fixed) for r in cell.replicas)
    return dataclasses.replace(cell, replicas=replicas)
