"""Splash attention, the TPU kernel that ships with JAX: a second choice, and a yardstick for `tpu`.

Its mask is static (causality and window) with segments beside it. A row that sees nothing is
undefined there, so masks are refused that leave such rows other than padding, whose output is set
to zero here; a zero output gradient then makes every other gradient of the row zero too. The scale
goes into the queries. Float32 operands pass the matrix unit once, where `tpu` passes them six
times, so they are worth little more than bfloat16. Inside shard_map it needs `check_vma=False`.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lm.attention.mask import Mask

LANES = 128
BLOCK = 512  # queries and keys of a tile, where the length allows
DTYPES = ("bfloat16", "float32")


def supports(q: Any, k: Any, v: Any, mask: Mask) -> str:
    """Empty if Splash can be built for these operands, which may be mere shapes, or why not."""
    T, S = q.shape[1], k.shape[1]
    if q.shape[3] % 64:
        return f"head size {q.shape[3]} is not a multiple of 64"
    if T % LANES or S % LANES:
        return f"lengths {T} and {S} are not multiples of {LANES}"
    if not q.dtype == k.dtype == v.dtype or q.dtype.name not in DTYPES:
        return f"dtypes {q.dtype}, {k.dtype}, {v.dtype} are not all one of {DTYPES}"
    for name in ("k_segments", "prefix", "lengths"):
        if getattr(mask, name) is not None:
            return f"{name} of a mask are not supported"
    if mask.window is not None and T - mask.window >= S:
        return f"window {mask.window} leaves queries past the {S} keys with nothing to see"
    return ""


def attention(q: Array, k: Array, v: Array, mask: Mask, *, scale: float) -> Array:
    """q [B, T, N, H]; k, v [B, S, K, H] -> [B, T, N, H] in the dtype of q."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    (_, T, N, _), S = q.shape, k.shape[1]
    one = _static_mask(splash, mask, (T, S))
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([one] * N), block_sizes=_blocks(splash, T, S)
    )
    q, k, v = ((q * scale).astype(q.dtype).swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2))
    if mask.q_segments is None:
        return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)
    segments = mask.q_segments
    out = jax.vmap(kernel)(q, k, v, splash.SegmentIds(segments, segments)).swapaxes(1, 2)
    return jnp.where((segments != 0)[:, :, None, None], out, 0)


def _static_mask(splash: Any, mask: Mask, shape: tuple[int, int]) -> Any:
    if mask.window is not None:
        reach = mask.window - 1
        return splash.LocalMask(shape, (reach, 0 if mask.causal else reach), 0)
    return splash.CausalMask(shape) if mask.causal else splash.FullMask(shape)


def _blocks(splash: Any, T: int, S: int) -> Any:
    """The largest blocks up to BLOCK that divide the lengths, the same in all three programs."""
    sizes = range(BLOCK, 0, -LANES)
    Q, C = next(n for n in sizes if T % n == 0), next(n for n in sizes if S % n == 0)
    return splash.BlockSizes(
        block_q=Q, block_kv=C, block_q_dkv=Q, block_kv_dkv=C, block_q_dq=Q, block_kv_dq=C
    )
