"""Rotary position embedding (Su et al. 2021, section 3.4.2): element i of a head is paired with
i + H/2 and the pair is turned by an angle that grows with the position.
"""

import jax.numpy as jnp
from jax import Array


def rope_angles(positions: Array, head_size: int, base: float) -> tuple[Array, Array]:
    """Cosine and sine of positions [B, T] times the frequencies base^(-2i/H): two [B, T, H/2]."""
    frequency = base ** (-jnp.arange(0, head_size, 2, dtype=jnp.float32) / head_size)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Array, angles: tuple[Array, Array]) -> Array:
    """x [B, T, ..., H] with every pair turned by its angle.

    As a permutation product or a roll it was no faster.
    """
    cos, sin = (jnp.expand_dims(a, range(2, x.ndim - 1)) for a in angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def split_heads(qkv: Array) -> tuple[Array, Array, Array]:
    """[B, T, K, N/K + 2, H] -> q [B, T, N, H], k and v [B, T, K, H]: of each kv head's group the
    queries come first, then its key and its value.
    """
    B, T, K, group, H = qkv.shape
    q, k, v = jnp.split(qkv, (group - 2, group - 1), axis=3)
    return q.reshape(B, T, K * (group - 2), H), k[..., 0, :], v[..., 0, :]
