"""Our Pallas kernel for TPUs: fused attention with a gradient that recomputes.

The algorithm is that of `blockwise`; lm/attention/tpu_kernel.py has the programs. This file chooses
the blocks, cuts operands and mask into tiles, and ties forward and gradient together.

It is for v4 and newer; on v4, whose fast memory is small, override `one_pass` above 8 MiB.

`supports` judges shapes and dtypes, not the machine: a program for a TPU may be lowered, exported
or compiled on a host that has none, by the name "tpu". Run on another machine, JAX refuses to lower
it. To run it there slowly, say so:

    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        attention(q, k, v, mask, impl="tpu")
"""

from functools import partial
from math import gcd
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lm.attention import tpu_kernel, tpu_tiles
from lm.attention.mask import Mask
from lm.attention.tpu_tiles import Tiles, pad, show

HEAD_SIZES = (64, 128, 256)
DTYPES = ("bfloat16", "float32")
LANES = 128
ONE_PASS_BYTES = 16 << 20  # of fast memory, for the float32 gradient of the queries of a kv head


class Blocks(NamedTuple):
    """Queries and keys of a tile, and whether one program gives all three gradients."""

    q: int
    k: int
    one_pass: bool


def blocks_for(q: Any, k: Any) -> Blocks:
    """Blocks by shape: about 512 rows (queries times heads of a group) by 512 keys.

    Rows and keys are multiples of 128, and the blocks of a sequence are as equal as that allows:
    less than 128 positions a block are padding. Blocks of float32, whose products are six of
    bfloat16, are 256, which keeps the program small; above 65,536 positions they are 1,024, which
    keeps the list of tiles small. None of these numbers has been tuned on a TPU.
    """
    (_, T, N, H), (S, K) = q.shape, k.shape[1:3]
    G = N // K
    target = 1024 if max(T, S) > 65_536 else 512 if q.dtype.itemsize == 2 else 256
    step = LANES // gcd(G, LANES)  # queries that make whole registers of rows
    Q = _even(T, max(target // G // step, 1) * step, step)
    C = _even(S, target if G * Q <= 1024 else LANES, LANES)
    return Blocks(Q, C, one_pass=4 * G * -(-T // Q) * Q * H <= ONE_PASS_BYTES)


def _even(length: int, most: int, step: int) -> int:
    """The block, a multiple of `step` and at most `most`, that cuts `length` most evenly."""
    count = -(-length // most)
    return -(-length // (count * step)) * step


def supports(q: Any, k: Any, v: Any, mask: Mask) -> str:
    """Empty if the kernel can be built for these operands, which may be mere shapes, or why not."""
    (_, T, N, H), (S, K) = q.shape, k.shape[1:3]
    if H not in HEAD_SIZES:
        return f"head size {H} is not one of {HEAD_SIZES}"
    if not q.dtype == k.dtype == v.dtype or q.dtype.name not in DTYPES:
        return f"dtypes {q.dtype}, {k.dtype}, {v.dtype} are not all one of {DTYPES}"
    tiles = _tiles(T, S, N, K, mask, blocks_for(q, k))
    if max(tiles.counts) > tpu_tiles.MAX_BLOCKS:
        return f"{max(tiles.counts)} blocks are more than {tpu_tiles.MAX_BLOCKS}"
    if (count := len(tpu_tiles.steps(tiles, by_keys=True))) > tpu_tiles.MAX_STEPS:
        return f"{count} tiles are more than the {tpu_tiles.MAX_STEPS} of scalar memory"
    return ""


def attention(
    q: Array, k: Array, v: Array, mask: Mask, *, scale: float, blocks: Blocks | None = None
) -> Array:
    """q [B, T, N, H]; k, v [B, S, K, H] -> [B, T, N, H] in the dtype of q.

    `blocks` overrides `blocks_for`; on a TPU q * N / K and k must be multiples of 128.
    """
    return _attention(q, k, v, mask, scale, blocks or blocks_for(q, k))


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attention(q: Array, k: Array, v: Array, mask: Mask, scale: float, blocks: Blocks) -> Array:
    return _forward(q, k, v, mask, scale, blocks)[0]


def _forward(
    q: Array, k: Array, v: Array, mask: Mask, scale: float, blocks: Blocks
) -> tuple[Array, Any]:
    """The output, and what the gradient needs: operands, output and log-sum-exp."""
    tiles = _tiles(q.shape[1], k.shape[1], q.shape[2], k.shape[2], mask, blocks)
    keys = _cut_keys(k, tiles), _cut_keys(v, tiles).mT
    out, lse = tpu_kernel.forward(
        _cut_queries(q, tiles), *keys, show(mask, tiles, by_keys=False), scale=scale, tiles=tiles
    )
    out = _join_queries(out, tiles)
    return out, (q, k, v, mask, out, lse)


def _backward(scale: float, blocks: Blocks, saved: Any, dout: Array) -> tuple:
    """Gradients of q, k and v; the mask has none."""
    q, k, v, mask, out, lse = saved
    tiles = _tiles(q.shape[1], k.shape[1], q.shape[2], k.shape[2], mask, blocks)
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1, keepdims=True)
    keys = _cut_keys(k, tiles)
    operands = (
        _cut_queries(q, tiles),
        keys,
        _cut_keys(v, tiles),
        _cut_queries(dout.astype(q.dtype), tiles),
        lse,
        _cut_queries(delta, tiles).mT,
    )
    turned = (*operands, keys.mT)
    by_keys = partial(tpu_kernel.backward_keys, scale=scale, tiles=tiles, one_pass=blocks.one_pass)
    shown = show(mask, tiles, by_keys=True)
    if blocks.one_pass:
        dk, dv, dq = by_keys(turned, shown)
    else:
        dk, dv = by_keys(operands, shown)
        shown = show(mask, tiles, by_keys=False)
        dq = tpu_kernel.backward_queries(turned, shown, scale=scale, tiles=tiles)
    dq, dk, dv = _join_queries(dq, tiles), _join_keys(dk, tiles), _join_keys(dv, tiles)
    return dq, dk, dv, None


_attention.defvjp(_forward, _backward)


def _tiles(T: int, S: int, N: int, K: int, mask: Mask, blocks: Blocks) -> Tiles:
    prefix = mask.prefix is not None and (mask.causal or mask.window is not None)
    return Tiles(T, S, N // K, blocks.q, blocks.k, mask.causal, mask.window, prefix)


def _cut_queries(x: Array, tiles: Tiles) -> Array:
    """[B, T, N, H] -> [B, K, blocks, G*Q, H]: the heads of a group are rows of one tile."""
    (B, _, N, H), n, G, Q = x.shape, tiles.counts[0], tiles.G, tiles.Q
    x = pad(x, n * Q).reshape(B, n, Q, N // G, G, H)
    return x.transpose(0, 3, 1, 4, 2, 5).reshape(B, N // G, n, G * Q, H)


def _join_queries(x: Array, tiles: Tiles) -> Array:
    """The inverse of `_cut_queries`."""
    (B, K, n, _, H), G, Q = x.shape, tiles.G, tiles.Q
    x = x.reshape(B, K, n, G, Q, H).transpose(0, 2, 4, 1, 3, 5)
    return x.reshape(B, n * Q, K * G, H)[:, : tiles.T]


def _cut_keys(x: Array, tiles: Tiles) -> Array:
    """[B, S, K, H] -> [B, K, padded S, H]"""
    return pad(x, tiles.counts[1] * tiles.C).swapaxes(1, 2)


def _join_keys(x: Array, tiles: Tiles) -> Array:
    """The inverse of `_cut_keys`."""
    return x.swapaxes(1, 2)[:, : tiles.S]
