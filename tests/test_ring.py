"""The ring gives the attention of whole rows, its messages are counted, and its work is even."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.attention import Mask, attention, reference
from lm.attention.ring import Ring, deal
from lm.config import UserError
from lm.data.loader import Batch
from lm.sharding import make_mesh

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 (simulated) devices")

B, T, N, K, H = 4, 48, 4, 2, 8
SCALE = 0.3
# Compiling is nearly all the time of these tests; unoptimised, it is half as long.
QUICK = {"xla_backend_optimization_level": 0}


def zigzag(x, data, n):
    """[B, T, ...] -> [n B, T / n, ...], by loops: device (d, i) has chunks i and 2n-1-i of the rows
    of d.
    """
    parts = np.split(np.asarray(x), data)
    chunks = [np.split(part, 2 * n, axis=1) for part in parts]
    return np.concatenate(
        [np.concatenate([c[i], c[2 * n - 1 - i]], axis=1) for c in chunks for i in range(n)]
    )


@cache
def operands(dtype="float32"):
    """q, k, v, weights of the output, and segments: a whole row, many documents, padding in the
    middle and at the end, nothing but padding.
    """
    rng = np.random.default_rng(0)
    shapes = (B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H)
    arrays = [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]
    segments = np.ones((B, T), np.int32)
    segments[1] = np.sort(rng.integers(1, 9, T))
    segments[2, 20:27], segments[2, 27:40], segments[2, 40:] = 0, 2, 0
    segments[3] = 0
    return arrays, segments


@cache
def whole(dtype="float32"):
    """Output and gradients of whole rows on one device, exact to float32."""
    arrays, segments = operands(dtype)
    q, k, v, w = (a.astype("float32") for a in arrays)
    mask = Mask(True, q_segments=jnp.asarray(segments))

    def f(q, k, v):
        out = reference.attention(q, k, v, mask, scale=SCALE)
        return (out * w).sum(), out

    gradients, out = jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradients


@cache
def compiled_ring(n, tensor=1, dtype="float32"):
    """The program of the output and the gradients, its operands, and the number of `data`."""
    strategy = "fsdp_tp" if tensor > 1 else "sequence"
    mesh = make_mesh(strategy, sequence=n, tensor=tensor if tensor > 1 else None)
    data = mesh.shape["data"]
    arrays, segments = operands(dtype)
    *qkv, w = (jnp.asarray(zigzag(a.astype("float32"), data, n), a.dtype) for a in arrays)

    def f(q, k, v, w, segments):
        out = attention(q, k, v, Ring(segments), scale=SCALE)
        return (out * w.astype("float32")).sum(), out

    args = *qkv, w, jnp.asarray(zigzag(segments, data, n))
    rows = jax.NamedSharding(mesh, jax.P(("data", "sequence")))
    with jax.set_mesh(mesh):
        args = jax.device_put(args, rows)
        step = jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))
        return step.lower(*args).compile(QUICK), args, data


# float32: tens of roundings of 2^-24. bfloat16: outputs and gradients are sums of tiles that were
# each rounded to 2^-9, of operands of unit size.
@pytest.mark.parametrize(
    "n, tensor, dtype, bound",
    [
        (2, 2, "float32", 4e-6),
        (8, 1, "float32", 4e-6),
        pytest.param(2, 1, "float32", 4e-6, marks=pytest.mark.slow),
        pytest.param(4, 1, "float32", 4e-6, marks=pytest.mark.slow),
        pytest.param(4, 2, "float32", 4e-6, marks=pytest.mark.slow),
        pytest.param(4, 1, "bfloat16", 3e-2, marks=pytest.mark.slow),
    ],
)
def test_the_ring_is_the_attention_of_whole_rows(n, tensor, dtype, bound):
    """Catches a hop too many or too few, a chunk taken for another's, keys after the query, keys of
    another document, padding that is seen, and gradients of keys that come home to another device.
    """
    program, args, data = compiled_ring(n, tensor, dtype)
    gradients, out = program(*args)
    for name, got, want in zip("oqkv", (out, *gradients), whole(dtype), strict=True):
        want = zigzag(want, data, n)
        error = np.abs(np.asarray(got, "float32") - want).max() / max(1, np.abs(want).max())
        assert error < bound, (name, error)


@pytest.mark.parametrize("n, tensor, messages", [(2, 2, 4), (8, 1, 9)])
def test_messages_of_a_ring(n, tensor, messages):
    """Catches keys that are gathered, and hops that are more than a message of keys and values and
    one of segments, with one of their gradients on the way back.

    Two devices: one hop, which both passes share as nothing lies between them, the gradients' hop,
    and their way home. More: one more hop in the loop of each pass.
    """
    text = compiled_ring(n, tensor)[0].as_text()
    names = re.findall(r" (all-\w+|reduce-scatter|collective-\w+)\(", text)
    assert names == ["collective-permute"] * messages
    pairs = re.findall(r"source_target_pairs={{(.*?)}}", text)
    assert len(set(pairs)) == 1
    sent = np.array([pair.split(",") for pair in pairs[0].split("},{")], int)
    devices = np.arange(8).reshape(-1, n, tensor)
    np.testing.assert_array_equal(sent[:, 0], devices.swapaxes(1, 2).ravel())
    np.testing.assert_array_equal(sent[:, 1], np.roll(devices, -1, axis=1).swapaxes(1, 2).ravel())


def batch():
    rng = np.random.default_rng(1)
    arrays = (rng.integers(1, 9, (3, B, T), dtype=np.int32) for _ in range(5))
    return Batch(*map(jnp.asarray, arrays))


@pytest.mark.parametrize("sequence, data", [(2, 4), (4, 2)])
def test_rows_are_dealt_in_zigzag(sequence, data):
    """Catches chunks in another order than the ring takes them to be, and a message to deal rows
    that every device has."""
    mesh = make_mesh("sequence", sequence=sequence)
    rows = batch()
    with jax.set_mesh(mesh):
        cut = jax.device_put(rows, jax.NamedSharding(mesh, jax.P(None, "data")))
        program = jax.jit(deal).lower(cut).compile()
        got = program(cut)
    assert isinstance(got.segments, Ring)
    for x, y in zip(jax.tree.leaves(got), rows, strict=True):
        want = np.stack([zigzag(step, data, sequence) for step in np.asarray(y)])
        np.testing.assert_array_equal(x, want)
    assert not re.search(r" (all-\w+|collective-permute|reduce-scatter)\(", program.as_text())


def test_without_the_axis_rows_stay_whole():
    """Catches a deal on every mesh, and dealt rows that ordinary attention takes for whole ones."""
    rows = batch()
    assert deal(rows) is rows
    with jax.set_mesh(make_mesh("fsdp")):
        assert deal(rows) is rows
        q = jnp.zeros((B, T, N, H))
        with pytest.raises(ValueError, match="rows were dealt, and the mesh has no axis"):
            attention(q, q, q, Ring(rows.segments[0]))


def test_misfits_are_sentences():
    """Catches a row cut inside a chunk, and a backend that was asked for and is not what runs."""
    with jax.set_mesh(make_mesh("sequence", sequence=4)):
        rows = Batch(*(a[..., :44] for a in batch()))
        with pytest.raises(UserError, match=r"length 44 .* 8 chunks of the 4 devices .* 40 or 48"):
            deal(rows)
        q = jnp.zeros((B, T, N, H))
        with pytest.raises(UserError, match="'cpu' cannot run here: several devices share"):
            attention(q, q, q, Ring(jnp.ones((B, T), jnp.int32)), impl="cpu")
