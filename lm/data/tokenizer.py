"""SentencePiece tokenizers that lose nothing: char, and BPE and unigram with byte fallback.

Ids 0 to 3 are <pad>, <bos>, <eos>, <unk>. Text is not normalised, so that `decode(encode(x)) == x`
and the bytes of the tokens of a text add up to the bytes of the text, which makes bits per byte
exact. Two properties of SentencePiece stand in the way, and are met here:

* it writes a space as U+2581 and reads U+2581 back as a space. A U+2581 of the text itself becomes
  its three byte pieces in BPE and unigram, and <unk> in char;
* its char model merges a run of unknown characters into one <unk>. Here every character is one
  token, so a char tokenizer is a table from code points to ids, and encodes at memory speed.

The alphabet of a char tokenizer is chosen by counting the whole training text; SentencePiece then
makes the model of it. BPE and unigram see a sample of lines spread evenly over the training text.
"""

import argparse
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece

from lm import config as configs
from lm import rundir
from lm.config import UserError

PAD, BOS, EOS, UNK = range(4)
ASCII = "".join(map(chr, range(0x20, 0x7F))) + "\n"  # what the abilities are written in

_SPACE = "\u2581"
_UNFIT = "\0\u2581\u2585"  # SentencePiece cannot have these as pieces
_COVERAGE = 0.9995  # share of the sample's characters that are pieces; the rest goes by bytes
_BLOCK = 1 << 20  # characters counted at once
_SPECIAL: dict[str, Any] = {
    **{"pad_id": PAD, "bos_id": BOS, "eos_id": EOS, "unk_id": UNK},
    **{"pad_piece": "<pad>", "bos_piece": "<bos>", "eos_piece": "<eos>", "unk_piece": "<unk>"},
}


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """`vocab_size` is the most ids there may be; `sample_bytes` what BPE and unigram learn from."""

    kind: Literal["char", "bpe", "unigram"] = "char"
    vocab_size: int = 128
    sample_bytes: int = 2_000_000

    def __post_init__(self) -> None:
        configs.within("vocab_size", self.vocab_size, 5, 1 << 24)
        configs.positive("sample_bytes", self.sample_bytes)


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A trained SentencePiece model and where it comes from; equal models have one `sha256`."""

    model: bytes
    text_sha256: str
    config: TokenizerConfig

    @functools.cached_property
    def sha256(self) -> str:
        """The hex SHA-256 of the model."""
        return hashlib.sha256(self.model).hexdigest()

    @property
    def vocab_size(self) -> int:
        """How many ids are used, at most `config.vocab_size`."""
        return len(self.pieces)

    @functools.cached_property
    def processor(self) -> sentencepiece.SentencePieceProcessor:
        """SentencePiece's own view of the model."""
        return sentencepiece.SentencePieceProcessor(model_proto=self.model)

    @functools.cached_property
    def pieces(self) -> list[bytes]:
        """The UTF-8 that each id stands for: nothing for controls, U+FFFD for <unk>."""
        return [_piece_bytes(self.processor, i) for i in range(self.processor.get_piece_size())]

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32 [T], with no <bos> and no <eos>."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, faster."""
        if self.config.kind == "char":
            return [self._ids_by_code.take(_codes(text)) for text in texts]
        plain = [text for text in texts if _SPACE not in text]
        encoded = iter(self.processor.encode(plain))
        ids = (self._encode_pieces(t) if _SPACE in t else next(encoded) for t in texts)
        return [np.array(x, np.int32) for x in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8, and <unk>, become U+FFFD."""
        return b"".join(self.pieces[int(i)] for i in ids).decode(errors="replace")

    def token_bytes(self, ids: np.ndarray, text: str) -> np.ndarray:
        """UTF-8 bytes of `text` under each of its ids, uint8 [T]; the sum is that of the text."""
        if self.config.kind != "char":
            return self._piece_sizes[ids]
        codes = _codes(text)
        sizes = 1 + (codes > 0x7F) + (codes > 0x7FF) + (codes > 0xFFFF)
        return sizes.astype(np.uint8)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `tokenizer.model`, then `tokenizer.json`, which vouches for it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {"text_sha256": self.text_sha256, "sha256": self.sha256}
        rundir.write_bytes(folder / "tokenizer.model", self.model)
        rundir.write_json(folder / "tokenizer.json", configs.to_dict(self.config) | about)

    @functools.cached_property
    def _ids_by_code(self) -> np.ndarray:
        table = np.full(sys.maxunicode + 1, UNK, np.int32)
        for i, piece in enumerate(self.pieces):
            if i > UNK:
                table[ord(piece.decode())] = i
        return table

    @functools.cached_property
    def _piece_sizes(self) -> np.ndarray:
        return np.array([0 if i <= UNK else len(p) for i, p in enumerate(self.pieces)], np.uint8)

    def _encode_pieces(self, text: str) -> list[int]:
        """Ids of a text that has U+2581 in it, which goes in as bytes."""
        mark = [self.processor.piece_to_id(f"<0x{b:02X}>") for b in _SPACE.encode()]
        first, *rest = self.processor.encode(text.split(_SPACE))
        return first + [i for part in rest for i in mark + part]


def train(
    texts: Sequence[str], config: TokenizerConfig, required_characters: str = ""
) -> Tokenizer:
    """A tokenizer of the texts, which should be those of the train split only.

    `required_characters` are single tokens, or parts of pieces, whatever the texts hold. A char
    vocabulary is these and then the commonest characters, as many as `vocab_size` has room for.
    Raises `UserError` where `vocab_size` has no room for what must be in it.
    """
    required = list(dict.fromkeys(required_characters))
    if unfit := [c for c in required if c in _UNFIT]:
        raise UserError(f"required_characters has {unfit[0]!r}, which SentencePiece cannot keep")
    if config.kind == "char":
        alphabet = _char_alphabet(texts, config, required)
        model = _train_model(alphabet[:1], config, alphabet)
    else:
        sample = _sample(texts, config.sample_bytes)
        alphabet = _piece_alphabet(sample, required)
        inside = re.escape("".join(c for c in alphabet if c not in "\n\t"))
        # SentencePiece leaves out what is longer than 4,192 bytes: 1,000 characters never are.
        sentences = re.findall(f"[{inside}]{{1,1000}}", sample)
        extra = {"byte_fallback": True, "allow_whitespace_only_pieces": True}
        model = _train_model(sentences, config, alphabet, **extra)
    return Tokenizer(model, text_sha256(texts), config)


def load(folder: str | os.PathLike[str]) -> Tokenizer:
    """What `save` wrote; raises `UserError` where it is missing or has changed since."""
    folder = Path(folder)
    for name in ("tokenizer.json", "tokenizer.model"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}; give a folder of `lm tokenizer train`")
    about, model = rundir.read_json(folder / "tokenizer.json"), folder / "tokenizer.model"
    stored = about.pop("sha256", None), about.pop("text_sha256", "")
    tokenizer = Tokenizer(model.read_bytes(), stored[1], configs.build(TokenizerConfig, about))
    if tokenizer.sha256 != stored[0]:
        raise UserError(
            f"{model} has changed: its SHA-256 is {tokenizer.sha256}, tokenizer.json says"
            f" {stored[0]}; restore it or train it again"
        )
    return tokenizer


def text_sha256(texts: Iterable[str]) -> str:
    """SHA-256 of a list of texts, with their borders."""
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode()
        digest.update(len(content).to_bytes(8))
        digest.update(content)
    return digest.hexdigest()


def _char_alphabet(texts: Sequence[str], config: TokenizerConfig, required: list[str]) -> list[str]:
    """What is required, then the commonest characters of the texts while there is room."""
    room = config.vocab_size - 4
    if len(required) > room:
        raise UserError(
            f"vocab_size {config.vocab_size} has no room for 4 special tokens and"
            f" {len(required)} required characters; use at least {len(required) + 4}"
        )
    counts = _counts(texts)
    common = [c for c in _by_count(counts) if c not in set(required)]
    return _anchored(required + common[: room - len(required)], counts)


def _piece_alphabet(sample: str, required: list[str]) -> list[str]:
    """What is required, the space, and the commonest characters up to `_COVERAGE`."""
    counts = _counts([sample])
    common = _by_count(counts)
    covered = np.cumsum([counts[ord(c)] for c in common])
    common = common[: 1 + int(np.searchsorted(covered, _COVERAGE * counts.sum()))]
    return _anchored(list(dict.fromkeys([*required, " ", *common])), counts)


def _anchored(alphabet: list[str], counts: np.ndarray) -> list[str]:
    """The alphabet with its commonest character, which must be in the text, in front."""
    first = max(alphabet, key=lambda c: (c not in "\n\t", counts[ord(c)]), default="")
    if not first or not counts.any():
        raise UserError("the training text is empty; give text to train a tokenizer on")
    return [first, *(c for c in alphabet if c != first)]


def _counts(texts: Iterable[str]) -> np.ndarray:
    """How often each code point is in the texts, int64; 0 for those that cannot be pieces."""
    counts = np.zeros(sys.maxunicode + 1, np.int64)
    for block in _blocks(texts):
        counts += np.bincount(_codes(block), minlength=len(counts))
    counts[[ord(c) for c in _UNFIT]] = 0
    return counts


def _by_count(counts: np.ndarray) -> list[str]:
    """The characters that occur, the commonest first, equals by code point."""
    codes = np.flatnonzero(counts)
    return [chr(c) for c in codes[np.argsort(-counts[codes], kind="stable")]]


def _blocks(texts: Iterable[str]) -> Iterator[str]:
    """The texts joined to `_BLOCK` characters or more: counting has a cost per call."""
    waiting, size = [], 0
    for text in texts:
        waiting.append(text)
        size += len(text)
        if size >= _BLOCK:
            yield "".join(waiting)
            waiting, size = [], 0
    yield "".join(waiting)


def _sample(texts: Sequence[str], sample_bytes: int) -> str:
    """Every k-th line, spread over all texts, about `sample_bytes` of UTF-8 together."""
    total = sum(len(text.encode()) for text in texts)
    lines = (line[0] for text in texts for line in re.finditer("[^\n]{1,1000}", text))
    return "\n".join(itertools.islice(lines, 0, None, -(-total // sample_bytes) or 1))


def _train_model(
    sentences: Iterable[str], config: TokenizerConfig, alphabet: list[str], **options: Any
) -> bytes:
    """The model proto of a tokenizer that has the alphabet, and nothing beyond it, as characters.

    SentencePiece takes required characters in the order of their counts and stops as soon as the
    text is covered, so those that the text lacks would be dropped. With the commonest character of
    the text not among the required ones, it is covered last and nothing is dropped.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=config.kind,
            vocab_size=config.vocab_size,
            hard_vocab_limit=False,  # a small text has fewer pieces, which is no mistake
            required_chars="".join(alphabet[1:]).replace(" ", _SPACE),
            character_coverage=1.0,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            minloglevel=2,
            **_SPECIAL,
            **options,
        )
    except RuntimeError as error:
        raise _refusal(str(error), config) from error
    return model.getvalue()


def _refusal(message: str, config: TokenizerConfig) -> UserError:
    if need := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return UserError(
            f"vocab_size {config.vocab_size} has no room for the special tokens, 256 bytes and"
            f" single characters of this text; use at least {need[1]}"
        )
    if "sentences_" in message:
        return UserError("the training text is empty; give text to train a tokenizer on")
    return UserError(f"SentencePiece cannot train this tokenizer: {message}")


def _piece_bytes(processor: sentencepiece.SentencePieceProcessor, i: int) -> bytes:
    piece = processor.id_to_piece(i)
    if i == UNK:
        return "\ufffd".encode()
    if processor.is_control(i):
        return b""
    if processor.is_byte(i):
        return bytes([int(piece[3:5], 16)])
    return piece.replace(_SPACE, " ").encode()


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


def main(argv: list[str]) -> int:
    """`lm tokenizer train|show`."""
    parser = argparse.ArgumentParser(
        prog="lm tokenizer",
        description="Trains a SentencePiece tokenizer on the train split of a source; shows one.",
        epilog="example: lm tokenizer train --stdlib --kind bpe --vocab_size 4096 --out runs/bpe",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    fit = verbs.add_parser("train", help="train a tokenizer and save it")
    source = fit.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", metavar="PATH", help="folder or glob of text files")
    source.add_argument("--stdlib", action="store_true", help="Python's standard library")
    fit.add_argument("--kind", choices=["char", "bpe", "unigram"], default="char")
    fit.add_argument("--vocab_size", type=int, default=128, help="the most ids there may be")
    fit.add_argument("--sample_bytes", type=int, default=TokenizerConfig.sample_bytes)
    fit.add_argument("--out", required=True, metavar="DIR")
    show = verbs.add_parser("show", help="size, hashes, bytes per token, pieces, a segmentation")
    show.add_argument("folder", metavar="DIR")
    show.add_argument("--text", default="def add(a, b):\n    return a + b  # the sum\n")
    show.add_argument("--json", action="store_true", help="for machines")
    args = parser.parse_args(argv)
    return _train_command(args) if args.verb == "train" else _show_command(args)


def _train_command(args: argparse.Namespace) -> int:
    from lm.data import sources  # imports TFDS, which `show` has no need of

    config = TokenizerConfig(args.kind, args.vocab_size, args.sample_bytes)
    out = Path(args.out)
    if out.is_file() or (out / "tokenizer.model").exists():
        raise UserError(f"{out} is a file or has a tokenizer; give another --out, or remove it")
    source = sources.SourceConfig("folder", args.input) if args.input else sources.SourceConfig()
    corpus = sources.scan(source)
    if corpus.warning:
        print(f"warning: {corpus.warning}", file=sys.stderr)
    with tempfile.TemporaryDirectory() as cache:
        texts = sources.texts(corpus, "train", cache)
    tokenizer = train(texts, config, ASCII)
    tokenizer.save(args.out)
    print(f"{args.kind} tokenizer of {tokenizer.vocab_size} ids, from {len(texts)} documents")
    print(f"{args.out}  sha256 {tokenizer.sha256}")
    return 0


def describe(tokenizer: Tokenizer, text: str) -> dict[str, Any]:
    """What `lm tokenizer show` says, JSON-ready."""
    ids = tokenizer.encode(text)
    longest = sorted(tokenizer.pieces[UNK + 1 :], key=lambda piece: (-len(piece), piece))[:10]
    return {
        **configs.to_dict(tokenizer.config),
        "used": tokenizer.vocab_size,
        "sha256": tokenizer.sha256,
        "text_sha256": tokenizer.text_sha256,
        "bytes_per_token": len(text.encode()) / len(ids) if len(ids) else None,
        "unknown": int((ids == UNK).sum()),
        "longest": [piece.decode(errors="replace") for piece in longest],
        "segmentation": [tokenizer.pieces[i].decode(errors="backslashreplace") for i in ids],
        "ids": ids.tolist(),
    }


def _show_command(args: argparse.Namespace) -> int:
    about = describe(load(args.folder), args.text)
    if args.json:
        print(json.dumps(about))
        return 0
    import rich.console
    import rich.table
    import rich.text

    lists = {name: " ".join(map(repr, about[name])) for name in ("longest", "segmentation")}
    per_token = about["bytes_per_token"]
    lists["bytes_per_token"] = (
        "no tokens" if per_token is None else f"{per_token:.2f} (of the text)"
    )
    table = rich.table.Table("", rich.table.Column(args.folder, overflow="fold"))
    for name, value in (about | lists).items():
        if name != "ids":
            table.add_row(name, rich.text.Text(str(value)))
    rich.console.Console().print(table)
    return 0
