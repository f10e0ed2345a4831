"""Objectives: loss(model, params, batch, key) -> (nats per weighted token, Metrics). One function
per way of training.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lm.loss import chunked
from lm.models import TransformerConfig
from lm.models import fused as fused_kernel

# The vocabulary from which `auto` goes without logits. On a CPU, 2,048 rows of D 256: equal in time
# at 4,096 (68 MiB of temporaries against 24), 7 % faster at 8,192, 15 to 29 % at 50,000. On an
# accelerator, where the fourth product may cost more than the memory, it has not been measured.
WITHOUT_LOGITS = 8192


class Metrics(NamedTuple):
    """Scalars of one batch: the mean nats without z-loss, and the weight they are averaged over."""

    loss: Array
    weight: Array


def causal(model: Any, params: Any, batch: Any, key: Array | None = None) -> tuple[Array, Metrics]:
    """Weighted mean of -log p(target | tokens before it) + z_loss * lse^2; `key` switches dropout
    on.

    `batch` has tokens, targets, segments, positions int32 [B, T] and weights float32 [B, T]. The
    model's config says whether logits are made, `loss`, and `z_loss`.
    """
    c: TransformerConfig = model.config
    inputs = {"params": params}, batch.tokens, batch.segments, batch.positions
    mode: dict[str, Any] = {
        "deterministic": key is None,
        "rngs": None if key is None else {"dropout": key},
    }
    if c.loss == "chunked" or (c.loss == "auto" and c.vocab_size >= WITHOUT_LOGITS):
        x, table = model.apply(*inputs, method="hidden", **mode)
        flat = x.reshape(-1, x.shape[-1]), table, batch.targets.reshape(-1)
        terms = chunked(*flat, scale=1 / c.width_ratio)
        found, lse = (a.reshape(batch.targets.shape) for a in terms)
    else:
        found, lse = nats(model.apply(*inputs, **mode), batch.targets)
    weight = batch.weights.sum()
    divisor = jnp.maximum(weight, 1e-9)
    loss = (found * batch.weights).sum() / divisor
    extra = c.z_loss * (lse**2 * batch.weights).sum() / divisor if c.z_loss else 0
    return loss + extra, Metrics(loss, weight)


def nats(logits: Array, targets: Array) -> tuple[Array, Array]:
    """-log softmax(logits)[target] and its log-sum-exp: logits [..., V], targets [...] -> two
    float32 [...].

    The target's logit is a product with a one-hot mask, which fuses; a gather's gradient would be a
    scatter (on a CPU slower by 3x).
    """
    chosen = targets[..., None] == jnp.arange(logits.shape[-1])
    lse = jax.nn.logsumexp(logits, axis=-1)
    return lse - jnp.where(chosen, logits, 0).sum(axis=-1), lse


def fused(model: Any, params: Any, batch: Any, key: Array | None = None) -> tuple[Array, Metrics]:
    """What `causal` computes, by the kernel of `lm.models.fused`; it has no dropout."""
    loss, weight = fused_kernel.loss(model.config, params, batch)
    return loss, Metrics(loss, weight)
