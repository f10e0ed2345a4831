"""What a query may see, as structure: a few integers instead of a T x S array.

Query t of row b sees key s when all of these hold:

    s < lengths[b]                                                 padding of the keys
    q_segments[b, t] == k_segments[b, s] != 0                      documents; 0 is padding
    s < prefix[b]   or   (causal: s <= t)  and  (window: |t - s| < window)

Positions are indices into the arrays, so with T != S query 0 stands at key 0, or at key `start`
where there is one: t is then start + t in the last line. A query that sees no
key gives a zero row and zero gradients in every backend. Backends read the fields they can exploit,
or ask `visible` for a tile.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lm.config import UserError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Structure of an attention mask; `None` switches a part off.

    Arrays: q_segments int32 [B, T], k_segments int32 [B, S] (default: q_segments), prefix and
    lengths int32 [B], start int32 [].
    """

    causal: bool = field(default=False, metadata={"static": True})
    window: int | None = field(default=None, metadata={"static": True})
    q_segments: Array | None = None
    k_segments: Array | None = None
    prefix: Array | None = None
    lengths: Array | None = None
    start: Array | None = None

    def as_array(self, T: int, S: int) -> Array:
        """The mask as bool [B or 1, T, S]: quadratic memory, for `reference` and for tests."""
        return visible(self, jnp.arange(T), jnp.arange(S))


def visible(mask: Mask, t: Array, s: Array) -> Array:
    """Which of the keys s [C] the queries t [Q] see: bool [B or 1, Q, C].

    Indices past the end of the segments are padding; without segments the caller hides them.
    """
    i, j = t[:, None] if mask.start is None else t[:, None] + mask.start, s[None, :]
    seen = jnp.ones((1, t.size, s.size), bool)
    if mask.causal:
        seen &= j <= i
    if mask.window is not None:
        seen &= abs(i - j) < mask.window
    if mask.prefix is not None:
        seen |= j < mask.prefix[:, None, None]
    if mask.lengths is not None:
        seen &= j < mask.lengths[:, None, None]
    if mask.q_segments is not None:
        keys = mask.q_segments if mask.k_segments is None else mask.k_segments
        q, k = (
            jnp.asarray(a).at[:, n].get(mode="fill", fill_value=0)
            for a, n in ((mask.q_segments, t), (keys, s))
        )
        seen &= (q[:, :, None] == k[:, None, :]) & (q != 0)[:, :, None]
    return seen


def check(q: Any, k: Any, v: Any, mask: Mask) -> None:
    """Refuse operands and masks that do not fit together, with a sentence."""
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    if not k.shape == v.shape == (B, S, K, H):
        raise UserError(
            f"keys {k.shape} and values {v.shape} do not fit queries {q.shape}; use [B, S, K, H]"
        )
    if N % K:
        raise UserError(f"{K} kv heads do not divide {N} heads; use a divisor of {N}")
    if mask.window is not None and mask.window < 1:
        raise UserError(f"window {mask.window} hides every key; use 1 or more, or None")
    if mask.k_segments is not None and mask.q_segments is None:
        raise UserError("k_segments are given without q_segments; give both or neither")
    keys = mask.q_segments if mask.k_segments is None else mask.k_segments
    for name, value, shape in (
        ("q_segments", mask.q_segments, (B, T)),
        ("k_segments", keys, (B, S)),
        ("prefix", mask.prefix, (B,)),
        ("lengths", mask.lengths, (B,)),
    ):
        if value is not None and value.shape != shape:
            raise UserError(f"{name} has shape {value.shape}, the operands need {shape}")
