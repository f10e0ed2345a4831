"""Masks and spans: how many, of what kind, never half a word, and nothing lost; and the losses that
come of them against plain loops.
"""

from functools import partial

import jax
import numpy as np
import pytest
from flax import linen as nn

from lm import objectives
from lm.config import UserError
from lm.corruption import Masking, Spans, cut_spans, mask_one, mask_tokens
from lm.data.loader import Batch
from lm.data.words import ENDS, STARTS, word_places
from lm.models import Transformer, TransformerConfig, initialise

V, FIRST, STOP, MASK = 40, 4, 30, 39
MASKING = Masking(MASK, FIRST, STOP)
MODEL = TransformerConfig(V, 1, 8, 1, 1, 8, activation="gelu", direction="both")


def text(rows, length, seed=0):
    """Rows of ordinary tokens, with a control in some places and padding at the end of one."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(FIRST, STOP, (rows, length)).astype(np.int32)
    tokens[:, ::17] = 1
    segments = np.ones((rows, length), np.int32)
    tokens[0, -9:], segments[0, -9:] = 0, 0
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return Batch(
        tokens, np.roll(tokens, -1, 1), np.ones(tokens.shape, np.float32), segments, positions
    )


MASKED = jax.jit(mask_tokens, static_argnums=2)


def test_masks_are_15_80_10_10():
    """Breaks if more or fewer tokens are chosen, or they are shown in other shares: a band of five
    standard errors of 200,000 tokens.
    """
    batch = text(200, 1000)
    found = MASKED(batch, jax.random.key(0), MASKING)
    chosen = np.asarray(found.weights) > 0
    ordinary = (batch.tokens >= FIRST) & (batch.segments > 0)
    assert not (chosen & ~ordinary).any()
    np.testing.assert_array_equal(found.targets, batch.tokens)
    np.testing.assert_array_equal(np.asarray(found.tokens)[~chosen], batch.tokens[~chosen])
    share = chosen.sum() / ordinary.sum()
    assert share == pytest.approx(0.15, abs=5 * np.sqrt(0.15 * 0.85 / ordinary.sum()))
    shown, was = np.asarray(found.tokens)[chosen], batch.tokens[chosen]
    band = 5 * np.sqrt(0.1 * 0.9 / chosen.sum())
    assert (shown == MASK).mean() == pytest.approx(0.8, abs=band * 4 / 3)
    # One in 26 of the swapped is the token itself.
    assert (shown == was).mean() == pytest.approx(0.1 + 0.1 / 26, abs=band)
    others = shown[(shown != MASK) & (shown != was)]
    assert set(others.tolist()) == set(range(FIRST, STOP))


def test_masks_are_a_function_of_the_key():
    """Breaks if every batch had the same masks, or evaluation others each time."""
    batch = text(4, 50)
    a, b, again = (MASKED(batch, jax.random.key(k), MASKING) for k in (1, 2, 1))
    assert (np.asarray(a.weights) != np.asarray(b.weights)).any()
    jax.tree.map(np.testing.assert_array_equal, a, again)
    keys = jax.random.split(jax.random.key(3), 2)
    side = jax.vmap(lambda key: mask_tokens(batch, key, MASKING))(keys)
    for i, key in enumerate(keys):
        alone = MASKED(batch, key, MASKING)
        jax.tree.map(lambda x, y, i=i: np.testing.assert_array_equal(x[i], y), side, alone)


def test_words_are_masked_whole():
    """Breaks if a word is masked in part, or whole words are chosen at another rate."""
    table = np.zeros(V, np.uint8)
    table[4:20] = STARTS + ENDS  # letters; what is above is a word of its own
    batch = text(40, 300)
    places = word_places(batch.tokens, batch.segments, table)
    for row, segments, found in zip(batch.tokens, batch.segments, places, strict=True):
        begin = 0
        for i, token in enumerate(row):
            inside = i and table[token] and table[row[i - 1]] and segments[i] == segments[i - 1]
            begin = begin if inside else i
            assert found[i] == begin
    words = Masking(MASK, FIRST, STOP, 0.3, "words")
    chosen = np.asarray(MASKED(batch._replace(targets=places), jax.random.key(0), words).weights)
    first = np.take_along_axis(chosen, places, 1)
    ordinary = (batch.tokens >= FIRST) & (batch.segments > 0)
    np.testing.assert_array_equal(chosen[ordinary], first[ordinary])
    begins = ordinary & (places == np.arange(300))
    assert chosen[begins].mean() == pytest.approx(0.3, abs=5 * np.sqrt(0.21 / begins.sum()))


def test_one_mask_a_row():
    """Breaks if a pseudo-likelihood is of a token that is not hidden, or of several at once."""
    batch = text(30, 40)
    found = mask_one(batch, jax.random.key(0), MASKING)
    chosen = np.asarray(found.weights) > 0
    assert (chosen.sum(1) == 1).all()
    assert (np.asarray(found.tokens)[chosen] == MASK).all()
    np.testing.assert_array_equal(np.asarray(found.tokens)[~chosen], batch.tokens[~chosen])
    assert (batch.tokens[chosen] >= FIRST).all() and len(set(chosen.argmax(1))) > 10


def test_masked_loss_equals_a_loop():
    """Breaks if the loss is of other tokens than the chosen ones, or is not their mean."""
    params = nn.unbox(initialise(MODEL, jax.random.key(0)))
    batch, key = text(3, 24), jax.random.key(5)
    model = Transformer(MODEL)
    run = jax.jit(partial(objectives.masked, model, masking=MASKING))
    loss, metrics = run(params, batch, key)
    shown = mask_tokens(batch, jax.random.split(key)[0], MASKING)
    logits = np.asarray(
        model.apply({"params": params}, shown.tokens, batch.segments, batch.positions), np.float64
    )
    total, count = 0.0, 0
    for r, t in zip(*np.nonzero(np.asarray(shown.weights)), strict=True):
        row = logits[r, t]
        total -= row[batch.tokens[r, t]] - np.log(np.exp(row).sum())
        count += 1
    assert count > 5 and metrics.weight == count
    assert float(loss) == pytest.approx(total / count, rel=1e-5)


SPANS = Spans(source=30, target=12, sentinel=V - 1, pad=0, begin=1, end=2)


def test_spans_lose_nothing():
    """Breaks if what is cut out and what is left are not the text, in T5's order, or a place has a
    weight that the decoder should not be asked.
    """
    n, cut, count = SPANS.counts
    assert n - cut + count + 1 <= 30 and cut + count + 1 <= 12 and (n, cut, count) == (32, 5, 2)
    rng = np.random.default_rng(0)
    rows = rng.integers(FIRST, STOP, (50, 42)).astype(np.int32)
    one = np.ones_like(rows)
    batch = Batch(rows, rows, one.astype(np.float32), one, one)
    found = jax.jit(cut_spans, static_argnums=2)(batch, jax.random.key(0), SPANS)
    lengths = []
    for r in range(len(rows)):
        tokens, targets = np.asarray(found.tokens[r]), np.asarray(found.targets[r])
        source, read, said = tokens[:30], tokens[30:], targets[30:]
        assert read[0] == SPANS.begin and (read[1:] == said[:-1]).all() and not targets[:30].any()
        source = source[: list(source).index(2)]
        said = said[: list(said).index(2)]
        # A slow reading: each sentinel of the source is replaced by what follows it in the target.
        pieces, spans = {}, [V - 1 - k for k in range(count)]
        for token in said.tolist():
            if token in spans:
                pieces[token] = []
            else:
                pieces[list(pieces)[-1]].append(token)
        assert list(pieces) == spans and [t for t in source.tolist() if t in spans] == spans
        whole = [x for t in source.tolist() for x in pieces.get(t, [t])]
        assert whole == rows[r, :n].tolist()
        assert sum(map(len, pieces.values())) == cut
        lengths += map(len, pieces.values())
        assert np.asarray(found.weights[r]).sum() == cut + count + 1
    np.testing.assert_array_equal(found.segments, found.tokens != 0)
    np.testing.assert_array_equal(found.positions[0], [*range(30), *range(12)])
    assert min(lengths) == 1 and max(lengths) == cut - count + 1  # every way to part them


def test_smoothing_equals_a_loop():
    """Breaks if the smoothed target is not (1 - s) of one-hot and s of uniform, with or without
    logits, or the reported loss is smoothed.
    """
    params = nn.unbox(initialise(MODEL, jax.random.key(0)))
    batch = text(2, 20)
    logits = Transformer(MODEL).apply(
        {"params": params}, batch.tokens, batch.segments, batch.positions
    )
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    hot = np.eye(V)[batch.targets]
    want = -((0.9 * hot + 0.1 / V) * log_p).sum(-1).mean()
    plain = -(hot * log_p).sum(-1).mean()
    for way in ("logits", "chunked"):
        model = Transformer(TransformerConfig(V, 1, 8, 1, 1, 8, "gelu", direction="both", loss=way))
        loss, metrics = objectives.seq2seq(model, params, batch, smoothing=0.1)
        assert float(loss) == pytest.approx(want, rel=1e-5)
        assert float(metrics.loss) == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Masking(MASK, FIRST, STOP, 0.0), "mask_rate is 0"),
        (lambda: Masking(MASK, FIRST, STOP, 1.5), "mask_rate is 1.5"),
        (lambda: Spans(3, 2, 39, 0, 1, 2), "leave no room to cut spans"),
        (lambda: Spans(30, 12, 39, 0, 1, 2, span=0.5), "span_length is 0.5"),
    ],
)
def test_impossible_settings_are_sentences(make, words):
    """Breaks if a rate of nothing trains on no token at all, silently."""
    with pytest.raises(UserError, match=words):
        make()
