"""Beam search with a length penalty: the texts of the highest log p / tokens ** length_penalty.

It is the search of the transformers library, whose choices are kept, so that scores of papers that
used it can be repeated: of 2 `width` continuations those that end are finished only if they are
among the first `width`; a finished text counts its end as a token, the prompt not at all; and what
has not ended at the limit is finished there. The search for a row ends

    heuristic   when the best running score over the length so far, with the penalty, is below the
                worst of `width` finished ones; with a positive penalty a longer text might yet win
    first       when `width` texts are finished
    never       when no text of any length up to the limit could win
"""

import functools
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lm.config import within
from lm.generate.decode import Filled
from lm.models.decode import extend

NEVER = -1e9  # the score of what is not there


@dataclass(frozen=True)
class Beams:
    """`width` running texts, and how finished ones are compared; a penalty above 0 favours long
    ones, for log p is negative.
    """

    width: int = 4
    length_penalty: float = 1.0
    ending: Literal["heuristic", "first", "never"] = "heuristic"

    def __post_init__(self) -> None:
        within("beams", self.width, 1, 64)
        within("length_penalty", self.length_penalty, -10, 10)


class Text(NamedTuple):
    """The tokens of a text, its end included, and its score."""

    ids: tuple[int, ...]
    score: float


@dataclass
class _Row:
    """The search for one row; running texts have sums of log p, finished ones scores."""

    running: list[Text]
    finished: list[Text] = field(default_factory=list)
    open: bool = True


class _Best(NamedTuple):
    """The best continuations of a row, [C]: sums of log p, the running text, and the token."""

    sums: np.ndarray
    parents: np.ndarray
    tokens: np.ndarray


class _Step(NamedTuple):
    """The last tokens of all running texts, [B W] each: where they stand, which running text each
    goes on from, and the sums of log p.
    """

    tokens: Any
    positions: Any
    parents: Any
    scores: Any


def beam_search(
    model: Any,
    params: Any,
    filled: Filled,
    beams: Beams,
    *,
    tokens: int,
    eos: tuple[int, ...],
) -> list[list[Text]]:
    """Up to `width` texts of each row, the best first.

    The cache has room for `tokens` more columns.
    """
    logits, cache, positions = filled
    (B, V), W = logits.shape, beams.width
    count = min(max(2, 1 + len(eos)) * W, W * V)
    rows = [_Row([Text((), 0.0)] + [Text((), NEVER)] * (W - 1)) for _ in range(B)]
    copies = np.repeat(np.arange(B), W)
    logits, cache = logits[copies], reorder(cache, jnp.asarray(copies))
    values, places = _best(logits, _scores(rows), W, count)
    for length in range(1, tokens + 1):
        parents = [
            _grow(row, _Best(v, p // V, p % V), beams, (length, tokens), eos)
            for row, v, p in zip(rows, np.asarray(values), np.asarray(places), strict=True)
        ]
        if length == tokens or not any(row.open for row in rows):
            break
        step = _Step(
            np.array([text.ids[-1] for row in rows for text in row.running], np.int32),
            (positions[copies] + length - 1).astype(np.int32),
            np.concatenate([each + b * W for b, each in enumerate(parents)]),
            _scores(rows),
        )
        values, places, cache = _expand(model, params, step, cache, W, count)
    return [sorted(row.finished, key=lambda text: -text.score) for row in rows]


def _grow(
    row: _Row, best: _Best, beams: Beams, lengths: tuple[int, int], eos: tuple[int, ...]
) -> np.ndarray:
    """Takes the best continuations into a row, of which the running texts have `lengths[0]` tokens
    and at most `lengths[1]`; returns which running text each new one goes on from.
    """
    (length, limit), W, values = lengths, beams.width, best.sums
    ended = np.isin(best.tokens, eos) | (length == limit)
    texts = [Text((*row.running[p].ids, int(t)), float(v)) for v, p, t in zip(*best, strict=True)]
    full = beams.ending == "first" and len(row.finished) == W
    if row.open and not full:
        new = [t for n, t in enumerate(texts[:W]) if ended[n] and t.score > NEVER / 2]
        scored = [t._replace(score=t.score / length**beams.length_penalty) for t in new]
        row.finished = sorted(row.finished + scored, key=lambda text: -text.score)[:W]
    order = np.argsort(np.where(ended, values + NEVER, values) * -1, kind="stable")[:W]
    # What has ended does not go on, also where nothing else is left to run.
    row.running = [texts[n]._replace(score=NEVER) if ended[n] else texts[n] for n in order]
    row.open = row.open and _improvable(row, beams, length, limit)
    return best.parents[order]


def _improvable(row: _Row, beams: Beams, length: int, limit: int) -> bool:
    if len(row.finished) < beams.width:
        return True
    if beams.ending == "first":
        return False
    best = limit if beams.ending == "never" and beams.length_penalty > 0 else length
    return row.running[0].score / best**beams.length_penalty > row.finished[-1].score


def _scores(rows: list[_Row]) -> Array:
    return jnp.array([text.score for row in rows for text in row.running], jnp.float32)


@functools.partial(jax.jit, static_argnames=("width", "count"))
def _best(logits: Array, scores: Array, width: int, count: int) -> tuple[Array, Array]:
    """The highest sums of log p [B, count] of continuations, and their places in [W, V]."""
    sums = jax.nn.log_softmax(logits.astype(jnp.float32)) + scores[:, None]
    return jax.lax.top_k(sums.reshape(len(sums) // width, -1), count)


@functools.partial(jax.jit, static_argnames=("model", "width", "count"), donate_argnames="cache")
def _expand(
    model: Any, params: Any, step: _Step, cache: Any, width: int, count: int
) -> tuple[Array, Array, Any]:
    """The best continuations after one token of every running text, and the cache."""
    tokens, positions = step.tokens[:, None], step.positions[:, None]
    cache = reorder(cache, step.parents)
    logits, cache = extend(model, params, tokens, jnp.ones_like(tokens), positions, cache)
    return *_best(logits[:, -1], step.scores, width, count), cache


def reorder(cache: Any, rows: Array) -> Any:
    """The cache with row i taken from `rows[i]`; layers are [L, B, ...], segments [B, S]."""
    layers = jax.tree.map(lambda a: jnp.take(a, rows, axis=1), cache.layers)
    return cache._replace(layers=layers, segments=jnp.take(cache.segments, rows, axis=0))
