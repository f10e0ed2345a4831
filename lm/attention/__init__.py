"""Attention behind one function; which code runs is chosen from a table and can be explained.

A backend is a module with two functions: `supports(q, k, v, mask)`, "" or the reason why it cannot
run, and `attention(q, k, v, mask, *, scale)`. `auto` takes the first line of the platform's table
that fits; a backend asked for by name runs or raises. Nothing falls back in silence. Rows that
several devices share (`Ring` in place of a mask) are one more module's, `ring`, on any platform.
"""

from types import ModuleType
from typing import Any

import jax
from jax import Array

from lm.attention import blockwise, cpu, gpu, reference, ring, splash, tpu
from lm.attention.mask import Mask, check
from lm.attention.ring import Ring
from lm.attention.rotary import rotate, split_heads
from lm.config import UserError, nearest
from lm.sharding import local

__all__ = ["BACKENDS", "Mask", "Ring", "attention", "choose", "explain", "rotary_attention"]

BACKENDS: dict[str, ModuleType] = {
    "reference": reference,
    "blockwise": blockwise,
    "cpu": cpu,
    "gpu": gpu,
    "tpu": tpu,
    "splash": splash,
}
# To XLA these are calls without a rule for cutting them: on a mesh each device calls its own.
KERNELS = ("cpu", "gpu", "tpu", "splash")
BIASED = ("reference",)  # those that take an additive bias
MOVED = ("reference", "blockwise", "cpu")  # queries may begin at a later key, `Mask.start`

# Per platform, in order: a backend, and the largest T*S for which `auto` takes it (None: any).
# docs/attention.md has the measurements behind the order and the limits on a CPU and on an H200;
# on a TPU nothing was measured.
ORDER: dict[str, tuple[tuple[str, int | None], ...]] = {
    "cpu": (("cpu", None), ("reference", 256 * 256), ("blockwise", None)),
    "gpu": (
        ("reference", 128 * 128),
        ("gpu", None),
        ("reference", 1024 * 1024),
        ("blockwise", None),
    ),
    "tpu": (("tpu", None), ("splash", None), ("reference", 256 * 256), ("blockwise", None)),
}

# Names of the axes, for a mesh: heads, keys, and the arrays of a mask.
HEADS, KEYS = ("batch", None, "heads", None), ("batch", None, "kv_heads", None)
PARTS = (("batch", None), ("batch", None), ("batch",), ("batch",), ())


def attention(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask | Ring,
    *,
    scale: float | None = None,
    impl: str = "auto",
    bias: Array | None = None,
) -> Array:
    """softmax(q k' scale + mask) v: q [B, T, N, H]; k, v [B, S, K, H], K divides N -> [B, T, N, H].

    `scale` defaults to 1/sqrt(H); a bias [N, T, S] is added to the scores. Raises UserError if
    `impl` is unknown or cannot run these operands.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if isinstance(mask, Ring):
        if impl != "auto" or bias is not None:
            what = "a bias" if bias is not None else f"attention backend '{impl}'"
            raise UserError(
                f"{what} cannot run here: several devices share each row; use impl='auto', which"
                " is a ring and has no bias, or a mesh without the axis 'sequence'"
            )
        check(q, k, v, Mask(True, q_segments=mask.segments))
        return ring.attention(q, k, v, mask, scale=scale)
    check(q, k, v, mask)
    name = choose(q, k, v, mask, impl, bias is not None)
    if bias is not None:
        return BACKENDS[name].attention(q, k, v, mask, scale=scale, bias=bias)
    if name not in KERNELS:
        return BACKENDS[name].attention(q, k, v, mask, scale=scale)

    def kernel(q: Array, k: Array, v: Array, *parts: Array | None) -> Array:
        whole = Mask(mask.causal, mask.window, *parts)
        return BACKENDS[name].attention(q, k, v, whole, scale=scale)

    inputs = HEADS, KEYS, KEYS, *PARTS
    return local(kernel, inputs, HEADS, q.shape)(q, k, v, *_parts(mask))


def rotary_attention(
    qkv: Array, angles: tuple[Array, Array], mask: Mask | Ring, *, impl: str = "auto"
) -> Array:
    """Attention of what one product leaves, qkv [B, T, K, N/K + 2, H] (the queries of a kv head's
    group, its key, its value), with queries and keys turned by angles [B, T, R/2] -> [B, T, N, H].

    The CPU kernel does all of it in one pass over qkv, where whole heads are turned, R = H.
    """
    B, T, K, group, H = qkv.shape
    if isinstance(mask, Ring):
        x, y, v = split_heads(qkv)
        return attention(rotate(x, angles), rotate(y, angles), v, mask, impl=impl)
    q, k = (jax.ShapeDtypeStruct((B, T, n, H), qkv.dtype) for n in (K * (group - 2), K))
    check(q, k, k, mask)
    whole = 2 * angles[0].shape[-1] == H
    if choose(q, k, k, mask, impl) != "cpu" or not whole:
        x, y, v = split_heads(qkv)
        return attention(rotate(x, angles), rotate(y, angles), v, mask, impl=impl)

    def kernel(qkv: Array, cos: Array, sin: Array, *parts: Array | None) -> Array:
        whole = Mask(mask.causal, mask.window, *parts)
        return cpu.packed(qkv, (cos, sin), whole, scale=H**-0.5)

    packed, turns = ("batch", None, "kv_heads", None, None), ("batch", None, None)
    return local(kernel, (packed, turns, turns, *PARTS), HEADS, q.shape)(
        qkv, *angles, *_parts(mask)
    )


def _parts(mask: Mask) -> tuple[Array | None, ...]:
    return mask.q_segments, mask.k_segments, mask.prefix, mask.lengths, mask.start


def choose(q: Any, k: Any, v: Any, mask: Mask, impl: str = "auto", biased: bool = False) -> str:
    """The name of the backend that would run on this platform; operands may be mere shapes."""
    if impl == "auto":
        if biased:
            return BIASED[0]
        return next(name for name, reason in _candidates(q, k, v, mask) if not reason)
    if impl not in BACKENDS:
        raise UserError(f"no attention backend '{impl}'; {nearest(impl, ['auto', *BACKENDS])}")
    if reason := _refuses(impl, q, k, v, mask, biased):
        raise UserError(f"attention backend '{impl}' cannot run here: {reason}; use impl='auto'")
    return impl


def _refuses(name: str, q: Any, k: Any, v: Any, mask: Mask, biased: bool = False) -> str:
    """ "" or why a backend cannot run these operands."""
    if biased and name not in BIASED:
        return "it has no additive bias"
    if mask.start is not None and name not in MOVED:
        return "its queries begin at the first key"
    return BACKENDS[name].supports(q, k, v, mask)


def explain(q: Array, k: Array, v: Array, mask: Mask) -> str:
    """Why `auto` takes each backend of this platform or not; operands may be mere shapes."""
    check(q, k, v, mask)
    lines = [f"attention on {jax.default_backend()}, q {q.shape}, k {k.shape}, {q.dtype}:"]
    chosen = False
    for name, reason in _candidates(q, k, v, mask):
        verdict = reason or ("not needed" if chosen else "runs")
        chosen = chosen or not reason
        lines.append(f"  {name:<10} {verdict}")
    return "\n".join(lines)


def _candidates(q: Array, k: Array, v: Array, mask: Mask) -> list[tuple[str, str]]:
    """The platform's backends in order, each with "" or the reason why `auto` passes it by."""
    result = []
    size = q.shape[1] * k.shape[1]
    for name, limit in ORDER[jax.default_backend()]:
        reason = _refuses(name, q, k, v, mask)
        if not reason and limit is not None and size > limit:
            reason = f"T*S = {size} is above {limit}, where the next one is faster or smaller"
        result.append((name, reason))
    return result
