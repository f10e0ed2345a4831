"""A small model of each family, and what tests do with folders of weights."""

import json
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn

from lm import models
from lm.pretrained import safetensors, settings, tensors
from lm.pretrained.loaded import Loaded

TINY = Path(__file__).parent / "pretrained" / "llama"

# A small config of each family: everything that a table has a row for.
SMALL = {
    "gpt2": settings.GPT2(vocab_size=23, n_positions=16, n_embd=12, n_layer=2, n_head=3),
    "gpt_neox": settings.NeoX(
        vocab_size=23,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=16,
    ),
    "bert": settings.Bert(
        vocab_size=23,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=16,
    ),
} | {
    name: kind(
        vocab_size=23,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=20,
        max_position_embeddings=16,
        **more,
    )
    for name, kind, more in (
        ("llama", settings.Llama, {"rope_scaling": (8.0, 1.0, 4.0, 8192.0)}),
        ("mistral", settings.Mistral, {"sliding_window": 5}),
        ("qwen2", settings.Qwen2, {"tie_word_embeddings": True}),
    )
}
# T5 is two: of 1.1 the MLP has a gate and the head is its own. Heads are not width / heads wide.
_T5 = {"vocab_size": 23, "d_model": 12, "d_kv": 5, "d_ff": 20, "num_layers": 2, "num_heads": 3}
SMALL["t5"] = settings.T5(**_T5, num_decoder_layers=3)
GATED = settings.T5(**_T5, feed_forward_proj="gated-gelu", head="untied")


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    found = safetensors.entries(folder / "model.safetensors")
    return {name: tensors.read(entry) for name, entry in found.items()}


def same_params(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in pairs)


def random_model(name: str, dtype: str = "float32") -> Loaded:
    """A model of a family with other numbers in every place."""
    config = (GATED if name == "t5 1.1" else SMALL[name]).model(dtype)
    rng = np.random.default_rng(0)
    shapes = nn.unbox(models.abstract(config))
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), shapes)
    return Loaded(models.build(config), params, None, config)


def save(folder: Path, arrays: dict[str, np.ndarray], file: str = "model.safetensors") -> None:
    folder.mkdir(exist_ok=True)
    plan = safetensors.plan([(k, v.shape) for k, v in arrays.items()], "F32")
    (folder / file).unlink(missing_ok=True)
    safetensors.write(folder / file, arrays.items(), plan)


def change_config(folder: Path, **more: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
