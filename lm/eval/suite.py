"""One evaluation of one replica: every test item of every ability, and held-out text, in one pass
over packed rows.

All test rows, of all tasks and of the text, lie in one array of equal batches, so one compiled
program scores them all; what is kept of a task is its answers' tokens, from which
`lm.emergence.metrics` computes every metric. Items share rows, as documents do in training, and see
nothing of each other.

Greedy decoding uses the same program: the first wrong token of an answer is put in the place of the
right one and its row is scored again, token after token. Only rows with a wrong token that is not
an answer's last are.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from lm.data.loader import Batch, read_rows, read_target_bytes
from lm.data.prepare import Packed
from lm.emergence.metrics import PAD, Answers
from lm.eval.score import LEAST_ITEM, Asked, Scores, nothing_asked

Key = tuple[str, str, int]  # task, level, format
Score = Callable[[Any, Batch, Asked], Scores]


@dataclasses.dataclass(frozen=True)
class Items:
    """Where the answers of a task are in the flattened scores, and what they should be: [n, A],
    padded with -1; how many choices each item has, and which of all items asked it is: [n].
    """

    at: np.ndarray
    target: np.ndarray
    choices: np.ndarray
    slot: np.ndarray


@dataclasses.dataclass(frozen=True)
class TestSet:
    """Everything that is evaluated: batches [k, B, T] with the choices asked for [k, B, P], items
    by task, and the text's rows with their bytes.
    """

    batches: Batch
    asked: Asked
    items: dict[Key, Items]
    text_rows: slice
    text_bytes: np.ndarray


def make_test_set(
    tasks: Mapping[Key, Packed],
    text: Packed | None,
    text_rows: int,
    batch: int,
    view: Callable[[Batch], Batch] | None = None,
) -> TestSet:
    """All rows of the tasks and up to `text_rows` of the text, if there is one, spread evenly over
    it; `view` makes what the model is shown of the text, if that is not the text.
    """
    parts, asks, items, first = [], [], {}, 0
    for key, packed in sorted(tasks.items()):
        part = read_rows(packed, np.arange(packed.rows))
        asked = nothing_asked(*part.tokens.shape)
        items[key] = _find_items(part, first, packed.about.get("choices", ()), asked)
        parts.append(part)
        asks.append(asked)
        first += packed.rows
    total, bytes_ = first, np.zeros(0, np.int64)
    if text is not None:
        rows = np.arange(min(text_rows, text.rows)) * text.rows // min(text_rows, text.rows)
        part = read_rows(text, rows)
        parts.append(part if view is None else view(part))
        asks.append(nothing_asked(*parts[-1].tokens.shape))
        total, bytes_ = first + len(parts[-1].tokens), read_target_bytes(text, rows)

    def stack(arrays: tuple[np.ndarray, ...]) -> np.ndarray:
        whole = np.concatenate(arrays)
        fill = np.zeros((-total % batch, *whole.shape[1:]), whole.dtype)
        return np.concatenate([whole, fill]).reshape(-1, batch, *whole.shape[1:])

    batches = Batch(*(stack(arrays) for arrays in zip(*parts, strict=True)))
    choices = Asked(*(stack(arrays) for arrays in zip(*asks, strict=True)))
    return TestSet(batches, choices, items, slice(first, total), bytes_)


def evaluate(score: Score, params: Any, test: TestSet) -> tuple[dict[Key, Answers], Scores]:
    """The answers of every task and the scores of the text's rows, as NumPy arrays."""
    flat = _score(score, params, test.batches, test.asked)
    decoded = _decode(score, params, test, flat.greedy.reshape(-1))
    answers = {}
    for key, items in test.items.items():
        at, real = np.maximum(items.at, 0), items.at >= 0
        taken = [a.reshape(-1)[at] for a in flat[:4]]
        logprob, greedy, square, highest = (np.where(real, a, 0) for a in taken)
        choices = flat.choices.reshape(-1, flat.choices.shape[-1])
        choices = choices[items.slot, : items.choices.max()]
        beyond = np.arange(choices.shape[1]) >= items.choices[:, None]
        answers[key] = Answers(
            items.target,
            logprob,
            greedy.astype(np.int32),
            square,
            highest,
            np.where(real, decoded[at], PAD).astype(np.int32),
            np.where(beyond, -np.inf, choices),
        )
    return answers, Scores(*(a[test.text_rows] for a in flat))


def _score(score: Score, params: Any, batches: Batch, asked: Asked) -> Scores:
    """The scores of batches [k, B, T] as arrays [k B, T]."""
    # All batches are dispatched before the first result is fetched.
    found = [
        score(params, Batch(*(a[i] for a in batches)), Asked(*(a[i] for a in asked)))
        for i in range(len(batches.tokens))
    ]
    return Scores(
        *(np.concatenate([np.asarray(a) for a in arrays]) for arrays in zip(*found, strict=True))
    )


def _decode(score: Score, params: Any, test: TestSet, greedy: np.ndarray) -> np.ndarray:
    """What greedy decoding gives at every target [rows T], a copy of `greedy`, the argmax of each
    target given the right tokens before it.
    """
    decoded = greedy.copy()
    batch, length = test.batches.tokens.shape[1:]
    rows = Batch(*(a.reshape(-1, length) for a in test.batches))
    tokens = rows.tokens.copy()
    for place in range(1, max((items.at.shape[1] for items in test.items.values()), default=1)):
        wrong = []  # where an input differs from the target before it: [2, n], here and next
        for items in test.items.values():
            if items.at.shape[1] <= place:
                continue
            here, after = items.at[:, place - 1], items.at[:, place]
            off = (decoded[items.at[:, :place]] != items.target[:, :place]).any(1) & (after >= 0)
            wrong.append(np.stack([here[off], after[off]]))
        changed = np.concatenate(wrong, 1) if wrong else np.zeros((2, 0), np.int64)
        if not changed.size:
            break
        tokens.reshape(-1)[changed[1]] = decoded[changed[0]]
        needed = np.unique(changed[1] // length)
        padded = np.append(needed, np.repeat(needed[-1:], -len(needed) % batch))
        again = rows._replace(tokens=tokens)
        again = Batch(*(a[padded].reshape(-1, batch, length) for a in again))
        none = nothing_asked(batch, length)
        none = Asked(*(np.broadcast_to(a, (len(again.tokens), *a.shape)) for a in none))
        new = _score(score, params, again, none).greedy[: len(needed)]
        where = np.searchsorted(needed, changed[1] // length) * length + changed[1] % length
        decoded[changed[1]] = new.reshape(-1)[where]
    return decoded


def _find_items(rows: Batch, first: int, listed: Sequence[Sequence[int]], asked: Asked) -> Items:
    """One item for every document of the rows [r, T] that has a weighted target; `first` is the
    number of rows before, `listed` the choices of each document, the right one first, which are
    put into `asked`.
    """
    length = rows.tokens.shape[-1]
    row, place = np.nonzero(rows.weights > 0)
    document = rows.segments[row, place].astype(np.int64) + row * (rows.segments.max() + 1)
    _, item, counts = np.unique(document, return_inverse=True, return_counts=True)
    # Documents come in order, so a running count restarts with each.
    starts = np.cumsum(counts) - counts
    column = np.arange(len(item)) - np.repeat(starts, counts)
    at = np.full((len(counts), counts.max()), PAD, np.int64)
    target = np.full(at.shape, PAD, np.int32)
    at[item, column] = (row + first) * length + place
    target[item, column] = rows.targets[row, place]
    own = row[starts]
    nth = np.arange(len(own)) - np.searchsorted(own, own)  # of its row
    asked.place[own, nth] = place[starts]
    several = np.zeros(len(counts), np.int64)
    for i, ids in enumerate(listed):
        several[i] = len(ids)
        asked.ids[own[i], nth[i], : len(ids)] = ids
    return Items(at, target, several, (own + first) * (length // LEAST_ITEM) + nth)
