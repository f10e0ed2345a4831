"""Model definitions: pure functions of parameters and a batch.

A kind of model is a config, a frozen dataclass, and the module that it builds; `MODELS` has them
all, and what is asked of any model is asked here.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from lm.models.cache import Cache, empty_cache
from lm.models.config import EncoderDecoderConfig, TransformerConfig
from lm.models.encoder_decoder import EncoderDecoder
from lm.models.lstm import LSTM, LSTMConfig
from lm.models.transformer import Transformer

__all__ = [
    "LSTM",
    "MODELS",
    "Cache",
    "Config",
    "EncoderDecoder",
    "EncoderDecoderConfig",
    "LSTMConfig",
    "Transformer",
    "TransformerConfig",
    "abstract",
    "build",
    "empty_cache",
    "initialise",
    "logical_axes",
    "mup_multipliers",
]

Config = TransformerConfig | LSTMConfig | EncoderDecoderConfig
MODELS: dict[type, Any] = {
    TransformerConfig: Transformer,
    LSTMConfig: LSTM,
    EncoderDecoderConfig: EncoderDecoder,
}

# Weights between two sides that both grow with the width: muP divides their learning rate by m.
HIDDEN = {"qkv", "out", "gate", "up", "down", "transform", "cross_q", "cross_kv", "cross_out"}
HIDDEN |= {"input", "recurrent", "project"}


def build(config: Config) -> Any:
    """The module of a config."""
    return MODELS[type(config)](config)


def initialise(config: Config, key: Array) -> Any:
    """Fresh parameters, boxed with their logical axes; `nn.unbox` gives plain arrays."""
    source = config.source_length if isinstance(config, EncoderDecoderConfig) else 0
    if not isinstance(config, LSTMConfig):
        # Parameters do not depend on the backend, and cuDNN's cannot run the row of one token.
        config = dataclasses.replace(config, attention="reference")
    row = jnp.zeros((1, source + 1), jnp.int32)
    return build(config).init(key, row, row, row)["params"]


def abstract(config: Config) -> Any:
    """The boxed shapes of the parameters, for any size at no cost."""
    return jax.eval_shape(lambda: initialise(config, jax.random.key(0)))


def logical_axes(config: Config) -> Any:
    """The tree of parameters with a tuple of axis names in place of each."""

    def boxed(leaf: Any) -> bool:
        return isinstance(leaf, nn.Partitioned)

    return jax.tree.map(lambda leaf: leaf.names, abstract(config), is_leaf=boxed)


def mup_multipliers(config: Config) -> Any:
    """The tree of parameters with a factor of Adam's learning rate: 1/m for hidden weights."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: 1 / config.width_ratio if path[-1].key in HIDDEN else 1.0,
        nn.unbox(abstract(config)),
    )
