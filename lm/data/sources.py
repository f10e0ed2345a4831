"""Text sources: TFDS builders over text that is on this machine, stored as array_record.

A document is a file. Its split is a hash of its path relative to the source, so the same file is
in the same split on every machine, and files with equal contents are kept once, so that no text is
in two splits. `scan` looks at the files and decides all of that; `documents` has TFDS store them on
first use, in a folder named after the source's identity: a source that changed is stored anew.

TensorFlow is never imported: array_record is written and read through TFDS data sources.
"""

import contextlib
import functools
import glob
import hashlib
import io
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tensorflow_datasets as tfds

from lm.config import UserError
from lm.data.prose import prose

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

type Examples = Iterator[tuple[str, dict[str, str]]]

# Of a distribution's own library; what is below these was installed by its users, or is bytecode.
_NOT_STDLIB = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class SourceConfig:
    """Where text comes from; `path` is a folder (taken with all below it) or a glob of files.

    `docstrings` is the English in the standard library, a document a file (`lm.data.prose`).
    """

    kind: Literal["python_stdlib", "docstrings", "folder"] = "python_stdlib"
    path: str = ""

    def __post_init__(self) -> None:
        if self.kind == "folder" and not self.path:
            raise UserError("path is empty; give the folder or the glob of the text files")
        if self.kind != "folder" and self.path:
            raise UserError(f"path is {self.path!r}; kind {self.kind!r} takes none, remove it")


@dataclass(frozen=True)
class File:
    """One document: `path` relative to the source, `place` on this machine, size in bytes."""

    path: str
    place: Path
    sha256: str
    size: int


@dataclass(frozen=True)
class Corpus:
    """The documents of a source by split, and what was left out: (path, reason) and counts."""

    source: SourceConfig
    splits: dict[Split, tuple[File, ...]]
    skipped: tuple[tuple[str, str], ...]
    duplicates: int
    empty: int

    @property
    def files(self) -> list[File]:
        """All documents, by path."""
        return sorted((f for s in SPLITS for f in self.splits[s]), key=lambda f: f.path)

    @functools.cached_property
    def identity(self) -> str:
        """SHA-256 over the (path, content hash) list."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.sha256} {file.path}\0".encode())
        return digest.hexdigest()

    @property
    def warning(self) -> str:
        """One sentence on the files that were skipped, or nothing."""
        if not self.skipped:
            return ""
        shown = ", ".join(f"{path} ({reason})" for path, reason in self.skipped[:5])
        more = f" and {len(self.skipped) - 5} more" if len(self.skipped) > 5 else ""
        count = len(self.skipped)
        return f"skipped {count} file{'s' * (count > 1)} of {_name(self.source)}: {shown}{more}"


def scan(source: SourceConfig) -> Corpus:
    """Reads every file of a source once and decides which are documents and of which split.

    Raises `UserError` when there are fewer documents than splits.
    """
    root, places = _text_files(source.path) if source.kind == "folder" else _stdlib_files()
    files: dict[str, File] = {}  # by content hash: the first by path stays
    skipped, duplicates, empty = [], 0, 0
    for place in places:
        path = place.relative_to(root).as_posix()
        content, reason = _read(place, source.kind)
        if reason:
            skipped.append((ascii(path)[1:-1], reason))
        elif not content.strip():
            empty += 1
        elif (digest := hashlib.sha256(content).hexdigest()) in files:
            duplicates += 1
        else:
            files[digest] = File(path, place, digest, len(content))
    if not files and skipped:
        path, reason = skipped[0]
        raise UserError(
            f"none of the {len(places)} files of {_name(source)} is text in UTF-8"
            f" ({path} is {reason}); give text files"
        )
    if (n := len(files)) < len(SPLITS):
        raise UserError(
            f"{_name(source)} has {n} document{'s' * (n != 1)} (files that are neither empty nor"
            f" copies); at least {len(SPLITS)} are needed, one each for train, validation and test:"
            " give more files, or cut a large one into several"
        )
    splits = split_files(list(files.values()))
    return Corpus(source, splits, tuple(skipped), duplicates, empty)


def split_files(files: Sequence[File]) -> dict[Split, tuple[File, ...]]:
    """Splits by relative path, as `split_names` does; of a split the files are in its order."""
    by_path = {file.path: file for file in files}
    names = split_names(list(by_path))
    return {split: tuple(by_path[path] for path in names[split]) for split in SPLITS}


def split_names(names: Sequence[str]) -> dict[Split, list[str]]:
    """Splits by blake2b of the name mod 1000: below 900 train, below 950 validation; sorted.

    Where that leaves a split of a few names empty, the cut moves by as few names as needed; the
    order along which it moves is the hash's as well. Needs at least three names.
    """
    ranked = sorted((_hash(name) % 1000, _hash(name), name) for name in names)
    n = len(ranked)
    train = min(max(sum(rank < 900 for rank, _, _ in ranked), 1), n - 2)
    test = min(max(sum(rank < 950 for rank, _, _ in ranked), train + 1), n - 1)
    parts = ranked[:train], ranked[train:test], ranked[test:]
    return {s: sorted(name for *_, name in part) for s, part in zip(SPLITS, parts, strict=True)}


def documents(
    source: SourceConfig | Corpus, split: Split, cache_dir: str | os.PathLike[str]
) -> Sequence[dict[str, bytes]]:
    """The documents of a split as `{"text", "path"}` in UTF-8, by path; stored on first use.

    A `Corpus` saves reading the files again to see whether they have changed.
    """
    corpus = scan(source) if isinstance(source, SourceConfig) else source
    cls = TextFolder if corpus.source.kind == "folder" else PythonStdlib
    data_dir = os.path.join(cache_dir, corpus.identity[:16])
    builder = cls(corpus=corpus, data_dir=data_dir, file_format="array_record")
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces itself where our JSON goes
        builder.download_and_prepare()
    return builder.as_data_source(split=split)


def texts(corpus: Corpus, split: Split, cache_dir: str | os.PathLike[str]) -> list[str]:
    """All texts of a split, by path; raises `UserError` where what is stored is damaged."""
    stored = documents(corpus, split, cache_dir)
    try:
        contents = [record["text"] for record in stored]
    except (RuntimeError, IndexError):  # what array_record raises for damaged files
        contents = []
    hashes = [hashlib.sha256(content).hexdigest() for content in contents]
    if hashes != [file.sha256 for file in corpus.splits[split]]:
        raise UserError(
            f"the documents stored in {os.fspath(cache_dir)} for split {split} are damaged; remove"
            " that folder, and they are stored again"
        )
    return [content.decode() for content in contents]


class PythonStdlib(tfds.core.GeneratorBasedBuilder):
    """The standard library of the running interpreter: about 30 MB of source and docstrings."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # there is nothing to download, hence no checksums of downloads to look for

    def __init__(self, *, corpus: Corpus, **kwargs: Any) -> None:
        self.corpus = corpus
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(
            self, "The Python standard library of the running interpreter, or its English."
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Examples]:
        return {split: self._generate_examples(self.corpus.splits[split]) for split in SPLITS}

    def _generate_examples(self, files: Sequence[File]) -> Examples:
        return _examples(files, self.corpus.source.kind)


class TextFolder(tfds.core.GeneratorBasedBuilder):
    """Any folder or glob of text files."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None

    def __init__(self, *, corpus: Corpus, **kwargs: Any) -> None:
        self.corpus = corpus
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, "Text files of a folder.")

    def _split_generators(self, dl_manager: Any) -> dict[str, Examples]:
        return {split: self._generate_examples(self.corpus.splits[split]) for split in SPLITS}

    def _generate_examples(self, files: Sequence[File]) -> Examples:
        return _examples(files, self.corpus.source.kind)


def _info(builder: tfds.core.DatasetBuilder, description: str) -> tfds.core.DatasetInfo:
    features = {"text": tfds.features.Text(), "path": tfds.features.Text()}
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description,
        features=tfds.features.FeaturesDict(features),
        disable_shuffling=True,  # the loader shuffles; here the order is that of the paths
    )


def _examples(files: Sequence[File], kind: str) -> Examples:
    for file in files:
        content, _ = _read(file.place, kind)
        if hashlib.sha256(content).hexdigest() != file.sha256:
            raise UserError(f"{file.place} changed while it was read; run the same command again")
        yield file.path, {"text": content.decode(), "path": file.path}


def _stdlib_files() -> tuple[Path, list[Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    places = sorted(root.rglob("*.py"))
    return root, [p for p in places if not _NOT_STDLIB & set(p.relative_to(root).parts)]


def _text_files(path: str) -> tuple[Path, list[Path]]:
    """The root and the files of a folder or glob; names that begin with a dot are left out."""
    path = os.path.expanduser(path)
    if os.path.isdir(path):
        root, pattern = Path(path), os.path.join(glob.escape(path), "**", "*")
    elif glob.has_magic(path):
        parts = Path(path).parts
        magic = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        root, pattern = Path(*parts[:magic]), path
    elif os.path.exists(path):
        root, pattern = Path(path).parent, glob.escape(path)
    else:
        raise UserError(f"{path} does not exist; give a folder or a glob of text files")
    places = sorted(p for p in map(Path, set(glob.glob(pattern, recursive=True))) if p.is_file())
    if not places:
        raise UserError(f"{path} holds no file; give a folder or a glob of text files")
    return root, places


def _read(place: Path, kind: str) -> tuple[bytes, str]:
    """The content, or the reason why a file is no document."""
    try:
        content = place.read_bytes()
    except OSError as error:
        return b"", f"unreadable: {error.strerror}"
    if b"\0" in content:
        return b"", "binary"
    try:
        text = content.decode()
        os.fspath(place).encode()
    except UnicodeError:
        return b"", "not UTF-8"
    return prose(text).encode() if kind == "docstrings" else content, ""


def _hash(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest())


def _name(source: SourceConfig) -> str:
    return source.path or "the Python standard library"
