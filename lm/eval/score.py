"""What a model says of each target under teacher forcing: enough to compute every metric later.

Greedy decoding gives an answer exactly if, under teacher forcing, the argmax at each of its tokens
is that token: the prefixes are the same as long as it is right. So exact match needs no decoding.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn


class Scores(NamedTuple):
    """Arrays per target, each [B, T]: log-probability (nats), argmax token, sum of squared
    probabilities.
    """

    logprob: Any
    greedy: Any
    square: Any


def make_scorer(model: nn.Module) -> Callable[[Any, Any], Scores]:
    """`score(params, batch) -> Scores`, pure; the caller, who knows the shardings, jits it."""

    def score(params: Any, batch: Any) -> Scores:
        logits: Any = model.apply({"params": params}, batch.tokens, batch.segments, batch.positions)
        logp = jax.nn.log_softmax(logits)
        logprob = jnp.take_along_axis(logp, batch.targets[..., None], axis=-1)[..., 0]
        return Scores(
            logprob, jnp.argmax(logits, axis=-1).astype(jnp.int32), jnp.exp(2 * logp).sum(axis=-1)
        )

    return score
