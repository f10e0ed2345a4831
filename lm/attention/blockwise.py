"""Attention in linear memory: online softmax over key blocks, with a gradient that recomputes.

For each block of queries the keys are visited in blocks, with running maximum m, sum l and
accumulator a:

    s = scale q k' + mask        m' = max(m, max s)         p = exp(s - m')
    l' = l exp(m - m') + sum p   a' = a exp(m - m') + p v   out = a / l,   L = m + log l

Only out and L are kept. The gradient recomputes p = exp(s - L) per block (Dao et al. 2022):

    D = <dout, out>   dv += p' dout   ds = p (dout v' - D)   dq += scale ds k   dk += scale ds' q

Key blocks above the causal diagonal or outside the window are not visited. The N / K heads of a
group are rows of one product with their kv head, so keys are not repeated. Statistics are float32
or wider.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from lm.attention.mask import Mask, visible

BLOCK = 128  # queries and keys of a tile, and on a GPU, where small products wait for each other:
GPU_BLOCK = 512
HIDDEN = -1e30  # added to a score; finite, so that no difference of two of them is NaN


def supports(q: Any, k: Any, v: Any, mask: Mask) -> str:
    """Always runs."""
    return ""


def attention(q: Array, k: Array, v: Array, mask: Mask, *, scale: float) -> Array:
    """q [B, T, N, H]; k, v [B, S, K, H] -> [B, T, N, H] in the dtype of q."""
    return _attention(q, k, v, mask, scale)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q: Array, k: Array, v: Array, mask: Mask, scale: float) -> Array:
    return _forward(q, k, v, mask, scale)[0]


def _forward(q: Array, k: Array, v: Array, mask: Mask, scale: float) -> tuple[Array, Any]:
    """The output, and what the gradient needs: operands, output and log-sum-exp."""
    K, wide = k.shape[2], _wide(q)
    qs, ks, vs = _split_queries(q, K), _split_keys(k), _split_keys(v)
    tile = _Tiles(mask, q.shape, k.shape)

    def row(operand: tuple[Array, Array]) -> tuple[Array, Array]:
        i, qi = operand  # qi [B, K, Q*G, H]

        def column(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            a, m, total = carry
            s = _dot("bkth,bksh->bkts", qi, ks[j]) * scale + tile.bias(i, j)
            new = jnp.maximum(m, s.max(-1))
            p, old = jnp.exp(s - new[..., None]), jnp.exp(m - new)
            pv = _dot("bkts,bksh->bkth", p.astype(v.dtype), vs[j])
            return a * old[..., None] + pv, new, total * old + p.sum(-1)

        # The maximum starts above HIDDEN, so a row that sees nothing has p = 0 throughout.
        m = jnp.full_like(qi[..., 0], HIDDEN / 2, wide)
        start = jnp.zeros_like(qi, wide), m, jnp.zeros_like(m)
        a, m, total = lax.fori_loop(*tile.bounds(i), column, start)
        total = jnp.maximum(total, 0.5)
        return a / total[..., None], m + jnp.log(total)

    out, lse = lax.map(row, (jnp.arange(len(qs)), qs))
    out = _join_queries(out, q).astype(q.dtype)
    return out, (q, k, v, mask, out, lse)


def _backward(scale: float, saved: Any, dout: Array) -> tuple:
    """Gradients of q, k and v; the mask has none."""
    q, k, v, mask, out, lse = saved
    K, wide = k.shape[2], _wide(q)
    qs, ks, vs = _split_queries(q, K), _split_keys(k), _split_keys(v)
    douts, delta = _split_queries(dout, K), (out.astype(wide) * dout.astype(wide)).sum(-1)
    deltas = _split_queries(delta[..., None], K)
    tile = _Tiles(mask, q.shape, k.shape)

    def row(carry: tuple[Array, Array], operand: tuple) -> tuple[tuple[Array, Array], Array]:
        i, qi, doi, li, di = operand

        def column(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            dqi, dks, dvs = carry
            s = _dot("bkth,bksh->bkts", qi, ks[j]) * scale + tile.bias(i, j)
            p = jnp.exp(s - li[..., None])
            dp = _dot("bkth,bksh->bkts", doi, vs[j])
            ds = (p * (dp - di) * scale).astype(q.dtype)
            dvs = dvs.at[j].add(_dot("bkts,bkth->bksh", p.astype(q.dtype), doi))
            dks = dks.at[j].add(_dot("bkts,bkth->bksh", ds, qi))
            return dqi + _dot("bkts,bksh->bkth", ds, ks[j]), dks, dvs

        start = jnp.zeros_like(qi, wide), *carry
        dqi, dks, dvs = lax.fori_loop(*tile.bounds(i), column, start)
        return (dks, dvs), dqi

    zeros = jnp.zeros_like(ks, wide), jnp.zeros_like(vs, wide)
    (dks, dvs), dqs = lax.scan(row, zeros, (jnp.arange(len(qs)), qs, douts, lse, deltas))
    dq, dk, dv = _join_queries(dqs, q), _join_keys(dks, k), _join_keys(dvs, v)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_forward, _backward)


def _block(length: int) -> int:
    return min(GPU_BLOCK if jax.default_backend() == "gpu" else BLOCK, length)


def _wide(x: Array) -> Any:
    """The dtype of sums and statistics."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _dot(letters: str, a: Array, b: Array) -> Array:
    return jnp.einsum(letters, a, b, preferred_element_type=_wide(a))


def _split(x: Array) -> Array:
    """[B, T, ...] -> [blocks, B, block, ...], padded with zeros to whole blocks."""
    B, T, *rest = x.shape
    size = _block(T)
    x = jnp.pad(x, [(0, 0), (0, -T % size)] + [(0, 0)] * len(rest))
    return x.reshape(B, -1, size, *rest).swapaxes(0, 1)


def _split_queries(q: Array, K: int) -> Array:
    """[B, T, N, H] -> [blocks, B, K, Q*G, H]: the queries of a group are rows of their kv head."""
    q = _split(q)
    n, B, Q, N, H = q.shape
    q = q.reshape(n, B, Q, K, N // K, H).transpose(0, 1, 3, 2, 4, 5)
    return q.reshape(n, B, K, Q * (N // K), H)


def _split_keys(k: Array) -> Array:
    """[B, S, K, H] -> [blocks, B, K, C, H]."""
    return _split(k).swapaxes(2, 3)


def _join_queries(x: Array, like: Array) -> Array:
    """The inverse of `_split_queries`, to the shape of `like`."""
    (n, B, K, rows, H), N = x.shape, like.shape[2]
    x = x.reshape(n, B, K, rows // (N // K), N // K, H).transpose(1, 0, 3, 2, 4, 5)
    return x.reshape(B, -1, N, H)[:, : like.shape[1]]


def _join_keys(x: Array, like: Array) -> Array:
    """The inverse of `_split_keys`, to the shape of `like`."""
    n, B, K, C, H = x.shape
    return x.transpose(1, 0, 3, 2, 4).reshape(B, n * C, K, H)[:, : like.shape[1]]


class _Tiles(NamedTuple):
    """The mask, tile by tile."""

    mask: Mask
    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]

    def bias(self, i: Array, j: Array) -> Array:
        """0 or HIDDEN for block i of the queries and j of the keys: [B or 1, 1, Q*G, C]."""
        (_, T, N, _), (S, K) = self.q_shape, self.k_shape[1:3]
        Q, C = _block(T), _block(S)
        s = j * C + jnp.arange(C)
        seen = visible(self.mask, i * Q + jnp.arange(Q), s) & (s < S)
        return jnp.where(seen, 0, HIDDEN).repeat(N // K, axis=1)[:, None]

    def bounds(self, i: Array) -> tuple[Any, Any]:
        """The key blocks [low, high) of which block i of the queries may see something."""
        mask, T, S = self.mask, self.q_shape[1], self.k_shape[1]
        Q, C = _block(T), _block(S)
        first = i * Q if mask.start is None else i * Q + mask.start
        last = first + Q - 1
        low, high = jnp.int32(0), jnp.int32(-(-S // C))
        if mask.prefix is not None:
            return low, high
        if mask.causal:
            high = jnp.minimum(high, last // C + 1)
        if mask.window is not None:
            low = jnp.clip((first - mask.window + 1) // C, low, high)
            high = jnp.minimum(high, (last + mask.window - 1) // C + 1)
        return low, high
