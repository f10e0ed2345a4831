"""Relative position bias (Raffel et al. 2020, section 2.1): a number for each head and distance.

Distances fall into 32 buckets: the near ones have one each, farther ones share one with others of
about the same logarithm, and all from 128 on the last. Where tokens are seen in both directions
half of the buckets are for keys to the right.
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import Array

BUCKETS = 32
FARTHEST = 128


def buckets(distance: Array, both: bool) -> Array:
    """The bucket of a key that stands `distance` int32 [...] to the right of its query."""
    count = BUCKETS // 2 if both else BUCKETS
    near = jnp.asarray(_by_length(count))[jnp.clip(-distance, 0, FARTHEST)]
    if not both:
        return near
    right = jnp.asarray(_by_length(count))[jnp.clip(distance, 0, FARTHEST)]
    return jnp.where(distance > 0, count + right, near)


def _by_length(count: int) -> np.ndarray:
    """The bucket, of `count`, of each length 0..FARTHEST."""
    exact = count // 2
    length = np.arange(FARTHEST + 1)
    share = np.log(np.maximum(length, 1).astype(np.float32) / np.float32(exact))
    share = share / np.float32(math.log(FARTHEST / exact)) * np.float32(count - exact)
    far = np.minimum(exact + share.astype(np.int32), count - 1)
    return np.where(length < exact, length, far).astype(np.int32)


def relative_bias(table: Array, T: int, S: int, start: Array | int, both: bool) -> Array:
    """table [32, N] -> the bias [N, T, S] of keys 0.. for queries that stand at key `start`, ...

    It is the same along diagonals: one column for each distance, which is then shifted by
    reshaping, since the gradient of a gather of T x S numbers would be a scatter.
    """
    distance = jnp.arange(T + S) - (T - 1) - start
    line = jnp.take(table, buckets(distance, both), axis=0).T
    N, M = line.shape
    rows = jnp.broadcast_to(line[:, None], (N, T, M)).reshape(N, T * M)
    return rows[:, : T * (M - 1)].reshape(N, T, M - 1)[:, :, T - 1 :]
