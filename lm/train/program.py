"""Everything a cell runs, compiled ahead of time.

Three programs: fresh states, one dispatch of training, one batch of scoring. Compiling them before
the first step makes the seconds it took a number of their own, and finds a batch that does not
divide the devices before anything is written. Names, seeds, learning rates and data are arguments:
cells that differ in nothing else share an entry of the persistent cache.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm import objectives
from lm.attention import ring
from lm.config import UserError
from lm.data.loader import Batch
from lm.eval.score import Asked, Scores, make_scorer, nothing_asked
from lm.models import build, mup_multipliers
from lm.models import fused as fused_kernel
from lm.sharding import SEQUENCE, make_mesh
from lm.train import optim
from lm.train.cell import Cell
from lm.train.objective import draws, make_objective
from lm.train.population import Population, make_population
from lm.train.step import TrainState, make_chunk, make_step

# Fresh states are made once, in milliseconds; optimising their code takes two seconds a cell on a
# CPU (2.1 against 0.4 s at 2x16).
INIT_OPTIONS = {"cpu": {"xla_backend_optimization_level": 0}, "gpu": None, "tpu": None}


@dataclasses.dataclass
class Cost:
    """Seconds of making programs, by kind, how many were made, and how many of them were in the
    persistent cache: for those `compile` is the time of reading them.
    """

    trace: float = 0.0
    lower: float = 0.0
    compile: float = 0.0
    programs: int = 0
    cached: int = 0


@dataclasses.dataclass(frozen=True)
class Program:
    """Compiled functions, to be called under `jax.set_mesh(mesh)`; `seconds` from begin to end, and
    what they went into.
    """

    population: Population
    init: Callable[..., TrainState]
    run: Callable[[TrainState, Any], tuple[TrainState, Any]]
    score: Callable[[Any, Batch, Asked], Scores]
    mesh: Any
    seconds: float
    cost: Cost


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What evaluating a checkpoint takes: the shapes of its states, and the compiled scorer, to be
    called under `jax.set_mesh(mesh)`.
    """

    states: TrainState
    score: Callable[[Any, Batch, Asked], Scores]
    mesh: Any


def cell_mesh(cell: Cell, devices: Sequence[Any]) -> Mesh:
    """The mesh that a cell asks for over `devices`; raises UserError where they do not divide."""
    return make_mesh(
        cell.train.strategy,
        devices,
        replicas=cell.train.replica_devices,
        tensor=cell.train.tensor_devices or None,
        sequence=cell.train.sequence_devices or None,
    )


def make_cell_population(cell: Cell, mesh: Mesh) -> Population:
    """The population of a cell, traced and not yet compiled; raises UserError if its rows, or the
    tokens of a row, do not divide the devices.
    """
    ring.check_length(cell.data.length, mesh.shape.get(SEQUENCE, 1))
    tx = optim.direction(cell.optim, mup_multipliers(cell.model))
    fused = is_fused(cell, mesh)
    step = make_step(
        build(cell.model),
        objectives.fused if fused else make_objective(cell),
        tx,
        optim.schedule(cell.optim, cell.steps * cell.tokens_per_step),
        tokens_per_step=cell.tokens_per_step,
        random=draws(cell),
    )
    return make_population(
        cell.model,
        make_chunk(step),
        tx,
        replicas=len(cell.replicas),
        rows=cell.data.rows,
        mesh=mesh,
        strategy=cell.train.strategy,
        mode="fused" if fused else cell.train.replicas,
    )


def is_fused(cell: Cell, mesh: Any) -> bool:
    """Whether the loss and its gradient are one kernel: where it can be, unless told otherwise.

    Raises UserError if it is asked for and cannot be.
    """
    if cell.train.replicas not in ("auto", "fused"):
        return False
    device = mesh.devices.flat[0].platform
    if mesh.size > 1 or device != "cpu":
        reason = f"it needs one CPU device, the mesh has {mesh.size} of {device}"
    elif cell.train.objective != "causal":
        reason = f"the objective is {cell.train.objective!r}, not 'causal'"
    else:
        model: Any = cell.model
        reason = fused_kernel.supports(model, cell.data.length)
    if reason and cell.train.replicas == "fused":
        raise UserError(f"train.replicas 'fused' cannot run this cell: {reason}; use 'auto'")
    return not reason


def own_part(where: NamedSharding, shape: tuple[int, ...]) -> tuple[range, range]:
    """Which replicas and which rows of batches [R, n, B, T] the devices of this process hold."""
    held = where.addressable_devices_indices_map(shape).values()
    ranges = []
    for axis in (0, 2):
        cuts = [index[axis].indices(shape[axis]) for index in held if index is not None]
        ranges.append(range(min(c[0] for c in cuts), max(c[1] for c in cuts)))
    return ranges[0], ranges[1]


def place(part: np.ndarray, where: NamedSharding, shape: tuple[int, ...]) -> Any:
    """An array of `shape` [R, n, B, T] on the mesh, of which this process gives its `own_part`."""
    if where.is_fully_addressable:
        return jax.device_put(part, where)
    replicas, rows = own_part(where, shape)

    def cut(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        first, last = (
            slice(i.indices(size)[0] - own.start, i.indices(size)[1] - own.start)
            for i, size, own in ((index[0], shape[0], replicas), (index[2], shape[2], rows))
        )
        return part[first, :, last]

    return jax.make_array_from_callback(shape, where, cut)


def fetch(array: Any) -> np.ndarray:
    """An array of the mesh as NumPy; where processes share it, all of them must call this."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def scoring_rows(cell: Cell) -> Batch:
    """Zeros in the shape of a cell's scoring batch, for `compile_cell`: no data need be there."""
    shape = cell.eval.batch, cell.data.length
    whole, real = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    return Batch(tokens=whole, targets=whole, weights=real, segments=whole, positions=whole)


def compile_cell(cell: Cell, rows: Batch, devices: list[Any] | None = None) -> Program:
    """Compiles a cell, on any thread; `rows` is any scoring batch [B, T], for its shapes."""
    begin = time.monotonic()
    used = devices or jax.devices()
    mesh = cell_mesh(cell, used)
    population = make_cell_population(cell, mesh)
    count = len(cell.replicas)
    shape = (count, cell.train.chunk, cell.data.rows, cell.data.length)
    batches = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(shape, a.dtype, sharding=population.batches), rows
    )
    numbers = [jax.ShapeDtypeStruct((count,), t) for t in (np.uint32, np.float32, np.uint32)]
    cost = Cost(trace=time.monotonic() - begin)
    with jax.set_mesh(mesh):
        lowered_init = _lower(cost, population.init, *numbers)
        lowered_run = _lower(cost, population.run, population.states, batches)
        lowered_score = _lower_scorer(cost, cell, population, rows)
        with _one_process_at_a_time(lowered_run):
            init = _compile(cost, lowered_init, INIT_OPTIONS[used[0].platform])
            run = _compile(cost, lowered_run)
            score = _compile(cost, lowered_score)
    return Program(
        population,
        init,
        run,
        _placed(population, score),
        mesh,
        time.monotonic() - begin,
        cost,
    )


def compile_scoring(cell: Cell, rows: Batch, devices: list[Any] | None = None) -> Scoring:
    """Compiles only what scores a cell's states; the program is that of `compile_cell`, bit for
    bit, and so comes from the cache where the cell was trained.
    """
    used = devices or jax.devices()
    mesh = cell_mesh(cell, used)
    population = make_cell_population(cell, mesh)
    cost = Cost()
    with jax.set_mesh(mesh):
        score = _compile(cost, _lower_scorer(cost, cell, population, rows))
    return Scoring(population.states, _placed(population, score), mesh)


def _lower_scorer(cost: Cost, cell: Cell, population: Population, rows: Batch) -> Any:
    one = jax.tree.map(_without_replicas, population.states.params)
    asked = nothing_asked(*np.shape(rows.tokens))
    # Every process reads all scores; one process may leave them where XLA puts them.
    mesh = population.batches.mesh
    shared = NamedSharding(mesh, PartitionSpec()) if _several(mesh) else None
    scorer = jax.jit(make_scorer(build(cell.model)), out_shardings=shared)
    return _lower(cost, scorer, one, jax.tree.map(np.asarray, rows), asked)


def _several(mesh: Any) -> bool:
    return len({device.process_index for device in mesh.devices.flat}) > 1


def _placed(population: Population, score: Any) -> Callable[[Any, Batch, Asked], Scores]:
    """`score` of parameters that may lie anywhere: one replica of a stacked tree lies where XLA put
    it, a compiled program is strict.
    """
    one = jax.tree.map(_without_replicas, population.states.params)
    at_rest = jax.tree.map(lambda leaf: leaf.sharding, one)
    return lambda params, *rows: score(jax.device_put(params, at_rest), *rows)


def _lower(cost: Cost, function: Any, *args: Any) -> Any:
    begin = time.monotonic()
    traced = function.trace(*args)
    cost.trace += time.monotonic() - begin
    begin = time.monotonic()
    lowered = traced.lower()
    cost.lower += time.monotonic() - begin
    return lowered


def _compile(cost: Cost, lowered: Any, options: dict[str, Any] | None = None) -> Any:
    begin, before = time.monotonic(), _seen.hits
    compiled = lowered.compile(options)
    cost.compile += time.monotonic() - begin
    cost.programs += 1
    cost.cached += _seen.hits - before
    return compiled


class _Seen(threading.local):
    """Programs that this thread found in the persistent cache."""

    hits = 0


_seen = _Seen()


def _count(event: str, **_: Any) -> None:
    _seen.hits += event == "/jax/compilation_cache/cache_hits"


jax.monitoring.register_event_listener(_count)


@contextlib.contextmanager
def _one_process_at_a_time(lowered: Any) -> Iterator[None]:
    """Holds back a program that another process is compiling until it is in the cache they share.

    The lock is one of 256 files, by a hash of the program's text: two programs of one file wait for
    each other without need. Where there is no cache, or no lock to be had in it, nothing is held.
    """
    with contextlib.ExitStack() as stack:
        # Processes that train one cell compile together, and only the first writes to the cache.
        folder = jax.config.jax_compilation_cache_dir
        if folder and jax.process_count() == 1:
            name = hashlib.sha256(lowered.as_text().encode()).hexdigest()[:2]
            with contextlib.suppress(OSError):
                locks = Path(folder) / "locks"
                locks.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context(open(locks / name, "a"))
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _without_replicas(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape of one replica, cut as in the stack of all."""
    where = NamedSharding(leaf.sharding.mesh, PartitionSpec(*leaf.sharding.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=where)
