"""Samplers against sorting in NumPy, and what they promise of ties, order and compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.config import UserError
from lm.generate.sampling import (
    Greedy,
    MinP,
    Sample,
    Temperature,
    TopK,
    TopP,
    choose_sampler,
    likeliest,
    penalise,
)

LOGITS = np.random.default_rng(0).normal(0, 3, (5, 67)).astype(np.float32)


def kept(step):
    return np.isfinite(np.asarray(jax.jit(lambda f, x: f(x))(step, LOGITS)))


def sorted_probabilities():
    p = np.exp(LOGITS - LOGITS.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    order = np.argsort(-p, axis=-1)
    return order, np.take_along_axis(p, order, -1)


@pytest.mark.parametrize("count", [1, 2, 30, 67, 500])
def test_top_k_keeps_the_k_largest(count):
    want = np.zeros(LOGITS.shape, bool)
    np.put_along_axis(want, np.argsort(-LOGITS, -1)[:, :count], True, -1)
    np.testing.assert_array_equal(kept(TopK(count)), want)


@pytest.mark.parametrize("mass", [1e-6, 0.3, 0.9, 0.999])
def test_top_p_keeps_the_fewest_that_reach_the_mass(mass):
    order, p = sorted_probabilities()
    before = np.cumsum(p, -1) - p
    want = np.zeros(LOGITS.shape, bool)
    np.put_along_axis(want, order, before < mass, -1)
    np.testing.assert_array_equal(kept(TopP(mass)), want)


def test_min_p_is_a_share_of_the_largest():
    p = np.exp(LOGITS - LOGITS.max(-1, keepdims=True))
    np.testing.assert_array_equal(kept(MinP(0.2)), p >= 0.2)


def test_ties_stay_and_what_was_dropped_stays_dropped():
    x = jnp.array([3.0, 1.0, 1.0, 0.0, -jnp.inf])
    assert TopK(2)(x).tolist() == [3.0, 1.0, 1.0, -jnp.inf, -jnp.inf]
    assert TopK(5)(TopK(1)(x)).tolist() == [3.0] + [-jnp.inf] * 4


def test_draws_follow_the_softmax_and_the_steps():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    keys = jax.random.split(jax.random.key(3), 20_000)
    for sampler, want in (
        (Sample(), [0.5, 0.3, 0.15, 0.05]),
        (Sample((Temperature(0.5),)), np.array([0.25, 0.09, 0.0225, 0.0025]) / 0.365),
        (Sample((TopK(2),)), [0.625, 0.375, 0, 0]),
    ):
        drawn = jax.jit(jax.vmap(sampler, (None, 0)))(logits, keys)
        share = np.bincount(drawn, minlength=4) / len(keys)
        np.testing.assert_allclose(share, want, atol=0.015)  # 4 standard errors


def test_another_temperature_compiles_nothing():
    compiled = jax.jit(lambda sampler, x, key: sampler(x, key))
    for value in (0.3, 0.7, 1.9):
        compiled(choose_sampler(value, top_k=3), LOGITS, jax.random.key(0))
    assert compiled._cache_size() == 1


def test_the_penalty_lowers_what_was_seen():
    logits = jnp.array([[2.0, -2.0, 1.0]])
    seen = jnp.array([[True, True, False]])
    assert penalise(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0]]


def test_the_likeliest_is_the_first_of_equals_and_always_a_token():
    assert likeliest(jnp.array([1.0, 4.0, 4.0])) == 1
    assert likeliest(jnp.array([jnp.nan, 1.0])) in (0, 1)
    assert choose_sampler() == Greedy()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1}, "temperature is -1"),
        ({"top_k": 3}, "top_k says nothing at temperature 0"),
        ({"temperature": 1, "top_p": 0}, "top_p 0 keeps no token"),
        ({"temperature": 1, "min_p": 1.5}, "min_p is 1.5"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_a_value_out_of_range_is_a_sentence(settings, words):
    with pytest.raises(UserError, match=words):
        choose_sampler(**settings)
