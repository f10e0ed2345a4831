"""Documents to packed arrays: tokenised once, sealed by a manifest, read through memory maps.

All documents lie one after another in one flat array, each from its <bos> to its <eos>. A row of
`length` T is a window of it, whose inputs are the tokens s[0:T] and whose targets are s[1:T+1]:

* `stream`: row r begins at token r T, so rows overlap by one token and every token but the first
  is a target once. For text.
* `fit`: a row holds whole documents, as many as the order gives and T + 1 tokens allow. For
  examples that must not be cut.
* `pairs`: a row is one document of T + 1 tokens: a source in the first `about["source_length"]`,
  and the target. What is padding there is no part of the document, and the target has positions
  of its own.

Every stored token has a weight, that of the loss where it is the target, and the bytes of text it
stands for. The first token of a document has weight 0: nothing before it says what it will be.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from lm import rundir
from lm.config import UserError, positive
from lm.data import sources
from lm.data.tokenizer import BOS, EOS, UNK, Tokenizer

Layout = Literal["stream", "fit", "pairs"]
ARRAYS = ("tokens", "doc_start", "token_bytes", "weight", "row_start")


class Document(NamedTuple):
    """What is stored of one document, each [n]: ids, weights as targets, bytes (None: zeros)."""

    tokens: np.ndarray
    weight: np.ndarray
    token_bytes: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Packed:
    """Packed documents; `about` says where they come from.

    `tokens` uint16 or uint32 [N], `doc_start` int64 [documents + 1], `token_bytes` uint8 [N],
    `weight` float16 [N], `row_start` int64 [rows + 1].
    """

    layout: Layout
    length: int
    tokens: np.ndarray
    doc_start: np.ndarray
    token_bytes: np.ndarray
    weight: np.ndarray
    row_start: np.ndarray
    about: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self.doc_start) - 1

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return len(self.row_start) - 1


def document(ids: np.ndarray, weight: Any = 1.0, token_bytes: np.ndarray | None = None) -> Document:
    """Puts <bos> and <eos> around ids [n]; `weight` is one number, or [n] and then 1 for <eos>."""
    weights = np.ones(len(ids) + 2, np.float16)
    weights[1:-1] = weight
    weights[0], weights[-1] = 0, weight if np.ndim(weight) == 0 else 1
    tokens = np.pad(ids, 1, constant_values=(BOS, EOS))
    return Document(tokens, weights, None if token_bytes is None else np.pad(token_bytes, 1))


def pack(
    documents: Iterable[Document | tuple[np.ndarray, np.ndarray]], layout: Layout, length: int
) -> Packed:
    """Packs documents, (tokens, weight) or `Document`, which are stored as they are given.

    Raises `UserError` where there is none, or, in the layout `fit`, one that is longer than a row.
    """
    positive("length", length)
    docs = [Document(*d) for d in documents]
    if not docs:
        raise UserError("there is no document to pack; give at least one")
    sizes = np.array([len(d.tokens) for d in docs])
    if (sizes == 0).any() or any(len(d.weight) != n for d, n in zip(docs, sizes, strict=True)):
        raise ValueError("a document has no tokens, or not one weight for each")
    doc_start = np.concatenate([[0], np.cumsum(sizes)])
    tokens = np.concatenate([d.tokens for d in docs])
    if tokens.min() < 0:
        raise ValueError(f"token id {tokens.min()} is negative")
    weight = np.concatenate([d.weight for d in docs]).astype(np.float16)
    weight[doc_start[:-1]] = 0
    none = np.zeros(sizes.max(), np.uint8)
    counted = [
        none[:n] if d.token_bytes is None else d.token_bytes
        for d, n in zip(docs, sizes, strict=True)
    ]
    return Packed(
        layout,
        length,
        tokens.astype(np.uint16 if tokens.max() < 1 << 16 else np.uint32),
        doc_start,
        np.concatenate(counted).astype(np.uint8),
        weight,
        _stream_rows(len(tokens), length) if layout == "stream" else _fit_rows(sizes, length),
    )


def prepare_text(
    corpus: sources.Corpus,
    split: sources.Split,
    tokenizer: Tokenizer,
    length: int,
    folder: str | os.PathLike[str],
    cache_dir: str | os.PathLike[str],
) -> Packed:
    """The documents of a split, tokenised into rows of a stream; `folder` is made if missing.

    Raises `UserError` where it is there, but damaged or made of something else.
    """
    about = {"source": corpus.identity, "split": split, "tokenizer_sha256": tokenizer.sha256}
    if not Path(folder).exists():
        texts = sources.texts(corpus, split, cache_dir)
        encoded = tokenizer.encode_batch(texts)
        unknown = sum(int((ids == UNK).sum()) for ids in encoded)
        docs = (
            document(ids, 1.0, tokenizer.token_bytes(ids, text))
            for ids, text in zip(encoded, texts, strict=True)
        )
        packed = pack(docs, "stream", length)
        save(folder, dataclasses.replace(packed, about=about | {"unknown": unknown}))
    packed = load(folder, tokenizer.sha256)
    wanted = about | {"length": length, "layout": "stream"}
    found = packed.about | {"length": packed.length, "layout": packed.layout}
    for name, value in wanted.items():
        if found.get(name) != value:
            raise UserError(
                f"{folder} was made with {name} {found.get(name)}, not {value}; remove the folder"
                " to prepare it again, or give another"
            )
    return packed


def save(folder: str | os.PathLike[str], packed: Packed) -> None:
    """Writes a folder whole or not at all; one writer at a time. Raises if it exists."""
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists; remove it to prepare it again, or give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # One fixed name: what a killed writer left is found, and removed, by the next.
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        for name in ARRAYS:
            with open(temporary / f"{name}.npy", "xb") as file:
                np.save(file, getattr(packed, name), allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        rundir.write_json(temporary / "about.json", _about(packed))
        rundir.write_json(temporary / rundir.MANIFEST, rundir.make_manifest(temporary))
        os.rename(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def load(folder: str | os.PathLike[str], tokenizer_sha256: str = "") -> Packed:
    """Maps what `save` wrote, after checking every byte against the manifest.

    Raises `UserError` where a file is missing or damaged, or the data was made with a tokenizer
    other than the one of `tokenizer_sha256`.
    """
    folder = Path(folder)
    remedy = "remove the folder and prepare it again"
    if not (folder / rundir.MANIFEST).is_file():
        raise UserError(f"{folder} holds no prepared data (no {rundir.MANIFEST}); {remedy}")
    manifest = rundir.read_json(folder / rundir.MANIFEST)
    problems = rundir.check_manifest(folder, manifest)
    names = {"about.json", *(f"{name}.npy" for name in ARRAYS)}
    if not problems and names - set(manifest["files"]):
        problems = [f"the manifest of {folder} lacks {min(names - set(manifest['files']))}"]
    if problems:
        raise UserError(f"{'; '.join(problems)}: {remedy}")
    about = rundir.read_json(folder / "about.json")
    made_with = about.get("tokenizer_sha256")
    if tokenizer_sha256 and made_with != tokenizer_sha256:
        raise UserError(
            f"{folder} was made with tokenizer {made_with}, not with {tokenizer_sha256}; use that"
            f" tokenizer, or {remedy}"
        )
    # The view drops the memmap class, whose bookkeeping costs more than a small gather.
    maps = {
        n: np.load(folder / f"{n}.npy", mmap_mode="r", allow_pickle=False).view(np.ndarray)
        for n in ARRAYS
    }
    return Packed(about.pop("layout"), about.pop("length"), **maps, about=about)


def _about(packed: Packed) -> dict[str, Any]:
    return {
        **packed.about,
        "layout": packed.layout,
        "length": packed.length,
        "documents": packed.documents,
        "rows": packed.rows,
        "tokens": len(packed.tokens),
        "bytes": int(packed.token_bytes.sum(dtype=np.int64)),
    }


def _stream_rows(tokens: int, length: int) -> np.ndarray:
    return np.append(np.arange(0, max(tokens - 1, 1), length), tokens - 1)


def _fit_rows(sizes: np.ndarray, length: int) -> np.ndarray:
    """Next-fit: a document that does not fit closes the row."""
    if sizes.max() > length + 1:
        raise UserError(
            f"document {sizes.argmax()} has {sizes.max()} tokens with <bos> and <eos>; a row of"
            f" length {length} holds {length + 1}: raise the length or make the example shorter"
        )
    starts, end, used = [0], 0, 0
    for size in sizes.tolist():
        if used + size > length + 1:
            starts.append(end)
            used = 0
        used += size
        end += size
    return np.array([*starts, end])
