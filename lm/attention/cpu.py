"""Our fused kernel for CPUs: cpu.cc, compiled per head size on first use.

docs/attention.md has the algorithm and its arithmetic. XLA calls it as a custom call on its own
threads; the gradient recomputes the probabilities from the saved log-sum-exp. Without a C++
compiler `supports` says so and the next backend runs.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lm import native
from lm.attention.mask import Mask

SOURCE = Path(__file__).with_suffix(".cc")
LARGEST_HEAD = 256


def supports(q: Any, k: Any, v: Any, mask: Mask) -> str:
    """ "" or why not: the dtype, the head size, or no compiler; compiles on first use (seconds)."""
    H = q.shape[-1]
    if q.dtype not in (jnp.float32, jnp.bfloat16) or not q.dtype == k.dtype == v.dtype:
        return f"operands are {q.dtype}, {k.dtype}, {v.dtype}, not all float32 or all bfloat16"
    if not 1 <= H <= LARGEST_HEAD:
        return f"head size {H} is not between 1 and {LARGEST_HEAD}"
    return _library(H)


def attention(q: Array, k: Array, v: Array, mask: Mask, *, scale: float) -> Array:
    """q [B, T, N, H]; k, v [B, S, K, H] -> [B, T, N, H] in the dtype of q."""
    return _attention(q, k, v, mask, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attention(q: Array, k: Array, v: Array, mask: Mask, scale: float) -> Array:
    return _forward(q, k, v, mask, scale)[0]


def _forward(q: Array, k: Array, v: Array, mask: Mask, scale: float) -> tuple[Array, Any]:
    B, T, N, H = q.shape
    results = jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)
    out, lse = _call("forward", H, results, mask, scale, q, k, v, *_arrays(mask, B))
    return out, (q, k, v, mask, out, lse)


def _backward(scale: float, saved: Any, dout: Array) -> tuple:
    q, k, v, mask, out, lse = saved
    results = tuple(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (q, k, v))
    operands = q, k, v, *_arrays(mask, q.shape[0]), out, lse, dout.astype(q.dtype)
    return *_call("backward", q.shape[-1], results, mask, scale, *operands), None


_attention.defvjp(_forward, _backward)


def packed(qkv: Array, angles: tuple[Array, Array], mask: Mask, *, scale: float) -> Array:
    """`attention` of what `split_heads` and `rotate` make of qkv [B, T, K, N/K + 2, H], which the
    kernel does while it reads -> [B, T, N, H]. The angles get no gradient.
    """
    return _packed(qkv, *angles, mask, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _packed(qkv: Array, cos: Array, sin: Array, mask: Mask, scale: float) -> Array:
    return _packed_forward(qkv, cos, sin, mask, scale)[0]


def _packed_forward(
    qkv: Array, cos: Array, sin: Array, mask: Mask, scale: float
) -> tuple[Array, Any]:
    B, T, K, group, H = qkv.shape
    N = K * (group - 2)
    results = jax.ShapeDtypeStruct((B, T, N, H), qkv.dtype), jax.ShapeDtypeStruct((B, N, T), "f4")
    operands = qkv, *(jnp.broadcast_to(a, (B, T, H // 2)) for a in (cos, sin)), *_arrays(mask, B)
    out, lse = _call("packed_forward", H, results, mask, scale, *operands)
    return out, (operands, mask, out, lse)


def _packed_backward(scale: float, saved: Any, dout: Array) -> tuple:
    operands, mask, out, lse = saved
    qkv = operands[0]
    results = (jax.ShapeDtypeStruct(qkv.shape, qkv.dtype),)
    operands = *operands, out, lse, dout.astype(qkv.dtype)
    found = _call("packed_backward", qkv.shape[-1], results, mask, scale, *operands)
    return found[0], None, None, None


_packed.defvjp(_packed_forward, _packed_backward)


def _library(H: int) -> str:
    """ "" once the kernel of this head size is compiled and registered, or why it is not."""
    handlers = (
        ("AttentionForward", f"onset_attention_forward_{H}"),
        ("AttentionBackward", f"onset_attention_backward_{H}"),
        ("PackedAttentionForward", f"onset_attention_packed_forward_{H}"),
        ("PackedAttentionBackward", f"onset_attention_packed_backward_{H}"),
    )
    return native.library(SOURCE, handlers, (f"HEAD_SIZE={H}",))


def _call(name: str, H: int, results: Any, mask: Mask, scale: float, *operands: Array) -> Any:
    if problem := _library(H):
        raise RuntimeError(f"the attention kernel is not there: {problem}")
    call = jax.ffi.ffi_call(f"onset_attention_{name}_{H}", results, vmap_method="broadcast_all")
    found = call(
        *operands,
        scale=np.float32(scale),
        causal=mask.causal,
        window=np.int64(mask.window or 0),
    )
    # Inside shard_map a custom call forgets that its results differ from device to device.
    axes = tuple(jax.typeof(operands[0]).manual_axis_type.varying)
    return tuple(jax.lax.pcast(a, axes, to="varying") for a in found) if axes else found


def _arrays(mask: Mask, B: int) -> tuple[Array, ...]:
    """The arrays of a mask, [B, 0] for what is switched off."""
    keys = mask.q_segments if mask.k_segments is None else mask.k_segments
    none = jnp.zeros((B, 0), jnp.int32)
    start = None if mask.start is None else jnp.broadcast_to(mask.start, (B,))
    parts = (mask.q_segments, keys, mask.prefix, mask.lengths, start)
    return tuple(none if part is None else part.astype(jnp.int32) for part in parts)
