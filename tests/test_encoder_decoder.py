"""The encoder-decoder: what a target sees, cached against whole, and T5's own pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import PAIRS, make_params, pair

from lm.attention import Mask, Ring, attention
from lm.attention.relative import buckets, relative_bias
from lm.config import UserError, to_dict
from lm.config import build as build_config
from lm.models import EncoderDecoderConfig, build, empty_cache, logical_axes, mup_multipliers

QUICK = {"xla_backend_optimization_level": 0}
S, T = 6, 13  # columns of the source, and of a row
SEGMENTS = np.array([[1] * 4 + [0] * 2 + [1] * 7, [1] * 11 + [0] * 2], np.int32)
POSITIONS = np.broadcast_to(np.r_[np.arange(S), np.arange(T - S)], (2, T)).astype(np.int32)
TOKENS = np.random.default_rng(3).integers(0, 29, (2, T)).astype(np.int32)
ROWS = TOKENS, SEGMENTS, POSITIONS
REAL = SEGMENTS[:, S:] > 0


def source_and_target(rows):
    return [a[:, :S] for a in rows], [a[:, S:] for a in rows]


def ways(config, params):
    """Logits of whole rows, by `hidden`, and by pieces."""

    def run(params, *rows):
        model, given = build(config), {"params": params}
        (source, seen, _), target = source_and_target(rows)
        cache = empty_cache(config, 2, T - S + 2)
        cache = model.apply(given, source, seen, cache, method="start")
        found = []
        for piece in (slice(0, 2), slice(2, 3), slice(3, T - S)):
            columns = (a[:, piece] for a in target)
            logits, cache = model.apply(given, *columns, cache, "all", method="extend")
            found.append(logits)
        x, table = model.apply(given, *rows, method="hidden")
        product = jnp.einsum("btd,vd->btv", x, table) / config.width_ratio
        return model.apply(given, *rows), product, jnp.concatenate(found, axis=1), cache

    return jax.jit(run, compiler_options=QUICK)(params, *ROWS)


@pytest.mark.parametrize("name", PAIRS)
def test_pieces_are_the_whole(name):
    """Breaks if the source is not kept, its padding is seen, or a bias or a position is shifted;
    if source columns have logits; or if `hidden` leaves out what the head does.
    """
    config = pair(name, attention="reference")
    whole, product, pieces, cache = ways(config, make_params(config))
    assert not whole[:, :S].any() and abs(whole[:, S:]).max() > 1
    np.testing.assert_allclose(product, whole, atol=1e-4)
    np.testing.assert_allclose(np.asarray(pieces)[REAL], np.asarray(whole)[:, S:][REAL], atol=2e-4)
    assert int(cache.length) == T - S and cache.layers[2].shape[2] == S


@pytest.mark.parametrize("name", ["t5", "plain"])
def test_what_a_target_sees(name):
    """Breaks if a target column sees a later one, padding, or not all of its source."""
    config = pair(name, attention="reference", vocab_size=29 + T)
    params = make_params(config)
    tokens = jnp.arange(29, 29 + T)[None]  # each has an embedding of its own

    def rows(embeddings):
        table = jnp.concatenate([params["embed"][:29], embeddings])
        given = {"params": params | {"embed": table}}
        logits = build(config).apply(given, tokens, SEGMENTS[:1], POSITIONS[:1])
        return logits[0, S:, :29].sum(-1)  # a tied head has those embeddings too

    sees = (
        np.abs(jax.jit(jax.jacrev(rows), compiler_options=QUICK)(params["embed"][29:])).sum(-1) > 0
    )
    want = np.concatenate([np.ones((7, 4)), np.zeros((7, 2)), np.tril(np.ones((7, 7)))], axis=1)
    np.testing.assert_array_equal(sees, want > 0)


def test_the_buckets_of_t5():
    """Breaks if a distance falls into another bucket than in T5; the numbers are those of
    transformers 5.23's T5Attention for distances -130, -64, ... to the left and to the right.
    """
    distance = jnp.array([-130, -64, -31, -16, -9, -8, -7, -1, 0, 1, 7, 8, 16, 40, 128])
    both = [15, 14, 11, 10, 8, 8, 7, 1, 0, 17, 23, 24, 26, 28, 31]
    left = [31, 26, 21, 16, 9, 8, 7, 1, 0, 0, 0, 0, 0, 0, 0]
    assert buckets(distance, both=True).tolist() == both
    assert buckets(distance, both=False).tolist() == left


def test_the_bias_is_a_look_up_by_distance():
    """Breaks if the shift along diagonals is off by one, or its gradient is not the look-up's."""
    table, start = jnp.asarray(np.random.default_rng(4).standard_normal((32, 3))), 5
    distance = np.arange(9)[None] - np.arange(4)[:, None] - start

    def looked_up(table):
        return table[buckets(jnp.asarray(distance), False)].transpose(2, 0, 1)

    def shifted(table):
        return relative_bias(table, 4, 9, jnp.int32(start), False)

    got, pull = jax.vjp(shifted, table)
    want, pull_wanted = jax.vjp(looked_up, table)
    np.testing.assert_array_equal(got, want)
    weights = jnp.asarray(np.random.default_rng(5).standard_normal(got.shape))
    np.testing.assert_allclose(pull(weights)[0], pull_wanted(weights)[0], rtol=1e-5, atol=1e-6)


def test_the_gradient_of_a_bias():
    """Breaks if the bias of a head reaches another one, or its gradient is not that of softmax."""
    rng = np.random.default_rng(6)
    q, k, v = (jnp.asarray(rng.standard_normal((2, n, h, 4))) for n, h in ((5, 4), (7, 2), (7, 2)))
    bias = jnp.asarray(rng.standard_normal((4, 5, 7)))

    def plain(bias):
        scores = jnp.einsum("btnh,bsnh->bnts", q, k.repeat(2, axis=2)) / 2 + bias
        p = jax.nn.softmax(scores, axis=-1)
        return jnp.einsum("bnts,bsnh->btnh", p, v.repeat(2, axis=2))

    got, pull = jax.vjp(lambda bias: attention(q, k, v, Mask(), bias=bias), bias)
    want, pull_wanted = jax.vjp(plain, bias)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(pull(got)[0], pull_wanted(got)[0], atol=1e-5)


def test_its_parameters_have_axes_and_rates():
    """Breaks if what reads the source cannot be cut, or learns at another rate than the rest."""
    config = pair("t5 1.1")
    names, rates = logical_axes(config)["decoder"], mup_multipliers(config)["decoder"]
    assert names["layers"]["cross_kv"] == ("layers", "embed", "heads")
    assert names["relative"] == (None, "heads")
    slow = {name for name, rate in rates["layers"].items() if rate == 1 / 3}
    assert {"cross_q", "cross_kv", "cross_out", "qkv", "down"} < slow and rates["relative"] == 1
    assert build_config(EncoderDecoderConfig, to_dict(config)) == config


def test_mistakes_are_sentences():
    """Breaks if a row without a target, a cache without a source, or rows that devices share reach
    JAX.
    """
    config = pair("plain")
    params, row = make_params(config), jnp.zeros((1, S), jnp.int32)

    def run(*rows, **how):
        return jax.eval_shape(lambda p: build(config).apply({"params": p}, *rows, **how), params)

    with pytest.raises(UserError, match="a row of 6 tokens has no target after a source of 6"):
        run(row, row, row)
    with pytest.raises(UserError, match="the cache has no source; read one into it"):
        run(row, row, row, empty_cache(config, 1, 8), method="extend")
    with pytest.raises(UserError, match="several devices share each row"):
        run(row, Ring(row), row)
    with pytest.raises(UserError, match="source_length is 0"):
        pair("plain", source_length=0)
    with pytest.raises(UserError, match="heads 5 does not divide width 24"):
        pair("plain", heads=5)
