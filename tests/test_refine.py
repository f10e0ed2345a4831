"""The planner: what it adds, what that does to an interval, and a run directory that takes it."""

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiny

from experiments import refine, rungs
from lm.config import UserError, to_dict
from lm.emergence import onset, planted, report
from lm.emergence.seeds import Interval
from lm.emergence.shapes import logistic
from lm.rundir import read_json
from lm.sizes import parameters
from lm.train.cell import EvalConfig, SeedConfig, build_point, cells

WIDTHS = (4, 6, 12, 16, 32, 48, 64)


def point(width, rate=8e-3, seeds=3):
    """A ladder point of two layers."""
    mixture = {"recall": {"task": "recall", "level": "5", "rows": 2}}
    mixture["easy"] = {"task": "recall", "level": "3", "rows": 2}
    return build_point(
        {
            **{"name": f"2x{width}", "model": {"size": f"2x{width}"}},
            **{"optim": {"learning_rate": rate}, "train": {"tokens": 10_000}},
            **{"data": {"length": 32, "mixture": mixture}, "seeds": {"replicas": seeds}},
        }
    )


def measure(points, x50, width, split, first=0):
    """Planted rows of ladder points: exact match and nll, by the seeds of each point."""
    exact, nll = {}, {}
    for p in points:
        params = parameters(p.model).non_embedding
        u = logistic(np.array([[x50, np.log10(width)]]), np.log10([params]))[0, 0]
        for k in range(p.seeds.first, p.seeds.first + p.seeds.replicas):
            rng = np.random.default_rng([first, params, k])
            level = float(rng.random() < u) if split else u
            hits = rng.binomial(1000, np.clip(0.25 + 0.7 * level + rng.normal(0, 0.01), 0, 1))
            exact.setdefault(params, []).append(hits / 1000)
            nll.setdefault(params, []).append(2 - 1.8 * level + rng.normal(0, 0.02))
    return planted.table({"exact_match": exact, "nll": nll}, task="recall")


def refined(points, x50, width, split, seed, choices, rounds=1):
    """For each way to choose, the interval's width in decades before and after its rounds."""

    def judge(points):
        rows = measure(points, x50, width, split, seed)
        verdict = onset.judge(rows)
        return rows, verdict, float(np.ptp(np.log10(verdict.ci95)))

    start, found = judge(points), []
    for choose in choices:
        now, have, widths = start, points, [start[2]]
        for _ in range(rounds * bool(np.isfinite(start[2]))):
            have = [*have, *choose(*now[:2], have)]
            now = judge(have)
            widths.append(now[2])
        found.append(widths)
    return found


def ours(rows, verdict, points):
    """What the planner adds, however narrow the interval is."""
    return [p.point for p in rungs.propose(rows, verdict, points, precision=1e-3)]


def at_random(rng):
    """As many sizes as the planner adds points, anywhere between neighbours of the ladder."""

    def choose(rows, verdict, points):
        have = list(points)
        for _ in ours(rows, verdict, points):
            every = rungs._between(have, {p.name for p in have})
            have.append(every[rng.integers(len(every))][0])
        return have[len(points) :]

    return choose


def fake(low, high, middle=None):
    """A verdict that says only where an onset is."""
    return SimpleNamespace(ci95=Interval(low, high), onset=middle or (low * high) ** 0.5)


@pytest.fixture(scope="module")
def ladder():
    return [point(w, rate=8e-3 if w < 20 else 4e-3) for w in WIDTHS]


def test_a_size_is_put_where_the_interval_is_widest(ladder):
    """Catches a gap chosen by its own width, one outside the interval, and a learning rate or a
    head size that is not the ladder's.
    """
    rows = measure(ladder, 4.0, 0.4, False)
    (first, *_) = rungs.propose(rows, fake(5000, 25_000), ladder)
    assert 6224 < first.params < 24_736 and first.point.name == "2x22"
    assert first.point.model == point(22).model and "2x16 and 2x32" in first.reason
    share = np.log(22 / 16) / np.log(2)
    assert first.point.optim.learning_rate == pytest.approx(8e-3 * 0.5**share, rel=1e-3)
    assert first.point.seeds.replicas == rungs.FEW and first.point.seeds.first == 0
    assert rungs.propose(rows, fake(900, 3400), ladder)[0].point.name == "2x8"


def test_seeds_are_added_where_no_width_is_left(ladder):
    """Catches seeds that were run before, a name that is taken, and a size with seeds enough."""
    close = [point(w) for w in (4, 6, 8, 10, 12)]
    rows = measure(close, 3.2, 0.3, True)
    verdict = fake(1400, 1700, 1576)
    (first,) = rungs.propose(rows, verdict, close, precision=0.05)
    assert (first.point.name, first.point.seeds.first, first.point.seeds.replicas) == (
        "2x8+1",
        3,
        5,
    )
    more = [*close, first.point]
    (second,) = rungs.propose(rows, verdict, more, {"2x8+2"}, precision=0.05)
    assert (second.point.name, second.point.seeds.first) == ("2x8+3", 8)
    full = [dataclasses.replace(p, seeds=dataclasses.replace(p.seeds, replicas=20)) for p in close]
    assert rungs.propose(rows, verdict, full, precision=0.05) == []


def test_nothing_is_added_to_a_narrow_interval(ladder):
    """Catches a planner that never stops, at the very precision that was asked for too."""
    rows = measure(ladder, 4.0, 0.4, False)
    assert rungs.propose(rows, fake(1000, 1000 * 10**0.2), ladder, precision=0.2 + 1e-9) == []
    assert rungs.propose(rows, fake(1000, 1000), ladder) == []


def test_neighbours_that_differ_in_more_have_nothing_between_them(ladder):
    """Catches a size between two that are trained differently."""
    longer = dataclasses.replace(ladder[4], train=dataclasses.replace(ladder[4].train, chunk=9))
    other = [*ladder[:4], longer, *ladder[5:]]
    rows = measure(ladder, 4.0, 0.4, False)
    gap = rungs.propose(rows, fake(7000, 24_000), other)
    assert [p.reason.split(",")[0] for p in gap[:1]] == ["between 2x16 and 2x48"]
    alone = [
        dataclasses.replace(p, role="ladder", eval=EvalConfig(items=i + 1))
        for i, p in enumerate(ladder)
    ]
    names = [p.point.name for p in rungs.propose(rows, fake(7000, 24_000), alone)]
    assert names == ["2x32+1"]


def test_an_ability_with_points_of_its_own_keeps_its_name(ladder):
    """Catches a size that is named after another ability, or a name that is taken."""
    named = [dataclasses.replace(p, name=f"recall-{p.name}") for p in ladder]
    rows = measure(ladder, 4.0, 0.4, False)
    (first, *_) = rungs.propose(rows, fake(5000, 25_000), named, {"recall-2x22"})
    assert first.point.name == "recall-2x22+1"


def test_refining_narrows_planted_intervals_more_than_chance(ladder):
    """Catches sizes put anywhere: a round of the planner must narrow a planted interval, and more
    than as many sizes at random (docs/emergence.md has the figures of 50 ladders).
    """
    for seed, split in enumerate((False, True)):
        rng = np.random.default_rng(seed)
        x50 = rng.uniform(3.1, 4.3)
        own, other = refined(ladder, x50, 0.3, split, seed, (ours, at_random(rng)))
        assert own[1] < 0.6 * own[0] and own[1] < other[1]


def test_a_fixed_axis_of_seeds_stays_fixed():
    """Catches new seeds that also move the axis which the study holds still."""
    own = dataclasses.replace(point(8), seeds=SeedConfig(2, first=4, vary=("init",)))
    more = rungs._continued(own, [own], {"2x8"}, 3)
    cell = refine._cell("study", more, [own])
    assert [(r.init, r.data, r.dropout) for r in cell.replicas] == [(6, 4, 4), (7, 4, 4), (8, 4, 4)]
    assert cell.name == more.name == "2x8+1"
    (before,) = cells("study", [own])
    assert [r.init for r in before.replicas] == [4, 5]


@pytest.mark.parametrize(
    ("task", "precision", "budget", "said"),
    [
        ("recal", None, None, "not an ability of the study"),
        ("recall/9", None, None, "not an ability of the study"),
        ("recall", None, None, "has the levels 3, 5"),
        ("recall/5", 0.0, None, "--precision is 0"),
        ("recall/5", float("nan"), None, "--precision is nan"),
        ("recall/5", None, "0", "--budget is '0'"),
        ("recall/5", None, "-3min", "--budget is '-3min'"),
        ("recall/5", None, "an hour", "--budget is 'an hour'"),
        (None, 0.1, None, "need --refine"),
    ],
)
def test_what_cannot_be_refined_is_refused(ladder, task, precision, budget, said):
    """Catches a typo, a budget or a precision that would be found out after hours of training."""
    with pytest.raises(UserError, match=said):
        refine.read_goal(task, precision, budget, ladder)


def test_a_budget_has_a_unit(ladder):
    """Catches minutes read as tokens."""
    assert refine.read_goal(None, None, None, ladder) is None
    goal = refine.read_goal("recall/5", None, "30min", ladder)
    assert (goal.minutes, goal.tokens, goal.precision) == (30, None, rungs.PRECISION)
    assert refine.read_goal("recall/3", 0.1, "5e6", ladder).tokens == 5e6


def test_a_budget_is_that_of_all_rounds(ladder):
    """Catches a budget that begins anew with every call, and one that other tasks use up."""
    more = rungs._continued(ladder[2], ladder, {p.name for p in ladder}, 3)
    cell = refine._cell("study", more, ladder)
    entry = {"task": "recall", "level": "5", "points": [to_dict(more)]}
    configs = {more.name: to_dict(cell)}
    once = 3 * cell.steps * cell.tokens_per_step
    goal = refine.Goal("recall", "5", tokens=1.5 * once)
    for refined_before, level, count in (([], "5", 1), ([entry], "5", 0), ([entry], "3", 1)):
        study = {"name": "study", "refined": refined_before, "cell_configs": configs}
        wanted = dataclasses.replace(goal, level=level)
        assert refine._affordable(wanted, study, None, ladder, [cell, cell]) == count


def test_a_study_takes_new_seeds_and_says_so(finished, study, lm, tmp_path, monkeypatch):
    """End to end on the tiny study, with a verdict that is said to lie at 2x4. Catches a finished
    cell that changes a bit, an added cell that `status`, `verify`, `explain` or the table do not
    see, a budget that counts from zero at every call, and a plain `lm run` that finds no end.
    """
    workdir = shutil.copytree(finished, tmp_path / "run")
    rows = {cell: tiny.rows(workdir / cell) for cell in tiny.CELLS}

    def judge(rows, seed=0):
        verdict = judge.real(rows)
        wide = Interval(390, 420 * 10 ** (0.5 if len(rows[rows["metric"] == "nll"]) < 9 else -0.02))
        return dataclasses.replace(verdict, verdict="emergent", onset=404.0, ci95=wide)

    judge.real = onset.judge
    monkeypatch.setattr(report, "main", lambda argv: 0)  # has tests of its own, and takes seconds
    command = ["run", study, f"--workdir={workdir}", "--refine=recall/3", "--workers=1"]
    flat = lm(*command)
    assert flat.code == 2 and "has no onset to refine" in tiny.one_sentence(flat.err)
    monkeypatch.setattr(onset, "judge", judge)
    poor = lm(*command, "--budget=100")
    assert poor.code == 0 and "the budget is spent" in poor.out
    done = lm(*command, "--budget=1e6", "--precision=0.1")
    assert done.code == 0, done.err
    assert "adding 2x4+1, 5 more seeds of 2x4" in done.out and "is met" in done.out
    assert {cell: tiny.rows(workdir / cell) for cell in tiny.CELLS} == rows
    there = read_json(workdir / "study.json")
    assert there["cells"]["2x4+1"] == ["2x4+1"]
    (entry,) = there["refined"]
    assert entry["round"] == 1 and entry["reasons"].keys() == {"2x4+1"}
    assert [r["seed_init"] for r in lm("explain", workdir, "2x4+1", "--json").json["replicas"]] == [
        *range(2, 7)
    ]
    states = {c["cell"]: c["state"] for c in lm("status", workdir, "--json").json["cells"]}
    assert states == {"1x4": "done", "2x4": "done", "2x4+1": "done"}
    found = lm("verify", workdir, "--json").json
    assert found["ok"] and found["cells"] == 3
    before = (workdir / "study.json").read_bytes()
    again = lm(*command, "--budget=1e6", "--precision=0.1")
    assert again.code == 0 and "is met" in again.out and "adding" not in again.out
    assert lm("run", study, f"--workdir={workdir}").code == 0
    assert (workdir / "study.json").read_bytes() == before
