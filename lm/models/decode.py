"""A few tokens more for rows with a cache: decode.cc for one token of a Llama-like model on a CPU,
the model's own `extend` for everything else, which is the kernel's oracle.

XLA on a CPU copies the weights of each layer out of their stack before it multiplies, so a token
costs several times the reading of the weights; docs/generation.md has the figures. The kernel reads
float32, bfloat16 and int8 weights where they lie, computes in float32, and writes into the cache
that it is given. A batch of `MOST_ROWS` reads the weights once for all its rows.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lm import native
from lm.attention.rotary import rope_angles
from lm.models.int8 import Int8, dequantise

SOURCE = Path(__file__).with_suffix(".cc")
TARGET = "onset_decode_step"
MOST_ROWS = 8
LANES = 16  # sizes are multiples of it, which is whole vectors on every machine
MATRICES = ("embed", "head", "qkv", "out", "up", "gate", "down")
PLAIN = {  # the settings of the models that the kernel computes
    "dtype": "float32",
    "activation": "swiglu",
    "norm": "rms",
    "block": "pre",
    "bias": "none",
    "qk_norm": "none",
    "positions": "rotary",
    "rotary_fraction": 1.0,
    "direction": "causal",
    "window": 0,
    "token_types": 0,
}


def extend(
    model: Any, params: Any, tokens: Array, segments: Array, positions: Array, cache: Any
) -> tuple[Array, Any]:
    """Logits [B, 1, V] of the last of T columns [B, T] that are appended to the cache."""
    if not supports(model.config, params, tokens.shape):
        return _step(model.config, params, tokens, segments, positions, cache)
    plain, columns = dequantise(params), (tokens, segments, positions)
    return model.apply({"params": plain}, *columns, cache, keep="last", method="extend")


def supports(config: Any, params: Any, shape: tuple[int, ...]) -> str:
    """ "" or why the kernel cannot append [B, T] columns; compiles it on first use (seconds)."""
    B, T = shape
    if jax.default_backend() != "cpu":
        return f"the platform is {jax.default_backend()}, not a CPU"
    if T != 1 or B > MOST_ROWS:
        return f"{B} rows of {T} tokens; it is for one token of at most {MOST_ROWS} rows"
    for name, value in PLAIN.items():
        if (found := getattr(config, name, None)) != value:
            return f"{name} is {found!r}, not {value!r}"
    if config.head not in ("tied", "untied"):
        return f"head is {config.head!r}"
    for name in ("width", "head_size", "mlp_size"):
        if (size := getattr(config, name)) % LANES:
            return f"{name} {size} is no multiple of {LANES}"
    kinds = {_values(w).dtype for w in _matrices(params).values()}
    if len(kinds) > 1 or not kinds <= {np.dtype(t) for t in (jnp.float32, jnp.bfloat16, jnp.int8)}:
        return f"weights are {', '.join(sorted(map(str, kinds)))}"
    return native.library(SOURCE, (("DecodeStep", TARGET),), ())


def _step(
    c: Any, params: Any, tokens: Array, segments: Array, positions: Array, cache: Any
) -> tuple[Array, Any]:
    matrices, (B, S) = _matrices(params), cache.segments.shape
    none = jnp.zeros((0,), jnp.float32)
    found = [matrices.get(name, none) for name in MATRICES]
    scales = [w.scale if isinstance(w, Int8) else none for w in found]
    seen = jax.lax.dynamic_update_slice(cache.segments, segments, (0, cache.length))
    norms = (params["norm"], params["layers"]["norm1"], params["layers"]["norm2"])
    angles = rope_angles(positions, c.head_size, c.rope_base, c.rope_scaling)
    keys, values = cache.layers
    operands = [
        *map(_values, found),
        *scales,
        *(a.astype(jnp.float32) for a in (*norms, *angles)),
        *(a.astype(jnp.int32) for a in (tokens, seen, cache.length)),
    ]
    results = jax.ShapeDtypeStruct((B, 1, c.vocab_size), jnp.float32), keys, values
    at = len(operands)
    call = jax.ffi.ffi_call(TARGET, results, input_output_aliases={at: 1, at + 1: 2})
    sizes = {"B": B, "S": S, "V": c.vocab_size, "D": c.width, "layers": c.layers, "F": c.mlp_size}
    sizes |= {"K": c.kv_heads, "G": c.group, "H": c.head_size}
    logits, keys, values = call(
        *operands,
        keys,
        values,
        **{name: np.int64(size) for name, size in sizes.items()},
        bits=np.int64(8 * _values(found[0]).dtype.itemsize),
        epsilon=np.float32(c.norm_epsilon),
        logit_scale=np.float32(1 / c.width_ratio),
    )
    return logits, cache._replace(layers=(keys, values), segments=seen, length=cache.length + 1)


def _matrices(params: Any) -> dict[str, Any]:
    leaves = {**params, **params["layers"]}
    return {name: leaves[name] for name in MATRICES if name in leaves}


def _values(w: Any) -> Any:
    return w.values if isinstance(w, Int8) else w
