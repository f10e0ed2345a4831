"""Attention: the definition against NumPy, blockwise against the definition, and the choice between
them.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.attention import Mask, attention, blockwise, choose, explain, reference
from lm.config import UserError

# Largest difference to the reference in float32, for outputs and gradients of unit normal operands.
# bfloat16 keeps 8 bits, and its products are rounded once more on the way to the gradient.
TOLERANCE = {"float32": 2e-5, "bfloat16": 6e-2}


def operands(B, T, S, N, K, H, dtype="float32"):
    """q, k, v and an output gradient."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


def with_gradients(impl, q, k, v, mask, dout):
    """The output and the gradients of q, k and v, as float32."""

    @jax.jit
    def run(q, k, v, mask, dout):
        out, pull = jax.vjp(lambda *a: attention(*a, mask, impl=impl), q, k, v)
        return out, *pull(dout)

    return [np.asarray(a, np.float32) for a in run(q, k, v, mask, dout)]


def assert_agree(got, want, tolerance):
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert np.isfinite(a).all(), name
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance, err_msg=name)


def definition(q, k, v, seen, scale):
    """Attention in float64, one query at a time."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    (B, T, N, _), K = q.shape, k.shape[2]
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(B, T, N):
        keys = np.flatnonzero(seen[b, t])
        if keys.size:
            kv = n // (N // K)
            e = np.exp(k[b, keys, kv] @ q[b, t, n] * scale)
            out[b, t, n] = e @ v[b, keys, kv] / e.sum()
    return out


def test_mask_says_what_its_docstring_says():
    """Breaks if any part is off by one, or prefix and window combine in another way."""
    rng = np.random.default_rng(0)
    B, T, S, window = 2, 7, 9, 3
    q, k = rng.integers(0, 3, (B, T)), rng.integers(0, 3, (B, S))
    prefix, lengths = np.array([2, 0]), np.array([9, 5])
    mask = Mask(True, window, *(jnp.asarray(a) for a in (q, k, prefix, lengths)))
    got = mask.as_array(T, S)
    for b, t, s in np.ndindex(B, T, S):
        near = s < prefix[b] or (s <= t and abs(t - s) < window)
        same = q[b, t] == k[b, s] != 0
        assert got[b, t, s] == (near and same and s < lengths[b]), (b, t, s)


def test_reference_is_the_definition():
    """Breaks if heads are grouped wrongly, the scale is lost, or an empty row is not zero."""
    q, k, v, _ = operands(2, 5, 6, 4, 2, 3)
    mask = Mask(causal=True, lengths=jnp.array([6, 0]))
    got = attention(q, k, v, mask, scale=0.7, impl="reference")
    want = definition(q, k, v, np.asarray(mask.as_array(5, 6)), 0.7)
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert not got[1].any()


@st.composite
def cases(draw):
    """Shapes that blocks of 8 divide or not, and any combination of the parts of a mask."""
    B, H = draw(st.integers(1, 2)), draw(st.sampled_from([2, 4]))
    K, G = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    T = draw(st.integers(1, 20))
    S = draw(st.one_of(st.just(T), st.integers(1, 27)))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    parts = draw(st.sets(st.sampled_from(["segments", "prefix", "lengths"])))

    def integers(high, *shape):
        return jnp.asarray(rng.integers(0, high, shape), jnp.int32)

    mask = Mask(
        causal=draw(st.booleans()),
        window=draw(st.one_of(st.none(), st.integers(1, 12))),
        q_segments=jnp.sort(integers(3, B, T)) if "segments" in parts else None,
        k_segments=jnp.sort(integers(3, B, S)) if "segments" in parts else None,
        prefix=integers(S + 1, B) if "prefix" in parts else None,
        lengths=integers(S + 1, B) if "lengths" in parts else None,
    )
    return (B, T, S, K * G, K, H), mask, draw(st.sampled_from(["float32", "bfloat16"]))


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Blocks of 8, so that short rows have several."""
    before, blockwise.BLOCK = blockwise.BLOCK, 8
    yield
    blockwise.BLOCK = before


@settings(max_examples=15, deadline=None, derandomize=True)
@given(cases())
def test_blockwise_equals_reference(case):
    """Breaks if a block is skipped or visited twice, or if a padded key, group or empty row is
    wrong.
    """
    shape, mask, dtype = case
    q, k, v, dout = operands(*shape, dtype)
    got = with_gradients("blockwise", q, k, v, mask, dout)
    exact = [a.astype(jnp.float32) for a in (q, k, v)]
    want = with_gradients("reference", *exact, mask, dout.astype(jnp.float32))
    assert_agree(got, want, TOLERANCE[dtype])


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
def test_rows_that_see_nothing_are_zero(impl):
    """Breaks if such a row becomes NaN or the mean of v, or sends gradient anywhere."""
    q, k, v, dout = operands(2, 12, 12, 2, 1, 4)
    segments = jnp.array([[1] * 6 + [0] * 6, [0] * 12])
    got = with_gradients(impl, q, k, v, Mask(True, q_segments=segments), dout)
    for array in got:
        assert np.isfinite(array).all()
        assert not array[0, 6:].any() and not array[1].any()
        assert array[0, :6].any()


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
def test_large_logits_stay_finite(impl):
    """Breaks if the maximum is not subtracted: exp(10,000) is infinite."""
    q, k, v, dout = operands(1, 12, 12, 1, 1, 4)
    got = with_gradients(impl, q * 100, k * 100, v, Mask(causal=True), dout)
    assert all(np.isfinite(a).all() for a in got)


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
def test_vmap_over_replicas(impl):
    """Breaks if a backend cannot be mapped or mixes replicas."""
    stacked = [jnp.stack([a, 2 * a]) for a in operands(2, 12, 12, 2, 1, 4)]
    segments = jnp.sort(jnp.arange(24).reshape(2, 12) % 3 + 1, axis=1)

    def run(q, k, v, dout):
        mask = Mask(True, q_segments=segments)
        out, pull = jax.vjp(lambda *a: attention(*a, mask, impl=impl), q, k, v)
        return out, *pull(dout)

    mapped, alone = jax.jit(jax.vmap(run))(*stacked), jax.jit(run)
    for i in range(2):
        for a, b in zip(mapped, alone(*[a[i] for a in stacked]), strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-5)


def test_blockwise_memory_is_linear(monkeypatch):
    """Breaks if a T x S array is kept: temporary memory would grow 4 times when T doubles."""
    monkeypatch.setattr(blockwise, "BLOCK", 128)

    def temporary(T):
        shape = jax.ShapeDtypeStruct((1, T, 1, 4), jnp.float32)
        loss = lambda *a: attention(*a, Mask(causal=True), impl="blockwise").sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 2.5 * temporary(4096)


def test_auto_takes_the_first_that_fits():
    """Breaks if `auto` builds a T x S array for long rows, or pays for blocks on short ones."""
    short, long = (jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32) for T in (32, 8192))
    assert choose(short, short, short, Mask()) == "reference"
    assert choose(long, long, long, Mask()) == "blockwise"
    assert choose(long, long, long, Mask(), "reference") == "reference"
    text = explain(long, long, long, Mask())
    assert re.search(r"reference +T\*S = 67108864 is above \d+", text)
    assert re.search(r"blockwise +runs", text)


def test_a_backend_asked_for_by_name_runs_or_raises(monkeypatch):
    """Breaks if an unknown or unable backend falls back in silence."""
    q, k, v, _ = operands(1, 4, 4, 2, 1, 4)
    with pytest.raises(UserError, match="did you mean 'blockwise'"):
        attention(q, k, v, Mask(), impl="blockwize")
    monkeypatch.setattr(reference, "supports", lambda *_: "head size 4 is not 64")
    with pytest.raises(UserError, match="'reference' cannot run here: head size 4 is not 64"):
        attention(q, k, v, Mask(), impl="reference")
    assert choose(q, k, v, Mask()) == "blockwise"
    assert "head size 4 is not 64" in explain(q, k, v, Mask())


@pytest.mark.parametrize(
    "shape, mask, words",
    [
        ((1, 4, 4, 3, 2, 4), Mask(), "2 kv heads do not divide 3 heads"),
        ((1, 4, 4, 2, 1, 4), Mask(window=0), "window 0 hides every key"),
        ((1, 4, 6, 2, 1, 4), Mask(q_segments=jnp.ones((1, 4))), "k_segments has shape (1, 4)"),
        ((1, 4, 4, 2, 1, 4), Mask(k_segments=jnp.ones((1, 4))), "without q_segments"),
        ((2, 4, 4, 2, 1, 4), Mask(prefix=jnp.ones(3)), "prefix has shape (3,)"),
    ],
)
def test_misfits_are_sentences(shape, mask, words):
    """Breaks if a misfit is broadcast or fails deep inside an einsum."""
    q, k, v, _ = operands(*shape)
    with pytest.raises(UserError) as error:
        attention(q, k, v, mask)
    assert words in str(error.value)
