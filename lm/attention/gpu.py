"""Attention on an NVIDIA GPU by cuDNN's fused kernels.

They are reached through `jax.nn.dot_product_attention`, which puts two calls into the program,
`__cudnn$fmhaSoftmax` and `__cudnn$fmhaSoftmaxBackward`. What cuDNN says itself is structure as ours
is: causal (query 0 stands at key 0, also with T != S), key lengths, and a window to the left of the
causal diagonal. Everything else, segments above all, is given as an array bool [B, 1, T, S], which
becomes a bias that the heads share: 1.1 to 2.5 times the time, and from T = 512 on 2.5 to 5 times
as fast as the best of XLA's own (docs/attention.md). A row that sees no key, whose softmax is 0/0,
is given keys, and its output, and so its gradient, is set to zero.

jax 0.12 cannot map such a bias over replicas: its rule wants one for every head. So there is a rule
of our own, which puts replicas among the rows; the price is that the gradient runs forward again.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from lm.attention.mask import Mask
from lm.sharding import devices_along

CUDNN: Literal["cudnn", "xla"] = "cudnn"  # the implementation asked of jax.nn
MASK_LIMIT = 2**30  # entries of a device's mask [B, T, S]; above, linear memory is worth more


def supports(q: Any, k: Any, v: Any, mask: Mask) -> str:
    """Empty, or the limit of cuDNN 9 or of jax's way to it that these operands, which may be mere
    shapes, exceed.
    """
    (B, T, _, H), S, limit = q.shape, k.shape[1], _largest_head()
    if not any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return "cuDNN is not installed, pip install 'onset-lm[cuda]'"
    if not (q.dtype == k.dtype == v.dtype and q.dtype.name in ("bfloat16", "float16")):
        return f"dtypes {q.dtype}, {k.dtype}, {v.dtype} are not all bfloat16 or all float16"
    if H % 8 or limit < H:
        return f"head size {H} is not a multiple of 8 up to {limit}"
    if T % 2 or S % 2:  # jax refuses them whenever a gradient is taken
        return f"lengths T = {T}, S = {S} are not both even"
    entries = B * T * S // devices_along("batch")
    if not _is_structure(mask, T, S) and entries > MASK_LIMIT:
        return f"a mask of {entries} entries is above {MASK_LIMIT}"
    return ""


def attention(q: Array, k: Array, v: Array, mask: Mask, *, scale: float) -> Array:
    """q [B, T, N, H]; k, v [B, S, K, H] -> [B, T, N, H] in the dtype of q."""
    T, S = q.shape[1], k.shape[1]
    if _is_structure(mask, T, S):
        return _structure(q, k, v, mask, scale)
    # The kernel skips blocks above the diagonal only if it is told of it.
    causal = mask.causal and mask.prefix is None
    sees = mask.as_array(T, S).any(-1)
    rest = replace(mask, causal=mask.causal and not causal).as_array(T, S)
    seen = jnp.broadcast_to(rest | ~sees[..., None], (len(q), T, S))
    return jnp.where(sees[..., None, None], _array(q, k, v, seen, causal, scale), 0)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _array(q: Array, k: Array, v: Array, seen: Array, causal: bool, scale: float) -> Array:
    """Attention to the keys that are seen [B, T, S], and not above the diagonal if `causal`."""
    return _among_rows(partial(_biased, causal=causal, scale=scale))(q, k, v, seen)


def _array_forward(
    q: Array, k: Array, v: Array, seen: Array, causal: bool, scale: float
) -> tuple[Array, Any]:
    return _array(q, k, v, seen, causal, scale), (q, k, v, seen)


def _array_backward(causal: bool, scale: float, saved: Any, dout: Array) -> tuple:
    """Gradients of q, k and v; the mask has none."""

    def gradients(q: Array, k: Array, v: Array, seen: Array, dout: Array) -> tuple:
        f = partial(_biased, seen=seen, causal=causal, scale=scale)
        _, pull = jax.vjp(f, q, k, v)
        return tuple(pull(dout))

    return *_among_rows(gradients)(*saved, dout), None


_array.defvjp(_array_forward, _array_backward)


def _biased(q: Array, k: Array, v: Array, seen: Array, causal: bool, scale: float) -> Array:
    return jax.nn.dot_product_attention(
        q, k, v, mask=seen[:, None], scale=scale, is_causal=causal, implementation=CUDNN
    )


def _among_rows(f: Callable) -> Callable:
    """f of arrays [B, ...], with replicas that it is mapped over as further rows."""
    mapped = jax.custom_batching.custom_vmap(f)

    @mapped.def_vmap
    def rule(size: int, batched: Any, *args: Array) -> tuple:
        full = [
            a if b else jnp.broadcast_to(a, (size, *a.shape))
            for a, b in zip(args, batched, strict=True)
        ]
        found = _among_rows(f)(*(a.reshape(-1, *a.shape[2:]) for a in full))
        found = jax.tree.map(lambda a: a.reshape(size, -1, *a.shape[1:]), found)
        return found, jax.tree.map(lambda _: True, found)

    return mapped


def _is_structure(mask: Mask, T: int, S: int) -> bool:
    """Whether cuDNN can say all of the mask itself."""
    if mask.q_segments is not None or mask.prefix is not None:
        return False
    return mask.window is None or (mask.causal and mask.lengths is None and T == S)


def _structure(q: Array, k: Array, v: Array, mask: Mask, scale: float) -> Array:
    lengths = mask.lengths
    out = jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=mask.causal,
        key_value_seq_lengths=None if lengths is None else jnp.maximum(lengths, 1).astype("int32"),
        local_window_size=None if mask.window is None else (mask.window - 1, 0),
        implementation=CUDNN,
    )
    if lengths is None:
        return out
    return jnp.where(lengths[:, None, None, None] > 0, out, 0)


def _largest_head() -> int:
    """256 from Hopper on. Compiling ahead on a host without a GPU, jax takes the older limit."""
    if jax.default_backend() != "gpu":
        return 128
    return 256 if float(jax.local_devices()[0].compute_capability) >= 9 else 128
