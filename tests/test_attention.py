"""Attention: the mask, the definition against NumPy, linear memory, and the choice of a backend.

tests/test_attention_battery.py holds every backend against the definition.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.attention import (
    Mask,
    attention,
    blockwise,
    choose,
    cpu,
    explain,
    reference,
    rotary_attention,
)
from lm.attention.rotary import rope_angles, rotate, split_heads
from lm.config import UserError
from lm.sharding import make_mesh


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


def rotary_case(B, T, K, G, H, dtype="float32"):
    """A packed product, positions that restart, two documents and padding, an output gradient."""
    keys = jax.random.split(jax.random.key(0), 2)
    qkv = jax.random.normal(keys[0], (B, T, K, G + 2, H)).astype(dtype)
    dout = jax.random.normal(keys[1], (B, T, K * G, H)).astype(dtype)
    segments = jnp.tile((jnp.arange(T) < T - T // 4) * (1 + (jnp.arange(T) > T // 3)), (B, 1))
    # Another spacing in each row: a shift would not be seen, rotation is relative.
    positions = jnp.tile(jnp.arange(T) % (T // 3 + 1), (B, 1)) * (1 + jnp.arange(B)[:, None])
    return qkv, rope_angles(positions, H, 1e4), Mask(True, q_segments=segments), dout


def rotary_run(impl, qkv, angles, mask, dout):
    out, pull = jax.vjp(lambda x: rotary_attention(x, angles, mask, impl=impl), qkv)
    return out, pull(dout)[0]


@pytest.mark.parametrize("dtype, bound", [("float32", 1e-5), ("bfloat16", 3e-2)])
@pytest.mark.parametrize("K, G, H", [(2, 3, 8), (1, 2, 20), (2, 1, 64)])
def test_rotary_attention_is_attention_of_what_is_rotated(K, G, H, dtype, bound):
    """Breaks if the kernel that rotates while it reads takes another head's rows, turns the wrong
    way, or does not turn its gradients back.
    """
    case = rotary_case(2, 75, K, G, H, dtype)
    if reason := cpu.supports(*[case[0]] * 3, case[2]):
        pytest.skip(reason)
    got = jax.jit(lambda *a: rotary_run("cpu", *a))(*case)
    wide = jax.tree.map(lambda a: a.astype("float32") if a.dtype == dtype else a, case)

    def split(qkv):
        q, k, v = split_heads(qkv)
        return attention(*(rotate(a, wide[1]) for a in (q, k)), v, wide[2], impl="reference")

    out, pull = jax.vjp(split, wide[0])
    for a, b in zip(got, (out, *pull(wide[3])), strict=True):
        np.testing.assert_allclose(np.float32(a), b, atol=bound * float(abs(b).max()))


def test_rotary_attention_of_replicas_and_devices():
    """Breaks if replicas share angles or masks, or a device reads rows of another's heads."""
    cases = [rotary_case(4, 21, 2, 2, 8), rotary_case(4, 21, 2, 2, 8)]
    cases[1] = (2 * cases[1][0], *cases[1][1:])
    want = [rotary_run("auto", *case) for case in cases]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *cases)
    got = jax.jit(jax.vmap(lambda *a: rotary_run("auto", *a)))(*stacked)
    for i in range(2):
        for a, b in zip(got, want[i], strict=True):
            np.testing.assert_array_equal(a[i], b)
    with jax.set_mesh(make_mesh("fsdp_tp", jax.devices()[:8])):
        cut = jax.jit(lambda *a: rotary_run("auto", *a))(*cases[0])
    for a, b in zip(cut, want[0], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
