"""Model definitions: pure functions of parameters and a batch."""

from lm.models.transformer import (
    Transformer,
    TransformerConfig,
    abstract,
    initialise,
    logical_axes,
    mup_multipliers,
)

__all__ = [
    "Transformer",
    "TransformerConfig",
    "abstract",
    "initialise",
    "logical_axes",
    "mup_multipliers",
]
