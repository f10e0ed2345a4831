"""A model as other people would give it, of random weights and a few kilobytes."""

from pathlib import Path

import jax
import tokenizers
from flax import linen as nn

from lm.models import Transformer, TransformerConfig, initialise
from lm.pretrained import Loaded
from lm.pretrained.export import export
from lm.pretrained.tokenizer import wrap


def tiny(folder: Path, width: int) -> Path:
    """A folder as transformers writes it: a Llama of one layer that reads bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(["<end>", *alphabet])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.add_special_tokens(["<end>"])
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    config = TransformerConfig(257, layers=1, width=width, heads=1, kv_heads=1, mlp_size=2 * width)
    params = nn.unbox(initialise(config, jax.random.key(width)))
    reader = wrap(backend, {"eos": 0}, None)
    export(Loaded(Transformer(config), params, reader, config), folder)
    return folder
