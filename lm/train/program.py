"""Everything a cell runs, compiled ahead of time.

Three programs: fresh states, one dispatch of training, one batch of scoring. Compiling them before
the first step makes the seconds it took a number of their own, and finds a batch that does not
divide the devices before anything is written.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lm import objectives
from lm.data.loader import Batch
from lm.eval.score import Scores, make_scorer
from lm.models.transformer import Transformer, mup_multipliers
from lm.sharding import make_mesh
from lm.train import optim
from lm.train.cell import Cell
from lm.train.population import Population, make_population
from lm.train.step import TrainState, make_chunk, make_step

# Fresh states are made once, in milliseconds; optimising their code takes two seconds a cell on a
# CPU (2.1 against 0.4 s at 2x16).
INIT_OPTIONS = {"cpu": {"xla_backend_optimization_level": 0}, "gpu": None, "tpu": None}


@dataclasses.dataclass(frozen=True)
class Program:
    """Compiled functions, to be called under `jax.set_mesh(mesh)`; `seconds` of compiling."""

    population: Population
    init: Callable[..., TrainState]
    run: Callable[[TrainState, Any], tuple[TrainState, Any]]
    score: Callable[[Any, Batch], Scores]
    mesh: Any
    seconds: float


def make_cell_population(cell: Cell, mesh: Any) -> Population:
    """The population of a cell, traced and not yet compiled; raises UserError if its rows do not
    divide the devices.
    """
    tx = optim.direction(cell.optim, mup_multipliers(cell.model))
    step = make_step(
        Transformer(cell.model),
        objectives.causal,
        tx,
        optim.schedule(cell.optim, cell.steps * cell.tokens_per_step),
        tokens_per_step=cell.tokens_per_step,
        dropout=cell.model.dropout > 0,
    )
    return make_population(
        cell.model,
        make_chunk(step),
        tx,
        replicas=len(cell.replicas),
        rows=cell.data.rows,
        mesh=mesh,
        strategy=cell.train.strategy,
        mode=cell.train.replicas,
    )


def compile_cell(cell: Cell, rows: Batch, devices: list[Any] | None = None) -> Program:
    """Compiles a cell; `rows` is any scoring batch [B, T], for its shapes."""
    begin = time.monotonic()
    used = devices or jax.devices()
    mesh = make_mesh(cell.train.strategy, used, replicas=cell.train.replica_devices)
    population = make_cell_population(cell, mesh)
    count = len(cell.replicas)
    shape = (count, cell.train.chunk, cell.data.rows, cell.data.length)
    batches = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(shape, a.dtype, sharding=population.batches), rows
    )
    numbers = [jax.ShapeDtypeStruct((count,), t) for t in (np.uint32, np.float32, np.uint32)]
    one = jax.tree.map(_without_replicas, population.states.params)
    at_rest = jax.tree.map(lambda leaf: leaf.sharding, one)
    with jax.set_mesh(mesh):
        init = population.init.lower(*numbers).compile(INIT_OPTIONS[used[0].platform])
        run = population.run.lower(population.states, batches).compile()
        scorer = jax.jit(make_scorer(Transformer(cell.model)))
        score = scorer.lower(one, jax.tree.map(np.asarray, rows)).compile()
    return Program(
        population,
        init,
        run,
        # One replica of a stacked tree lies where XLA put it, a compiled program is strict.
        lambda params, batch: score(jax.device_put(params, at_rest), batch),
        mesh,
        time.monotonic() - begin,
    )


def _without_replicas(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape of one replica, cut as in the stack of all."""
    where = NamedSharding(leaf.sharding.mesh, PartitionSpec(*leaf.sharding.spec[1:]))
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype, sharding=where)
