"""Teacher-forced scores against a NumPy softmax, real greedy decoding, and text counted by hand."""

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm.data import tokenizer
from lm.data.loader import Batch, read_rows, read_target_bytes
from lm.data.prepare import BOS, EOS, Document, document, pack
from lm.emergence import metrics
from lm.eval.perplexity import text_metrics
from lm.eval.score import CHOICES, Asked, make_scorer, nothing_asked
from lm.eval.suite import evaluate, make_test_set
from lm.models import Transformer, TransformerConfig, initialise

MODEL = TransformerConfig(vocab_size=24, layers=2, width=8, heads=2, kv_heads=1, mlp_size=16)
PROMPT, ANSWER, ITEMS = 5, 3, 24


@cache
def params():
    """A random model, its weights enlarged so that its answers depend on the prompt."""
    fresh = nn.unbox(initialise(MODEL, jax.random.key(0)))
    return jax.tree.map(lambda p: 3 * p if p.ndim > 1 else p, fresh)


@cache
def scorer():
    return jax.jit(make_scorer(Transformer(MODEL)))


@cache
def prompts():
    return np.random.default_rng(0).integers(4, MODEL.vocab_size, (ITEMS, PROMPT))


@cache
def decoded():
    """Greedy answers [ITEMS, ANSWER]: the model is run again on each longer prefix."""
    rows = np.pad(prompts(), ((0, 0), (1, 0)), constant_values=BOS)
    for _ in range(ANSWER):
        positions = np.broadcast_to(np.arange(rows.shape[1]), rows.shape)
        logits = Transformer(MODEL).apply(
            {"params": params()}, jnp.asarray(rows), jnp.ones(rows.shape, int), positions
        )
        rows = np.concatenate([rows, np.argmax(logits[:, -1], axis=-1)[:, None]], axis=1)
    return rows[:, -ANSWER:]


def answers_of(targets, length, choices=()):
    """What `evaluate` says of items with these targets, in rows of `length` tokens."""
    weight = np.float16([0] * (1 + PROMPT) + [1] * ANSWER + [0])
    docs = [
        Document(np.concatenate([[BOS], p, t, [EOS]]), weight)
        for p, t in zip(prompts(), targets, strict=True)
    ]
    text = pack([document(np.arange(4, 20), 1.0, np.arange(16))] * 9, "stream", length)
    listed = dataclasses.replace(pack(docs, "fit", length), about={"choices": choices})
    packs = {("a", "1", 0): listed, ("A", "1", 0): pack(docs[:3], "fit", length)}
    test = make_test_set(packs, text, 5, 4)
    found, scores = evaluate(scorer(), params(), test)
    chosen = read_rows(text, np.arange(5) * text.rows // 5)
    # As many rows as in a batch of the test set, so that the program is the same.
    want = [
        scorer()(params(), Batch(*(a[[i] * 4] for a in chosen)), nothing_asked(4, length)).logprob[
            0
        ]
        for i in range(5)
    ]
    np.testing.assert_array_equal(scores.logprob, want)
    assert (
        test.text_bytes.tolist() == read_target_bytes(text, np.arange(5) * text.rows // 5).tolist()
    )
    return found["a", "1", 0]


def test_scores_are_those_of_a_numpy_softmax():
    """Catches scores of the wrong place or token, in bits, or of probabilities not squared."""
    packed = pack([document(p) for p in prompts()], "fit", 16)
    rows = read_rows(packed, np.arange(4))
    rng = np.random.default_rng(0)
    place, ids = rng.integers(0, 16, (4, 4)), rng.integers(0, MODEL.vocab_size, (4, 4, CHOICES))
    found = scorer()(params(), rows, Asked(np.int32(place), np.int32(ids)))
    logits = Transformer(MODEL).apply(
        {"params": params()}, *(jnp.asarray(rows[i]) for i in (0, 3, 4))
    )
    logits = np.asarray(logits, np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    chosen = np.take_along_axis(p, rows.targets[..., None].astype(int), -1)[..., 0]
    np.testing.assert_allclose(found.logprob, np.log(chosen), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(found.greedy, logits.argmax(-1))
    np.testing.assert_allclose(found.square, (p**2).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(found.highest, np.log(p.max(-1)), rtol=1e-4, atol=1e-5)
    asked = np.log(p[np.arange(4)[:, None, None], place[..., None], ids])
    np.testing.assert_allclose(found.choices, asked, rtol=1e-4, atol=1e-4)
    assert found.greedy.dtype == np.int32 and found.logprob.shape == rows.tokens.shape


def test_exact_match_is_greedy_decoding():
    """Catches an answer that counts although a token of it is wrong, or read at another place."""
    right = decoded()
    assert len(np.unique(right, axis=0)) > ITEMS / 2
    targets = right.copy()
    for item in range(ITEMS // 2, ITEMS):  # one token is wrong: the first, the second or the last
        place = item % ANSWER
        targets[item, place] = 4 + (targets[item, place] - 3) % (MODEL.vocab_size - 4)
    wanted = (targets == right).all(1)
    assert wanted.sum() == ITEMS // 2
    found = answers_of(targets, 32)
    np.testing.assert_array_equal(found.target, targets)
    np.testing.assert_array_equal((found.greedy == targets).all(1), wanted)
    assert metrics.score(found)["exact_match"].value == 0.5
    # Decoded from the prompt, whatever the targets were.
    np.testing.assert_array_equal(found.decoded, right)
    assert not (found.greedy == right).all()


def test_choices_are_scored_where_the_answer_begins():
    """Catches choices of another item or place, and choices of items that have fewer."""
    targets = decoded()
    listed = [[int(t[0]), *range(5 + i % 2, 7)] for i, t in enumerate(targets)]
    found = answers_of(targets, 32, listed)
    np.testing.assert_allclose(found.choices[:, 0], found.logprob[:, 0], rtol=1e-4, atol=1e-5)
    assert found.choices.shape == (ITEMS, 3)
    assert (found.choices[1::2, 2] == -np.inf).all() and (found.choices[::2] > -50).all()
    alone = answers_of(targets, PROMPT + ANSWER + 1, listed)
    np.testing.assert_allclose(found.choices, alone.choices, rtol=1e-4, atol=1e-5)


def test_packed_items_score_as_items_alone():
    """Catches items that see their neighbours in the row, and scores given to a neighbour."""
    targets = np.random.default_rng(1).integers(4, MODEL.vocab_size, (ITEMS, ANSWER))
    alone = answers_of(targets, PROMPT + ANSWER + 1)
    packed = answers_of(targets, 32)
    np.testing.assert_array_equal(packed.target, targets)
    np.testing.assert_array_equal(alone.target, targets)
    np.testing.assert_allclose(packed.logprob, alone.logprob, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(packed.square, alone.square, rtol=1e-4)
    np.testing.assert_array_equal(packed.greedy, alone.greedy)
    assert len(np.unique(packed.logprob)) > ITEMS


def test_answers_of_unlike_lengths_are_padded():
    """Catches padding that counts as a token, and tokens of one answer in the row of another."""
    sizes = [1, 3, 2]
    docs = [Document(np.arange(4, 4 + 4 + n), np.float16([0] * 4 + [1] * n)) for n in sizes]
    text = pack([document(np.arange(4, 20))], "stream", 10)
    test = make_test_set({("a", "1", 0): pack(docs, "fit", 10)}, text, 1, 2)
    items = test.items["a", "1", 0]
    assert items.target.tolist() == [[8, -1, -1], [8, 9, 10], [8, 9, -1]]
    tokens = test.batches.targets.reshape(-1)
    assert (tokens[items.at[items.at >= 0]] == items.target[items.target >= 0]).all()


def test_text_is_counted_by_hand():
    """Catches bits per character, bytes of unscored tokens, and means of means."""
    words = ["héllo → 𝄞!", "ß", "plain text here", "日本語"]
    trained = tokenizer.train(words, tokenizer.TokenizerConfig(vocab_size=64))
    encoded = [trained.encode(w) for w in words]
    docs = [
        document(ids, 1.0, trained.token_bytes(ids, w))
        for ids, w in zip(encoded, words, strict=True)
    ]
    packed = pack(docs, "stream", 7)
    rows = np.arange(packed.rows)
    batch = read_rows(packed, rows)
    logprob = -np.random.default_rng(0).exponential(size=batch.tokens.shape)
    found = text_metrics(logprob, batch.weights, read_target_bytes(packed, rows))

    nats = sum(
        -logprob[r, t]
        for r in range(len(rows))
        for t in range(7)
        if batch.segments[r, t] and batch.targets[r, t] != BOS and batch.weights[r, t]
    )
    count = sum(len(w) + 1 for w in words)  # the end of each is predicted, too
    assert found["nll"].value == pytest.approx(nats / count)
    assert found["bpb"].value == pytest.approx(
        nats / math.log(2) / sum(len(w.encode()) for w in words)
    )
    assert found["perplexity"].value == pytest.approx(math.exp(nats / count))
    assert {m.n for m in found.values()} == {count}


def test_errors_of_text_are_those_of_the_bootstrap():
    """Catches errors that take the tokens of a row for independent: they would be too small."""
    rng = np.random.default_rng(0)
    rows, length = 400, 16
    weights = (rng.random((rows, length)) < rng.random((rows, 1))).astype(np.float32)
    logprob = -(rng.exponential(size=(rows, 1)) + 0.2 * rng.exponential(size=(rows, length)))
    sizes = rng.integers(1, 4, (rows, length)) * (weights > 0)
    found = text_metrics(logprob, weights, sizes.sum(1))
    draws = []
    for _ in range(1500):
        i = rng.integers(0, rows, rows)
        again = text_metrics(logprob[i], weights[i], sizes[i].sum(1))
        draws.append([again[name].value for name in found])
    for (name, measure), spread in zip(found.items(), np.std(draws, axis=0), strict=True):
        assert measure.stderr == pytest.approx(spread, rel=0.1), name
    naive = np.std(logprob[weights > 0]) / math.sqrt(weights.sum())
    assert found["nll"].stderr > 1.5 * naive


def test_a_diverging_model_has_a_perplexity():
    """Catches an OverflowError in place of a very large number."""
    found = text_metrics(np.full((2, 3), -1e4), np.ones((2, 3)), np.array([3, 3]))
    assert math.isfinite(found["perplexity"].value) and found["nll"].value == 1e4
