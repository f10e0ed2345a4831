"""Text to ids and back for models of other people, and for ours.

A text is a text: what a user types never becomes a control token, however it is spelt, unless the
caller says that it is a rendered chat (`special=True`). Tokenizers of other people are run by the
`tokenizers` library, from a `tokenizer.json` or from what a GGUF file says
(`lm.pretrained.gguf_tokenizer`); ours by `lm.data.tokenizer`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from lm.config import UserError
from lm.data import tokenizer as ours
from lm.pretrained.template import render
from lm.pretrained.tensors import open_json, show

LARGEST_JSON = 64 << 20  # bytes of a tokenizer.json; a vocabulary of 262,144 takes half of it
_MARK = "\ue000"  # stands before the number of a control token that was typed; for private use


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer and the ids that mean something: where a text begins ([CLS] for BERT), where it
    ends ([SEP]), padding, and the mask; None where the model has none.

    `begins` says whether the model was trained on texts that begin with `bos_id`: `begin` puts it
    there, `encode` does not. `controls` are the spellings of the control tokens, `template` the
    model's chat template, and `source` the text of a tokenizer.json, for export.
    """

    vocab_size: int
    to_ids: Callable[[str, bool], Sequence[int]] = dataclasses.field(repr=False)
    to_text: Callable[[list[int], bool], str] = dataclasses.field(repr=False)
    bos_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    mask_id: int | None = None
    begins: bool = False
    controls: tuple[str, ...] = ()
    template: str | None = dataclasses.field(default=None, repr=False)
    source: Callable[[], str] | None = dataclasses.field(default=None, repr=False)

    def encode(self, text: str, special: bool = False) -> np.ndarray:
        """The ids of a text, int32 [T], none added; `special` reads control tokens in the text.

        Raises `UserError` where the text holds half of a surrogate pair, which is no character.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text has half a character, {show(text[error.start])}, at place {error.start};"
                " give valid UTF-8"
            ) from error
        return np.array(self.to_ids(text, special), np.int32)

    def begin(self, text: str, special: bool = False) -> np.ndarray:
        """The ids of a text as the model was trained to see its beginning."""
        ids = self.encode(text, special)
        if not self.begins or self.bos_id is None or ids[:1].tolist() == [self.bos_id]:
            return ids
        return np.concatenate([np.array([self.bos_id], np.int32), ids])

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """The text of ids; control tokens are left out unless `special`.

        Bytes that are not UTF-8 become U+FFFD. Models have more rows than there are tokens: ids
        without one stand for nothing.
        """
        kept = [int(i) for i in ids]
        return self.to_text([i for i in kept if 0 <= i < self.vocab_size], special)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> str:
        """The chat as the model's template writes it; `encode(..., special=True)` reads it.

        `messages` are `{"role": ..., "content": ...}`. Raises `UserError` without a template.
        """
        if self.template is None:
            raise UserError(
                "this model has no chat template; give it a prompt to go on with, or a model that"
                " was tuned for chat"
            )
        for message in messages:
            parts = isinstance(message, Mapping) and (message.get("role"), message.get("content"))
            if not parts or not all(isinstance(part, str) for part in parts):
                raise UserError(
                    f"{show(message)} is no message; give a role and a content, both texts"
                )
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        spelt = {k: self.to_text([i], True) for k, i in names.items() if i is not None}
        return render(self.template, messages, add_generation_prompt, **spelt)

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> np.ndarray:
        """The ids of a chat, int32 [T], in which only the template's control tokens are control
        tokens: those that somebody typed into a message are read as text.
        """
        typed = re.compile("|".join(map(re.escape, self.controls)) or "(?!)")
        texts = [m["content"] for m in messages if _has_text(m)]
        mark, found = _MARK, []
        while any(mark in text for text in texts):
            mark += _MARK

        def hide(match: re.Match[str]) -> str:
            found.append(match[0])
            return f"{mark}{len(found) - 1};"

        hidden = [
            {**m, "content": typed.sub(hide, m["content"])} if _has_text(m) else m for m in messages
        ]
        parts = re.split(f"{mark}([0-9]{{1,9}});", self.chat(hidden, add_generation_prompt))
        # A slice: a template could write a number of its own.
        pieces = [
            self.encode("".join(found[int(part) :][:1])) if n % 2 else self.encode(part, True)
            for n, part in enumerate(parts)
        ]
        return np.concatenate(pieces)


def _has_text(message: Any) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("content"), str)


def from_folder(folder: Path, config: Mapping[str, Any]) -> TextTokenizer | None:
    """The tokenizer of a Hugging Face folder, or None where it has no tokenizer.json.

    `config` is its config.json, asked for ids that tokenizer_config.json does not name.
    """
    path, about_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not path.exists():
        return None
    if (size := path.stat().st_size) > LARGEST_JSON:
        raise UserError(f"{path} has {size:,} bytes; at most {LARGEST_JSON:,} are read")
    backend = guarded(path, lambda: tokenizers.Tokenizer.from_file(str(path)))
    about = open_json(about_path, LARGEST_JSON) if about_path.exists() else {}
    if not isinstance(about, dict):
        raise UserError(f"{about_path} is no JSON object; download it again")
    ids = {}
    for role, keys in ROLES.items():
        texts = filter(None, (_content(about.get(key)) for key in keys))
        found = [*map(backend.token_to_id, texts), config.get(f"{role}_token_id")]
        ids[role] = next((i for i in found if type(i) is int and i >= 0), None)
    begins = about.get("add_bos_token")
    if not isinstance(begins, bool):
        begins = guarded(path, lambda: backend.encode("").ids[:1] == [ids["bos"]])
    return wrap(backend, ids, _template(folder, about), begins)


# The role of an id -> the settings of tokenizer_config.json that name it, the first that is there.
ROLES: dict[str, tuple[str, ...]] = {
    "bos": ("bos_token", "cls_token"),
    "eos": ("eos_token", "sep_token"),
    "pad": ("pad_token",),
    "mask": ("mask_token",),
}


def wrap(
    backend: tokenizers.Tokenizer,
    ids: Mapping[str, int | None],
    template: str | None,
    begins: bool = False,
) -> TextTokenizer:
    """A `TextTokenizer` of the `tokenizers` library's; `ids` by role, as in `ROLES`."""
    backend.no_padding()
    backend.no_truncation()
    controls = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}

    # Whether control tokens are read is a state of the library's object, so there are two.
    @functools.cache
    def reader(special: bool) -> tokenizers.Tokenizer:
        copy = tokenizers.Tokenizer.from_str(backend.to_str())
        copy.encode_special_tokens = not special
        return copy

    def to_ids(text: str, special: bool) -> Sequence[int]:
        return guarded(None, lambda: reader(special).encode(text, add_special_tokens=False).ids)

    def to_text(ids: list[int], special: bool) -> str:
        return guarded(None, lambda: backend.decode(ids, skip_special_tokens=not special))

    return TextTokenizer(
        backend.get_vocab_size(),
        to_ids,
        to_text,
        **{f"{role}_id": ids.get(role) for role in ROLES},
        begins=begins and ids.get("bos") is not None,
        # The longest first: of two that begin alike, a pattern takes the one that stands first.
        controls=tuple(sorted(filter(None, controls), key=len, reverse=True)),
        template=template,
        source=backend.to_str,
    )


def from_ours(tokenizer: ours.Tokenizer) -> TextTokenizer:
    """A `TextTokenizer` of `lm.data.tokenizer`, which has no control tokens in text and no chat."""
    return TextTokenizer(
        tokenizer.vocab_size,
        lambda text, special: tokenizer.encode(text).tolist(),
        lambda ids, special: tokenizer.decode(ids),
        bos_id=ours.BOS,
        eos_id=ours.EOS,
        pad_id=ours.PAD,
        begins=True,
    )


def guarded[T](path: Path | None, make: Callable[[], T]) -> T:
    """What `make` makes by the `tokenizers` library, whose complaints become a `UserError`: of a
    file, or of a tokenizer that was read and cannot be used.
    """
    try:
        return make()
    # The library raises plain Exception, and its panics are not even that.
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        why = (str(error).splitlines() or [type(error).__name__])[0][:200]
        whose = "this model" if path is None else str(path)
        raise UserError(f"the tokenizer of {whose} is broken ({why}); download it again") from error


def _content(value: Any) -> str | None:
    """The spelling of a token, which is a text or a record with one."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _template(folder: Path, about: Mapping[str, Any]) -> str | None:
    """The chat template: a file of its own, or a setting; of several the one called default."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > LARGEST_JSON:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes; it is no chat template")
        return path.read_text(errors="replace")
    value = about.get("chat_template")
    if isinstance(value, list):
        named = {v.get("name"): v.get("template") for v in value if isinstance(v, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None
