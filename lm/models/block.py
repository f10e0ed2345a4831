"""A layer of a Transformer: attention and an MLP, each added to the stream of states.

Functions that take a `module` make its parameters; its config is a `TransformerConfig`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from lm.attention import Mask, Ring, attention, rotary_attention
from lm.attention.relative import BUCKETS, relative_bias
from lm.attention.rotary import rope_angles, rotate, split_heads
from lm.config import UserError
from lm.models.cache import Cache
from lm.models.config import TransformerConfig
from lm.models.layers import activate, dense, dropout, normalise, rms_norm, scale, weight
from lm.sharding import constrain

STREAM = ("batch", "seq", None)

Kept = tuple[Array, Array] | None  # keys and values of all layers, each [L, B, S, K, H]


class View(NamedTuple):
    """What tokens see of each other: the mask, the angles that their positions turn queries and
    keys by, and a bias [N, T, S] of the scores.
    """

    mask: Mask | Ring
    angles: tuple[Array, Array] | None = None
    bias: Array | None = None


def look(module: Any, segments: Array | Ring | Mask, positions: Array, cache: Cache | None) -> View:
    """How the tokens of a batch see each other, and what is kept of those before them."""
    c, T = module.config, positions.shape[1]
    angles, bias, start = None, None, None if cache is None else cache.length
    if c.positions == "rotary":
        angles = rope_angles(positions, c.rotated, c.rope_base, c.rope_scaling)
    if c.positions == "relative":
        table = weight(module, "relative", (BUCKETS, c.heads), None, "heads")
        S = T if cache is None else cache.segments.shape[1]
        bias = relative_bias(table, T, S, 0 if start is None else start, c.direction == "both")
    if isinstance(segments, Ring):  # rows that several devices share
        if c.direction != "causal" or c.window or bias is not None:
            raise UserError(
                "several devices share each row, which only causal attention without a window"
                f" or a bias can; direction is {c.direction!r}, window {c.window} and positions"
                f" {c.positions!r}, use a mesh without 'sequence'"
            )
        return View(segments, angles)
    if isinstance(segments, Mask):  # of a caller for whom padding, too, sees what is real
        return View(segments, angles, bias)
    filled = None if cache is None else cache.segments
    mask = Mask(c.direction == "causal", c.window or None, segments, filled, start=start)
    return View(mask, angles, bias)


def place(module: Any, x: Array, positions: Array) -> Array:
    """x [B, T, D] with the learned embeddings of its positions, if the model has them."""
    c = module.config
    if c.positions != "learned":
        return x
    if x.shape[1] > c.context:
        raise UserError(
            f"a row of {x.shape[1]} tokens is longer than the context of {c.context};"
            " cut it, or give the model a larger context"
        )
    table = weight(module, "position_embed", (c.context, c.width), None, "embed")
    return x + jnp.take(table, positions, axis=0)


class Block(nn.Module):
    """One layer."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, carried: tuple[Array, Kept], key: Array | None, layer: Array | None, view: View
    ) -> tuple[tuple[Array, Kept], None]:
        """x [B, T, D] and what is kept -> the same and None; `key` switches dropout on.

        With keys and values that are kept, no gradient is expected, and `layer` is their index.
        """
        (x, kept), c = carried, self.config
        keys = (None, None) if key is None else jax.random.split(key)
        pre, given = c.block != "post", x

        h, kept = attend(self, normalise(self, "norm1", x) if pre else x, view, kept, layer)
        x = constrain(x + dropout(h, c.dropout, keys[0]), STREAM)
        x = x if pre else normalise(self, "norm1", x)

        y = given if c.block == "parallel" else x
        h = mlp(self, normalise(self, "norm2", y) if pre else y, learns=kept is None)
        x = constrain(x + dropout(h, c.dropout, keys[1]), STREAM)
        return (x if pre else normalise(self, "norm2", x), kept), None


def attend(
    module: Any, x: Array, view: View, kept: Kept = None, layer: Array | None = None
) -> tuple[Array, Kept]:
    """x [B, T, D] -> [B, T, D], and what is kept with the keys and values of x put in from column
    `view.mask.start` on.
    """
    c = module.config
    (B, T, D), K, G, H = x.shape, c.kv_heads, c.group, c.head_size
    learns, axes = kept is None, ("embed", "heads")
    qkv = dense(module, "qkv", x.reshape(B * T, D), (D, K * (G + 2) * H), axes, learns)
    qkv = constrain(qkv.reshape(B, T, K, G + 2, H), ("batch", "seq", "kv_heads", None, "head"))
    if learns and view.angles is not None and c.qk_norm == "none":
        a = rotary_attention(qkv, view.angles, view.mask, impl=c.attention)
    else:
        q, k, v = split_heads(qkv)
        if c.qk_norm == "rms":
            q = rms_norm(q, scale(module, "q_norm", H), c.norm_epsilon)
            k = rms_norm(k, scale(module, "k_norm", H), c.norm_epsilon)
        if view.angles is not None:
            q, k = rotate(q, view.angles), rotate(k, view.angles)
        if kept is not None:
            assert isinstance(view.mask, Mask)
            kept, (k, v) = keep(kept, layer, view.mask.start, (k, v))
        impl = c.attention if learns else "auto"
        a = attention(q, k, v, view.mask, scale=c.attention_scale, impl=impl, bias=view.bias)
    a = a.reshape(B * T, K * G * H)
    out = dense(module, "out", a, (K * G * H, D), ("heads", "embed"), learns)
    return out.reshape(B, T, D), kept


def keep(kept: Any, layer: Any, start: Any, new: Any) -> tuple[Any, Any]:
    """What is kept [L, B, S, ...] with new columns [B, T, ...] of a layer, and that layer's.

    As a carry of a loop over layers it is written in place; as its input and output, or with the
    loop unrolled, XLA on a CPU copies it at every layer.
    """
    at = (layer, 0, start, 0, 0)
    kept = tuple(
        lax.dynamic_update_slice(old, part[None].astype(old.dtype), at)
        for old, part in zip(kept, new, strict=True)
    )
    return kept, tuple(lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in kept)


def mlp(module: Any, x: Array, learns: bool = True) -> Array:
    """x [B, T, D] -> [B, T, D]."""
    c = module.config
    (B, T, D), F = x.shape, c.mlp_size
    x = x.reshape(B * T, D)
    h = dense(module, "up", x, (D, F), ("embed", "mlp"), learns)
    if c.gated:
        gate = dense(module, "gate", x, (D, F), ("embed", "mlp"), learns)
        h = activate(c.activation, gate) * h
    else:
        h = activate(c.activation, h)
    return dense(module, "down", h, (F, D), ("mlp", "embed"), learns).reshape(B, T, D)


def stack(config: TransformerConfig, block: Any = Block) -> Any:
    """A block repeated over depth, its parameters stacked along a leading axis `layers`."""
    if config.remat != "none":
        keep_dots = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        policy = keep_dots if config.remat == "dots" else None
        block = nn.remat(block, prevent_cse=False, policy=policy)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, 0, nn.broadcast),
        length=config.layers,
        unroll=config.layers if config.layer_loop == "unroll" else 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
