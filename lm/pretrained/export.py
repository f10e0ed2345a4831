"""A loaded model as a folder that transformers loads: config.json, safetensors, tokenizer."""

import secrets
import shutil
from pathlib import Path
from typing import Any

from lm import rundir
from lm.config import UserError
from lm.pretrained import safetensors, settings, weights
from lm.pretrained.families import Family, family_of
from lm.pretrained.loaded import Loaded

KINDS = {"float32": "F32", "bfloat16": "BF16"}


def export(loaded: Loaded, folder: str | Path) -> Family:
    """Writes a new folder, whole or not at all, and returns the family it is of.

    Tensors go to the disk one at a time. Raises `UserError` where the folder is there, or where no
    family has models of this shape.
    """
    folder, config = Path(folder), loaded.config
    if folder.exists():
        raise UserError(f"{folder} is there; give a new folder, or remove it")
    family = family_of(config)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir(parents=True)
    try:
        about = _config(family, loaded)
        shapes = [(name, slot.shape) for name, slot in weights.slots(family, config).items()]
        plan = safetensors.plan(shapes, KINDS[config.param_dtype])
        tensors = weights.take_apart(family, config, loaded.params)
        safetensors.write(temporary / "model.safetensors", tensors, plan)
        _write_tokenizer(temporary, loaded)
        rundir.write_json(temporary / "config.json", about)
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return family


def _config(family: Family, loaded: Loaded) -> dict[str, Any]:
    """config.json, in the spelling of old and new versions of transformers."""
    about: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.name}
    about |= settings.written(family.settings.of(loaded.config))
    about |= {"torch_dtype": loaded.config.param_dtype}
    ids = loaded.tokenizer
    for role in ("bos", "eos", "pad"):
        about[f"{role}_token_id"] = None if ids is None else getattr(ids, f"{role}_id")
    return about


def _write_tokenizer(folder: Path, loaded: Loaded) -> None:
    """tokenizer.json and what it does not say; nothing for tokenizers of ours, which transformers
    cannot read.
    """
    tokenizer = loaded.tokenizer
    if tokenizer is None or tokenizer.source is None:
        return
    rundir.write_bytes(folder / "tokenizer.json", tokenizer.source().encode())
    about: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    names = {"bos": "bos_token", "eos": "eos_token", "pad": "pad_token", "mask": "mask_token"}
    for role, name in names.items():
        number = getattr(tokenizer, f"{role}_id")
        if number is not None:
            about[name] = tokenizer.decode([number], special=True)
    about["add_bos_token"] = tokenizer.begins
    if tokenizer.template is not None:
        about["chat_template"] = tokenizer.template
    if getattr(loaded.config, "context", 0):
        about["model_max_length"] = loaded.config.context
    rundir.write_json(folder / "tokenizer_config.json", about)
