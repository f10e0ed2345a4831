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

from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from lm.models.block import STREAM, Block, look, place, stack
from lm.models.cache import Cache, fill
from lm.models.config import TransformerConfig, deviation
from lm.models.layers import activate, bias, dense, dropout, logits, normalise, weight
from lm.sharding import constrain

__all__ = ["Block", "Transformer", "TransformerConfig", "deviation"]

Top = tuple[Array, Array | None]  # the table of the head [V, D], and its bias [V]


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
        x, top, _ = self.states(tokens, segments, positions, types, deterministic=deterministic)
        return self.multiply(x, *top)

    def extend(
        self,
        tokens: Array,
        segments: Array,
        positions: Array,
        cache: Cache,
        keep: Literal["last", "all"] = "last",
    ) -> tuple[Array, Cache]:
        """Logits float32 [B, 1 or T, V] of T more columns, and the cache with them.

        Equal to the logits of whole rows, however they are cut into columns. Of those, `cache` must
        have room for T more. No gradient is expected: weights are not laid out for one.
        """
        x, top, grown = self.states(tokens, segments, positions, None, cache, deterministic=True)
        assert grown is not None
        return self.multiply(x[:, -1:] if keep == "last" else x, *top, learns=False), grown

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
        x, (table, offset), _ = self.states(
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
        cache: Cache | None = None,
        *,
        deterministic: bool,
    ) -> tuple[Array, Top, Cache | None]:
        """Final states [B, T, D], what the logits are made of, and the cache with what was read."""
        c = self.config
        table, x = self.enter(tokens, positions, types)
        keys, layers, kept = None, None, None
        if c.dropout and not deterministic:
            keys = jax.random.split(self.make_rng("dropout"), c.layers + 1)
            x, keys = dropout(x, c.dropout, keys[0]), keys[1:]
        if cache is not None:
            cache = cache._replace(segments=fill(cache, segments))
            layers, kept = jnp.arange(c.layers), cache.layers
        view = look(self, segments, positions, cache)
        (x, kept), _ = stack(c)(c, name="layers")((x, kept), keys, layers, view)
        if cache is not None:
            cache = cache._replace(layers=kept, length=cache.length + tokens.shape[1])
        return *self.leave(x, table), cache

    def enter(self, tokens: Array, positions: Array, types: Array | None) -> tuple[Array, Array]:
        """The table [V, D] and what enters the first layer [B, T, D]."""
        c, D = self.config, self.config.width
        table = weight(self, "embed", (c.vocab_size, D), "vocab", "embed")
        x = jnp.take(table, tokens, axis=0)
        if c.token_types:
            kinds = weight(self, "type_embed", (c.token_types, D), None, "embed")
            x = x + (kinds[0] if types is None else jnp.take(kinds, types, axis=0))
        x = constrain(place(self, x, positions), STREAM)
        return table, normalise(self, "embed_norm", x) if c.block == "post" else x

    def leave(self, x: Array, table: Array) -> tuple[Array, Top]:
        """Final states and what the logits are made of, from the last layer's x [B, T, D]."""
        c, (B, T, D) = self.config, x.shape
        if c.block != "post":
            x = normalise(self, "norm", x)
        if c.head == "untied":
            table = weight(self, "head", (c.vocab_size, D), "vocab", "embed")
        if c.head != "mlm":
            return x, (table, None)
        h = dense(self, "transform", x.reshape(B * T, D), (D, D), ("embed", None))
        h = normalise(self, "transform_norm", activate(c.activation, h))
        return h.reshape(B, T, D), (table, bias(self, "head_bias", c.vocab_size, "vocab"))

    def multiply(self, x: Array, table: Array, offset: Array | None, learns: bool = True) -> Array:
        """Logits [B, T, V] of final states [B, T, D]."""
        c, (B, T, D) = self.config, x.shape
        y = logits(x.reshape(B * T, D), table, learns) / c.width_ratio
        y = y if offset is None else y + offset
        return constrain(y.reshape(B, T, c.vocab_size), ("batch", "seq", "vocab"))
