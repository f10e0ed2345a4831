"""Rotary position embedding (Su et al. 2021, section 3.4.2): of the R features that are rotated,
the first of a head and as a rule all, i is paired with i + R/2 and the pair is turned by an angle
that grows with the position.
"""

import math

import jax.numpy as jnp
from jax import Array


def rope_angles(
    positions: Array, rotated: int, base: float, scaling: tuple[float, ...] = ()
) -> tuple[Array, Array]:
    """Cosine and sine of positions [B, T] times the frequencies base^(-2i/R): two [B, T, R/2]."""
    frequency = base ** (-jnp.arange(0, rotated, 2, dtype=jnp.float32) / rotated)
    if scaling:
        frequency = stretch(frequency, *scaling)
    angle = positions[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def stretch(frequency: Array, factor: float, low: float, high: float, context: float) -> Array:
    """Frequencies for a longer context than the model was trained on, as Llama 3.1 has them.

    Those with more than `high` turns in the old `context` stay, those with fewer than `low` are
    divided by `factor`, and in between the two are mixed (Grattafiori et al. 2024, section 3.4.2).
    """
    turns = context * frequency / (2 * math.pi)
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    return kept * frequency + (1 - kept) * frequency / factor


def rotate(x: Array, angles: tuple[Array, Array]) -> Array:
    """x [B, T, ..., H] with every pair of its first R features turned by its angle.

    As a permutation product or a roll it was no faster.
    """
    cos, sin = (jnp.expand_dims(a, range(2, x.ndim - 1)) for a in angles)
    half = cos.shape[-1]
    if 2 * half < x.shape[-1]:
        turned = rotate(x[..., : 2 * half], angles)
        return jnp.concatenate([turned, x[..., 2 * half :]], axis=-1)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def split_heads(qkv: Array) -> tuple[Array, Array, Array]:
    """[B, T, K, N/K + 2, H] -> q [B, T, N, H], k and v [B, T, K, H]: of each kv head's group the
    queries come first, then its key and its value.
    """
    B, T, K, group, H = qkv.shape
    q, k, v = jnp.split(qkv, (group - 2, group - 1), axis=3)
    return q.reshape(B, T, K * (group - 2), H), k[..., 0, :], v[..., 0, :]
