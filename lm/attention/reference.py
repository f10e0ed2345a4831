"""Attention by its definition: softmax(scale q k' + bias) v, with the whole T x S array of scores.

    e[t, s] = exp(scale <q[t], k[s]> + bias[t, s] - max)  where t sees s, else 0
    out = e v / max(1/2, sum_s e)

A row that sees a key has a sum of at least 1, so the last maximum only turns 0/0 into 0 for a row
that sees none. (At 1 instead of 1/2, a row with one key would be a tie and get half of its
gradient.) Grouped queries: head n reads kv head n // (N / K); the N / K heads of a group are
further rows of one product, so keys are not repeated. Computed in float32 or wider. It is the
oracle of every other backend, and the fastest one for the short rows of tiny models:
docs/attention.md has the formulations that were tried.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lm.attention.mask import Mask

HIDDEN = -1e30  # added to a score; finite, so that no difference of two of them is NaN


def supports(q: Any, k: Any, v: Any, mask: Mask) -> str:
    """Always runs."""
    return ""


def attention(
    q: Array, k: Array, v: Array, mask: Mask, *, scale: float, bias: Array | None = None
) -> Array:
    """q [B, T, N, H]; k, v [B, S, K, H]; bias [N, T, S] -> [B, T, N, H] in the dtype of q."""
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    G, dtype, wide = N // K, q.dtype, jnp.promote_types(q.dtype, jnp.float32)
    q, k, v = (a.astype(wide) for a in (q, k, v))
    q = (q * scale).reshape(B, T, K, G, H).swapaxes(2, 3).reshape(B, T * G, K, H)
    hidden = jnp.where(mask.as_array(T, S), 0, jnp.asarray(HIDDEN, wide)).repeat(G, axis=1)

    # A bias and a division after the second product: with `where` and `jax.nn.softmax` the gradient
    # takes 1.2 to 1.7 times as long on a CPU.
    scores = jnp.einsum("btkh,bskh->bkts", q, k) + hidden[:, None]
    if bias is not None:
        scores += bias.reshape(K, G, T, S).swapaxes(1, 2).reshape(K, T * G, S)
    top = jnp.maximum(jax.lax.stop_gradient(scores).max(-1, keepdims=True), HIDDEN / 2)
    e = jnp.exp(scores - top)
    share = 1 / jnp.maximum(e.sum(-1), 0.5)
    out = jnp.einsum("bkts,bskh->btkh", e, v) * share.swapaxes(1, 2)[..., None]
    return out.reshape(B, T, G, K, H).swapaxes(2, 3).reshape(B, T, N, H).astype(dtype)
