"""Attention: the mask, the definition against NumPy, linear memory, and the choice of a backend.

tests/test_attention_battery.py holds every backend against the definition.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.attention import Mask, attention, blockwise, choose, cpu, explain, reference
from lm.config import UserError


def operands(B, T, S, N, K, H, dtype="float32"):
    """q, k, v and an output gradient."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


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


def test_blockwise_memory_is_linear(monkeypatch):
    """Breaks if a T x S array is kept: temporary memory would grow 4 times when T doubles."""
    monkeypatch.setattr(blockwise, "BLOCK", 128)

    def temporary(T):
        shape = jax.ShapeDtypeStruct((1, T, 1, 4), jnp.float32)
        loss = lambda *a: attention(*a, Mask(causal=True), impl="blockwise").sum()  # noqa: E731
        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 2.5 * temporary(4096)


def test_auto_takes_the_first_that_fits(monkeypatch):
    """Breaks if `auto` builds a T x S array for long rows, or pays for blocks on short ones, where
    our kernel cannot run; or does not say why.
    """
    monkeypatch.setattr(cpu, "supports", lambda *_: "no C++ compiler")
    short, long = (jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32) for T in (32, 8192))
    assert choose(short, short, short, Mask()) == "reference"
    assert choose(long, long, long, Mask()) == "blockwise"
    assert choose(long, long, long, Mask(), "reference") == "reference"
    text = explain(long, long, long, Mask())
    assert re.search(r"cpu +no C\+\+ compiler", text)
    assert re.search(r"reference +T\*S = 67108864 is above \d+", text)
    assert re.search(r"blockwise +runs", text)
    monkeypatch.setattr(cpu, "supports", lambda *_: "")
    assert choose(short, short, short, Mask()) == choose(long, long, long, Mask()) == "cpu"


def test_a_backend_asked_for_by_name_runs_or_raises(monkeypatch):
    """Breaks if an unknown or unable backend falls back in silence."""
    q, k, v, _ = operands(1, 4, 4, 2, 1, 4)
    with pytest.raises(UserError, match="did you mean 'blockwise'"):
        attention(q, k, v, Mask(), impl="blockwize")
    monkeypatch.setattr(reference, "supports", lambda *_: "head size 4 is not 64")
    with pytest.raises(UserError, match="'reference' cannot run here: head size 4 is not 64"):
        attention(q, k, v, Mask(), impl="reference")
    monkeypatch.setattr(cpu, "supports", lambda *_: "no C++ compiler")
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
