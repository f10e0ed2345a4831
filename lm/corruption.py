"""What is hidden from a model that is to restore it: masked tokens, and spans with sentinels.

Pure functions of (rows of text, key), mapped over replicas like the step that calls them; training
draws a fresh key for every batch, evaluation has a fixed one. Ids are placed as T5 has them: the
last of the vocabulary is [MASK] and the first sentinel, the one before it the second, and so on;
`stop` is where ordinary tokens end.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array

from lm.config import UserError, positive, within

SHOWN, SWAPPED = 0.8, 0.1  # of the chosen tokens: as [MASK], as any other; the rest as they are


@dataclass(frozen=True)
class Masking:
    """BERT's masks (Devlin et al. 2019, section 3.1), drawn anew each time (Liu et al. 2019):
    each token, or word, is chosen with probability `rate`.
    """

    mask: int
    first: int
    stop: int
    rate: float = 0.15
    unit: Literal["tokens", "words"] = "tokens"

    def __post_init__(self) -> None:
        positive("mask_rate", self.rate)
        within("mask_rate", self.rate, 0, 1)


def mask_tokens(batch: Any, key: Array, masking: Masking) -> Any:
    """The batch [B, T] as a masked model reads it: targets are the tokens, weights 1 where one was
    chosen.

    Only ordinary tokens, first <= id < stop, are chosen. Of `unit` words the targets that come in
    are each token's place of its word's first, and a word is chosen whole; each of its tokens is
    then shown as [MASK], as another or as it is by a chance of its own.
    """
    pick, how, other = jax.random.split(key, 3)
    tokens, shape = batch.tokens, batch.tokens.shape
    chance = jax.random.uniform(pick, shape)
    if masking.unit == "words":
        chance = jnp.take_along_axis(chance, batch.targets, axis=-1)
    ordinary = (tokens >= masking.first) & (tokens < masking.stop) & (batch.segments > 0)
    chosen = ordinary & (chance < masking.rate)
    kind = jax.random.uniform(how, shape)
    swapped = jax.random.randint(other, shape, masking.first, masking.stop, tokens.dtype)
    shown = jnp.where(kind < SHOWN + SWAPPED, swapped, tokens)
    shown = jnp.where(kind < SHOWN, jnp.asarray(masking.mask, tokens.dtype), shown)
    return batch._replace(
        tokens=jnp.where(chosen, shown, tokens),
        targets=tokens,
        weights=chosen.astype(jnp.float32),
    )


def mask_one(batch: Any, key: Array, masking: Masking) -> Any:
    """The batch with one ordinary token of each row shown as [MASK]; rows without one have no
    weight.
    """
    tokens = batch.tokens
    ordinary = (tokens >= masking.first) & (tokens < masking.stop) & (batch.segments > 0)
    chance = jnp.where(ordinary, jax.random.uniform(key, tokens.shape), -1)
    chosen = ordinary & (chance == chance.max(axis=-1, keepdims=True))
    return batch._replace(
        tokens=jnp.where(chosen, jnp.asarray(masking.mask, tokens.dtype), tokens),
        targets=tokens,
        weights=chosen.astype(jnp.float32),
    )


@dataclass(frozen=True)
class Spans:
    """T5's span corruption (Raffel et al. 2020, section 3.1.4) for rows of `source` columns and
    `target` columns: `rate` of the tokens, in spans of `span` on average, are cut out.
    """

    source: int
    target: int
    sentinel: int  # the first; the next is one lower
    pad: int
    begin: int
    end: int
    rate: float = 0.15
    span: float = 3.0

    def __post_init__(self) -> None:
        positive("mask_rate", self.rate)
        within("mask_rate", self.rate, 0, 0.9)
        within("span_length", self.span, 1)
        if self.counts[0] < 2:
            raise UserError(
                f"{self.source} source and {self.target} target columns leave no room to cut spans"
                " out; use longer rows"
            )

    @property
    def counts(self) -> tuple[int, int, int]:
        """Tokens of a text, those cut out of it, and their spans: as many as the columns hold."""
        best = (0, 0, 0)
        for tokens in range(2, self.source + self.target):
            cut = min(max(round(tokens * self.rate), 1), tokens - 1)
            spans = min(max(round(cut / self.span), 1), tokens - cut)
            if tokens - cut + spans + 1 > self.source or cut + spans + 1 > self.target:
                break
            best = (tokens, cut, spans)
        return best


def cut_spans(batch: Any, key: Array, spans: Spans) -> Any:
    """The batch [B, T] of text as rows of `source` and `target` columns for an encoder-decoder.

    The source has a sentinel in place of each span, the target each sentinel with what was there,
    both end with <eos>; the text's last tokens, for which there is no room, are left out. Weights
    are 0 in the source, positions begin anew in the target.
    """
    keys = jax.random.split(key, len(batch.tokens))
    tokens, targets = jax.vmap(lambda row, k: _cut_row(row, k, spans))(batch.tokens, keys)
    inside = jnp.arange(tokens.shape[1])
    position = jnp.where(inside < spans.source, inside, inside - spans.source)
    return batch._replace(
        tokens=tokens,
        targets=targets,
        weights=(targets != spans.pad).astype(jnp.float32),
        segments=(tokens != spans.pad).astype(jnp.int32),
        positions=jnp.broadcast_to(position, tokens.shape).astype(jnp.int32),
    )


def _cut_row(row: Array, key: Array, spans: Spans) -> tuple[Array, Array]:
    """Tokens and targets of one row."""
    n, cut, count = spans.counts
    keys = jax.random.split(key)
    sizes = jnp.stack([_parts(keys[0], n - cut, count), _parts(keys[1], cut, count)], 1).ravel()
    part = jnp.repeat(jnp.arange(2 * count), sizes, total_repeat_length=n)  # text, span, text, …
    first = jnp.concatenate([jnp.ones(1, bool), part[1:] != part[:-1]])
    sentinel = (spans.sentinel - part // 2).astype(row.dtype)
    out = part % 2 == 1
    source = _squeeze(~out | first, jnp.where(out, sentinel, row[:n]), spans.source, spans)
    target = _squeeze(out | first, jnp.where(out, row[:n], sentinel), spans.target, spans)
    begin = jnp.full((1,), spans.begin, row.dtype)
    empty = jnp.full((spans.source,), spans.pad, row.dtype)
    # What the decoder reads is what it is to say, one place later.
    return jnp.concatenate([source, begin, target[:-1]]), jnp.concatenate([empty, target])


def _parts(key: Array, items: int, parts: int) -> Array:
    """The sizes of `parts` random parts, none empty, of `items`: int [parts]."""
    cuts = jax.random.permutation(key, jnp.arange(items - 1) < parts - 1)
    part = jnp.concatenate([jnp.zeros(1, int), jnp.cumsum(cuts)])
    return jnp.zeros(parts, int).at[part].add(1)


def _squeeze(keep: Array, values: Array, length: int, spans: Spans) -> Array:
    """The values that are kept, <eos>, and padding up to `length`."""
    at = jnp.where(keep, jnp.cumsum(keep) - 1, length)
    filled = jnp.full((length,), spans.pad, values.dtype).at[at].set(values, mode="drop")
    return filled.at[keep.sum()].set(spans.end)
