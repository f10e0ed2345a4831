"""Models of other people: their weights, their tokenizers, and the same for ours.

`load(path)` gives a `Loaded`; `export(loaded, folder)` writes one that transformers loads. What is
read is not believed: docs/pretrained.md says what is checked.
"""

from pathlib import Path
from typing import Literal

from lm import models
from lm.config import UserError, nearest
from lm.pretrained import cells, gguf_tokenizer, sources, tokenizer, weights
from lm.pretrained.export import export
from lm.pretrained.gguf import open_gguf
from lm.pretrained.loaded import Loaded
from lm.pretrained.tensors import open_json
from lm.pretrained.tokenizer import TextTokenizer

__all__ = ["Loaded", "export", "is_cell", "load", "look"]


def load(path: str | Path, dtype: Literal["float32", "bfloat16"] = "float32") -> Loaded:
    """A model with its weights in `dtype`, from one of

    * a folder as transformers writes it: config.json, safetensors, tokenizer.json;
    * a GGUF file of the Llama family;
    * a cell of ours, `WORKDIR/CELL` or `WORKDIR/CELL:REPLICA`, at its newest whole checkpoint.

    Raises `UserError` where it is none of these, of an unknown family, damaged, or where names and
    shapes do not fit.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f"no weights of {dtype!r}; {nearest(dtype, ['float32', 'bfloat16'])}")
    if is_cell(path):
        return cells.load(str(path), dtype)
    source, text_tokenizer = look(path, dtype)
    params = weights.assemble(Path(path), source.family, source.config, source.entries)
    return Loaded(models.build(source.config), params, text_tokenizer, source.config)


def is_cell(path: str | Path) -> bool:
    """Whether `load` takes this for a cell of ours: what is no file and no folder of weights."""
    path = Path(path)
    here = path.is_dir() and (path / "config.json").exists()
    return not path.is_file() and (not here or (path / "checkpoints").is_dir())


def look(path: str | Path, dtype: str) -> tuple[sources.Source, TextTokenizer | None]:
    """The model of a folder or of a GGUF file, without its weights."""
    path = Path(path)
    if path.is_file():
        contents = open_gguf(path)
        text_tokenizer = gguf_tokenizer.from_metadata(path, contents.metadata)
        return sources.gguf(path, contents, dtype), text_tokenizer
    config = open_json(path / "config.json", sources.LARGEST_CONFIG)
    if not isinstance(config, dict):
        raise UserError(f"{path}/config.json is no JSON object; download it again")
    return sources.folder(path, config, dtype), tokenizer.from_folder(path, config)
