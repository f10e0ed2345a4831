"""A masked word's baseline: the commonest token between the neighbours, counted in the text.

The guess for w_i is that of the first context that was seen in training:

    (w_i-1, w_i+1)    (w_i-2, w_i-1)    (w_i-1)    (w_i+1)    nothing

It reads what the model reads, so a neighbour may be masked, or swapped, as well.
"""

from typing import NamedTuple

import numpy as np

from lm.data.loader import Batch

CONTEXTS = ((-1, 1), (-2, -1), (-1,), (1,), ())


class Trigram(NamedTuple):
    """For each of `CONTEXTS` the codes of those that were seen, ascending, and the guess [n]."""

    seen: tuple[np.ndarray, ...]
    guess: tuple[np.ndarray, ...]
    vocabulary: int


def fit_trigram(tokens: np.ndarray, vocabulary: int) -> Trigram:
    """Counts tokens [N] of ids below `vocabulary`; of equally common tokens the least is taken."""
    tokens = np.asarray(tokens, np.int64)
    middle = np.arange(2, max(len(tokens) - 1, 2))
    seen, guess = [], []
    for context in CONTEXTS:
        code = _code([tokens[middle + offset] for offset in context], vocabulary, len(middle))
        both, counts = np.unique(code * vocabulary + tokens[middle], return_counts=True)
        context_of, token = np.divmod(both, vocabulary)
        best = np.lexsort((-token, counts, context_of))  # the last of a context is its commonest
        last = np.append(context_of[best][1:] != context_of[best][:-1], True)[: len(best)]
        seen.append(context_of[best][last])
        guess.append(token[best][last])
    return Trigram(tuple(seen), tuple(guess), vocabulary)


def guess(trigram: Trigram, tokens: np.ndarray) -> np.ndarray:
    """The guess at every place of rows [B, T], int64; the token itself is not looked at."""
    tokens = np.asarray(tokens, np.int64)
    padded = np.pad(tokens, ((0, 0), (2, 1)), constant_values=-1)
    found = np.full(tokens.shape, -1, np.int64)
    for context, seen, guesses in zip(CONTEXTS, trigram.seen, trigram.guess, strict=True):
        around = [padded[:, 2 + offset : 2 + offset + tokens.shape[1]] for offset in context]
        code = _code(around, trigram.vocabulary, tokens.shape)
        at = np.minimum(np.searchsorted(seen, code), len(seen) - 1)
        known = seen[at] == code
        for neighbours in around:
            known &= neighbours >= 0
        found = np.where((found < 0) & known, guesses[at], found)
    return found


def trigram_accuracy(trigram: Trigram, rows: Batch) -> float:
    """The share of tokens with weight of rows [B, T] that it guesses."""
    chosen = rows.weights > 0
    return float((guess(trigram, rows.tokens) == rows.targets)[chosen].mean())


def _code(parts: list[np.ndarray], vocabulary: int, shape: int | tuple[int, ...]) -> np.ndarray:
    code = np.zeros(shape, np.int64)
    for part in parts:
        code = code * vocabulary + part
    return code
