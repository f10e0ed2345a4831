"""`lm eval RUNDIR --tasks=NAME/LEVEL`: measures abilities that a finished study had not, on the
checkpoints it kept.

The items are those that the study would have had: of its eval seed, in its tokenizer and rows. Rows
go into the cells' rows.jsonl and answers to the other answers of that evaluation; study.json says
what was asked. One replica at one step is a unit: its answers, its rows, and last an event that
says it is done, so that the same command given again after a kill does what is left. A process of
its own does the work, because a study's thread pool is pinned before JAX starts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from experiments.inspect_run import open_study
from lm import rundir, tasks
from lm.config import UserError, build, nearest, within
from lm.rundir import environment, holder, lock, now, read_json, read_lines, sha256, write_json

if TYPE_CHECKING:
    from lm.emergence.metrics import Answers
    from lm.eval.suite import Key
    from lm.train.cell import Cell

AGAIN = 75  # as a worker's: the process that started this one is gone
PATIENCE = 60.0  # seconds to wait for the one unit that an orphan may be finishing


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `lm eval --help` shows what there is")


def main(argv: list[str]) -> int:
    """`lm eval RUNDIR --tasks=NAME/LEVEL[,...] [--formats=] [--items=] [--steps=] [--json]`."""
    parser = _Parser(
        "lm eval",
        description="Measures new abilities on the kept checkpoints of a study's finished cells.",
        epilog="example: lm eval runs/desk --tasks=hop/2 --steps=last (lm-eval: --harness --help)",
    )
    parser.add_argument("dir", help="the --workdir of an `lm run`")
    parser.add_argument("--tasks", required=True, help="NAME/LEVEL,...; `lm tasks` lists them")
    parser.add_argument("--formats", type=int, default=1, help="in how many prompt formats")
    parser.add_argument("--items", type=int, help="of each task; the study's number unless said")
    parser.add_argument(
        "--steps", default="all", help="all that are kept (default), last, or such as 0,64,512"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, for machines")
    args = parser.parse_args(argv)
    wanted = read_tasks(args.tasks, args.formats)
    if args.items is not None:
        within("--items", args.items, 1)
    workdir, study = open_study(args.dir)
    if "cell_configs" not in study:
        raise UserError(
            f"{workdir} trained something else than our language models; it has no checkpoints"
            " to evaluate"
        )
    with lock(workdir / "lock", f"lm eval {args.tasks}"):
        study = read_json(workdir / "study.json")
        job = plan(workdir, study, wanted, args.items, args.steps)
        found = _carry_out(workdir, job, quiet=args.json)
    return _report(workdir, found, args.json)


def read_tasks(text: str, formats: int) -> list[tasks.Task]:
    """The tasks of `hop/2,program/1`, each in its first `formats` formats; raises UserError with
    the nearest name.
    """
    within("--formats", formats, 1, tasks.FORMATS)
    known = [f"{name}/{level}" for name, level in tasks.TASKS]
    found: dict[str, list[tasks.Task]] = {}
    for word in filter(None, (part.strip() for part in text.split(","))):
        if word not in known:
            raise UserError(f"task {word!r} is not known; {nearest(word, known)}")
        name, _, level = word.partition("/")
        found[word] = [tasks.task(name, level, format) for format in range(formats)]
    if not found:
        raise UserError(f"--tasks is {text!r}; name one, such as --tasks=hop/2")
    return [task for each in found.values() for task in each]


def plan(
    workdir: Path,
    study: Mapping[str, Any],
    wanted: Sequence[tasks.Task],
    items: int | None,
    steps: str,
) -> dict[str, Any]:
    """What is to be done, written into study.json before any of it is: tasks by cell, and steps.

    Raises UserError where nothing can be done, or not what was asked for.
    """
    from lm.train import mixture
    from lm.train.cell import Cell
    from lm.train.checkpoint import sealed_steps

    cells = {name: build(Cell, config, name) for name, config in study["cell_configs"].items()}
    done = {n: c for n, c in cells.items() if (workdir / n / "result.json").exists()}
    if not done:
        raise UserError(f"no cell of {workdir} is done; `lm run` trains them, then give this again")
    earlier = {(e["task"], e["level"]): e["items"] for e in study.get("evaluated", [])}
    count = next(iter(done.values())).eval.items if items is None else items
    for task in wanted:
        if (before := earlier.get((task.name, task.level), count)) != count:
            raise UserError(
                f"{task.name}/{task.level} was evaluated with {before} items, not {count};"
                f" give --items={before}"
            )
    new = {name: [t for t in wanted if not _has(cell, t)] for name, cell in done.items()}
    if not any(new.values()):
        raise UserError(
            f"{workdir} measured {', '.join(dict.fromkeys(f'{t.name}/{t.level}' for t in wanted))}"
            " while it trained; name a task that it had not"
        )
    parts: dict[str, dict[str, Any]] = {
        name: {
            "steps": _choose(workdir / name, sealed_steps(workdir / name / "checkpoints"), steps),
            "tasks": [(t.name, t.level, t.format) for t in new[name]],
        }
        for name in done
        if new[name]
    }
    units = sum(len(done[name].replicas) * len(part["steps"]) for name, part in parts.items())
    left = {
        n: sum(map(len, _left(workdir / n, done[n], part).values())) for n, part in parts.items()
    }
    about: dict[tuple[str, str, int], int] = {}
    for name in filter(left.get, left):
        for task in new[name]:
            packed = mixture.prepare_test(done[name], workdir / "data", task, count)
            about[task.name, task.level, task.format] = packed.documents
    _record(workdir, study, wanted, count, about)
    return {
        **{"items": count, "parent": os.getpid()},
        "cells": {name: part for name, part in parts.items() if left[name]},
        "there": units - sum(left.values()),
        "left_out": sorted(cells.keys() - done.keys()),
    }


def _has(cell: "Cell", task: tasks.Task) -> bool:
    """Whether the study measured a task in that format."""
    own = cell.data.mixture.values()
    return any(
        (m.task, m.level) == (task.name, task.level) and task.format < m.formats for m in own
    )


def _choose(folder: Path, kept: Sequence[int], steps: str) -> list[int]:
    """The steps asked for, of those that are kept."""
    if not kept:
        raise UserError(
            f"{folder} has no checkpoint; a study keeps its last ones, and with"
            " --config.train.keep_every more: restore them or train the cell again"
        )
    if steps in ("all", "last"):
        return list(kept) if steps == "all" else [kept[-1]]
    try:
        asked = sorted({int(step) for step in steps.split(",")})
    except ValueError:
        raise UserError(f"--steps is {steps!r}; use all, last, or such as 0,64,512") from None
    if absent := [step for step in asked if step not in kept]:
        raise UserError(
            f"{folder} kept no checkpoint of step {absent[0]}; use --steps of"
            f" {', '.join(map(str, kept))}"
        )
    return asked


def _record(
    workdir: Path,
    study: Mapping[str, Any],
    wanted: Sequence[tasks.Task],
    items: int,
    about: Mapping[tuple[str, str, int], int],
) -> None:
    """Says in study.json what is evaluated: among its tasks, and under `evaluated`."""
    from lm.train import mixture

    def keys(name: str) -> set[tuple[str, str, int]]:
        return {(t["task"], t["level"], t["format"]) for t in study.get(name, [])}

    known = [
        mixture.known(task, about[key])
        for task in wanted
        if (key := (task.name, task.level, task.format)) in about.keys() - keys("tasks")
    ]
    entries = [
        {"task": task, "level": level, "format": format, "items": items, "time": now()}
        for task, level, format in sorted(about.keys() - keys("evaluated"))
    ]
    if entries:
        added = {"tasks": known, "evaluated": entries}
        more = {name: [*study.get(name, []), *each] for name, each in added.items()}
        write_json(workdir / "study.json", {**study, **more})


def _carry_out(workdir: Path, job: dict[str, Any], quiet: bool) -> dict[str, Any]:
    """Has the job done by a process that starts with the study's NPROC; returns what it did."""
    from experiments import workdir as shared

    if not job["cells"]:
        return {"evaluated": 0, "there": job["there"], "left_out": job["left_out"]}
    command = shared.command(workdir, 1, "experiments.evaluate")
    found: dict[str, Any] = {}
    with (
        tempfile.TemporaryFile("w+") as stderr,
        subprocess.Popen(
            command.argv,
            env={**os.environ, **command.env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        ) as process,
    ):
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps(job))
        process.stdin.close()
        try:
            for line in process.stdout:
                found = json.loads(line)
                if not quiet and "cell" in found:
                    print(f"{found['cell']}: step {found['step']}, {found['seconds']:.1f} s")
            process.wait()
        except BaseException:
            process.kill()  # nothing is lost
            raise
        stderr.seek(0)
        errors = stderr.read()
    if process.returncode == 2:
        raise UserError(errors.splitlines()[-1])
    if process.returncode:
        raise RuntimeError(f"evaluating ended with {process.returncode}:\n{errors}")
    return {"evaluated": found["evaluated"], "there": job["there"], "left_out": job["left_out"]}


def _report(workdir: Path, found: dict[str, Any], as_json: bool) -> int:
    from lm.emergence import report

    if as_json:
        report.write(workdir)
        print(json.dumps(found))
        return 0
    print(f"{found['evaluated']} evaluations made, {found['there']} were there")
    for name in found["left_out"]:
        print(f"{name} is not done and was left out; give the same command again when it is")
    return report.main([str(workdir)])


def work(workdir: Path, job: Mapping[str, Any]) -> dict[str, int]:
    """Does a job, one cell after another, printing a JSON line for every step of a cell; returns
    how many units were evaluated.
    """
    made = 0
    for name, part in job["cells"].items():
        _wait(workdir / name / "lock")
        with lock(workdir / name / "lock", f"lm eval, cell {name}"):
            made += _evaluate_cell(workdir, name, part, job["items"], job["parent"])
    return {"evaluated": made}


def _wait(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while holder(path) and time.monotonic() < deadline:
        time.sleep(0.2)


def _evaluate_cell(
    workdir: Path, name: str, part: Mapping[str, Any], items: int, parent: int
) -> int:
    """Evaluates what is left of a cell; returns the number of units."""
    import jax

    from lm.emergence import metrics
    from lm.eval.suite import evaluate, make_test_set
    from lm.train import checkpoint, mixture
    from lm.train.cell import Cell
    from lm.train.population import replica
    from lm.train.program import compile_scoring, scoring_rows
    from lm.train.record import Recorder
    from lm.train.step import ALIVE

    folder, begin = rundir.inside(workdir, name), time.monotonic()
    cell = build(Cell, read_json(folder / "config.json"), name)
    wanted = [tasks.task(*key) for key in part["tasks"]]
    units = _left(folder, cell, part)
    todo = sum(map(len, units.values()))
    if not todo:  # an orphan, which we waited for, did it
        return 0
    packs = {
        (t.name, t.level, t.format): mixture.prepare_test(cell, workdir / "data", t, items)
        for t in wanted
    }
    test = make_test_set(packs, None, 0, cell.eval.batch)
    study = read_json(workdir / "study.json")
    chances = {(t["task"], t["level"], t["format"]): t["chance"] for t in study["tasks"]}
    program = compile_scoring(cell, scoring_rows(cell))
    record = Recorder(cell, folder, _attempt(folder), chances)
    try:
        with jax.set_mesh(program.mesh):
            for step in (step for step, left in units.items() if left):
                states = checkpoint.load(folder / "checkpoints", step, program.states)
                if step == cell.steps:
                    check_params(folder, states)
                for index in units[step]:
                    if os.getppid() != parent:
                        raise SystemExit(AGAIN)
                    who = cell.replicas[index]
                    answers, _ = evaluate(program.score, replica(states.params, index), test)
                    file = _add_answers(folder, f"{step:08d}-{who.point}-{who.index}", answers)
                    record.event("answers", file=file, sha256=sha256(folder / file))
                    ok = int(states.diverged_at[index]) == ALIVE
                    seconds = time.monotonic() - begin
                    for where, found in answers.items():
                        record.measure(who, step, where, metrics.score(found), ok, seconds)
                    record.rows.sync()
                    about = {"step": step, "point": who.point, "replica": who.index}
                    record.event("evaluated", **about, tasks=part["tasks"])
                    record.events.sync()
                seconds = time.monotonic() - begin
                print(json.dumps({"cell": name, "step": step, "seconds": seconds}), flush=True)
    finally:
        record.close()
    return todo


def _left(folder: Path, cell: "Cell", part: Mapping[str, Any]) -> dict[int, list[int]]:
    """By step, the replicas that were not yet asked everything."""
    asked: dict[tuple[int, str, int], set[tuple]] = {}
    for event in read_lines(folder / "events.jsonl")[0]:
        if event["event"] == "evaluated":
            who = event["step"], event["point"], event["replica"]
            asked.setdefault(who, set()).update(map(tuple, event["tasks"]))
    wanted = set(map(tuple, part["tasks"]))
    return {
        step: [
            index
            for index, who in enumerate(cell.replicas)
            if wanted - asked.get((step, who.point, who.index), set())
        ]
        for step in part["steps"]
    }


def _attempt(folder: Path) -> int:
    """Adds this process to environment.json, as an attempt at training would; returns its
    number.
    """
    import jax

    path, used = folder / "environment.json", jax.devices()
    before = read_json(path) if path.exists() else []
    here = {**environment(), "device": used[0].device_kind, "devices": len(used), "time": now()}
    here |= {name: here["versions"].get(name) for name in ("jax", "jaxlib")}
    write_json(path, [*before, here | {"verb": "eval"}])
    return len(before) + 1


def check_params(folder: Path, states: Any) -> None:
    """Refuses final parameters that are not those that the result vouches for."""
    from lm.train.population import replica
    from lm.train.record import params_sha256

    for index, result in enumerate(read_json(folder / "result.json")["replicas"]):
        if params_sha256(replica(states.params, index)) != result["params_sha256"]:
            raise UserError(
                f"the last checkpoint of {folder} does not hold the parameters of its result.json"
                f" (replica {result['replica']} of {result['point']}); restore both from a backup"
            )


def _add_answers(folder: Path, name: str, answers: Mapping["Key", "Answers"]) -> str:
    """Puts answers beside those of the same evaluation, in one file, whole or not at all; returns
    its name in the cell's folder.
    """
    from lm.emergence import metrics

    file = f"answers/{name}.npz"
    (folder / "answers").mkdir(exist_ok=True)
    before = metrics.load(folder / file) if (folder / file).exists() else {}
    new = {f"{task}.{level}.{format}": a for (task, level, format), a in answers.items()}
    metrics.save(folder / file, {**before, **new})
    return file


if __name__ == "__main__":
    try:
        print(json.dumps(work(Path(sys.argv[1]), json.load(sys.stdin))))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
