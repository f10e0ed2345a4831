"""Continuations in one pass against a full forward for each; windows against lm-eval's own."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm.config import UserError
from lm.eval import continuations
from lm.eval.continuations import Request, score, windows
from lm.models import LSTMConfig, Transformer, TransformerConfig, build, initialise

CONFIG = TransformerConfig(vocab_size=24, layers=2, width=8, heads=2, kv_heads=1, mlp_size=16)
LIMIT = 48


@cache
def params(config=CONFIG):
    """A random model, its weights enlarged so that what it says depends on all that it sees."""
    fresh = nn.unbox(initialise(config, jax.random.key(0)))
    return jax.tree.map(lambda p: 2 * p if p.ndim > 1 else p, fresh)


@cache
def forward(config):
    model, p = build(config), params(config)
    return jax.jit(lambda *rows: jax.nn.log_softmax(model.apply({"params": p}, *rows)))


def ids(rng, n):
    return rng.integers(0, CONFIG.vocab_size, n).astype(np.int32)


def naive(request, limit, config):
    """log p of each token of a continuation, and whether it is the argmax: the whole text alone."""
    n = len(request.continuation)
    whole = np.concatenate([request.context, request.continuation])[-(limit + 1) :]
    length = getattr(config, "context", 0) or LIMIT
    row = np.zeros((1, length), np.int32)
    row[0, : len(whole) - 1] = whole[:-1]
    seen = (np.arange(length) < len(whole) - 1).astype(np.int32)[None]
    log_p = np.asarray(forward(config)(row, seen, np.arange(length)[None]))[0]
    log_p = log_p[: len(whole) - 1][-n:]
    return log_p[np.arange(n), request.continuation], log_p.argmax(1) == request.continuation


def check(requests, limit=LIMIT, config=CONFIG):
    found, short = score(build(config), params(config), requests, limit)
    for request, got in zip(requests, found, strict=True):
        want, greedy = naive(request, limit, config)
        np.testing.assert_allclose(got.logprob, want, atol=2e-5)
        np.testing.assert_array_equal(got.greedy, greedy)
        assert got.total == pytest.approx(want.sum(), abs=1e-4)
    return short


def choices(rng, contexts, lengths=(1, 2, 5, 3)):
    return [Request(context, ids(rng, n)) for context in contexts for n in lengths]


def test_choices_equal_a_full_forward_each():
    """Items of several lengths, out of order, and one question asked twice."""
    rng = np.random.default_rng(0)
    requests = choices(rng, [ids(rng, n) for n in (1, 7, 20, 3, 12, 12)])
    requests = [requests[i] for i in rng.permutation(len(requests))] + requests[:1]
    assert check(requests) == 0


def test_a_common_beginning_is_a_trunk(monkeypatch):
    """Two few-shot prompts, contexts of one token after them, and one that is alone."""
    rng = np.random.default_rng(1)
    monkeypatch.setattr(continuations, "TRUNK", 4)
    monkeypatch.setattr(continuations, "SAVED", 12)
    first, second = ids(rng, 9), ids(rng, 11)
    contexts = [np.concatenate([p, ids(rng, n)]) for p in (first, second) for n in (1, 5, 8, 8)]
    requests = choices(rng, [*contexts, ids(rng, 6)])
    cut = [continuations._cut(r, LIMIT) for r in requests]
    families = {trunk: len(members) for trunk, members in continuations._families(cut)}
    assert families == {9: 4, 11: 4, 0: 1}
    assert check(requests) == 0


@pytest.mark.parametrize(
    "config",
    [
        LSTMConfig(vocab_size=24, layers=2, width=8),
        # The table of positions is no longer than what is asked, whatever sizes are rounded to.
        dataclasses.replace(CONFIG, positions="learned", context=17, norm="layer", bias="all"),
        dataclasses.replace(CONFIG, window=5),
    ],
    ids=["lstm", "learned", "window"],
)
def test_every_kind_of_model(config, monkeypatch):
    rng = np.random.default_rng(5)
    monkeypatch.setattr(continuations, "TRUNK", 4)
    monkeypatch.setattr(continuations, "SAVED", 1)
    head = ids(rng, 5)
    contexts = [np.concatenate([head, ids(rng, n)]) for n in (3, 8)]
    assert check(choices(rng, contexts, (1, 4)), 17, config) == 0


def test_pieces_and_small_passes(monkeypatch):
    """Long contexts and continuations are appended in pieces, and batches are cut."""
    rng = np.random.default_rng(2)
    monkeypatch.setattr(continuations, "PASS", 8)
    monkeypatch.setattr(continuations, "PIECE", 4)
    monkeypatch.setattr(continuations, "CACHE_BYTES", 1)
    assert check(choices(rng, [ids(rng, n) for n in (2, 17, 9)], (1, 6, 13))) == 0


def test_long_contexts_lose_their_left():
    rng = np.random.default_rng(3)
    requests = choices(rng, [ids(rng, n) for n in (12, 16, 17, 30)], (1, 4))
    assert check(requests, limit=16) == 5  # a limit of what is fed: the last token never is


def test_greedy_takes_the_first_of_equals():
    """A model whose logits are all equal chooses the id 0, as argmax does."""
    flat = jax.tree.map(jnp.zeros_like, params())
    request = Request(np.array([3], np.int32), np.array([0, 0, 1], np.int32))
    found, _ = score(Transformer(CONFIG), flat, [request], LIMIT)
    assert found[0].greedy.tolist() == [True, True, False]


def test_an_empty_continuation_is_certain():
    empty = Request(np.array([3], np.int32), np.zeros(0, np.int32))
    found, short = score(Transformer(CONFIG), params(), [empty], LIMIT)
    assert (found[0].total, found[0].greedy.all(), short) == (0.0, True, 0)


@pytest.mark.parametrize("n", [0, 1, 4, 5, 8, 9, 23])
@pytest.mark.parametrize("overlap", [1, 2, 4])
def test_windows_are_those_of_lm_eval(n, overlap):
    utils = pytest.importorskip("lm_eval.utils", reason="the extra 'harness' is not installed")
    tokens, limit = np.arange(100, 100 + n, dtype=np.int32), 4
    pairs = utils.get_rolling_token_windows(tokens.tolist(), 7, limit, overlap)
    want = [utils.make_disjoint_window(pair) for pair in pairs]
    found = windows(tokens, 7, limit, overlap)
    assert [(r.context.tolist(), r.continuation.tolist()) for r in found] == want


def test_windows_score_every_token_with_what_the_window_holds():
    rng = np.random.default_rng(4)
    requests = list(windows(ids(rng, 29), 1, 8, 3))
    assert sum(len(r.continuation) for r in requests) == 29
    assert check(requests, limit=8) == 0


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        (lambda: run([], [1]), "a context is empty; begin it with the token that begins a text"),
        (lambda: run([1], [1] * 9), "of 9 tokens is above the limit of 8; score it in windows"),
        (lambda: list(windows(np.arange(3), 0, 4, 5)), "overlap is 5; it must be 1 to 4"),
        (lambda: run([1], [1], 0), "limit"),
    ],
)
def test_bad_input_is_one_sentence(ask, says):
    with pytest.raises(UserError, match=says):
        ask()


def run(context, continuation, limit=8):
    request = Request(np.array(context, np.int32), np.array(continuation, np.int32))
    return score(Transformer(CONFIG), params(), [request], limit)


def test_sizes_are_rounded_to_few():
    grid = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128]
    for n in range(1, 129):
        assert continuations._up(n) == min(g for g in grid if g >= n)
        assert continuations._down(n) == max(g for g in grid if g <= n)
