"""The tokenizer that a GGUF file describes, built with the `tokenizers` library.

Two kinds: byte-level BPE (`gpt2`), whose `pre` names the expressions that cut a text into words
before merging, and SentencePiece's BPE (`llama`), whose merges are not in the file and follow from
the scores: of two neighbours, those whose union has the highest score are joined first. Expressions
are those of llama.cpp (src/llama-vocab.cpp), which are the models' own.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from lm.config import UserError, nearest
from lm.pretrained.tensors import show
from lm.pretrained.tokenizer import TextTokenizer, guarded, wrap

# Token types of the format that mean something here.
_NORMAL, _CONTROL, _USER = 1, 3, 4
_LONGEST_PIECE = 512  # characters; splitting a longer one in two, in every way, has no end

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# `pre` -> the expressions that cut, one after another.
CUTS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3 % "1,3",),
    "qwen2": (_LLAMA3 % "1",),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
_ROLES = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "pad": "padding_token_id",
    "mask": "mask_token_id",
}


def from_metadata(path: Path, metadata: Mapping[str, Any]) -> TextTokenizer | None:
    """The tokenizer of a file's metadata, None where it has none; raises `UserError` where it is of
    another kind, or broken.
    """
    model = metadata.get("tokenizer.ggml.model")
    if model is None or (isinstance(model, str) and model == "none"):
        return None
    if not isinstance(model, str) or model not in _KINDS:
        raise UserError(
            f"{path} has a tokenizer of kind {show(model)};"
            f" {nearest(str(model)[:40], list(_KINDS))}"
        )
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise UserError(f"{path} has no tokenizer.ggml.tokens; convert the model again")
    types = _types(path, metadata, len(tokens))
    backend = guarded(path, lambda: _KINDS[model](path, metadata, tokens, types))
    for kind, add in ((_CONTROL, backend.add_special_tokens), (_USER, backend.add_tokens)):
        of_kind = [t for t, k in zip(tokens, types, strict=True) if t and k == kind]
        add([AddedToken(t, normalized=False, special=kind == _CONTROL) for t in of_kind])
    # A file that does not say: SentencePiece's models begin a text with <s>.
    begins = metadata.get("tokenizer.ggml.add_bos_token", model == "llama")
    return wrap(backend, _ids(path, metadata, len(tokens)), _template(metadata), begins is True)


def _types(path: Path, metadata: Mapping[str, Any], count: int) -> list[int]:
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return [_NORMAL] * count
    whole = isinstance(types, np.ndarray) and types.dtype.kind in "iu"
    if not whole or len(types) != count:
        raise UserError(f"{path} has {count:,} tokens, and not as many types; convert it again")
    return [int(t) for t in types]


def _ids(path: Path, metadata: Mapping[str, Any], count: int) -> dict[str, int | None]:
    ids: dict[str, int | None] = {}
    for role, key in _ROLES.items():
        value = metadata.get(f"tokenizer.ggml.{key}")
        if value is not None and (type(value) is not int or not 0 <= value < count):
            raise UserError(f"{path} has {key} {show(value)}; it must be below {count:,}")
        ids[role] = value
    return ids


def _template(metadata: Mapping[str, Any]) -> str | None:
    value = metadata.get("tokenizer.chat_template")
    return value if isinstance(value, str) else None


def _byte_level(
    path: Path, metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> tokenizers.Tokenizer:
    """Byte-level BPE, merges as they stand in the file."""
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(pre, str) or pre not in CUTS:
        raise UserError(
            f"{path} cuts words by {show(pre)}, which is not known;"
            f" {nearest(str(pre)[:40], list(CUTS))}"
        )
    merges = [tuple(m.split(" ", 1)) for m in metadata.get("tokenizer.ggml.merges", [])]
    if bad := next((m for m in merges if len(m) != 2), None):
        raise UserError(f"{path} has the merge {show(bad)}, which is no pair; convert it again")
    vocabulary = {token: i for i, token in reversed(list(enumerate(tokens)))}
    model = models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe")
    backend = tokenizers.Tokenizer(model)
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in CUTS[pre]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(
    path: Path, metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> tokenizers.Tokenizer:
    """SentencePiece's BPE with byte fallback."""
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    if type(unknown) is not int or not 0 <= unknown < len(tokens):
        raise UserError(f"{path} has unknown_token_id {show(unknown)}; convert the model again")
    vocabulary = {token: i for i, token in reversed(list(enumerate(tokens)))}
    normal = {i: t for i, (t, k) in enumerate(zip(tokens, types, strict=True)) if k == _NORMAL}
    merges = _merges(path, metadata, vocabulary, normal)
    backend = tokenizers.Tokenizer(
        models.BPE(vocabulary, merges, unk_token=tokens[unknown], fuse_unk=True, byte_fallback=True)
    )
    steps: list[Any] = [normalizers.Replace(" ", "\u2581")]
    undo: list[Any] = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("\u2581"))
        undo.append(decoders.Strip(" ", 1, 0))
    backend.normalizer = normalizers.Sequence(steps)
    backend.decoder = decoders.Sequence(undo)
    return backend


def _merges(
    path: Path, metadata: Mapping[str, Any], vocabulary: Mapping[str, int], normal: dict[int, str]
) -> list[tuple[str, str]]:
    """The pairs whose union is a piece, those of the highest score first."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, np.ndarray) or len(scores) <= max(normal, default=0):
        raise UserError(f"{path} has no tokenizer.ggml.scores for all of its tokens; convert again")
    if not np.isfinite(scores).all():
        raise UserError(f"{path} has scores that are no numbers; convert the model again")
    if (longest := max(map(len, normal.values()), default=0)) > _LONGEST_PIECE:
        raise UserError(f"{path} has a piece of {longest:,} characters; {_LONGEST_PIECE} are read")
    found = []
    for i, piece in normal.items():
        halves = ((piece[:n], piece[n:]) for n in range(1, len(piece)))
        fitting = [h for h in halves if h[0] in vocabulary and h[1] in vocabulary]
        found += [(-float(scores[i]), i, pair) for pair in fitting]
    return [pair for _, _, pair in sorted(found)]


_KINDS: dict[str, Callable[..., tokenizers.Tokenizer]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}
