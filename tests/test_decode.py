"""The kernel that decodes one token, and int8 weights, against the model's own `extend`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm.models import Transformer, TransformerConfig, decode, empty_cache, initialise
from lm.models.int8 import Int8, dequantise, quantise

CONFIG = TransformerConfig(97, 3, 64, 4, 2, 96, head="untied")
TOKENS, LENGTH = 9, 12
PADDING = np.array([0, 3, 0, 5, 1])


def weights(config):
    """Parameters with norms that are not one."""
    params = nn.unbox(initialise(config, jax.random.key(0)))
    noise = jax.random.key(1)
    return jax.tree.map(lambda a: 1.5 * a * (1 + jax.random.normal(noise, a.shape) / 3), params)


PARAMS = weights(CONFIG)
ROWS = jax.random.randint(jax.random.key(2), (5, TOKENS), 0, CONFIG.vocab_size)
SEGMENTS = (np.arange(TOKENS) >= PADDING[:, None]).astype(np.int32)
POSITIONS = np.maximum(np.cumsum(SEGMENTS, 1) - 1, 0).astype(np.int32)
COLUMNS = ROWS, jnp.asarray(SEGMENTS), jnp.asarray(POSITIONS)


def narrow(params):
    return jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)


def one_by_one(config, params, columns):
    """Logits [B, T, V] and the cache, by the kernel."""

    def step(cache, column):
        y, cache = decode.extend(Transformer(config), params, *(a[:, None] for a in column), cache)
        return cache, y[:, 0]

    cache = empty_cache(config, len(columns[0]), LENGTH)
    turned = tuple(jnp.asarray(a).T for a in columns)
    cache, y = jax.jit(lambda cache, turned: jax.lax.scan(step, cache, turned))(cache, turned)
    return y.swapaxes(0, 1), cache


needs_compiler = pytest.mark.skipif(
    bool(reason := decode.supports(CONFIG, PARAMS, (1, 1))), reason=reason or "it runs"
)


@needs_compiler
@pytest.mark.parametrize("head", ["tied", "untied"])
@pytest.mark.parametrize("change", [lambda p: p, narrow, quantise], ids=["32", "16", "8"])
def test_the_kernel_is_the_model(head, change):
    """Breaks if a weight's layout, a scale, a rotation, padding or the cache is wrong."""
    config = dataclasses.replace(CONFIG, head=head)
    params = change({k: v for k, v in PARAMS.items() if head == "untied" or k != "head"})
    assert decode.supports(config, params, (5, 1)) == ""
    plain = jax.tree.map(lambda a: a.astype(jnp.float32), dequantise(params))
    cache = empty_cache(config, 5, LENGTH)
    want, kept = Transformer(config).apply(
        {"params": plain}, *COLUMNS, cache, keep="all", method="extend"
    )
    got, cache = one_by_one(config, params, COLUMNS)
    real = SEGMENTS > 0
    np.testing.assert_allclose(got[real], want[real], atol=2e-4)
    np.testing.assert_array_equal(cache.segments, kept.segments)
    assert cache.length == kept.length == TOKENS
    for mine, its in zip(cache.layers, kept.layers, strict=True):
        np.testing.assert_allclose(
            mine[:, :, :TOKENS][:, real], its[:, :, :TOKENS][:, real], atol=1e-4
        )


@needs_compiler
def test_a_row_has_the_same_bits_alone():
    """Four rows go through the products together, the fifth by itself."""
    together, _ = one_by_one(CONFIG, PARAMS, COLUMNS)
    alone, _ = one_by_one(CONFIG, PARAMS, [a[1:2] for a in COLUMNS])
    np.testing.assert_array_equal(together[1], alone[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"activation": "gelu"}, "activation is 'gelu'"),
        ({"window": 3}, "window is 3"),
        ({"width": 72, "heads": 4}, "width 72 is no multiple of 16"),
        ({"dtype": "bfloat16"}, "dtype is 'bfloat16'"),
    ],
)
def test_what_the_kernel_does_not_compute_is_said(change, words):
    config = dataclasses.replace(CONFIG, **change)
    assert words in decode.supports(config, PARAMS, (1, 1))
    assert "9 rows of 1 token" in decode.supports(CONFIG, PARAMS, (9, 1))


def test_int8_is_within_half_a_step_of_the_weights():
    small = quantise(PARAMS)
    kinds = {type(a) for a in jax.tree.leaves(small, is_leaf=lambda a: isinstance(a, Int8))}
    assert Int8 in kinds
    assert small["layers"]["qkv"].values.dtype == jnp.int8
    assert small["embed"].scale.shape == (97, 1)
    for name in ("qkv", "down"):
        w, q = PARAMS["layers"][name], small["layers"][name]
        error = jnp.abs(dequantise(q) - w)
        assert (error <= 0.5001 * q.scale).all()
        np.testing.assert_allclose(q.scale * 127, jnp.abs(w).max(1, keepdims=True), rtol=1e-6)
    np.testing.assert_array_equal(small["norm"], PARAMS["norm"])
