"""`lm weights PATH`: what is in a model of other people or of ours, and whether it is whole.

Of a folder or a GGUF file only the descriptions are read, so that a large one is looked at in no
time: names and shapes are compared with what the config wants.
"""

import argparse
import collections
import json
import textwrap
from pathlib import Path
from typing import Any, NoReturn

from lm import config as configs
from lm import pretrained
from lm.config import UserError
from lm.pretrained import weights
from lm.pretrained.families import NUMERICS
from lm.pretrained.tokenizer import TextTokenizer
from lm.sizes import parameters

_ROLES = ("bos", "eos", "pad", "mask")
# Settings that have a place of their own, or that change no logit.
_SAID = NUMERICS | {
    *("layers", "width", "heads", "kv_heads", "mlp_size", "vocab_size", "context", "kind"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `lm weights --help` shows what there is")


def main(argv: list[str]) -> int:
    """`lm weights PATH [--json] [--export=FOLDER] [--dtype=]`."""
    parser = _Parser(
        "lm weights",
        description="Says what is in a model: a Hugging Face folder, a GGUF file, WORKDIR/CELL.",
        epilog="example: lm weights runs/desk/2x16 --json",
    )
    parser.add_argument("path")
    parser.add_argument("--export", metavar="FOLDER", help="write it as transformers loads it")
    parser.add_argument("--dtype", default="float32", help="of --export: float32 or bfloat16")
    parser.add_argument("--json", action="store_true", help="one JSON object, for machines")
    args = parser.parse_args(argv)
    about = describe(args.path)
    if args.export:
        loaded = pretrained.load(args.path, args.dtype)
        about["exported"] = {"folder": args.export}
        about["exported"]["family"] = pretrained.export(loaded, args.export).name
    if args.json:
        print(json.dumps(about))
    else:
        _print(about)
    return 0


def describe(path: str) -> dict[str, Any]:
    """What the verb says, JSON-ready; raises `UserError` where the model could not be loaded."""
    if pretrained.is_cell(path):
        loaded = pretrained.load(path)
        return {"family": "ours", **_model(loaded.config), **_text(loaded.tokenizer)}
    source, tokenizer = pretrained.look(path, "float32")
    wanted = weights.slots(source.family, source.config)
    found = weights.canonical(Path(path), source.family, wanted, source.entries)
    weights.check(Path(path), source.family, wanted, found)
    kinds = collections.Counter(entry.kind for entry in source.entries.values())
    size = sum(entry.size for entry in source.entries.values())
    about = {"family": source.family.name, **_model(source.config), "tensors": dict(kinds)}
    left = sorted(name for name in found if name not in wanted)
    return about | {"bytes": size, "left_out": left, **_text(tokenizer)}


def _model(config: Any) -> dict[str, Any]:
    counts = parameters(config)
    return {
        "parameters": counts.total,
        "non_embedding": counts.non_embedding,
        "config": configs.to_dict(config),
    }


def _text(tokenizer: TextTokenizer | None) -> dict[str, Any]:
    if tokenizer is None:
        return {"tokenizer": None}
    ids = {role: getattr(tokenizer, f"{role}_id") for role in _ROLES}
    size = {"vocab_size": tokenizer.vocab_size, "chat": tokenizer.template is not None}
    return {"tokenizer": {**size, "begins": tokenizer.begins, **ids}}


def _print(about: dict[str, Any]) -> None:
    c = about["config"]
    sizes = [f"{c['layers']} layers of width {c['width']}"]
    if "heads" in c:
        keys = f" ({c['kv_heads']} of keys)" if "kv_heads" in c else ""
        sizes.append(f"{c['heads']} heads{keys}, MLP {c['mlp_size']:,}")
    sizes += [f"vocabulary {c['vocab_size']:,}"]
    sizes += [f"context {c['context']:,}"] if c.get("context") else []
    rest = [f"{name}={value}" for name, value in c.items() if name not in _SAID]
    rows = {
        "family": about["family"],
        "parameters": f"{about['parameters']:,} ({about['non_embedding']:,} without embeddings)",
        "sizes": ", ".join(sizes),
        "settings": ", ".join(rest),
    }
    if "tensors" in about:
        kinds = ", ".join(f"{count} {kind}" for kind, count in about["tensors"].items())
        rows["tensors"] = f"{kinds}; {about['bytes']:,} bytes"
        rows["left out"] = ", ".join(about["left_out"])
    rows["tokenizer"] = _tokenizer(about["tokenizer"])
    if "exported" in about:
        rows["exported"] = f"{about['exported']['folder']} ({about['exported']['family']})"
    for name, value in rows.items():
        if value:
            print(_wrapped(name, value))


def _tokenizer(text: dict[str, Any] | None) -> str:
    if text is None:
        return "none"
    ids = [f"{role} {text[role]}" for role in _ROLES if text[role] is not None]
    template = "a" if text["chat"] else "no"
    return ", ".join([f"{text['vocab_size']:,} tokens", f"{template} chat template", *ids])


def _wrapped(name: str, value: str) -> str:
    lines = textwrap.wrap(value, 86) or [""]
    return "\n".join([f"{name:12} {lines[0]}", *(f"{'':12} {line}" for line in lines[1:])])
