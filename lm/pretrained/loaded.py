"""A model that was loaded: its module, its parameters, its tokenizer and its config."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lm.attention import Mask
from lm.config import UserError
from lm.models import EncoderDecoderConfig, TransformerConfig, build
from lm.pretrained.tokenizer import TextTokenizer


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model of other people or of ours, ready to use: `model.apply({"params": params}, ...)`.

    `tokenizer` is None where the folder had none.
    """

    model: Any
    params: Any = dataclasses.field(repr=False)
    tokenizer: TextTokenizer | None
    config: Any

    def logits(
        self,
        input_ids: np.ndarray,
        attention_mask: np.ndarray | None = None,
        decoder_input_ids: np.ndarray | None = None,
    ) -> np.ndarray:
        """input_ids and attention_mask int [B, T] -> float32 [B, T, V]; with an encoder-decoder,
        decoder_input_ids int [B, U] -> [B, U, V].

        A 0 in the mask is padding, on either side, which no token sees; its own logits are those of
        a token that sees the real ones up to its place, as with transformers. Positions are the
        columns, 0 to T - 1, as transformers has them when it is given a mask and no positions. That
        matters where positions are learned (GPT-2, BERT): there, a row that is padded on the left
        is not what it is without the padding.
        Every shape is compiled once. Raises `UserError` for ids that the model does not have, and
        for rows longer than its context.
        """
        tokens = self._ids("input_ids", input_ids)
        mask = np.ones_like(tokens) if attention_mask is None else np.asarray(attention_mask)
        if mask.shape != tokens.shape or not np.isin(mask, (0, 1)).all():
            raise UserError(
                f"attention_mask has the shape {list(mask.shape)}, or others than 0 and 1; it must"
                f" be 0 and 1 as {list(tokens.shape)}, as input_ids are"
            )
        real = mask.astype(np.int32)
        if not isinstance(self.config, EncoderDecoderConfig):
            if decoder_input_ids is not None:
                raise UserError(
                    "decoder_input_ids are for an encoder-decoder, and this model has no encoder;"
                    " leave them out"
                )
            return np.asarray(_forward(self.model, self.params, tokens, real))
        if decoder_input_ids is None:
            raise UserError(
                "decoder_input_ids are missing; an encoder-decoder needs the target so far, which"
                " begins with the id of padding"
            )
        target = self._ids("decoder_input_ids", decoder_input_ids)
        if len(target) != len(tokens):
            raise UserError(
                f"decoder_input_ids have {len(target)} rows and input_ids {len(tokens)}; give a"
                " target for each source"
            )
        return np.asarray(_from_source(self.config, self.params, tokens, real, target))

    def _ids(self, name: str, ids: Any) -> np.ndarray:
        array = np.asarray(ids)
        if array.ndim != 2 or not array.size or array.dtype.kind not in "iu":
            raise UserError(
                f"{name} are {array.dtype} of the shape {list(array.shape)}; give whole numbers"
                " [B, T], one token or more"
            )
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self.config.vocab_size:
            raise UserError(
                f"{name} have the id {low if low < 0 else high}; this model has 0 to"
                f" {self.config.vocab_size - 1}"
            )
        context = getattr(self.config, "context", 0)
        if context and array.shape[1] > context:
            raise UserError(
                f"{name} have {array.shape[1]:,} tokens a row, the model's context is"
                f" {context:,}; cut them"
            )
        return array.astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _forward(model: Any, params: Any, tokens: Array, real: Array) -> Array:
    c = model.config
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segments: Any = real
    if isinstance(c, TransformerConfig):
        # A padded place asks as well, and is not seen.
        every = jnp.ones_like(real)
        segments = Mask(c.direction == "causal", c.window or None, every, real)
    y: Array = model.apply({"params": params}, tokens, segments, positions)
    return y.astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _from_source(config: Any, params: Any, source: Array, real: Array, target: Array) -> Array:
    """As rows of training are: the source, then the target."""
    S = source.shape[1]
    config = dataclasses.replace(config, source_length=S)
    tokens = jnp.concatenate([source, target], axis=1)
    segments = jnp.concatenate([real, jnp.ones_like(target)], axis=1)
    columns = [jnp.broadcast_to(jnp.arange(a.shape[1]), a.shape) for a in (source, target)]
    positions = jnp.concatenate(columns, axis=1)
    y: Array = build(config).apply({"params": params}, tokens, segments, positions)
    return y[:, S:].astype(jnp.float32)
