"""Reading a text piece by piece with a cache against reading it whole."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, family, make_params

from lm.attention import MOVED, Mask, attention
from lm.config import UserError
from lm.models import LSTMConfig, build, empty_cache
from lm.sharding import make_mesh

QUICK = {"xla_backend_optimization_level": 0}
CAUSAL = [name for name in FAMILIES if family(name).direction == "causal"]
T = 12
# A prompt of 7 and one of 4 tokens, padded on the left, and what follows them.
SEGMENTS = np.array([[1] * T, [0] * 3 + [1] * (T - 3)], np.int32)
POSITIONS = np.maximum(np.cumsum(SEGMENTS, axis=1) - 1, 0).astype(np.int32)
TOKENS = np.random.default_rng(1).integers(0, 29, (2, T)).astype(np.int32)
ROWS = TOKENS, SEGMENTS, POSITIONS


def in_pieces(config, params, *rows):
    """Logits [B, T, V] of a prompt of 7 columns in two pieces, then of one column at a time."""
    model, cache, found = build(config), empty_cache(config, 2, T + 3), []
    for piece in (slice(0, 2), slice(2, 7)):
        columns = (a[:, piece] for a in rows)
        given = {"params": params}, *columns, cache, "all"
        logits, cache = model.apply(*given, method="extend")
        found.append(logits)

    def step(cache, columns):
        columns = (a[:, None] for a in columns)
        logits, cache = model.apply({"params": params}, *columns, cache, method="extend")
        return cache, logits[:, 0]

    rest = tuple(a[:, 7:].swapaxes(0, 1) for a in rows)
    cache, logits = jax.lax.scan(step, cache, rest)
    return jnp.concatenate([*found, logits.swapaxes(0, 1)], axis=1), cache


def both(config, params):
    """Logits by pieces and of the whole, and the cache."""

    def run(params, *rows):
        whole = build(config).apply({"params": params}, *rows)
        return *in_pieces(config, params, *rows), whole

    return jax.jit(run, compiler_options=QUICK)(params, *ROWS)


@pytest.mark.parametrize("name", CAUSAL)
def test_pieces_are_the_whole(name):
    """Breaks if a column is put or read at the wrong place, padding is seen or moves positions, a
    window counts from the piece, or a head, a norm or a bias is left out of `extend`.
    """
    config = family(name, attention="reference")
    got, cache, want = both(config, make_params(config))
    real = SEGMENTS > 0
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], atol=2e-4)
    assert int(cache.length) == T
    np.testing.assert_array_equal(cache.segments[:, :T], SEGMENTS)
    assert not cache.segments[:, T:].any()


def test_pieces_in_bfloat16():
    """Breaks if the cache is kept in another dtype than the model computes in, or in a narrower."""
    config = family("mistral", attention="reference", dtype="bfloat16")
    got, cache, want = both(config, make_params(config))
    assert {a.dtype for a in cache.layers} == {jnp.dtype("bfloat16")}
    real = SEGMENTS > 0
    # Two roundings of 2^-9 of logits up to 12, in each of two layers.
    np.testing.assert_allclose(np.asarray(got)[real], np.asarray(want)[real], atol=0.15)


def test_padding_changes_nothing():
    """Breaks if a prompt's logits depend on how far it is padded."""
    config = family("gpt2", attention="reference")
    params = make_params(config)

    def last(rows, length):
        given = (jnp.asarray(a) for a in rows)
        cache = empty_cache(config, 1, length)
        return build(config).apply({"params": params}, *given, cache, method="extend")[0]

    padded = last([a[1:, :7] for a in ROWS], 9)
    np.testing.assert_allclose(last([a[1:, 3:7] for a in ROWS], 4), padded, atol=1e-4)


@pytest.mark.parametrize("impl", MOVED)
def test_queries_that_start_later_are_the_rest_of_all(impl):
    """Breaks if causality or a window forget where the queries stand, forward or in the gradient;
    300 keys are three blocks.
    """
    rng = np.random.default_rng(2)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 300, n, 16), np.float32)) for n in (4, 2, 2))
    start = 137

    def run(q, k, v, impl, mask):
        out, pull = jax.vjp(lambda *a: attention(*a, mask, impl=impl), q, k, v)
        return out, pull(jnp.ones_like(out))

    for window in (None, 40):
        whole, _ = run(q, k, v, "reference", Mask(True, window))
        late = Mask(True, window, start=jnp.int32(start))
        got, gradients = run(q[:, start:], k, v, impl, late)
        np.testing.assert_allclose(got, whole[:, start:], atol=1e-5)
        want = run(q[:, start:], k, v, "reference", late)[1]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradients, want)


@pytest.mark.parametrize("seed", range(6))
def test_a_piece_of_a_cache_of_any_shape(seed):
    """Breaks if the kernel for CPUs looks past the filled columns, at padding, or at its last block
    as if it began at 0; one of the seeds is a single token, some lie on a mesh.
    """
    rng = np.random.default_rng(seed)
    S = int(rng.integers(2, 300))
    T = 1 if seed == 1 else int(rng.integers(1, S))
    start, B, K = int(rng.integers(0, S - T + 1)), 2, int(rng.integers(1, 3))
    q, k, v = (
        jnp.asarray(rng.standard_normal((B, n, heads, 16), np.float32))
        for n, heads in ((T, 2 * K), (S, K), (S, K))
    )
    segments = jnp.asarray(rng.integers(0, 2, (B, S)), jnp.int32).at[:, start + T :].set(0)
    arrays = segments[:, start : start + T], segments
    prefix = jnp.full(B, S // 3) if seed % 2 else None
    mask = Mask(seed != 2, 20 if seed == 3 else None, *arrays, prefix, start=jnp.int32(start))
    mesh = make_mesh("replicated", jax.devices()[: 1 + seed % 2])
    with jax.set_mesh(mesh):
        found, want = (
            jax.jit(partial(attention, impl=impl))(q, k, v, mask) for impl in ("cpu", "reference")
        )
    np.testing.assert_allclose(found, want, atol=1e-5)


@pytest.mark.parametrize("impl", ["gpu", "tpu", "splash"])
def test_kernels_refuse_queries_that_start_later(impl):
    """Breaks if a kernel that does not know `start` gives the wrong attention in silence."""
    q = jnp.zeros((1, 4, 1, 8))
    with pytest.raises(UserError, match="its queries begin at the first key"):
        attention(q, q, q, Mask(True, start=jnp.int32(2)), impl=impl)
    with pytest.raises(UserError, match="it has no additive bias"):
        attention(q, q, q, Mask(True), impl=impl, bias=jnp.zeros((1, 4, 4)))


def test_a_cache_that_cannot_be_is_a_sentence():
    """Breaks if a model of both directions seems to decode, or a cache of no columns is made."""
    with pytest.raises(UserError, match="direction is 'both'"):
        empty_cache(family("bert"), 1, 4)
    with pytest.raises(UserError, match="length is 0"):
        empty_cache(family("ours"), 1, 0)
    config, row = family("ours"), jnp.zeros((1, 5), jnp.int32)
    with pytest.raises(UserError, match="1 rows of 5 columns do not fit a cache of 1 rows of 4"):
        given = {"params": make_params(config)}, row, row, row, empty_cache(config, 1, 4)
        build(config).apply(*given, method="extend")
    assert empty_cache(LSTMConfig(8, 2, 4), 3, 5).layers[0].shape == (2, 3, 4)
