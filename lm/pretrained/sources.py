"""Where weights come from: a Hugging Face folder, or a GGUF file."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lm.config import UserError, nearest
from lm.pretrained import safetensors, settings
from lm.pretrained.families import FAMILIES, GGUF, Family
from lm.pretrained.gguf import Contents
from lm.pretrained.tensors import Entry, open_json, read, show

LARGEST_CONFIG = 1 << 20  # bytes of a config.json
LARGEST_INDEX = 32 << 20  # of a model.safetensors.index.json
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt", "pytorch_model.pt")


class Source(NamedTuple):
    """A model on the disk: its family, the config of ours, and its tensors."""

    family: Family
    config: Any
    entries: Mapping[str, Entry]


def folder(path: Path, config: Mapping[str, Any], dtype: str) -> Source:
    """The model of a folder with this config.json; raises `UserError`."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{path}/config.json is of model_type {show(kind)}, which cannot be loaded;"
            f" {nearest(str(kind)[:40], list(FAMILIES))}"
        )
    family, entries = FAMILIES[kind], _tensors(path)
    ours = settings.read(family.settings, config).model(dtype)
    # T5 1.1 as transformers 5 writes it: tied, says the config, but its head is in the file.
    if family.name == "t5" and ours.head == "tied" and "lm_head.weight" in entries:
        ours = dataclasses.replace(ours, head="untied")
    return Source(family, ours, entries)


def _tensors(path: Path) -> dict[str, Entry]:
    """All tensors of the safetensors of a folder, one file or several."""
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        return safetensors.entries(path / "model.safetensors")
    if not index.is_file():
        raise UserError(_nothing(path))
    about = open_json(index, LARGEST_INDEX)
    places = about.get("weight_map") if isinstance(about, dict) else None
    if not isinstance(places, dict) or not all(isinstance(f, str) for f in places.values()):
        raise UserError(f"{index} has no weight_map of names and files; download it again")
    names, found = sorted(set(places.values())), dict[str, Entry]()
    # A name, not a path: nothing outside of the folder is opened.
    if odd := [n for n in names if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,200}\.safetensors", n)]:
        raise UserError(f"{index} names the file {show(odd[0])}; it must be one of its folder")
    for name in names:
        if not (path / name).is_file():
            raise UserError(f"{path / name} is missing; {index.name} names it, download it")
        for entry in safetensors.entries(path / name).values():
            if places.get(entry.name) != name:
                raise UserError(
                    f"{path / name} has {show(entry.name)}, which {index.name} has not in it;"
                    " download both again"
                )
            found[entry.name] = entry
    if lost := [name for name in places if name not in found]:
        raise UserError(
            f"{path} lacks {show(lost[0])}, one of {len(lost):,} tensors that {index.name} names;"
            " download it again"
        )
    return found


def _nothing(path: Path) -> str:
    pickles = [name for name in _PICKLES if (path / name).exists()]
    if pickles:
        return (
            f"{path / pickles[0]} is a pickle, which runs what is in it when it is read; convert it"
            " where you trust it: AutoModel.from_pretrained(FOLDER).save_pretrained(OUT)"
        )
    return f"{path} has no model.safetensors and no model.safetensors.index.json; give the weights"


def gguf(path: Path, contents: Contents, dtype: str) -> Source:
    """The model of a GGUF file; raises `UserError`."""
    # A list where a number belongs is as good as nothing there.
    metadata = {k: v for k, v in contents.metadata.items() if isinstance(v, str | int | float)}
    arch, entries = metadata.get("general.architecture"), contents.entries
    if not isinstance(arch, str) or arch not in GGUF:
        raise UserError(
            f"{path} is of the architecture {show(arch)}, which cannot be loaded;"
            f" {nearest(str(arch)[:40], list(GGUF))}"
        )
    family = GGUF[arch]
    keys = {name: metadata.get(f"{arch}.{there}") for name, there in _KEYS.items()}
    record = {name: value for name, value in keys.items() if value is not None}
    embed = entries.get("token_embd.weight")
    record["vocab_size"] = embed.shape[0] if embed and len(embed.shape) == 2 else 0
    record["tie_word_embeddings"] = "output.weight" not in entries
    kind = metadata.get(f"{arch}.rope.scaling.type", "none")
    if kind != "none":
        raise UserError(
            f"{path} has a rotation of type {show(kind)}; 'none' and Llama 3's can be loaded"
        )
    config = settings.read(family.settings, record).model(dtype)
    if "rope_freqs.weight" in entries:
        config = _rotated(path, config, entries["rope_freqs.weight"])
    for name in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        if metadata.get(f"{arch}.{name}", config.head_size) != config.head_size:
            raise UserError(
                f"{path} has {arch}.{name} {show(metadata[f'{arch}.{name}'])} and heads of"
                f" {config.head_size}; models can be loaded where they are equal"
            )
    if metadata.get(f"{arch}.expert_count"):
        raise UserError(f"{path} is a mixture of experts, which cannot be loaded; take a dense one")
    return Source(family, config, entries)


# Keys of a config.json -> what follows the architecture in GGUF's.
_KEYS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
# Rotations of Llama 3.1 and 3.2: GGUF has their effect, a factor for each frequency, and no name.
_KNOWN = ((8.0, 1.0, 4.0, 8192.0), (32.0, 1.0, 4.0, 8192.0))


def _rotated(path: Path, config: Any, entry: Entry) -> Any:
    """The config with Llama 3's rotation, by the factors that a file has of it."""
    frequency = config.rope_base ** (-np.arange(config.head_size // 2) / (config.head_size // 2))
    if entry.shape == frequency.shape:
        factors = read(entry).astype(np.float64)
        for scaling in _KNOWN:
            if np.allclose(factors, _factors(frequency, scaling), rtol=1e-3):
                return dataclasses.replace(config, rope_scaling=scaling)
    raise UserError(
        f"{path} scales its rotation in a way that is not Llama 3.1's or 3.2's; it cannot be loaded"
    )


def _factors(frequency: np.ndarray, scaling: tuple[float, ...]) -> np.ndarray:
    """By how much Llama 3 slows every frequency."""
    factor, low, high, before = scaling
    turns = before * frequency / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)
