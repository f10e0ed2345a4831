"""Replicas are an axis: one compiled program trains all replicas of a cell.

`vmap` runs them side by side, `sequential` runs the same step on one after another
(`jax.lax.map`), `fused` is `vmap` over the objective that is one kernel (`lm.models.fused`). All
take and give states with a leading replica axis and agree within rounding, so nothing else knows
which one runs. On a mesh every state rests where its strategy says, with the replica axis in
front; the step is a `jax.jit` with those shardings and donates the state. Where several devices
share a row it is here that rows are dealt to them (`lm.attention.ring`): what trains does not know,
but draws other dropout masks.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lm.attention.ring import deal
from lm.models import Config, initialise
from lm.sharding import Strategy, batch_sharding, replica_axis, shardings
from lm.train.step import TrainState, new_state

Mode = Literal["auto", "vmap", "sequential", "fused"]

# What `auto` means. CPU: tiny products run one at a time anyway, and replicas side by side fall out
# of the cache (docs/design.md has the figures); accelerators are idle unless replicas fill them
# (0.72 against 3.82 ms a step of 16 replicas of 2x32 on an H200).
FASTEST: dict[str, Literal["vmap", "sequential"]] = {
    "cpu": "sequential",
    "gpu": "vmap",
    "tpu": "vmap",
}


class Population(NamedTuple):
    """Two functions made by `jax.jit` and the shardings of what they take."""

    init: Any  # (init seeds [R], learning rates [R], dropout seeds [R]) -> states
    run: Any  # (states, batches [R, n, B, T]) -> (states, losses [R, n])
    states: TrainState  # shapes with shardings, for compiling ahead and for restoring
    batches: NamedSharding


def make_population(
    config: Config,
    chunk: Callable[[TrainState, Any], tuple[TrainState, Array]],
    tx: optax.GradientTransformation,
    *,
    replicas: int,
    rows: int,
    mesh: Mesh,
    strategy: Strategy = "replicated",
    mode: Mode = "auto",
) -> Population:
    """The population of `replicas` states trained by `chunk`; call and lower its functions under
    `jax.set_mesh(mesh)`.
    """
    one_by_one = choose(mode, mesh) == "sequential"

    def over_replicas(f: Callable, *args: Any) -> Any:
        if one_by_one:
            return jax.lax.map(lambda a: f(*a), args)
        return jax.vmap(f, spmd_axis_name=replica_axis(mesh))(*args)

    def boxed(seed: Array, learning_rate: Array, dropout_seed: Array) -> TrainState:
        # Initialising traces the model on one token, which no mesh divides: only its result is cut.
        with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
            params = initialise(config, jax.random.key(seed))
        return new_state(params, tx, learning_rate, dropout_seed)

    numbers = [jax.ShapeDtypeStruct((replicas,), t) for t in (jnp.uint32, jnp.float32, jnp.uint32)]
    shapes = _open_empty(jax.eval_shape(lambda *a: over_replicas(boxed, *a), *numbers))
    at_rest = shardings(shapes, mesh, strategy, replicas=True)
    cut = batch_sharding(mesh, rows, replicas=replicas if replica_axis(mesh) else 0).spec
    cut = PartitionSpec(*(cut[:1] if replica_axis(mesh) else (None,)), None, cut[-1])
    batches = NamedSharding(mesh, cut)
    losses = NamedSharding(mesh, PartitionSpec(replica_axis(mesh)))
    return Population(
        init=jax.jit(lambda *a: nn.unbox(over_replicas(boxed, *a)), out_shardings=at_rest),
        run=jax.jit(
            lambda states, b: over_replicas(lambda s, x: chunk(s, deal(x)), states, b),
            in_shardings=(at_rest, batches),
            out_shardings=(at_rest, losses),
            donate_argnums=0,
        ),
        states=jax.tree.map(
            lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
            nn.unbox(shapes),
            at_rest,
        ),
        batches=batches,
    )


def _open_empty(boxed: Any) -> Any:
    """Opens boxes around nothing: Muon masks what is Adam's, and has names for it, but no shape."""

    def is_box(leaf: Any) -> bool:
        return isinstance(leaf, nn.Partitioned)

    return jax.tree.map(
        lambda leaf: leaf.value if is_box(leaf) and not jax.tree.leaves(leaf) else leaf,
        boxed,
        is_leaf=is_box,
    )


def choose(mode: Mode, mesh: Mesh) -> Literal["vmap", "sequential"]:
    """How the step is mapped over replicas; those spread over devices can only run side by side."""
    if mode == "fused":
        return "vmap"
    if mode != "auto":
        return mode
    return "vmap" if replica_axis(mesh) else FASTEST[mesh.devices.flat[0].platform]


def replica(tree: Any, index: int) -> Any:
    """One replica of a stacked tree."""
    return jax.tree.map(lambda leaf: leaf[index], tree)
