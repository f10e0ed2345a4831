"""Weights in 8 bits for decoding: w [..., I, O] is `values` int8 times `scale` float32 [..., 1, O].

One scale for each output channel, the largest absolute weight over 127, so that a product is scaled
after its sums. Tables [V, D] are products with their rows, and have a scale for each row, [V, 1].
Norms and biases stay as they are.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

PRODUCTS = ("qkv", "out", "up", "gate", "down")  # [layers, in, out]
TABLES = ("embed", "head")  # [V, D]


class Int8(NamedTuple):
    """A quantised weight."""

    values: Array
    scale: Array


def quantise(params: Any) -> Any:
    """The tree with its matrices as `Int8`; the error of a weight is at most half its scale."""

    def leaf(path: Any, w: Array) -> Any:
        name = path[-1].key
        if name in PRODUCTS and w.ndim == 3:
            return _quantise(w, -2)
        return _quantise(w, -1) if name in TABLES and w.ndim == 2 else w

    return jax.tree_util.tree_map_with_path(leaf, params)


def dequantise(params: Any) -> Any:
    """The tree with plain float32 matrices; a tree without `Int8` is returned as it is."""
    return jax.tree.map(lambda w: _widen(w) if _quantised(w) else w, params, is_leaf=_quantised)


def _quantised(leaf: Any) -> bool:
    return isinstance(leaf, Int8)


@functools.partial(jax.jit, static_argnums=1)
def _quantise(w: Array, axis: int) -> Int8:
    wide = w.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(wide).max(axis, keepdims=True), 1e-30) / 127
    values = jnp.round(wide / scale).astype(jnp.int8)
    return Int8(values, scale)


def _widen(w: Int8) -> Array:
    return w.values.astype(jnp.float32) * w.scale
