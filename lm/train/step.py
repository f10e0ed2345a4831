"""One training step as a pure function of (state, batch), for one replica.

`jax.vmap` over it is a population, `jax.lax.scan` over it is a dispatch, `jax.jit` with shardings
spreads it over a mesh; none of them is known here. A loss or gradient that is not finite ends the
replica: its parameters stay those of the step before, it is marked with the step at which it
happened, and the steps that follow change nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

ALIVE = -1


class TrainState(NamedTuple):
    """All that training changes, and the replica's own constants; a pytree of arrays that may have
    a leading replica axis.
    """

    step: Array  # int32, steps taken
    params: Any
    opt_state: Any
    learning_rate: Array  # float32, the replica's peak
    dropout_seed: Array  # uint32
    diverged_at: Array  # int32, the first step with a loss or gradient not finite, else ALIVE


def new_state(
    params: Any,
    tx: optax.GradientTransformation,
    learning_rate: float | Array,
    dropout_seed: int | Array,
) -> TrainState:
    """The state before the first step."""
    return TrainState(
        jnp.zeros((), jnp.int32),
        params,
        tx.init(params),
        jnp.asarray(learning_rate, jnp.float32),
        jnp.asarray(dropout_seed, jnp.uint32),
        jnp.full((), ALIVE, jnp.int32),
    )


def make_step(
    model: Any,
    objective: Callable,
    tx: optax.GradientTransformation,
    rate: Callable[[Array], Array],
    *,
    tokens_per_step: int,
    random: bool = False,
) -> Callable[[TrainState, Any], tuple[TrainState, Array]]:
    """`step(state, batch) -> (state, loss)`; `rate` maps tokens seen to a share of the peak
    learning rate. A `random` objective is given a key: it has dropout, or draws masks.
    """

    def step(state: TrainState, batch: Any) -> tuple[TrainState, Array]:
        key = jax.random.fold_in(jax.random.key(state.dropout_seed), state.step) if random else None
        loss_of = jax.value_and_grad(
            lambda params: objective(model, params, batch, key), has_aux=True
        )
        (_, metrics), gradient = loss_of(state.params)
        loss = metrics.loss
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        scale = -state.learning_rate * rate((state.step + 1) * float(tokens_per_step))
        params = jax.tree.map(lambda p, u: p + (scale * u).astype(p.dtype), state.params, updates)

        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradient))
        alive = state.diverged_at == ALIVE
        keep = finite & alive
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(keep, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        diverged_at = jnp.where(alive & ~finite, state.step, state.diverged_at)
        state = state._replace(
            step=state.step + 1, params=params, opt_state=opt_state, diverged_at=diverged_at
        )
        return state, jnp.where(alive, loss, jnp.nan)

    return step


def make_chunk(step: Callable) -> Callable[[TrainState, Any], tuple[TrainState, Array]]:
    """Several steps in one dispatch: batches of n steps, stacked -> (state, losses [n])."""
    return lambda state, batches: jax.lax.scan(step, state, batches)
