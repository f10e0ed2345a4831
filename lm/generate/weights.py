"""A checkpoint made ready to decode: float32, bfloat16 or int8 weights."""

import dataclasses
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from lm.config import UserError, nearest
from lm.models.int8 import quantise
from lm.pretrained import load

Weights = Literal["float32", "bfloat16", "int8"]


def open_checkpoint(path: str, weights: Weights = "float32") -> Any:
    """What `lm.pretrained.load` gives, with its weights in another form and float32 arithmetic.

    Raises UserError for a model that cannot go on with a text, and for unknown weights.
    """
    if weights not in get_args(Weights):
        raise UserError(f"no weights {weights!r}; {nearest(weights, get_args(Weights))}")
    loaded = load(path)
    if getattr(loaded.config, "direction", "causal") == "both":
        raise UserError(
            f"{path} reads a text in both directions and cannot go on with one; `lm fill` asks it"
            " for a masked word"
        )
    if loaded.tokenizer is None:
        raise UserError(f"{path} has no tokenizer; put its tokenizer.json beside its weights")
    return convert(loaded, weights)


def convert(loaded: Any, weights: Weights) -> Any:
    """The model with its weights in another form."""
    if weights == "float32":
        return loaded
    if weights == "int8":
        return dataclasses.replace(loaded, params=quantise(loaded.params))
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), loaded.params)
    config = dataclasses.replace(loaded.config, param_dtype="bfloat16")
    return dataclasses.replace(
        loaded, model=type(loaded.model)(config), params=narrow, config=config
    )
