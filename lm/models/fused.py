"""The loss of a small Transformer and its gradient as one kernel: fused.cc, for CPUs.

XLA runs a model of width 16 as hundreds of small loops over arrays that do not fit the cache; here
each sequence goes through the whole model and back before the next one starts. Replicas are a
leading axis, as everywhere: `jax.vmap` over `loss` is one call that spreads replicas and rows over
XLA's threads. It computes what `lm.objectives.causal` computes, within rounding, without dropout.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lm import native
from lm.models.config import TransformerConfig

SOURCE = Path(__file__).with_suffix(".cc")
TARGET = "onset_fused_loss_and_gradient"
LONGEST = 128  # tokens of a row
WIDEST = 64
# Against XLA, 8 replicas of 16 rows of 64 tokens: at width 64 it is 1.7 times as fast with a
# vocabulary of 512, 1.06 with 4,096, 0.8 with 8,192; at width 16 2.7, 2.7 and 1.7 times.
LARGEST_VOCABULARY = 4096
# The values of settings that it knows.
ONLY = {
    "activation": ("swiglu", "gelu"),
    "qk_norm": ("none",),
    "head": ("tied", "untied"),
    "dropout": (0,),
    "z_loss": (0,),
    "norm": ("rms",),
    "block": ("pre",),
    "bias": ("none",),
    "positions": ("rotary",),
    "rotary_fraction": (1,),
    "rope_scaling": ((),),
    "window": (0,),
    "direction": ("causal",),
    "token_types": (0,),
    "head_width": (0,),
}
NAMES = ("embed", "head", "norm", "norm1", "qkv", "out", "norm2", "up", "gate", "down")


def supports(config: TransformerConfig, length: int) -> str:
    """ "" or why this model cannot be run by the kernel; compiles it on first use (seconds)."""
    if config.kind != "transformer":
        return f"the model is of kind {config.kind!r}, not 'transformer'"
    if config.dtype != "float32" or config.param_dtype != "float32":
        return f"dtype is {config.dtype} over {config.param_dtype} parameters, not float32"
    for name, values in ONLY.items():
        if (value := getattr(config, name)) not in values:
            return f"{name} is {value!r}, not {' or '.join(map(repr, values))}"
    if np.float32(config.norm_epsilon) == 0:
        return f"norm_epsilon is {config.norm_epsilon}, which is 0 in float32"
    if length > LONGEST:
        return f"rows of {length} tokens are longer than {LONGEST}"
    if config.width > WIDEST:
        return f"width {config.width} is above {WIDEST}, where products fill the cores anyway"
    if config.vocab_size > LARGEST_VOCABULARY:
        limit = f"above {LARGEST_VOCABULARY}, where XLA's products are as fast"
        return f"vocabulary of {config.vocab_size} is {limit}"
    return native.library(SOURCE, (("FusedLossAndGradient", TARGET),), ())


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def loss(config: TransformerConfig, params: Any, batch: Any) -> tuple[Array, Array]:
    """Weighted mean of -log p(target) in nats and the weight, as `lm.objectives.causal`.

    `params` is the plain tree of `Transformer(config)`; `batch` has [B, T] fields.
    """
    return _run(config, params, batch)[0]


def _forward(config: TransformerConfig, params: Any, batch: Any) -> tuple[Any, Any]:
    return _run(config, params, batch)


def _backward(config: TransformerConfig, gradient: Any, cotangents: tuple[Array, Array]) -> tuple:
    return jax.tree.map(lambda g: g * cotangents[0], gradient), None


loss.defvjp(_forward, _backward)


def _run(config: TransformerConfig, params: Any, batch: Any) -> tuple[Any, Any]:
    """((loss, weight), gradient of the loss)."""
    if problem := supports(config, batch.tokens.shape[1]):
        raise RuntimeError(f"the fused kernel cannot run this model: {problem}")
    c, (B, T) = config, batch.tokens.shape
    leaves = {name: params[name] for name in NAMES if name in params} | params["layers"]
    none = jnp.zeros((0,), jnp.float32)
    operands = [leaves.get(name, none) for name in NAMES]
    weight = batch.weights.sum()
    share = 1 / jnp.maximum(weight, 1e-9)
    results = [jax.ShapeDtypeStruct(a.shape, jnp.float32) for a in (share, *operands)]
    call = jax.ffi.ffi_call(TARGET, results, vmap_method="broadcast_all")
    total, *gradients = call(
        *operands,
        *(a.astype(jnp.int32) for a in (batch.tokens, batch.targets)),
        *(a.astype(jnp.int32) for a in (batch.segments, batch.positions)),
        batch.weights.astype(jnp.float32),
        share,
        **{
            "B": np.int64(B),
            "T": np.int64(T),
            "V": np.int64(c.vocab_size),
            "D": np.int64(c.width),
            "layers": np.int64(c.layers),
            "K": np.int64(c.kv_heads),
            "G": np.int64(c.group),
            "H": np.int64(c.head_size),
            "F": np.int64(c.mlp_size),
        },
        gated=c.activation == "swiglu",
        tied=c.head == "tied",
        rope_base=np.float32(c.rope_base),
        epsilon=np.float32(c.norm_epsilon),
        logit_scale=np.float32(1 / c.width_ratio),
    )
    found = dict(zip(NAMES, gradients, strict=True))
    layers = {name: found[name] for name in params["layers"]}
    gradient = {name: found[name] for name in params if name != "layers"} | {"layers": layers}
    return (total, weight), gradient
