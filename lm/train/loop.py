"""Training one cell from wherever it stands to its end: dispatch, measure, write rows, checkpoint.

At the end of a dispatch, in this order: the losses of the dispatch before are fetched (the device
never waits for the host), an evaluation is made if one is due, rows are written and synced, and
only then a checkpoint is taken. So every row up to a checkpoint is on the disk before it, a resume
replays from the checkpoint, and a replayed row finds itself there, bit for bit, and is not written
twice.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lm.config import UserError, diff, to_dict
from lm.data.loader import Batch, dataset
from lm.eval.suite import Key, TestSet, evaluate, make_test_set
from lm.eval.trigram import fit_trigram, trigram_accuracy
from lm.rundir import environment, now, read_json, write_json
from lm.train import mixture
from lm.train.cell import Cell
from lm.train.checkpoint import Checkpoints
from lm.train.objective import PAIRS, TEXT, held_out, held_out_view
from lm.train.population import replica
from lm.train.program import Program, compile_cell, fetch, own_part, place, scoring_rows
from lm.train.record import Clock, Recorder, params_sha256
from lm.train.step import ALIVE, TrainState

# What must be the same for a resume to give the same bits.
BITS = ("nproc", "xla_flags", "device", "devices", "jax", "jaxlib")


class Interrupted(Exception):
    """Training was asked to stop and did so after a checkpoint; the same command goes on from
    there.
    """


def train(
    cell: Cell,
    folder: Path,
    data: Path,
    *,
    stop: Callable[[], bool] = lambda: False,
    devices: list[Any] | None = None,
    program: Callable[[], Program] | None = None,
    checkpoints: Path | None = None,
    check: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Trains a cell to its end and returns what is in its `result.json`; the caller holds the
    cell's lock. `program` gives the compiled cell, by default by compiling it now; seconds of
    `compile` are those spent waiting for it. `checkpoints` is theirs by default in `folder`: where
    several processes train a cell, they share these, and all but the first have a `folder` that is
    thrown away. `check` raises when the cell is not the caller's any more; it is called at every
    dispatch and before everything that is written for good.

    Raises UserError for what the user must mend, Interrupted when `stop()` asked for an end.
    """
    begin = time.monotonic()
    check()
    attempt, changed = _begin(cell, folder, devices)
    prepared = mixture.load(cell, data)
    test, chances = _held_out(cell, prepared)
    record = Recorder(cell, folder, attempt, chances)
    saved = Checkpoints(checkpoints or folder / "checkpoints", cell.kept_steps, check)
    try:
        record.event("begin")
        tick = time.monotonic()
        compiled = program() if program else compile_cell(cell, scoring_rows(cell), devices)
        waited = time.monotonic() - tick
        record.event("compiled", waited=waited, **dataclasses.asdict(compiled.cost))
        with jax.set_mesh(compiled.mesh):
            step, states, clock = _start(cell, compiled, saved, record, changed)
            run = _Run(
                *(cell, compiled, prepared, test, record, saved, clock, begin, clock.total),
                check,
            )
            clock.compile += waited
            states = _steps(run, states, step, stop)
            return _finish(run, folder, states, attempt)
    finally:
        saved.close()
        record.close()


def _held_out(cell: Cell, prepared: mixture.Prepared) -> tuple[TestSet, dict[Key, float]]:
    """Everything that is measured, and the chance of what has one."""
    abilities = {k: v for k, v in prepared.test.items() if k[0] not in (TEXT, PAIRS)}
    text = prepared.test[held_out(cell), "", 0]
    view = held_out_view(cell, prepared.tokenizer)
    test = make_test_set(abilities, text, cell.eval.text_rows, cell.eval.batch, view)
    chances = {(t["task"], t["level"], t["format"]): t["chance"] for t in prepared.tasks}
    if cell.train.objective == "masked":
        rows = Batch(*(a.reshape(-1, cell.data.length)[test.text_rows] for a in test.batches))
        masked = Batch(*(a[: len(a) // 2] for a in rows))
        trigram = fit_trigram(prepared.train[TEXT, ""].tokens, cell.model.vocab_size)
        chances[TEXT, "test", 0] = trigram_accuracy(trigram, masked)
    return test, chances


@dataclasses.dataclass(frozen=True)
class _Run:
    """One attempt at one cell."""

    cell: Cell
    program: Program
    prepared: mixture.Prepared
    test: TestSet
    record: Recorder
    checkpoints: Checkpoints
    clock: Clock
    begin: float  # on the monotonic clock
    before: float  # seconds of earlier attempts
    check: Callable[[], None]

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.begin


def _begin(cell: Cell, folder: Path, devices: list[Any] | None) -> tuple[int, list[str]]:
    """Writes config and environment; returns the attempt's number and what changed in BITS since
    the last one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = to_dict(cell)
    if (folder / "config.json").exists():
        if lines := diff(read_json(folder / "config.json"), config):
            raise UserError(
                f"{folder} was begun with another config ({'; '.join(lines)});"
                " choose another --workdir"
            )
    else:
        write_json(folder / "config.json", config)
    used = devices or jax.devices()
    here = {**environment(), "device": used[0].device_kind, "devices": len(used), "time": now()}
    here |= {name: here["versions"].get(name) for name in ("jax", "jaxlib")}
    path = folder / "environment.json"
    before = read_json(path) if path.exists() else []
    last = before[-1] if before else here
    changed = [f"{n}: {last.get(n)} -> {here[n]}" for n in BITS if last.get(n) != here[n]]
    write_json(path, [*before, here])
    return len(before) + 1, changed


def _start(
    cell: Cell, program: Program, checkpoints: Checkpoints, record: Recorder, changed: list[str]
) -> tuple[int, TrainState, Clock]:
    """The states to go on from: of the newest whole checkpoint, or fresh ones."""
    step, states, extra, problems = checkpoints.restore(program.population.states)
    for problem in problems:
        record.event("checkpoint_quarantined", what=problem)
    if step >= 0:
        record.event("resume", step=step)
        if changed:
            record.event("not_bit_exact", what="; ".join(changed))
        return step, states, Clock(**extra["seconds"])
    seeds = np.array([(r.init, r.dropout) for r in cell.replicas], np.uint32)
    rates = np.array([r.learning_rate for r in cell.replicas], np.float32)
    return 0, program.init(seeds[:, 0], rates, seeds[:, 1]), Clock()


def _steps(run: _Run, states: TrainState, first: int, stop: Callable[[], bool]) -> TrainState:
    """The loop over dispatches, from step `first` to the end."""
    cell, clock, n = run.cell, run.clock, run.cell.train.chunk
    due, kept = set(cell.eval_steps), set(cell.kept_steps)
    if first == 0 and kept and not run.checkpoints.steps():
        _save(run, states, 0)
    where = run.program.population.batches
    shape = len(cell.replicas), n, cell.data.rows, cell.data.length
    replicas, rows = own_part(where, shape)
    loaders = mixture.loaders(cell, run.prepared)[replicas.start : replicas.stop]
    feeds = [iter(dataset(loader, first, cell.steps, n, rows=rows)) for loader in loaders]
    pending: tuple[int, Any, Any] | None = None
    for step in range(first + n, cell.steps + 1, n):
        run.check()
        tick = time.monotonic()
        batches = [next(feed) for feed in feeds]
        stacked = Batch(*(np.stack(arrays) for arrays in zip(*batches, strict=True)))
        stacked = jax.tree.map(lambda part: place(part, where, shape), stacked)
        states, losses = run.program.run(states, stacked)
        if pending is not None:
            _fetch(run, pending)
        pending = step, losses, states.diverged_at + 0  # a copy: the next dispatch takes the states
        stopping = stop() and step < cell.steps
        save = stopping or step % cell.train.checkpoint_every < n or step in {*kept, cell.steps}
        if save or step in due:
            _fetch(run, pending)
            pending = None
        clock.train += time.monotonic() - tick
        if step in due:
            _evaluate(run, states, step)
        if save:
            _save(run, states, step)
        if stopping:
            run.checkpoints.seal()
            run.record.event("interrupted", step=step)
            raise Interrupted(f"{cell.name} stopped at step {step} after a checkpoint")
    return states


def _save(run: _Run, states: TrainState, step: int) -> None:
    """Begins a checkpoint when every row before it is on the disk."""
    run.check()
    run.clock.total = run.seconds()
    run.record.sync(run.clock)
    run.checkpoints.save(step, states, {"seconds": dataclasses.asdict(run.clock)})


def _fetch(run: _Run, pending: tuple[int, Any, Any]) -> None:
    step, losses, diverged_at = pending
    losses, diverged_at = fetch(losses).astype(np.float64), fetch(diverged_at)  # waits for it
    run.check()
    run.record.losses(step, losses, diverged_at, run.seconds())


def _evaluate(run: _Run, states: TrainState, step: int) -> None:
    tick = time.monotonic()
    diverged_at = fetch(states.diverged_at)
    for index, who in enumerate(run.cell.replicas):
        ok = int(diverged_at[index]) == ALIVE
        answers, text = evaluate(run.program.score, replica(states.params, index), run.test)
        run.check()
        run.record.evaluation(who, step, answers, text, run.test, ok, run.seconds())
    run.clock.eval += time.monotonic() - tick


def _finish(run: _Run, folder: Path, states: TrainState, attempt: int) -> dict[str, Any]:
    """The result, written when all that it vouches for is on the disk."""
    replicas, diverged_at = [], fetch(states.diverged_at)
    for index, who in enumerate(run.cell.replicas):
        at = int(diverged_at[index])
        replicas.append(
            {
                "point": who.point,
                "replica": who.index,
                "status": "ok" if at == ALIVE else "diverged",
                "diverged_step": None if at == ALIVE else at,
                "params_sha256": params_sha256(jax.tree.map(fetch, replica(states.params, index))),
            }
        )
    run.check()
    run.checkpoints.seal()
    run.clock.total = run.seconds()
    run.record.event("done", step=run.cell.steps)
    run.record.sync(run.clock)
    seconds = {k: round(v, 3) for k, v in dataclasses.asdict(run.clock).items()}
    result = {"status": "done", "replicas": replicas, "seconds": seconds, "attempts": attempt}
    run.check()
    write_json(folder / "result.json", result)
    return result
