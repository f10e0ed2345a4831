"""Pairs of texts, split so that no near copy of a held-out source was trained on; TFDS stores them.

Packages, versions and templates come in families: binary packages of one source share paragraphs,
a method and its module function a docstring. Pairs that share a key (their reader says which) or
the source as far as `plain` tells it apart are one family, and families share keys transitively. A
hash of the family decides its split, so it is the same on every machine and no family is in two.
Of pairs whose sources agree in `plain` the first is kept.

What is left out is counted by reason, and `Pairs.warning` says it in one sentence.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tensorflow_datasets as tfds

from lm.config import UserError
from lm.data import pair_readers
from lm.data.pair_readers import Pair, PairsConfig
from lm.data.sources import SPLITS, Split, split_names


@dataclass(frozen=True)
class Pairs:
    """The pairs of a source by split, in the order of their reader, and how many were left out for
    which reason.
    """

    config: PairsConfig
    splits: dict[Split, tuple[Pair, ...]]
    families: int
    dropped: dict[str, int]

    @functools.cached_property
    def identity(self) -> str:
        """SHA-256 over all pairs and their splits."""
        digest = hashlib.sha256()
        for split in SPLITS:
            for pair in self.splits[split]:
                digest.update(json.dumps([split, pair.name, pair.source, pair.target]).encode())
        return digest.hexdigest()

    @property
    def warning(self) -> str:
        """One sentence on the pairs that were left out, or nothing."""
        if not self.dropped:
            return ""
        kept, total = sum(map(len, self.splits.values())), sum(self.dropped.values())
        reasons = ", ".join(f"{n:,} {reason}" for reason, n in self.dropped.items())
        return f"of {kept + total:,} pairs {total:,} were left out: {reasons}"


def scan(config: PairsConfig) -> Pairs:
    """Reads a source and decides which pairs are kept and of which split.

    Raises `UserError` where there are fewer families than splits.
    """
    found = pair_readers.read(config)
    dropped, kept = Counter(found.dropped), {}
    for pair in found.pairs:
        same = pair_readers.plain(pair.source)
        if reason := refusal(pair, config):
            dropped[reason] += 1
        elif same in kept:
            dropped["with the source of another"] += 1
        else:
            kept[same] = pair
    keys = [[f"source {same}", *(f"key {k}" for k in pair.keys)] for same, pair in kept.items()]
    names = families(keys)
    distinct = sorted(set(names))
    if len(distinct) < len(SPLITS):
        why = ", ".join(f"{n} {reason}" for reason, n in dropped.items()) or "none was left out"
        raise UserError(
            f"{_name(config)} has {len(kept)} pairs in {len(distinct)} families; at least"
            f" {len(SPLITS)} are needed, one each for train, validation and test ({why})"
        )
    split_of = {name: s for s, some in split_names(distinct).items() for name in some}
    splits: dict[Split, list[Pair]] = {split: [] for split in SPLITS}
    for name, pair in zip(names, kept.values(), strict=True):
        splits[split_of[name]].append(pair)
    most_first = dict(dropped.most_common())
    return Pairs(config, {s: tuple(some) for s, some in splits.items()}, len(distinct), most_first)


def refusal(pair: Pair, config: PairsConfig) -> str:
    """Why a pair is left out, or nothing."""
    sizes = len(pair.source), len(pair.target)
    if not min(sizes):
        return "with an empty side"
    if max(sizes) > config.longest:
        return f"longer than {config.longest} characters"
    if config.ratio and max(sizes) > config.ratio * min(sizes):
        return f"{config.ratio:g} times as long on one side"
    if pair.source == pair.target and config.kind in ("po", "descriptions"):
        return "untranslated"
    return ""


def families(keys: Sequence[Sequence[str]]) -> list[str]:
    """The least key of each item's family; items are of one family if a chain of shared keys links
    them.
    """
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for some in keys:
        roots = sorted({root(key) for key in some})
        for other in roots[1:]:
            parent[other] = roots[0]
    return [root(some[0]) for some in keys]


def records(
    pairs: Pairs, split: Split, cache_dir: str | os.PathLike[str]
) -> Sequence[dict[str, bytes]]:
    """The pairs of a split as `{"source", "target", "name"}` in UTF-8; stored on first use."""
    data_dir = os.path.join(cache_dir, pairs.identity[:16])
    builder = TextPairs(pairs=pairs, data_dir=data_dir, file_format="array_record")
    tfds.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces itself where our JSON goes
        builder.download_and_prepare()
    return builder.as_data_source(split=split)


def load(pairs: Pairs, split: Split, cache_dir: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """(source, target) of a split; raises `UserError` where what is stored is damaged."""
    try:
        stored = [
            (record["source"].decode(), record["target"].decode())
            for record in records(pairs, split, cache_dir)
        ]
    except (RuntimeError, IndexError, UnicodeError):  # what array_record raises for damaged files
        stored = []
    if stored != [(pair.source, pair.target) for pair in pairs.splits[split]]:
        raise UserError(
            f"the pairs stored in {os.fspath(cache_dir)} for split {split} are damaged; remove that"
            " folder, and they are stored again"
        )
    return stored


class TextPairs(tfds.core.GeneratorBasedBuilder):
    """Pairs of texts from any of the sources of `lm.data.pair_readers`."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # there is nothing to download, hence no checksums of downloads to look for

    def __init__(self, *, pairs: Pairs, **kwargs: Any) -> None:
        self.pairs = pairs
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {name: tfds.features.Text() for name in ("source", "target", "name")}
        return tfds.core.DatasetInfo(
            builder=self,
            description="Pairs of a source text and its target.",
            features=tfds.features.FeaturesDict(features),
            supervised_keys=("source", "target"),
            disable_shuffling=True,  # the loader shuffles; here the order is the reader's
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict]]]:
        return {split: self._generate_examples(self.pairs.splits[split]) for split in SPLITS}

    def _generate_examples(self, pairs: Sequence[Pair]) -> Iterator[tuple[int, dict]]:
        for i, pair in enumerate(pairs):
            yield i, {"source": pair.source, "target": pair.target, "name": pair.name}


def lead(source: str, words: int) -> str:
    """The baseline of a summary: the first sentence of the source, cut to a number of words."""
    first = re.split(r"(?<=[.!?]) ", source, maxsplit=1)[0]
    return " ".join(first.split()[:words])


def _name(config: PairsConfig) -> str:
    return config.path or {"docstrings": "the Python standard library"}.get(
        config.kind, config.kind
    )
