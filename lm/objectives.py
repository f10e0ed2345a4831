"""Objectives: loss(model, params, batch, key) -> (nats per weighted token, Metrics). One function
per way of training.

    causal     -log p(target | what is before it)
    masked     -log p(w_i | the row without w_i), for the tokens that were chosen
    span       -log p(what was cut out | what is left), token by token
    seq2seq    -log p(target | source, target before it), with label smoothing

`masked` and `span` are `causal` of what `lm.corruption` makes of the rows, with a new draw for
every key, without which they cannot be.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lm.corruption import Masking, Spans, cut_spans, mask_tokens
from lm.loss import chunked
from lm.models import fused as fused_kernel

# The vocabulary from which `auto` goes without logits. On a CPU, 2,048 rows of D 256: equal in time
# at 4,096 (68 MiB of temporaries against 24), 7 % faster at 8,192, 15 to 29 % at 50,000. On an
# accelerator, where the fourth product may cost more than the memory, it has not been measured.
WITHOUT_LOGITS = 8192


class Metrics(NamedTuple):
    """Scalars of one batch: the mean nats without z-loss and smoothing, and the weight they are
    averaged over.
    """

    loss: Array
    weight: Array


def causal(model: Any, params: Any, batch: Any, key: Array | None = None) -> tuple[Array, Metrics]:
    """Weighted mean of -log p(target | tokens before it) + z_loss * lse^2; `key` switches dropout
    on.

    `batch` has tokens, targets, segments, positions int32 [B, T] and weights float32 [B, T]. The
    model's config says whether logits are made, `loss`, and `z_loss`.
    """
    return seq2seq(model, params, batch, key)


def seq2seq(
    model: Any, params: Any, batch: Any, key: Array | None = None, *, smoothing: float = 0.0
) -> tuple[Array, Metrics]:
    """`causal` with the target's probability smoothed: (1 - smoothing) of one-hot plus `smoothing`
    of uniform (Szegedy et al. 2016, section 7).

    Rows are as the model wants them; those of an encoder-decoder have weight in the target only.
    """
    c = model.config
    inputs = {"params": params}, batch.tokens, batch.segments, batch.positions
    mode: dict[str, Any] = {
        "deterministic": key is None,
        "rngs": None if key is None else {"dropout": key},
    }
    middle: Any = 0  # the mean logit: of uniform, -sum q log p = lse - middle
    if c.loss == "chunked" or (c.loss == "auto" and c.vocab_size >= WITHOUT_LOGITS):
        x, table = model.apply(*inputs, method="hidden", **mode)
        flat = x.reshape(-1, x.shape[-1]), table, batch.targets.reshape(-1)
        terms = chunked(*flat, scale=1 / c.width_ratio)
        found, lse = (a.reshape(batch.targets.shape) for a in terms)
        if smoothing:
            middle = (x * table.mean(axis=0)).sum(axis=-1) / c.width_ratio
    else:
        logits = model.apply(*inputs, **mode)
        found, lse = nats(logits, batch.targets)
        if smoothing:
            middle = logits.mean(axis=-1)
    weight = batch.weights.sum()
    divisor = jnp.maximum(weight, 1e-9)
    plain = (found * batch.weights).sum() / divisor
    extra = c.z_loss * (lse**2 * batch.weights).sum() / divisor if c.z_loss else 0
    if smoothing:
        extra += smoothing * ((lse - middle - found) * batch.weights).sum() / divisor
    return plain + extra, Metrics(plain, weight)


def masked(
    model: Any, params: Any, batch: Any, key: Array, *, masking: Masking
) -> tuple[Array, Metrics]:
    """Mean -log p of the chosen tokens of a batch of text (`lm.corruption.mask_tokens`)."""
    masks, dropout = jax.random.split(key)
    return causal(model, params, mask_tokens(batch, masks, masking), dropout)


def span(model: Any, params: Any, batch: Any, key: Array, *, spans: Spans) -> tuple[Array, Metrics]:
    """Mean -log p of what `lm.corruption.cut_spans` makes an encoder-decoder say of a batch of
    text.
    """
    cuts, dropout = jax.random.split(key)
    return causal(model, params, cut_spans(batch, cuts, spans), dropout)


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
