"""Models of other people: their weights, their tokenizers, and the same for ours.

`load(path)` gives a `Loaded`; `export(loaded, folder)` writes one that transformers loads. What is
read is not believed: docs/pretrained.md says what is checked.
"""

from pathlib import Path
from typing import Literal

from lm import models
from lm.config import UserError
from lm.pretrained import cells, gguf_tokenizer, sources, tokenizer, weights
from lm.pretrained.export import export
from lm.pretrained.gguf import open_gguf
from lm.pretrained.loaded import Loaded
from lm.pretrained.tensors import open_json

__all__ = ["Loaded", "export", "load"]


def load(path: str | Path, dtype: Literal["float32", "bfloat16"] = "float32") -> Loaded:
    """A model with its weights in `dtype`, from one of

    * a folder as transformers writes it: config.json, safetensors, tokenizer.json;
    * a GGUF file of the Llama family;
    * a cell of ours, `WORKDIR/CELL` or `WORKDIR/CELL:REPLICA`, at its newest whole checkpoint.

    Raises `UserError` where it is none of these, of an unknown family, damaged, or where names and
    shapes do not fit.
    """
    text, path = str(path), Path(path)
    if path.is_file():
        contents = open_gguf(path)
        text_tokenizer = gguf_tokenizer.from_metadata(path, contents.metadata)
        return _finish(path, sources.gguf(path, contents, dtype), text_tokenizer)
    if (path / "checkpoints").is_dir() or not (path / "config.json").exists():
        return cells.load(text, dtype)
    config = open_json(path / "config.json", sources.LARGEST_CONFIG)
    if not isinstance(config, dict):
        raise UserError(f"{path}/config.json is no JSON object; download it again")
    source = sources.folder(path, config, dtype)
    return _finish(path, source, tokenizer.from_folder(path, config))


def _finish(
    path: Path, source: sources.Source, text_tokenizer: tokenizer.TextTokenizer | None
) -> Loaded:
    params = weights.assemble(path, source.family, source.config, source.entries)
    return Loaded(models.build(source.config), params, text_tokenizer, source.config)
