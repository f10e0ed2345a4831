"""Attention on an NVIDIA GPU by kernels that others keep fast: cuDNN's, and tokamax's where cuDNN
cannot say the mask.

cuDNN is reached through `jax.nn.dot_product_attention`, which puts two fused calls into the
program, `__cudnn$fmhaSoftmax` and `__cudnn$fmhaSoftmaxBackward`. Its masks are structure as ours
are: causal (query 0 stands at key 0, also with T != S), key lengths, and a window to the left of
the causal diagonal. Segments and prefixes would need a bias of T x S numbers; they are tokamax's,
if it is installed, whose Triton kernel reads them from an array bool [B, 1, T, S]: a byte for each,
shared by the heads. Neither is asked for a row that sees no key, whose softmax is 0/0: it is given
keys, and its output, and so its gradient, is set to zero.

Checked without a GPU: the arguments against `reference` through the plain XLA form of either
library, and that both compile for an H100, forward and backward, to their fused calls.
"""

from dataclasses import replace
from importlib.util import find_spec
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from lm.attention.mask import Mask

CUDNN: Literal["cudnn", "xla"] = "cudnn"  # the implementation asked of jax.nn
TOKAMAX = "triton"  # and of tokamax, whose Mosaic kernel cannot be compiled without a GPU
MASK_LIMIT = 2**30  # bytes of a mask [B, T, S]; above, linear memory is worth more


def supports(q: Any, k: Any, v: Any, mask: Mask) -> str:
    """Empty if one of the kernels can run these operands, which may be mere shapes, or why not."""
    if not (reason := cudnn_refuses(q, k, v, mask)):
        return ""
    if not (other := tokamax_refuses(q, k, v, mask)):
        return ""
    return f"cuDNN: {reason}; tokamax: {other}"


def attention(q: Array, k: Array, v: Array, mask: Mask, *, scale: float) -> Array:
    """q [B, T, N, H]; k, v [B, S, K, H] -> [B, T, N, H] in the dtype of q."""
    if cudnn_refuses(q, k, v, mask):
        return _tokamax(q, k, v, mask, scale)
    return _cudnn(q, k, v, mask, scale)


def cudnn_refuses(q: Any, k: Any, v: Any, mask: Mask) -> str:
    """Empty, or the limit of cuDNN 9 or of jax's way to it that these operands exceed."""
    (_, T, _, H), S, limit = q.shape, k.shape[1], _largest_head()
    if not any(find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        return "it is not installed, pip install 'onset-lm[cuda]'"
    if reason := _wrong_dtype(q, k, v):
        return reason
    if H % 8 or limit < H:
        return f"head size {H} is not a multiple of 8 up to {limit}"
    if T % 2 or S % 2:  # jax refuses them whenever a gradient is taken
        return f"lengths T = {T}, S = {S} are not both even"
    if mask.q_segments is not None or mask.prefix is not None:
        return "segments and prefixes would need a bias of T x S numbers"
    if mask.window is not None and not (mask.causal and mask.lengths is None and T == S):
        return "a window needs a causal mask, T = S and no lengths"
    return ""


def tokamax_refuses(q: Any, k: Any, v: Any, mask: Mask) -> str:
    """Empty, or why tokamax's kernel is not asked for these operands."""
    (B, T, _, H), S = q.shape, k.shape[1]
    if find_spec("tokamax") is None:
        return "it is not installed, pip install tokamax"
    if reason := _wrong_dtype(q, k, v):
        return reason
    if H % 8 or H > 256:
        return f"head size {H} is not a multiple of 8 up to 256"
    if B * T * S > MASK_LIMIT:
        return f"a mask of {B * T * S} bytes is above {MASK_LIMIT}"
    return ""


def _cudnn(q: Array, k: Array, v: Array, mask: Mask, scale: float) -> Array:
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


def _tokamax(q: Array, k: Array, v: Array, mask: Mask, scale: float) -> Array:
    import tokamax  # takes seconds

    T, S = q.shape[1], k.shape[1]
    # The kernel skips blocks above the diagonal only if it is told of it.
    causal = mask.causal and mask.prefix is None
    sees = mask.as_array(T, S).any(-1)
    rest = replace(mask, causal=mask.causal and not causal).as_array(T, S)
    out = tokamax.dot_product_attention(
        q,
        k,
        v,
        mask=(rest | ~sees[..., None])[:, None],
        scale=scale,
        is_causal=causal,
        implementation=TOKAMAX,
    )
    return jnp.where(sees[..., None, None], out, 0)


def _wrong_dtype(q: Any, k: Any, v: Any) -> str:
    """Both take float32 only with products of fewer bits, or not at all."""
    if q.dtype == k.dtype == v.dtype and q.dtype.name in ("bfloat16", "float16"):
        return ""
    return f"dtypes {q.dtype}, {k.dtype}, {v.dtype} are not all bfloat16 or all float16"


def _largest_head() -> int:
    """256 from Hopper on. Compiling ahead on a host without a GPU, jax takes the older limit."""
    if jax.default_backend() != "gpu":
        return 128
    return 256 if float(jax.local_devices()[0].compute_capability) >= 9 else 128
