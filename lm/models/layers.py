"""The parts of a Transformer: parameters with named axes, norm, rotary positions, products."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from lm.sharding import constrain


def parameter(
    module: Any,
    name: str,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: Callable[..., Array],
) -> Array:
    """A parameter with logical axes; the module's config names `param_dtype`, in which it is
    stored, and `dtype`, in which it is laid out for compute.
    """
    config = module.config
    value = module.param(name, nn.with_logical_partitioning(init, axes), shape, config.param_dtype)
    return constrain(value.astype(config.dtype), axes)


def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, computed in float32.

    Zhang and Sennrich 2019, equation 4.
    """
    wide = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * inverse * scale).astype(x.dtype)


def product(x: Array, w: Array) -> Array:
    """x [X, I] @ w [I, O] -> [X, O].

    A tall w is turned first, so that its gradient is a wide product, [O, X] @ [X, I]: the tall one
    takes XLA on a CPU up to 5 times as long (265 against 55 us at [128, 2048] @ [2048, 16]). The
    barrier keeps XLA from turning it back.
    """
    if w.shape[0] > w.shape[1]:
        return jnp.einsum("xi,oi->xo", x, lax.optimization_barrier(w.T))
    return x @ w


def logits(x: Array, table: Array) -> Array:
    """x [X, D] times every row of table [V, D], in float32: [X, V]. The barrier as in `product`."""
    turned = lax.optimization_barrier(table.T)
    return jnp.einsum("xd,dv->xv", x, turned, preferred_element_type=jnp.float32)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zero each element with probability `rate` and scale the rest; without a key, x itself."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)
