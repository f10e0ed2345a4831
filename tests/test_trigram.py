"""The baseline of masked words against counting in a dictionary."""

from collections import Counter, defaultdict

import numpy as np

from lm.data.loader import Batch
from lm.eval.trigram import CONTEXTS, fit_trigram, guess, trigram_accuracy

V = 9


def slow(text, row, place):
    """The guess by a search through the text for every context."""
    for context in CONTEXTS:
        around = [place + offset for offset in context]
        if any(i < 0 or i >= len(row) for i in around):
            continue
        seen = Counter()
        for i in range(2, len(text) - 1):
            if all(text[i + o] == row[place + o] for o in context):
                seen[text[i]] += 1
        if seen:
            most = max(seen.values())
            return min(token for token, n in seen.items() if n == most)
    raise AssertionError("nothing is the last context")


def test_guesses_equal_a_search():
    """Breaks if a context is coded so that two are one, or the order of backing off is another."""
    rng = np.random.default_rng(0)
    text = np.minimum(rng.geometric(0.3, 300), V - 1)
    rows = rng.integers(0, V, (4, 25))
    found = guess(fit_trigram(text, V), rows)
    want = [[slow(text.tolist(), row.tolist(), i) for i in range(25)] for row in rows]
    np.testing.assert_array_equal(found, want)
    used = defaultdict(int)
    for row in want:
        for token in row:
            used[token] += 1
    assert len(used) > 3


def test_accuracy_is_of_the_masked_places():
    """Breaks if places that were not asked for count, or the masked token itself is read."""
    text = np.tile([1, 2, 3, 4], 50)
    trigram = fit_trigram(text, V)
    targets = np.tile([1, 2, 3, 4], 3)[None]
    tokens, weights = targets.copy(), np.zeros((1, 12), np.float32)
    for place in (3, 6, 9):
        tokens[0, place], weights[0, place] = V - 1, 1
    zeros = np.zeros_like(tokens)
    assert trigram_accuracy(trigram, Batch(tokens, targets, weights, zeros, zeros)) == 1
    other = targets.copy()
    other[0, 6] = 8
    found = trigram_accuracy(trigram, Batch(tokens, other, weights, zeros, zeros))
    assert abs(found - 2 / 3) < 1e-9
