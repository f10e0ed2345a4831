"""The parts of a model: parameters with named axes, norms, products, activations.

Functions that take a `module` make its parameters; its `config` says in which form.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from lm.models.config import deviation
from lm.sharding import constrain

Axes = tuple[str | None, ...]


def parameter(
    module: Any,
    name: str,
    shape: tuple[int, ...],
    axes: Axes,
    init: Callable[..., Array],
) -> Array:
    """A parameter with logical axes; the module's config names `param_dtype`, in which it is
    stored, and `dtype`, in which it is laid out for compute.
    """
    config = module.config
    value = module.param(name, nn.with_logical_partitioning(init, axes), shape, config.param_dtype)
    return constrain(value.astype(config.dtype), axes)


def weight(module: Any, name: str, shape: tuple[int, ...], *axes: str | None) -> Array:
    """A matrix of the table of deviations."""
    init = nn.initializers.normal(deviation(module.config, name))
    return parameter(module, name, shape, axes, init)


def scale(module: Any, name: str, size: int) -> Array:
    """The factor of a norm."""
    return parameter(module, name, (size,), (None,), nn.initializers.ones)


def bias(module: Any, name: str, size: int, axis: str | None = None) -> Array:
    """What is added to a product or a norm."""
    return parameter(module, name, (size,), (axis,), nn.initializers.zeros)


def dense(
    module: Any,
    name: str,
    x: Array,
    shape: tuple[int, int],
    axes: tuple[str | None, str | None],
    learns: bool = True,
) -> Array:
    """x [X, I] times the weight `name` [I, O], plus `name`_bias where the config has one; `learns`
    as for `product`.
    """
    y = product(x, weight(module, name, shape, *axes), learns)
    has = module.config.bias
    if has == "all" or (has == "qkv" and name == "qkv"):
        # What lies along the residual stream is whole on every device, as the norms are.
        axis = None if axes[1] == "embed" else axes[1]
        y = y + bias(module, f"{name}_bias", shape[1], axis)
    return y


def normalise(module: Any, name: str, x: Array) -> Array:
    """x by the config's norm, with the factor `name` and, of a layer norm, `name`_bias."""
    c, D = module.config, x.shape[-1]
    factor = scale(module, name, D)
    if c.norm == "rms":
        return rms_norm(x, factor, c.norm_epsilon)
    return layer_norm(x, factor, bias(module, f"{name}_bias", D), c.norm_epsilon)


def rms_norm(x: Array, scale: Array, epsilon: float) -> Array:
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, computed in float32.

    Zhang and Sennrich 2019, equation 4.
    """
    wide = x.astype(jnp.float32)
    inverse = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * inverse * scale).astype(x.dtype)


def layer_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias over the last axis, computed in float32.

    Ba et al. 2016, equation 4.
    """
    wide = x.astype(jnp.float32)
    wide = wide - wide.mean(axis=-1, keepdims=True)
    inverse = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + epsilon)
    return (wide * inverse * scale + bias).astype(x.dtype)


def activate(name: str, x: Array) -> Array:
    """The nonlinearity of a config's `activation`, which for a gated MLP is that of the gate."""
    if name == "relu":
        return jax.nn.relu(x)
    if name == "swiglu":
        return jax.nn.silu(x)
    return jax.nn.gelu(x, approximate=name != "gelu_exact")


def product(x: Array, w: Array, learns: bool = True) -> Array:
    """x [X, I] @ w [I, O] -> [X, O].

    If a gradient may be asked for, a tall w is turned first, so that its gradient is a wide
    product, [O, X] @ [X, I]: the tall one takes XLA on a CPU up to 5 times as long (265 against 55
    us at [128, 2048] @ [2048, 16]). The barrier keeps XLA from turning it back. To turn it for few
    rows takes longer than the product: up to 20 times, for one row of a model of 135M.
    """
    if learns and w.shape[0] > w.shape[1]:
        return jnp.einsum("xi,oi->xo", x, lax.optimization_barrier(w.T))
    return x @ w


def logits(x: Array, table: Array, learns: bool = True) -> Array:
    """x [X, D] times every row of table [V, D], in float32: [X, V]; turned as in `product`."""
    if not learns:
        return jnp.einsum("xd,vd->xv", x, table, preferred_element_type=jnp.float32)
    turned = lax.optimization_barrier(table.T)
    return jnp.einsum("xd,dv->xv", x, turned, preferred_element_type=jnp.float32)


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Zero each element with probability `rate` and scale the rest; without a key, x itself."""
    if key is None or rate == 0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)
