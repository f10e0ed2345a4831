"""What a model remembers of the columns that it has read: an argument and a result of `extend`.

A row of a cache is S columns, of which the first `length` are filled, in all rows alike. A column
is a token or padding: prompts of unequal length are padded on the left, so that they end together.
Positions are those of the tokens (0 at a row's first one), so what is computed for a prompt does
not depend on its padding.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from lm.config import UserError, positive
from lm.models.config import EncoderDecoderConfig, TransformerConfig
from lm.models.lstm import LSTMConfig, fresh_state


class Cache(NamedTuple):
    """`layers`: of a Transformer keys and values, each [L, B, S, K, H]; of an LSTM h and c, each
    [L, B, ...]; of an encoder-decoder keys and values of the target, then those of the source and
    the source's segments [1, B, S], which its method `start` fills in. `segments` int32 [B, S]: 1
    where a column is a token, 0 where it is padding or not filled. `length` int32 []: columns that
    are filled.
    """

    layers: Any
    segments: Array
    length: Array


def empty_cache(config: Any, batch: int, length: int) -> Cache:
    """A cache of `batch` rows with room for `length` columns, padding included."""
    positive("batch", batch)
    positive("length", length)
    segments = jnp.zeros((batch, length), jnp.int32)
    return Cache(_empty_layers(config, batch, length), segments, jnp.int32(0))


def _empty_layers(config: Any, batch: int, length: int) -> Any:
    if isinstance(config, LSTMConfig):
        return fresh_state(config, batch)
    if isinstance(config, EncoderDecoderConfig):
        source = config.decoder.layers, batch, 0, config.heads, config.head_size
        crossed = jnp.zeros(source, config.dtype), jnp.zeros(source, config.dtype)
        own = _empty_layers(config.decoder, batch, length)
        return *own, *crossed, jnp.zeros((1, batch, 0), jnp.int32)
    c: TransformerConfig = config
    if c.direction != "causal":
        raise UserError(
            "direction is 'both': what a token is depends on those after it, so nothing can be"
            " kept; run the model on whole rows"
        )
    shape = c.layers, batch, length, c.kv_heads, c.head_size
    return jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype)


def fill(cache: Cache, segments: Array) -> Array:
    """The segments of the cache [B, S] with those of T more columns [B, T].

    That there is room behind those that are filled, whose number is not known here, is the
    caller's to see to.
    """
    (B, T), (rows, S) = segments.shape, cache.segments.shape
    if rows != B or T > S:
        raise UserError(
            f"{B} rows of {T} columns do not fit a cache of {rows} rows of {S}; make one that does"
        )
    return lax.dynamic_update_slice(
        cache.segments, segments.astype(cache.segments.dtype), (0, cache.length)
    )
