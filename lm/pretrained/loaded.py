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
from lm.models import TransformerConfig
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
        if decoder_input_ids is not None:
            raise UserError(
                "decoder_input_ids are for an encoder-decoder, and this model has no encoder; leave"
                " them out"
            )
        return np.asarray(_forward(self.model, self.params, tokens, mask.astype(np.int32)))

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
