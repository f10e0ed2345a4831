"""Attention behind one function; which code runs is chosen from a table and can be explained.

A backend is a module with two functions: `supports(q, k, v, mask)`, "" or the reason why it cannot
run, and `attention(q, k, v, mask, *, scale)`. `auto` takes the first line of the platform's table
that fits; a backend asked for by name runs or raises. Nothing falls back in silence.
"""

from types import ModuleType

import jax
from jax import Array

from lm.attention import blockwise, reference
from lm.attention.mask import Mask, check
from lm.config import UserError, nearest

__all__ = ["BACKENDS", "Mask", "attention", "choose", "explain"]

BACKENDS: dict[str, ModuleType] = {"reference": reference, "blockwise": blockwise}

# Per platform, in order: a backend, and the largest T*S for which `auto` takes it (None: any).
# docs/attention.md has the measurements behind the limit of `cpu`; the others are not measured.
ORDER: dict[str, tuple[tuple[str, int | None], ...]] = {
    "cpu": (("reference", 256 * 256), ("blockwise", None)),
    "gpu": (("reference", 256 * 256), ("blockwise", None)),
    "tpu": (("reference", 256 * 256), ("blockwise", None)),
}


def attention(
    q: Array, k: Array, v: Array, mask: Mask, *, scale: float | None = None, impl: str = "auto"
) -> Array:
    """softmax(q k' scale + mask) v: q [B, T, N, H]; k, v [B, S, K, H], K divides N -> [B, T, N, H].

    `scale` defaults to 1/sqrt(H). Raises UserError if `impl` is unknown or cannot run these
    operands.
    """
    check(q, k, v, mask)
    backend = BACKENDS[choose(q, k, v, mask, impl)]
    return backend.attention(q, k, v, mask, scale=q.shape[-1] ** -0.5 if scale is None else scale)


def choose(q: Array, k: Array, v: Array, mask: Mask, impl: str = "auto") -> str:
    """The name of the backend that would run on this platform; operands may be mere shapes."""
    if impl == "auto":
        return next(name for name, reason in _candidates(q, k, v, mask) if not reason)
    if impl not in BACKENDS:
        raise UserError(f"no attention backend '{impl}'; {nearest(impl, ['auto', *BACKENDS])}")
    if reason := BACKENDS[impl].supports(q, k, v, mask):
        raise UserError(f"attention backend '{impl}' cannot run here: {reason}; use impl='auto'")
    return impl


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
        reason = BACKENDS[name].supports(q, k, v, mask)
        if not reason and limit is not None and size > limit:
            reason = f"T*S = {size} is above {limit}, where the next one is faster or smaller"
        result.append((name, reason))
    return result
