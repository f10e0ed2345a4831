"""What a study of pairs trains on: a tokenizer, packed rows and the held-out pairs, made once for
all points that share them.

A document is `source \\n target`, and only the target has weight. Rows hold whole documents, as
many as fit; pairs that no row can hold, and held-out sources that leave no room for an answer, are
left out.
"""

import contextlib
import dataclasses
import fcntl
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from lm import rundir
from lm.config import UserError, fingerprint, positive
from lm.data import pairs, prepare
from lm.data.pair_readers import PairsConfig, one_line
from lm.data.tokenizer import ASCII, Tokenizer, TokenizerConfig
from lm.data.tokenizer import load as load_tokenizer
from lm.data.tokenizer import train as train_tokenizer
from lm.eval import text
from lm.translate import BETWEEN

LEADS = (5, 8, 12, 16, 1000)  # words at which a lead may be cut
LEAD_PAIRS = 500  # of the training pairs, on which the cut is chosen


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Pairs, their tokenizer, and rows of `length` tokens. `lang` is that of the targets, `answer`
    the most tokens of an output and `beams` those of the search for it, `baseline` what a model has
    to be better than.
    """

    pairs: PairsConfig
    tokenizer: TokenizerConfig
    length: int
    answer: int
    beams: int = dataclasses.field(default=1, metadata={"omit": True})
    lang: str = "en"
    baseline: Literal["copy", "lead"] = "copy"
    items: int = 500  # held-out pairs that are scored, at most

    def __post_init__(self) -> None:
        for name in ("length", "answer", "beams", "items"):
            positive(name, getattr(self, name))


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Packed training rows and held-out (source, target) with what the baseline writes for them."""

    tokenizer: Tokenizer
    train: prepare.Packed
    heldout: list[tuple[str, str]]
    baseline: list[str]


def prepared(config: DataConfig, folder: Path) -> Prepared:
    """The data of a config in `folder`, made there on first use."""
    same = dataclasses.replace(config, beams=1)  # of a search, which changes no data
    own = folder / f"pairs-{fingerprint(same)}"
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(own.with_suffix(".lock")):
        if not (own / "train").exists():
            _prepare(config, own, folder)
        tokenizer = load_tokenizer(own / "tokenizer")
        packed = prepare.load(own / "train", tokenizer.sha256)
        held = rundir.read_json(own / "heldout.json")
    heldout = [(source, target) for source, target in held["pairs"]]
    return Prepared(tokenizer, packed, heldout, held["baseline"])


def _prepare(config: DataConfig, own: Path, folder: Path) -> None:
    """Writes the tokenizer, the held-out pairs and last, whole or not at all, the rows."""
    scanned = pairs.scan(config.pairs)
    stored = {split: pairs.load(scanned, split, folder) for split in ("train", "test")}
    train = [(one_line(a), one_line(b)) for a, b in stored["train"]]
    held = [(one_line(a), one_line(b)) for a, b in stored["test"]]
    texts = [source + BETWEEN + target for source, target in train]
    tokenizer = train_tokenizer(texts, config.tokenizer, ASCII)
    tokenizer.save(own / "tokenizer")
    room = config.length - config.answer - 2
    read = tokenizer.encode_batch([source for source, _ in held])
    fit = [pair for pair, ids in zip(held, read, strict=True) if len(ids) < room]
    chosen = np.sort(np.random.default_rng(0).permutation(len(fit))[: config.items])
    held = [fit[i] for i in chosen]
    packed = pack(train, tokenizer, config.length)
    words = best_lead(train) if config.baseline == "lead" else 0
    written = [pairs.lead(source, words) if words else source for source, _ in held]
    record = {"pairs": held, "baseline": written, "lead_words": words, "warning": scanned.warning}
    rundir.write_json(own / "heldout.json", record)
    left_out = len(train) - packed.documents
    made_of = {"tokenizer_sha256": tokenizer.sha256, "pairs": scanned.identity}
    about = {**made_of, "left_out": left_out}
    prepare.save(own / "train", dataclasses.replace(packed, about=about))


def pack(train: Sequence[tuple[str, str]], tokenizer: Tokenizer, length: int) -> prepare.Packed:
    """Rows of whole documents in a fixed order of chance; raises `UserError` if none fits."""
    sources = tokenizer.encode_batch([source + BETWEEN for source, _ in train])
    targets = tokenizer.encode_batch([target for _, target in train])
    documents = []
    for i in np.random.default_rng(1).permutation(len(train)):
        weight = np.repeat([0.0, 1.0], [len(sources[i]), len(targets[i])])
        ids = np.concatenate([sources[i], targets[i]])
        if len(ids) + 2 <= length + 1:
            documents.append(prepare.document(ids, weight))
    if not documents:
        raise UserError(f"no pair fits into a row of {length} tokens; raise data.length")
    return prepare.pack(documents, "fit", length)


def best_lead(train: Sequence[tuple[str, str]]) -> int:
    """At how many words a lead is the best summary of the training pairs, by ROUGE-L."""
    some = train[:: -(-len(train) // LEAD_PAIRS)]
    references = [target for _, target in some]

    def score(words: int) -> float:
        leads = [pairs.lead(source, words) for source, _ in some]
        return text.statistics(leads, references, ("rougeL",))["rougeL"].value

    return max(LEADS, key=score)


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits until no other worker prepares the same data."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
