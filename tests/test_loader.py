"""Batches: what a row holds, in which order rows come, and that the step says it all."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.config import UserError
from lm.data.loader import (
    Batch,
    Loader,
    MixtureItem,
    dataset,
    read_rows,
    read_target_bytes,
    row_order,
)
from lm.data.prepare import BOS, document, pack

LENGTHS = st.lists(st.integers(0, 20), min_size=1, max_size=30)
LAYOUTS = st.sampled_from(["stream", "fit"])


def make(lengths, layout, length, seed=0):
    rng = np.random.default_rng(seed)
    docs = [
        document(rng.integers(4, 99, n), rng.integers(0, 3, n) / 4, rng.integers(0, 4, n))
        for n in lengths
    ]
    return pack(docs, layout, length)


def slow_row(packed, row):
    """The definition of a row, one token at a time."""
    start, stop = int(packed.row_start[row]), int(packed.row_start[row + 1])
    stop += packed.layout == "stream"
    out = [[], [], [], [], []]
    for i in range(packed.length):
        at, segment, position = start + i, 0, 0
        if at < stop:
            inside = [d for d in range(packed.documents) if start < packed.doc_start[d] <= at]
            segment = len(inside) + 1
            position = at - max([start, *packed.doc_start[inside].tolist()])
        target = at + 1 < stop
        crosses = at + 1 in packed.doc_start
        out[0].append(int(packed.tokens[at]) if at < stop else 0)
        out[1].append(int(packed.tokens[at + 1]) if target else 0)
        out[2].append(float(packed.weight[at + 1]) if target and not crosses else 0.0)
        out[3].append(segment)
        out[4].append(position)
    return out


def same(a, b):
    for name, x, y in zip(Batch._fields, a, b, strict=True):
        np.testing.assert_array_equal(x, y, err_msg=name)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, layout=LAYOUTS, length=st.integers(21, 30))
def test_rows_equal_the_slow_definition(lengths, layout, length):
    """Catches targets across documents, positions that go on, and padding with weight."""
    packed = make(lengths, layout, length)
    rows = np.arange(packed.rows)
    fast = read_rows(packed, rows)
    same(fast, (np.array(x) for x in zip(*(slow_row(packed, r) for r in rows), strict=True)))
    assert [a.dtype for a in fast] == [np.int32, np.int32, np.float32, np.int32, np.int32]
    assert not fast.weights[fast.targets == BOS].any()


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, layout=LAYOUTS, length=st.integers(21, 30))
def test_every_target_and_byte_comes_once(lengths, layout, length):
    """Catches rows that overlap by too much or leave a token out: bits per byte would be wrong."""
    packed = make(lengths, layout, length)
    batch = read_rows(packed, np.arange(packed.rows))
    targets = batch.targets[batch.weights > 0]
    assert targets.tolist() == packed.tokens[packed.weight > 0].tolist()
    nbytes = read_target_bytes(packed, np.arange(packed.rows))
    assert nbytes.sum() == packed.token_bytes[packed.weight > 0].sum()
    assert nbytes.shape == (packed.rows,)


def mixture(seed=0, weight=0.25):
    text, task = make([20] * 40, "stream", 16), make([9, 3, 5] * 30, "fit", 16, 1)
    return Loader((MixtureItem("text", text, 5, weight), MixtureItem("task", task, 3)), 16, seed)


def test_mixture_fills_its_rows_and_scales_weights():
    """Catches a mixture with other shares than it says, and a weight on the wrong item."""
    loader = mixture()
    batch, plain = loader.batch(3), mixture(weight=1.0).batch(3)
    assert batch.tokens.shape == (loader.batch_size, 16) == (8, 16)
    np.testing.assert_array_equal(batch.weights[:5], plain.weights[:5] / 4)
    np.testing.assert_array_equal(batch.weights[5:], plain.weights[5:])
    task = loader.items[1]
    same((a[5:] for a in batch), read_rows(task.packed, row_order(task, 0, 9, 3)))


def test_chunk_equals_single_batches():
    """Catches a chunk whose rows depend on where the chunk begins."""
    loader = mixture()
    single = [loader.batch(step) for step in range(20, 31)]
    same(loader.chunk(20, 11), (np.stack(x) for x in zip(*single, strict=True)))


def test_a_batch_is_a_function_of_seed_and_step():
    """Catches hidden state: a resume would see other batches than the run it continues."""
    loader = mixture()
    forward = [loader.batch(step) for step in range(6)]
    for step in (5, 0, 3):
        same(mixture().batch(step), forward[step])
    other = mixture(seed=1).batch(0)
    assert not np.array_equal(other.tokens, forward[0].tokens)
    assert not np.array_equal(forward[1].tokens, forward[0].tokens)


@pytest.mark.parametrize("count", [1, 3, 7, 64])
def test_an_epoch_visits_each_row_once(count):
    """Catches draws with replacement, and epochs in one and the same order."""
    item = MixtureItem("x", make([20] * 20, "stream", 6), 1)
    rows = item.packed.rows
    visits = np.concatenate([row_order(item, 5, i, count) for i in range(0, 3 * rows, count)])
    epochs = [visits[e * rows : (e + 1) * rows] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(rows))
    assert not np.array_equal(epochs[0], epochs[1]) and epochs[0].tolist() != sorted(epochs[0])


def test_items_are_in_orders_of_their_own():
    """Catches sources of one size that are visited in one order: their rows would be paired."""
    packed = make([20] * 20, "stream", 6)
    orders = [row_order(MixtureItem(name, packed, 1), 0, 0, packed.rows) for name in "ab"]
    assert not np.array_equal(*orders)


def test_orders_are_pinned():
    """Catches a change of the permutation: old runs could not be resumed bit by bit."""
    item = MixtureItem("x", make([20] * 20, "stream", 6), 1)
    assert row_order(item, 5, 0, 8).tolist() == [31, 59, 67, 2, 13, 3, 33, 9]


@pytest.mark.parametrize(("start", "stop", "steps"), [(0, 10, 5), (3, 14, 4), (2, 2, 3)])
def test_dataset_gives_the_chunks_in_order(start, stop, steps):
    """Catches chunks that the thread hands over out of order, twice, or beyond the end."""
    loader = mixture()
    chunks = list(dataset(loader, start, stop, steps))
    assert len(chunks) == math.ceil((stop - start) / steps)
    for i, chunk in enumerate(chunks):
        first = start + i * steps
        same(chunk, loader.chunk(first, min(steps, stop - first)))


def test_bad_mixtures():
    """Catches rows of two lengths in one batch, and mixtures without rows."""
    packed = make([5], "stream", 16)
    with pytest.raises(UserError, match="rows_per_batch of x is 0"):
        MixtureItem("x", packed, 0)
    with pytest.raises(UserError, match="weight of x is nan"):
        MixtureItem("x", packed, 1, math.nan)
    with pytest.raises(UserError, match="packed in rows of 16 tokens, the length is 32"):
        Loader((MixtureItem("x", packed, 1),), 32, 0)
    with pytest.raises(UserError, match="at least one item"):
        Loader((), 16, 0)
    with pytest.raises(UserError, match="names unlike"):
        Loader((MixtureItem("x", packed, 1),) * 2, 16, 0)
