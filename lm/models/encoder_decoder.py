"""An encoder that reads a source and a decoder that writes a target: T5 (Raffel et al. 2020) and
the plain one of Vaswani et al. 2017, pre-norm.

    memory = norm(blocks(embed(source)))                      both directions
    x = x + out(attention(q, k, v))                           of norm1(x), causal, per layer
    x = x + cross_out(attention(cross_q(y), cross_kv(memory)))     where y = norm_cross(x)
    x = x + down(act(up(z)))                                  where z = norm2(x)
    logits = norm(x) head'

To whatever trains and scores it looks like every other model: a row of T columns is
`source_length` columns of source, padded, and then the target; positions restart there. The logits
of source columns are zeros, and their targets should have no weight. The target's first token says
only that it begins; each column's target is the next token.

Parameters: `embed` [V, D] and `head` at the top; under `encoder` and `decoder` each `relative` [32,
N] or `position_embed`, `norm` and `layers`, which are a Transformer's, and in the decoder also
`norm_cross`, `cross_q` [D, N H], `cross_kv` with columns [N, (key, value), H] and `cross_out`.

To decode, `start` reads a source into a cache, and `extend` appends columns of the target:

    cache = empty_cache(config, batch, length)
    cache = model.apply({"params": p}, source, segments, cache, method="start")
    logits, cache = model.apply({"params": p}, tokens, segments, positions, cache, method="extend")

There the source has any width; `source_length` is of training rows only.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from lm.attention import Mask, Ring, attention
from lm.config import UserError
from lm.models.block import STREAM, View, attend, look, mlp, place, stack
from lm.models.cache import Cache, fill
from lm.models.config import EncoderDecoderConfig, TransformerConfig
from lm.models.layers import dense, dropout, logits, normalise, weight
from lm.sharding import constrain


class Source(NamedTuple):
    """What the decoder reads: segments int32 [B, S], and the memory [B, S, D], or None where its
    keys and values are in a cache.
    """

    segments: Array
    memory: Array | None = None


class DecoderBlock(nn.Module):
    """One layer of the decoder."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, carried: tuple, key: Array | None, layer: Array | None, seen: tuple[View, Source]
    ) -> tuple[tuple, None]:
        """As `lm.models.block.Block`; kept are own keys and values and those of the source."""
        (x, kept), c, (view, source) = carried, self.config, seen
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        own: Any = None if kept is None else kept[:2]
        crossed: Any = None if kept is None else kept[2:]

        h, own = attend(self, normalise(self, "norm1", x), view, own, layer)
        x = constrain(x + dropout(h, c.dropout, keys[0]), STREAM)
        if crossed is not None:
            crossed = tuple(lax.dynamic_index_in_dim(a, layer, keepdims=False) for a in crossed)
        h = self.cross(normalise(self, "norm_cross", x), view, source, crossed)
        x = constrain(x + dropout(h, c.dropout, keys[1]), STREAM)
        h = mlp(self, normalise(self, "norm2", x), learns=kept is None)
        x = constrain(x + dropout(h, c.dropout, keys[2]), STREAM)
        return (x, None if kept is None else (*own, *kept[2:])), None

    def cross(self, x: Array, view: View, source: Source, crossed: Any) -> Array:
        """x [B, T, D] -> what it finds in the source [B, T, D]."""
        c, (B, T, D) = self.config, x.shape
        (N, H), learns, axes = (c.heads, c.head_size), crossed is None, ("embed", "heads")
        q = dense(self, "cross_q", x.reshape(B * T, D), (D, N * H), axes, learns)
        if crossed is None:
            assert source.memory is not None
            S = source.memory.shape[1]
            flat = source.memory.reshape(B * S, D)
            kv = dense(self, "cross_kv", flat, (D, N * 2 * H), axes).reshape(B, S, N, 2, H)
            crossed = kv[..., 0, :], kv[..., 1, :]
        assert isinstance(view.mask, Mask)
        mask = Mask(q_segments=view.mask.q_segments, k_segments=source.segments)
        (k, v), impl = crossed, c.attention if learns else "auto"
        a = attention(q.reshape(B, T, N, H), k, v, mask, scale=c.attention_scale, impl=impl)
        a = a.reshape(B * T, N * H)
        out = dense(self, "cross_out", a, (N * H, D), ("heads", "embed"), learns)
        return out.reshape(B, T, D)


class Stack(nn.Module):
    """The layers of the encoder, or of the decoder, which has a source."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self,
        x: Array,
        segments: Array,
        positions: Array,
        source: Source | None = None,
        cache: Cache | None = None,
        deterministic: bool = True,
    ) -> tuple[Array, Any]:
        """Embeddings [B, T, D] -> final states [B, T, D], and what is kept."""
        c, keys, layers, kept = self.config, None, None, None
        x = constrain(place(self, x, positions), STREAM)
        if c.dropout and not deterministic:
            keys = jax.random.split(self.make_rng("dropout"), c.layers + 1)
            x, keys = dropout(x, c.dropout, keys[0]), keys[1:]
        if cache is not None:
            layers, kept = jnp.arange(c.layers), cache.layers[:4]
        view = look(self, segments, positions, cache)
        if source is None:
            (x, kept), _ = stack(c)(c, name="layers")((x, kept), keys, layers, view)
        else:
            every = stack(c, DecoderBlock)(c, name="layers")
            (x, kept), _ = every((x, kept), keys, layers, (view, source))
        return normalise(self, "norm", x), kept


class EncoderDecoder(nn.Module):
    """A model of a target given a source; rows are what the module's docstring says."""

    config: EncoderDecoderConfig

    def setup(self) -> None:
        """Parameters at the top, and the two stacks."""
        c = self.config
        self.embed = weight(self, "embed", (c.vocab_size, c.width), "vocab", "embed")
        if c.head == "untied":
            self.head = weight(self, "head", (c.vocab_size, c.width), "vocab", "embed")
        self.encoder, self.decoder = Stack(c.encoder), Stack(c.decoder)

    def __call__(
        self, tokens: Array, segments: Array, positions: Array, *, deterministic: bool = True
    ) -> Array:
        """tokens, segments, positions int32 [B, T] -> logits float32 [B, T, V], zeros for the
        source.
        """
        x = self.target(tokens, segments, positions, deterministic)
        source = self.config.source_length
        return jnp.pad(self.multiply(x), ((0, 0), (source, 0), (0, 0)))

    def hidden(
        self, tokens: Array, segments: Array, positions: Array, *, deterministic: bool = True
    ) -> tuple[Array, Array]:
        """What the logits are the product of: final states [B, T, D], zeros for the source, and
        the head's table [V, D]. The logits are this product over `width_ratio`.
        """
        x = self.target(tokens, segments, positions, deterministic)
        return jnp.pad(x, ((0, 0), (self.config.source_length, 0), (0, 0))), self.table()

    def encode(self, source: Array, segments: Array, *, deterministic: bool = True) -> Array:
        """The memory [B, S, D] of sources int32 [B, S]; segments are 0 for padding."""
        positions = jnp.maximum(jnp.cumsum(segments > 0, axis=1) - 1, 0)
        x = jnp.take(self.embed, source, axis=0)
        return self.encoder(x, segments, positions, deterministic=deterministic)[0]

    def start(self, source: Array, segments: Array, cache: Cache) -> Cache:
        """The cache with the keys and values of sources int32 [B, S]."""
        c, memory = self.config, self.encode(source, segments)
        w = self.variables["params"]["decoder"]["layers"]["cross_kv"].astype(c.dtype)
        kv = jnp.einsum("bsd,ldo->lbso", memory, w)
        kv = kv.reshape(*kv.shape[:3], c.heads, 2, c.head_size)
        crossed = kv[..., 0, :], kv[..., 1, :], segments[None].astype(jnp.int32)
        return cache._replace(layers=(*cache.layers[:2], *crossed))

    def extend(
        self,
        tokens: Array,
        segments: Array,
        positions: Array,
        cache: Cache,
        keep: Literal["last", "all"] = "last",
    ) -> tuple[Array, Cache]:
        """Logits float32 [B, 1 or T, V] of T more columns of the target, and the cache with them;
        as `Transformer.extend`.
        """
        *_, filled = cache.layers
        if not filled.shape[-1]:
            raise UserError("the cache has no source; read one into it by the method 'start'")
        cache = cache._replace(segments=fill(cache, segments))
        x = jnp.take(self.embed, tokens, axis=0)
        x, kept = self.decoder(x, segments, positions, Source(filled[0]), cache)
        cache = cache._replace(layers=(*kept, filled), length=cache.length + tokens.shape[1])
        x = self.scale(x)
        return self.multiply(x[:, -1:] if keep == "last" else x, learns=False), cache

    def target(
        self, tokens: Array, segments: Array, positions: Array, deterministic: bool
    ) -> Array:
        """Final states of the target's columns [B, T - source_length, D]."""
        if isinstance(segments, Ring):
            raise UserError(
                "several devices share each row, which an encoder-decoder reads in two parts; use"
                " a mesh without 'sequence'"
            )
        S = self.config.source_length
        if tokens.shape[1] <= S:
            raise UserError(
                f"a row of {tokens.shape[1]} tokens has no target after a source of {S}; make rows"
                " longer or source_length smaller"
            )
        x = jnp.take(self.embed, tokens, axis=0)
        memory, _ = self.encoder(
            x[:, :S], segments[:, :S], positions[:, :S], deterministic=deterministic
        )
        source = Source(segments[:, :S], memory)
        own = x[:, S:], segments[:, S:], positions[:, S:]
        return self.scale(self.decoder(*own, source, deterministic=deterministic)[0])

    def scale(self, x: Array) -> Array:
        """Final states as the head wants them."""
        return x * self.config.width**-0.5 if self.config.head == "tied_scaled" else x

    def table(self) -> Array:
        """The head's table [V, D]."""
        return self.head if self.config.head == "untied" else self.embed

    def multiply(self, x: Array, learns: bool = True) -> Array:
        """Logits [B, T, V] of final states [B, T, D]."""
        c, (B, T, D) = self.config, x.shape
        y = logits(x.reshape(B * T, D), self.table(), learns) / c.width_ratio
        return constrain(y.reshape(B, T, c.vocab_size), ("batch", "seq", "vocab"))
