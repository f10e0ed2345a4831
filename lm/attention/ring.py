"""Attention over rows that several devices share: keys and values go round in a ring.

A row of T tokens is 2n chunks of c = T / 2n; device i of the n along mesh axis `sequence` has
chunks i and 2n-1-i (zigzag), its early and its late one, as a row of its own. At step r it meets
the keys of device j = i - r (mod n), which have come r hops, in two tiles of [c, c]:

    r = 0          its own: causal, as its two chunks are in order
    0 < r <= i     j before i:   late queries x early keys,   early queries x early keys
    r > i          j after i:    late queries x early keys,   late queries x late keys

All that lies above the causal diagonal is left out, and every device has the same work at every
step, half of it never masked but by documents. With rows cut in order instead, the last device has
2n-1 times the work of the first. A tile is `lm.attention.blockwise`, whose outputs are merged:

    L' = log(exp L + exp L_tile)     out' = out exp(L - L') + out_tile exp(L_tile - L')

The gradient is a second ring (Liu, Zaharia and Abbeel 2023), from out and L alone: the tiles'
gradients under the row's own L add up, and those of keys and values travel with them, one hop more,
home. Differentiating the first ring instead would keep the keys of all n devices on each, or with
rematerialisation go round once more. A hop is asked for before the tiles that hide it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from lm.attention import blockwise
from lm.attention.mask import Mask
from lm.config import UserError
from lm.sharding import AS_READ, SEQUENCE, local, sequence_devices

HEADS, KEYS = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ring:
    """The mask of rows that were dealt: causal within the documents of the whole row. In a batch it
    stands in the place of the segments, so that dealt rows cannot be taken for whole ones.
    """

    segments: Array  # int32 [n B, T / n]


def deal(batch: Any) -> Any:
    """A batch of rows [B, T] as rows [n B, T / n] of their devices, with its segments in a `Ring`;
    itself if the mesh has no axis `sequence`.

    Every device has its rows whole before, so nothing is sent. Raises UserError if T does not
    divide into 2n chunks.
    """
    n = sequence_devices()
    if n == 1:
        return batch
    T = batch.tokens.shape[-1]
    check_length(T, n)

    def dealt(x: Array) -> Array:
        B, *lead = x.shape[-2], *x.shape[:-2]
        names = (*(None for _ in lead), "batch", None)
        shape = (*lead, n * B, T // n)
        return local(partial(_take, n=n), (names,), names, shape, given=AS_READ)(x)

    batch = jax.tree.map(dealt, batch)
    return batch._replace(segments=Ring(batch.segments))


def check_length(T: int, n: int) -> None:
    """Raises UserError if rows of T tokens cannot be dealt to n devices."""
    if n > 1 and T % (2 * n):
        below, above = T // (2 * n) * 2 * n, (T // (2 * n) + 1) * 2 * n
        raise UserError(
            f"length {T} is not divisible by the {2 * n} chunks of the {n} devices of mesh axis"
            f" '{SEQUENCE}'; use {f'{below} or {above}' if below else above}"
        )


def _take(x: Array, n: int) -> Array:
    """This device's two chunks of [..., T]."""
    c, i = x.shape[-1] // (2 * n), lax.axis_index(SEQUENCE)
    chunks = (lax.dynamic_slice_in_dim(x, k * c, c, axis=-1) for k in (i, 2 * n - 1 - i))
    return jnp.concatenate(list(chunks), axis=-1)


def attention(q: Array, k: Array, v: Array, ring: Ring, *, scale: float) -> Array:
    """q [n B, T / n, N, H]; k, v [n B, T / n, K, H] of dealt rows -> [n B, T / n, N, H] in the
    dtype of q.
    """
    n = sequence_devices()
    if n == 1:
        raise ValueError(
            f"rows were dealt, and the mesh has no axis '{SEQUENCE}'; use one that has"
        )

    def f(q: Array, k: Array, v: Array, segments: Array) -> Array:
        return _attention(q, k, v, segments, scale, n)

    return local(f, (HEADS, KEYS, KEYS, ("batch", None)), HEADS, q.shape)(q, k, v, ring.segments)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q: Array, k: Array, v: Array, segments: Array, scale: float, n: int) -> Array:
    return _forward(q, k, v, segments, scale, n)[0]


def _forward(
    q: Array, k: Array, v: Array, segments: Array, scale: float, n: int
) -> tuple[Array, Any]:
    """The output, and what the gradient needs: operands, output and log-sum-exp."""
    i = lax.axis_index(SEQUENCE)
    qs, mine = _halves(q), _halves(segments)
    keys = _halves(k), _halves(v), mine
    coming = _hop(keys, n)
    start = tuple(map(_halves, _tile(q, k, v, Mask(True, q_segments=segments), scale)))

    def visit(r: Any, found: Any, keys: Any) -> Any:
        tiles, pick = _tiles(r <= i, qs, mine, keys)
        late, second = (tuple(x) for x in zip(*map(_pair, _tile(*tiles, scale)), strict=True))
        found = jax.tree.map(lambda x, y: x.at[1].set(y), found, _merge(_at(found, 1), late))
        merged = _merge(_at(found, pick), second)
        return jax.tree.map(lambda x, y: x.at[pick].set(y), found, merged)

    def step(r: Array, carry: Any) -> Any:
        found, keys = carry
        coming = _hop(keys, n)
        return visit(r, found, keys), coming

    found, keys = lax.fori_loop(1, n - 1, step, (start, coming)) if n > 2 else (start, coming)
    out, lse = map(_whole, visit(n - 1, found, keys))
    out = out.astype(q.dtype)
    return out, (q, k, v, segments, out, lse)


def _backward(scale: float, n: int, saved: Any, dout: Array) -> tuple:
    """Gradients of q, k and v; the segments have none."""
    q, k, v, segments, out, lse = saved
    i, mine = lax.axis_index(SEQUENCE), _halves(segments)
    rows = tuple(map(_halves, (q, out, lse, dout)))
    keys = _halves(k), _halves(v), mine
    coming = _hop(keys, n)
    own = _tile_gradient(q, k, v, Mask(True, q_segments=segments), scale, out, lse, dout)
    dq, *dkeys = (_halves(x.astype(_wide(x))) for x in own)

    def visit(r: Any, dq: Array, dkeys: Any, keys: Any) -> tuple[Array, Any]:
        tiles, pick = _tiles(r <= i, rows[0], mine, keys)
        out, lse, dout = (_both(x[1], _at(x, pick)) for x in rows[1:])
        found = _tile_gradient(*tiles, scale, out, lse, dout)
        (dq0, dq1), (dk0, dk1), (dv0, dv1) = map(_pair, found)
        dk, dv = _hop(dkeys, n)
        dq = dq.at[1].add(dq0).at[pick].add(dq1)
        return dq, [dk.at[0].add(dk0).at[pick].add(dk1), dv.at[0].add(dv0).at[pick].add(dv1)]

    def step(r: Array, carry: Any) -> Any:
        dq, dkeys, keys = carry
        coming = _hop(keys, n)
        return *visit(r, dq, dkeys, keys), coming

    carry = dq, dkeys, coming
    dq, dkeys, keys = lax.fori_loop(1, n - 1, step, carry) if n > 2 else carry
    dq, dkeys = visit(n - 1, dq, dkeys, keys)
    dk, dv = map(_whole, _hop(dkeys, n))
    return _whole(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_attention.defvjp(_forward, _backward)


def _hop(tree: Any, n: int) -> Any:
    """Everything to the next device; the first two, of one shape, in one message."""
    leaves, structure = jax.tree.flatten(tree)
    to_next = [(i, (i + 1) % n) for i in range(n)]
    sent = lax.ppermute(jnp.stack(leaves[:2]), SEQUENCE, to_next)
    rest = [lax.ppermute(x, SEQUENCE, to_next) for x in leaves[2:]]
    return jax.tree.unflatten(structure, [*sent, *rest])


def _tiles(
    before: Array, qs: Array, mine: Array, keys: Any
) -> tuple[tuple[Array, Array, Array, Mask], Array]:
    """Queries, keys, values and mask of the two tiles of a step, one below the other, and which
    half the second one is of.
    """
    ks, vs, theirs = keys
    pick = jnp.where(before, 0, 1)
    q, s = (_both(x[1], _at(x, pick)) for x in (qs, mine))
    k, v, t = (_both(x[0], _at(x, pick)) for x in (ks, vs, theirs))
    return (q, k, v, Mask(q_segments=s, k_segments=t)), pick


def _tile(q: Array, k: Array, v: Array, mask: Mask, scale: float) -> tuple[Array, Array]:
    """Output and log-sum-exp [B, T, N, 1] of these keys alone, in the dtype of sums."""
    out, (*_, lse) = blockwise._forward(q, k, v, mask, scale)
    return out.astype(_wide(q)), blockwise._join_queries(lse[..., None], q)


def _tile_gradient(
    q: Array, k: Array, v: Array, mask: Mask, scale: float, out: Array, lse: Array, dout: Array
) -> tuple[Array, ...]:
    """What these keys add to the gradients of q, k and v, under the log-sum-exp of the row."""
    split = blockwise._split_queries(lse, k.shape[2])[..., 0]
    return blockwise._backward(scale, (q, k, v, mask, out, split), dout)[:3]


def _merge(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """Outputs and log-sum-exps of two sets of keys as those of both."""
    lse = jnp.logaddexp(a[1], b[1])
    return a[0] * jnp.exp(a[1] - lse) + b[0] * jnp.exp(b[1] - lse), lse


def _halves(x: Array) -> Array:
    """[B, 2 c, ...] -> [2, B, c, ...]: the early and the late chunk."""
    B, T, *rest = x.shape
    return x.reshape(B, 2, T // 2, *rest).swapaxes(0, 1)


def _whole(x: Array) -> Array:
    """The inverse of `_halves`."""
    _, B, c, *rest = x.shape
    return x.swapaxes(0, 1).reshape(B, 2 * c, *rest)


def _both(a: Array, b: Array) -> Array:
    return jnp.concatenate([a, b])


def _pair(x: Array) -> Array:
    """The inverse of `_both`: [2 B, ...] -> [2, B, ...]."""
    return x.reshape(2, -1, *x.shape[1:])


def _at(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _wide(x: Array) -> Any:
    """The dtype of sums and statistics."""
    return jnp.promote_types(x.dtype, jnp.float32)
