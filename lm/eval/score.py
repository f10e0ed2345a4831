"""What a model says of each target under teacher forcing: enough to compute every metric later.

Greedy decoding gives an answer exactly if, under teacher forcing, the argmax at each of its tokens
is that token: the prefixes are the same as long as it is right. So exact match needs no decoding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn

CHOICES = 12  # of one item at most; tasks with more are scored without
LEAST_ITEM = 4  # tokens: <bos>, a prompt, an answer, <eos>; so a row has T // 4 items at most


class Asked(NamedTuple):
    """Where in a row the choices of its items are to be scored, [B, P], and their ids [B, P, C]."""

    place: Any
    ids: Any


class Scores(NamedTuple):
    """Arrays per target, each [B, T]: log-probability (nats), argmax token, sum of squared
    probabilities, log-probability of the argmax; and [B, P, C] of the choices asked for.
    """

    logprob: Any
    greedy: Any
    square: Any
    highest: Any
    choices: Any


def nothing_asked(rows: int, length: int) -> Asked:
    """Zeros in the shape that `score` takes for rows [B, T]."""
    shape = rows, length // LEAST_ITEM
    return Asked(np.zeros(shape, np.int32), np.zeros((*shape, CHOICES), np.int32))


def make_scorer(model: nn.Module) -> Callable[[Any, Any, Asked], Scores]:
    """`score(params, batch, asked) -> Scores`, pure; the caller, who knows the shardings, jits
    it.
    """

    def score(params: Any, batch: Any, asked: Asked) -> Scores:
        logits: Any = model.apply({"params": params}, batch.tokens, batch.segments, batch.positions)
        ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
        highest = logits.max(axis=-1, keepdims=True)
        e = jnp.exp(logits - highest)
        total = e.sum(axis=-1)
        chosen = jnp.where(batch.targets[..., None] == ids, logits - highest, 0).sum(axis=-1)
        # Reductions that vectorise: argmax and a gather made scoring four times slower on a CPU.
        greedy = jnp.where(logits == highest, ids, ids.size).min(axis=-1)
        log_total = jnp.log(total)
        square = (e * e).sum(axis=-1) / (total * total)
        # Choices are gathered where an answer begins only: at every target they took as long as
        # the whole of a small model.
        log_p = jnp.take_along_axis(
            logits - highest - log_total[..., None], asked.place[..., None], axis=1
        )
        choices = jnp.take_along_axis(log_p, asked.ids, axis=-1)
        return Scores(chosen - log_total, greedy, square, -log_total, choices)

    return score
