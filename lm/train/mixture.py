"""What a cell reads, prepared once: text and abilities as packed arrays, for training and for
testing.

`prepare` writes a folder named after everything its contents depend on; `load` maps it, after
checking every byte. Abilities are drawn from their generators into packed arrays like any text, so
a batch is rows of arrays and nothing is generated while training. That no key is both in train and
in test is asserted here, on the very examples that are written. Abilities that are thought of when
a study is done are packed in the same way, for testing only (`prepare_test`).
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lm import tasks
from lm.config import UserError, fingerprint, to_dict
from lm.data import pairs, sources, tokenizer
from lm.data import prepare as packing
from lm.data.loader import Loader, MixtureItem
from lm.data.pair_readers import PairsConfig
from lm.eval.score import CHOICES
from lm.eval.suite import Key
from lm.rundir import read_json, write_json
from lm.train.cell import Cell, DataConfig, MixtureConfig
from lm.train.objective import PAIRS, TEXT, held_out, words

POOL_SEED = 0  # draws the training examples; the order in which replicas see them is their own


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Packed arrays for training by (task, level), for testing by (task, level, format), and what
    is known of each task: its chance and baselines.
    """

    tokenizer: tokenizer.Tokenizer
    train: dict[tuple[str, str], packing.Packed]
    test: dict[Key, packing.Packed]
    tasks: list[dict[str, Any]]


def folder(cell: Cell, data: Path) -> Path:
    """Where a cell's data lies below `data`: a fingerprint of all that it depends on."""
    mixture = {
        k: (m.task, m.level, m.examples, m.formats) for k, m in sorted(cell.data.mixture.items())
    }
    about = {
        "source": to_dict(cell.data.source),
        "tokenizer": to_dict(cell.data.tokenizer),
        "length": cell.data.length,
        "mixture": mixture,
        "items": cell.eval.items,
        "eval_seed": cell.replicas[0].eval,
    }
    if cell.data.pairs:
        source = cell.model.source_length  # type: ignore[union-attr] # seq2seq has one
        about |= {"pairs": to_dict(cell.data.pairs), "source_length": source}
    return data / fingerprint(about)


def prepare(cell: Cell, data: Path, say: Callable[[str], None] = lambda _: None) -> Path:
    """Writes what `load` reads, if it is not there; raises UserError where the text or an example
    does not fit.
    """
    where = folder(cell, data)
    if (where / "tasks.json").exists():
        return where
    if cell.data.pairs:
        return _prepare_pairs(cell, cell.data.pairs, where, data, say)
    say(f"reading {cell.data.source.path or 'the Python standard library'}")
    corpus = sources.scan(cell.data.source)
    if corpus.warning:
        say(corpus.warning)
    text = sources.texts(corpus, "train", data / "tfds")
    trained = _tokenizer(cell, text, where, say)
    del text
    for split in ("train", "test"):
        say(f"tokenising the text for {split}")
        packing.prepare_text(
            corpus, split, trained, cell.data.length, where / f"text-{split}", data / "tfds"
        )
    found = []
    for item in _abilities(cell.data):
        say(f"drawing {item.task}/{item.level}")
        found += _prepare_task(cell, item, trained, where)
    write_json(where / "tasks.json", {"tasks": found})  # last: its presence says that all is there
    return where


def _tokenizer(
    cell: Cell, text: list[str], where: Path, say: Callable[[str], None]
) -> tokenizer.Tokenizer:
    """The tokenizer of a folder, trained on a text if it is not there."""
    if not (where / "tokenizer" / "tokenizer.json").exists():
        say(
            f"training a {cell.data.tokenizer.kind} tokenizer on {sum(map(len, text)):,} characters"
        )
        tokenizer.train(text, cell.data.tokenizer, tasks.ALPHABET + "\n").save(where / "tokenizer")
    return tokenizer.load(where / "tokenizer")


def _prepare_pairs(
    cell: Cell, config: PairsConfig, where: Path, data: Path, say: Callable[[str], None]
) -> Path:
    """`prepare` where the mixture is pairs: one row for each, long sources cut, and pairs with a
    target that has no room left out.
    """
    say(f"reading pairs of {config.path or config.kind}")
    found = pairs.scan(config)
    if found.warning:
        say(found.warning)
    texts = {split: pairs.load(found, split, data / "tfds") for split in ("train", "test")}
    trained = _tokenizer(cell, [text for pair in texts["train"] for text in pair], where, say)
    source = cell.model.source_length  # type: ignore[union-attr] # seq2seq has one
    for split, some in texts.items():
        if (where / f"pairs-{split}").exists():
            continue
        rows = [pair_row(pair, trained, source, cell.data.length) for pair in some]
        if left_out := rows.count(None):
            say(f"{left_out:,} of {len(rows):,} pairs for {split} have a target without room")
        about = {"tokenizer_sha256": trained.sha256, "source_length": source, "split": split}
        packed = packing.pack([row for row in rows if row], "fit", cell.data.length)
        packing.save(
            where / f"pairs-{split}", dataclasses.replace(packed, layout="pairs", about=about)
        )
    write_json(where / "tasks.json", {"tasks": []})
    return where


def pair_row(
    pair: tuple[str, str], trained: tokenizer.Tokenizer, source: int, length: int
) -> packing.Document | None:
    """A pair as a row of the layout `pairs`, [length + 1]; None where its target has no room.

    The source ends with <eos>, after as much of it as there is room for; the target lies between
    <bos> and <eos>.
    """
    read, said = trained.encode_batch(pair)
    if len(said) + 2 > length + 1 - source:
        return None
    row = np.full(length + 1, tokenizer.PAD, np.int32)
    read = read[: source - 1]
    row[: len(read) + 1] = [*read, tokenizer.EOS]
    target = slice(source + 1, source + 1 + len(said))
    row[source], row[target], row[target.stop] = tokenizer.BOS, said, tokenizer.EOS
    weight, bytes_ = np.zeros(length + 1, np.float16), np.zeros(length + 1, np.uint8)
    weight[source + 1 : target.stop + 1] = 1
    bytes_[target] = trained.token_bytes(said, pair[1])
    return packing.Document(row, weight, bytes_)


def load(cell: Cell, data: Path) -> Prepared:
    """What `prepare` wrote, every byte checked; raises UserError naming what is damaged."""
    where = folder(cell, data)
    if not (where / "tasks.json").exists():
        raise UserError(
            f"{where} holds no prepared data; give the `lm run` command again to prepare it"
        )
    trained = tokenizer.load(where / "tokenizer")

    def read(name: str) -> packing.Packed:
        return packing.load(where / name, trained.sha256)

    text = held_out(cell)
    train: dict[tuple[str, str], packing.Packed] = {(text, ""): read(f"{text}-train")}
    test: dict[Key, packing.Packed] = {(text, "", 0): read(f"{text}-test")}
    for item in _abilities(cell.data):
        train[item.task, item.level] = read(f"{item.task}-{item.level}-train")
        for format in range(item.formats):
            test[item.task, item.level, format] = read(f"{item.task}-{item.level}-test-{format}")
    return Prepared(trained, train, test, read_json(where / "tasks.json")["tasks"])


def prepare_test(cell: Cell, data: Path, task: tasks.Task, items: int) -> packing.Packed:
    """At most `items` test items of an ability that the study had not, packed as `prepare` would
    have; written where they are not yet there.

    Raises UserError where the study's tokenizer or its rows cannot hold them.
    """
    if cell.train.objective != "causal":
        raise UserError(
            f"the study trained with objective {cell.train.objective!r}; abilities are asked of"
            " causal models"
        )
    trained = tokenizer.load(folder(cell, data) / "tokenizer")
    about = {"task": task.name, "level": task.level, "tokenizer_sha256": trained.sha256}
    drawn = {"items": items, "eval_seed": cell.replicas[0].eval, "length": cell.data.length}
    where = data / fingerprint(about | drawn | {"format": task.format})
    if not where.exists():
        test = tasks.items(task, "test", cell.replicas[0].eval, items)
        _check_fits(task, test, trained, cell.data.length)
        _pack(where, test, trained, cell, about | drawn | {"choices": _choices(test, trained)})
    return packing.load(where, trained.sha256)


def known(task: tasks.Task, items: int, train_examples: int = 0) -> dict[str, Any]:
    """What study.json says of an ability in one format: its chance and baselines."""
    chance = tasks.chance(task)
    return {
        **{"task": task.name, "level": task.level, "format": task.format, "ability": task.ability},
        **{"chance": chance.value, "baselines": chance.baselines},
        **{"items": items, "train_examples": train_examples},
    }


def loaders(cell: Cell, prepared: Prepared) -> list[Loader]:
    """One loader per replica: the same mixture in the order of the replica's data seed."""
    items = tuple(
        MixtureItem(f"{m.task}-{m.level}", prepared.train[m.task, m.level], m.rows, m.weight)
        for _, m in sorted(cell.data.mixture.items())
    )
    table = words(cell, prepared.tokenizer)
    return [Loader(items, cell.data.length, replica.data, table) for replica in cell.replicas]


def _abilities(data: DataConfig) -> list[MixtureConfig]:
    return [m for _, m in sorted(data.mixture.items()) if m.task not in (TEXT, PAIRS)]


def _prepare_task(
    cell: Cell, item: MixtureConfig, trained: tokenizer.Tokenizer, where: Path
) -> list[dict[str, Any]]:
    """Packs an ability, and says what is known of it in each of its formats."""
    formats = [tasks.task(item.task, item.level, f) for f in range(item.formats)]
    train = [
        example
        for f, task in enumerate(formats)
        for example in tasks.examples(
            task, "train", POOL_SEED + f, math.ceil(item.examples / item.formats), task.turns
        )
    ]
    about = {"task": item.task, "level": item.level, "tokenizer_sha256": trained.sha256}
    _pack(where / f"{item.task}-{item.level}-train", train, trained, cell, about)
    about_formats = []
    for f, task in enumerate(formats):
        # The same seed in every format: the same questions in other words.
        test = tasks.items(task, "test", cell.replicas[0].eval, cell.eval.items)
        tasks.assert_disjoint(task, train, test)
        listed = {"choices": _choices(test, trained)}
        name = f"{item.task}-{item.level}-test-{f}"
        _pack(where / name, test, trained, cell, about | listed)
        about_formats.append(known(task, len(test), len(train)))
    return about_formats


def _check_fits(
    task: tasks.Task, test: Sequence[tasks.Example], trained: tokenizer.Tokenizer, length: int
) -> None:
    """Refuses items that a finished study cannot be asked: its tokenizer and rows are what they
    are.
    """
    texts = [text for e in test for text in (e.prompt, e.answer, *e.choices)]
    characters = sorted(set("".join(texts)))
    lacking = [c for c in characters if tokenizer.UNK in trained.encode(c)]
    if lacking:
        raise UserError(
            f"{task.name}/{task.level} writes {lacking[0]!r}, which the study's tokenizer lacks;"
            " choose another task or format"
        )
    size = 2 + max(len(tasks.tokens(e, trained.encode)[0]) for e in test)
    if size > length + 1:
        raise UserError(
            f"{task.name}/{task.level} has an item of {size} tokens with <bos> and <eos>, a row of"
            f" the study holds {length + 1}; choose a lower level or another task"
        )


def _pack(
    to: Path,
    examples: Sequence[tasks.Example],
    trained: tokenizer.Tokenizer,
    cell: Cell,
    about: dict[str, Any],
) -> None:
    if not to.exists():
        packed = packing.pack(_documents(examples, trained), "fit", cell.data.length)
        packing.save(to, dataclasses.replace(packed, about=about))


def _choices(test: Sequence[tasks.Example], trained: tokenizer.Tokenizer) -> list[list[int]]:
    """The token ids of every item's choices, the right one first; none for all items where one
    has too many, or choices of several tokens.
    """
    found = []
    for example in test:
        # Not a set: its order changes from process to process, and with it the last bits of a sum.
        distinct = dict.fromkeys(example.choices)
        ordered = sorted(distinct, key=lambda choice: choice != example.answer)
        ids = [trained.encode(choice) for choice in ordered]
        alone = all(len(i) == 1 for i in ids) and ordered[:1] == [example.answer]
        if not alone or not 2 <= len(ids) <= CHOICES:
            return []
        found.append([int(i[0]) for i in ids])
    return found


def _documents(
    examples: Sequence[tasks.Example], trained: tokenizer.Tokenizer
) -> list[packing.Document]:
    pieces: dict[str, np.ndarray] = {}  # abilities repeat a few short strings a million times

    def encode(text: str) -> np.ndarray:
        if text not in pieces:
            pieces[text] = trained.encode(text)
        return pieces[text]

    found = []
    for example in examples:
        ids, answer = tasks.tokens(example, encode)
        # <eos> has no weight: an answer's length is fixed by its format, so learning to stop would
        # say nothing.
        weight = np.pad(answer, 1).astype(np.float16)
        found.append(
            packing.Document(np.pad(ids, 1, constant_values=(tokenizer.BOS, tokenizer.EOS)), weight)
        )
    return found
