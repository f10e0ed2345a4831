"""Objectives: loss(model, params, batch, key) -> (nats per weighted token, Metrics). One function
per way of training.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array


class Metrics(NamedTuple):
    """Scalars of one batch: the loss and the weight it was averaged over."""

    loss: Array
    weight: Array


def causal(
    model: nn.Module, params: Any, batch: Any, key: Array | None = None
) -> tuple[Array, Metrics]:
    """Weighted mean of -log p(target | tokens before it); `key` switches dropout on.

    `batch` has tokens, targets, segments, positions int32 [B, T] and weights float32 [B, T].
    """
    rngs = None if key is None else {"dropout": key}
    logits: Any = model.apply(
        {"params": params},
        batch.tokens,
        batch.segments,
        batch.positions,
        deterministic=key is None,
        rngs=rngs,
    )
    weight = batch.weights.sum()
    loss = (nats(logits, batch.targets) * batch.weights).sum() / jnp.maximum(weight, 1e-9)
    return loss, Metrics(loss, weight)


def nats(logits: Array, targets: Array) -> Array:
    """-log softmax(logits)[target]: logits [..., V], targets [...] -> float32 [...].

    The target's logit is a product with a one-hot mask, which fuses; a gather's gradient would be a
    scatter (on a CPU slower by 3x).
    """
    chosen = targets[..., None] == jnp.arange(logits.shape[-1])
    return jax.nn.logsumexp(logits, axis=-1) - jnp.where(chosen, logits, 0).sum(axis=-1)
