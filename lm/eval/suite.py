"""One evaluation of one replica: every test item of every ability, and held-out text, in one pass
over packed rows.

All test rows, of all tasks and of the text, lie in one array of equal batches, so one compiled
program scores them all; what is kept of a task is its answers' tokens, from which
`lm.emergence.metrics` computes every metric. Items share rows, as documents do in training, and see
nothing of each other.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lm.data.loader import Batch, read_rows, read_target_bytes
from lm.data.prepare import Packed
from lm.emergence.metrics import PAD, Answers
from lm.eval.score import Scores


@dataclasses.dataclass(frozen=True)
class Items:
    """Where the answers of a task are in the flattened scores, and what they should be: [n, A],
    padded with -1.
    """

    at: np.ndarray
    target: np.ndarray


@dataclasses.dataclass(frozen=True)
class TestSet:
    """Everything that is evaluated: batches [k, B, T], items by (task, level), and the text's rows
    with their bytes.
    """

    batches: Batch
    items: dict[tuple[str, str], Items]
    text_rows: slice
    text_bytes: np.ndarray


def make_test_set(
    tasks: Mapping[tuple[str, str], Packed], text: Packed, text_rows: int, batch: int
) -> TestSet:
    """All rows of the tasks and up to `text_rows` of the text, spread evenly over it."""
    parts, items, first = [], {}, 0
    for key, packed in sorted(tasks.items()):
        rows = np.arange(packed.rows)
        part = read_rows(packed, rows)
        items[key] = _find_items(part, first)
        parts.append(part)
        first += packed.rows
    rows = np.arange(min(text_rows, text.rows)) * text.rows // min(text_rows, text.rows)
    parts.append(read_rows(text, rows))
    total = first + len(rows)
    fill = -total % batch
    stacked = [np.pad(np.concatenate(a), ((0, fill), (0, 0))) for a in zip(*parts, strict=True)]
    batches = Batch(*(a.reshape(-1, batch, a.shape[-1]) for a in stacked))
    return TestSet(batches, items, slice(first, total), read_target_bytes(text, rows))


def evaluate(
    score: Callable[[Any, Batch], Scores], params: Any, test: TestSet
) -> tuple[dict[tuple[str, str], Answers], Scores]:
    """The answers of every task and the scores of the text's rows, as NumPy arrays."""
    # All batches are dispatched before the first result is fetched.
    found = [
        score(params, Batch(*(a[i] for a in test.batches))) for i in range(len(test.batches.tokens))
    ]
    flat = Scores(
        *(np.concatenate([np.asarray(a) for a in arrays]) for arrays in zip(*found, strict=True))
    )
    answers = {}
    for key, items in test.items.items():
        taken = [a.reshape(-1)[np.maximum(items.at, 0)] for a in flat]
        logprob, greedy, square = (np.where(items.at >= 0, a, 0) for a in taken)
        answers[key] = Answers(items.target, logprob, greedy.astype(np.int32), square)
    return answers, Scores(*(a[test.text_rows] for a in flat))


def _find_items(rows: Batch, first: int) -> Items:
    """One item for every document of the rows [r, T] that has a weighted target; `first` is the
    number of rows before.
    """
    row, place = np.nonzero(rows.weights > 0)
    document = rows.segments[row, place].astype(np.int64) + row * (rows.segments.max() + 1)
    _, item, counts = np.unique(document, return_inverse=True, return_counts=True)
    # Documents come in order, so a running count restarts with each.
    column = np.arange(len(item)) - np.repeat(np.cumsum(counts) - counts, counts)
    at = np.full((len(counts), counts.max()), PAD, np.int64)
    target = np.full(at.shape, PAD, np.int32)
    at[item, column] = (row + first) * rows.tokens.shape[-1] + place
    target[item, column] = rows.targets[row, place]
    return Items(at, target)
