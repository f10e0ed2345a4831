"""The Transformer: blocks of attention and an MLP over a stream of states, in the forms that a
config can express. As our own studies have it (pre-norm, rotary positions, grouped queries):

    x = embed(tokens)
    x = x + out(attention(rope(q), rope(k), v))    where [q k v] = qkv(norm(x))      per layer
    x = x + down(silu(gate(y)) * up(y))            where y = norm(x)                 per layer
    logits = norm(x) head'

A document sees itself only (segments), and positions restart in each. Weights are two-dimensional
products on [B*T, D]. The columns of `qkv` are ordered by kv head, [K, (N/K queries, key, value),
H], so that a cut along K is a cut along heads; a loader of other layouts has to arrange them so.
`gate` and `up` are not one, for a cut along F would separate them; as [D, 2, F] their product takes
5 times as long on a CPU.

Width transfer (muP; Yang et al. 2022, table 8, for Adam), with m = width / base_width: hidden
weights have standard deviation 1/sqrt(fan-in) and learning rate 1/m; embeddings, head, norms and
biases keep both; the logits are multiplied by 1/m.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from lm.attention import Mask, Ring, attention, rotary_attention
from lm.attention.rotary import rope_angles, rotate, split_heads
from lm.config import UserError
from lm.models.config import TransformerConfig, deviation
from lm.models.layers import (
    activate,
    bias,
    dense,
    dropout,
    logits,
    normalise,
    rms_norm,
    scale,
    weight,
)
from lm.sharding import constrain

__all__ = ["Block", "Transformer", "TransformerConfig", "deviation"]

STREAM = ("batch", "seq", None)


class Block(nn.Module):
    """One layer: attention, then the MLP, each added to the stream."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Array, key: Array | None, mask: Mask | Ring, angles: tuple | None
    ) -> tuple[Array, None]:
        """x [B, T, D] -> ([B, T, D], None); `key` switches dropout on."""
        c = self.config
        keys = (None, None) if key is None else jax.random.split(key)
        pre, given = c.block != "post", x

        h = self.attend(normalise(self, "norm1", x) if pre else x, mask, angles)
        x = constrain(x + dropout(h, c.dropout, keys[0]), STREAM)
        x = x if pre else normalise(self, "norm1", x)

        y = given if c.block == "parallel" else x
        h = self.mlp(normalise(self, "norm2", y) if pre else y)
        x = constrain(x + dropout(h, c.dropout, keys[1]), STREAM)
        return x if pre else normalise(self, "norm2", x), None

    def attend(self, x: Array, mask: Mask | Ring, angles: tuple | None) -> Array:
        """x [B, T, D] -> [B, T, D]."""
        c = self.config
        (B, T, D), K, G, H = x.shape, c.kv_heads, c.group, c.head_size
        qkv = dense(self, "qkv", x.reshape(B * T, D), (D, K * (G + 2) * H), ("embed", "heads"))
        qkv = constrain(qkv.reshape(B, T, K, G + 2, H), ("batch", "seq", "kv_heads", None, "head"))
        if angles is not None and c.qk_norm == "none":
            a = rotary_attention(qkv, angles, mask, impl=c.attention)
        else:
            q, k, v = split_heads(qkv)
            if c.qk_norm == "rms":
                q = rms_norm(q, scale(self, "q_norm", H), c.norm_epsilon)
                k = rms_norm(k, scale(self, "k_norm", H), c.norm_epsilon)
            if angles is not None:
                q, k = rotate(q, angles), rotate(k, angles)
            a = attention(q, k, v, mask, impl=c.attention)
        a = a.reshape(B * T, K * G * H)
        return dense(self, "out", a, (K * G * H, D), ("heads", "embed")).reshape(B, T, D)

    def mlp(self, x: Array) -> Array:
        """x [B, T, D] -> [B, T, D]."""
        c = self.config
        (B, T, D), F = x.shape, c.mlp_size
        x = x.reshape(B * T, D)
        h = dense(self, "up", x, (D, F), ("embed", "mlp"))
        if c.gated:
            gate = dense(self, "gate", x, (D, F), ("embed", "mlp"))
            h = activate(c.activation, gate) * h
        else:
            h = activate(c.activation, h)
        return dense(self, "down", h, (F, D), ("mlp", "embed")).reshape(B, T, D)


class Transformer(nn.Module):
    """A language model, causal or of both directions."""

    config: TransformerConfig

    def __call__(
        self,
        tokens: Array,
        segments: Array,
        positions: Array,
        types: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> Array:
        """tokens, segments, positions, types int32 [B, T] -> logits float32 [B, T, V].

        Segments are 1.. for documents and 0 for padding; types default to 0. Dropout needs
        `deterministic=False` and `rngs={"dropout": key}`.
        """
        c, (B, T) = self.config, tokens.shape
        x, table, offset = self.states(
            tokens, segments, positions, types, deterministic=deterministic
        )
        y = logits(x.reshape(B * T, c.width), table) / c.width_ratio
        y = y if offset is None else y + offset
        return constrain(y.reshape(B, T, c.vocab_size), ("batch", "seq", "vocab"))

    def hidden(
        self,
        tokens: Array,
        segments: Array,
        positions: Array,
        types: Array | None = None,
        *,
        deterministic: bool = True,
    ) -> tuple[Array, Array]:
        """What the logits are the product of: final states [B, T, D] and the head's table [V, D].

        The logits are this product over `width_ratio`. A head with a bias has it as a further
        column of the table, [V, D + 1], beside states of one.
        """
        x, table, offset = self.states(
            tokens, segments, positions, types, deterministic=deterministic
        )
        if offset is not None:
            column = (offset * self.config.width_ratio)[:, None].astype(table.dtype)
            x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)
            table = jnp.concatenate([table, column], axis=-1)
        return x, table

    @nn.compact
    def states(
        self,
        tokens: Array,
        segments: Array,
        positions: Array,
        types: Array | None,
        *,
        deterministic: bool,
    ) -> tuple[Array, Array, Array | None]:
        """Final states [B, T, D], the head's table [V, D] and its bias [V] or None."""
        c = self.config
        table, x = self.enter(tokens, positions, types)
        keys = None
        if c.dropout and not deterministic:
            keys = jax.random.split(self.make_rng("dropout"), c.layers + 1)
            x, keys = dropout(x, c.dropout, keys[0]), keys[1:]
        x, _ = _stack(c)(c, name="layers")(x, keys, _mask(c, segments), _angles(c, positions))
        return self.leave(x, table)

    def enter(self, tokens: Array, positions: Array, types: Array | None) -> tuple[Array, Array]:
        """The table [V, D] and what enters the first layer [B, T, D]."""
        c, D = self.config, self.config.width
        table = weight(self, "embed", (c.vocab_size, D), "vocab", "embed")
        x = jnp.take(table, tokens, axis=0)
        if c.token_types:
            kinds = weight(self, "type_embed", (c.token_types, D), None, "embed")
            x = x + (kinds[0] if types is None else jnp.take(kinds, types, axis=0))
        if c.positions == "learned":
            if tokens.shape[1] > c.context:
                raise UserError(
                    f"a row of {tokens.shape[1]} tokens is longer than the context of {c.context};"
                    " cut it, or give the model a larger context"
                )
            places = weight(self, "position_embed", (c.context, D), None, "embed")
            x = x + jnp.take(places, positions, axis=0)
        x = constrain(x, STREAM)
        return table, normalise(self, "embed_norm", x) if c.block == "post" else x

    def leave(self, x: Array, table: Array) -> tuple[Array, Array, Array | None]:
        """What the logits are made of, from the last layer's x [B, T, D]."""
        c, (B, T, D) = self.config, x.shape
        if c.block != "post":
            x = normalise(self, "norm", x)
        if c.head == "untied":
            table = weight(self, "head", (c.vocab_size, D), "vocab", "embed")
        if c.head != "mlm":
            return x, table, None
        h = dense(self, "transform", x.reshape(B * T, D), (D, D), ("embed", None))
        h = normalise(self, "transform_norm", activate(c.activation, h))
        return h.reshape(B, T, D), table, bias(self, "head_bias", c.vocab_size, "vocab")


def _mask(c: TransformerConfig, segments: Array | Ring | Mask) -> Mask | Ring:
    if isinstance(segments, Mask):  # of a caller for whom padding, too, sees what is real
        return segments
    if not isinstance(segments, Ring):
        return Mask(c.direction == "causal", c.window or None, q_segments=segments)
    if c.direction != "causal" or c.window:  # rows that several devices share
        raise UserError(
            f"several devices share each row, which only causal attention without a window can;"
            f" direction is {c.direction!r} and window {c.window}, use a mesh without 'sequence'"
        )
    return segments


def _angles(c: TransformerConfig, positions: Array) -> tuple[Array, Array] | None:
    if c.positions != "rotary":
        return None
    return rope_angles(positions, c.rotated, c.rope_base, c.rope_scaling)


def _stack(config: TransformerConfig) -> Any:
    """Block repeated over depth, its parameters stacked along a leading axis `layers`."""
    block: Any = Block
    if config.remat != "none":
        keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        block = nn.remat(Block, prevent_cse=False, policy=keep if config.remat == "dots" else None)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast),
        length=config.layers,
        unroll=config.layers if config.layer_loop == "unroll" else 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
