"""The loss without logits: the textbook's numbers and gradients, in memory without V."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.config import UserError
from lm.loss import chunked
from lm.sharding import make_mesh

# Largest error of (nats, lse) and of the gradients, relative to the largest entry of the exact
# array. float32: some tens of roundings (2^-24). bfloat16: the operands are taken as they are and
# their products are exact in float32; then dy and the gradients are rounded once each (2^-9).
BOUNDS = {"float32": (2e-6, 4e-6), "bfloat16": (2e-6, 6e-3)}


def operands(X, D, V, dtype="float32", seed=0, size=1.0):
    """x [X, D], table [V, D], targets [X], and the gradients of nats and lse [X]."""
    rng = np.random.default_rng(seed)
    x, table = (size * rng.normal(size=s) for s in ((X, D), (V, D)))
    targets = rng.integers(0, V, X)
    targets[: min(2, X)] = [0, V - 1][: min(2, X)]
    return (
        jnp.asarray(x, dtype),
        jnp.asarray(table, dtype),
        jnp.asarray(targets, jnp.int32),
        *(jnp.asarray(rng.normal(size=X), jnp.float32) for _ in range(2)),
    )


def with_gradients(x, table, targets, dnats, dlse, **options):
    """nats, lse, dx, dtable."""
    found, pull = jax.vjp(lambda x, table: chunked(x, table, targets, **options), x, table)
    return *found, *pull((dnats, dlse))


def exact(x, table, targets, dnats, dlse, scale=1.0):
    """The same by the textbook, in float64."""
    x, table, dnats, dlse = (np.asarray(a, np.float64) for a in (x, table, dnats, dlse))
    y = scale * x @ table.T
    top = y.max(-1, keepdims=True)
    lse = (top + np.log(np.exp(y - top).sum(-1, keepdims=True)))[:, 0]
    hot = np.eye(len(table))[np.asarray(targets)]
    dy = scale * (np.exp(y - lse[:, None]) * (dnats + dlse)[:, None] - hot * dnats[:, None])
    return lse - (y * hot).sum(-1), lse, dy @ table, dy.T @ x


def assert_agree(got, want, dtype):
    for i, name in enumerate(("nats", "lse", "dx", "dtable")):
        a, b = np.asarray(got[i], np.float64), np.asarray(want[i], np.float64)
        error = np.abs(a - b).max() / max(np.abs(b).max(), 1)
        assert error <= BOUNDS[dtype][i // 2], (name, error)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("V, chunk", [(50, 16), (48, 16), (7, 16), (33, 32)])
def test_equals_the_textbook(dtype, V, chunk):
    """Breaks if a row of the table is counted twice or never, if the scale is lost in one of the
    gradients, or if a sum is taken in bfloat16.
    """
    args = operands(19, 8, V, dtype)
    run = jax.jit(lambda *a: with_gradients(*a, scale=0.5, chunk=chunk))
    got = run(*args)
    assert [a.dtype for a in got] == ["float32", "float32", dtype, dtype]
    assert_agree(got, exact(*args, scale=0.5), dtype)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(X=st.integers(1, 9), D=st.integers(1, 9), V=st.integers(1, 40), chunk=st.integers(1, 45))
def test_any_shape(X, D, V, chunk):
    """Breaks if a vocabulary or a chunk of one, or a chunk larger than the vocabulary, is wrong."""
    args = operands(X, D, V, seed=V)
    run = jax.jit(lambda *a: with_gradients(*a, chunk=chunk))
    assert_agree(run(*args), exact(*args), "float32")


def test_sums_of_bfloat16_are_float32():
    """Breaks if dx is accumulated in bfloat16: 400 chunks would lose most of what they add."""
    x, table, targets, dnats, _ = operands(4, 8, 400, "bfloat16", size=0.05)
    table = jnp.abs(table) + jnp.bfloat16(1)  # all of one sign, so that dx is a sum of 400 terms
    args = x, table, targets, jnp.zeros_like(dnats), jnp.ones_like(dnats)
    got = jax.jit(lambda *a: with_gradients(*a, chunk=1))(*args)
    assert_agree(got, exact(*args), "bfloat16")


def test_large_logits_stay_finite():
    """Breaks if the running maximum is not subtracted: exp(10,000) is infinite."""
    args = operands(6, 8, 20, size=60.0)
    got = jax.jit(lambda *a: with_gradients(*a, chunk=8))(*args)
    want = exact(*args)
    assert want[1].max() > 1000
    assert_agree(got, want, "float32")


def test_a_row_that_is_not_finite_says_so():
    """Breaks if NaN or infinity in the states gives a finite loss: a step would not see that its
    replica has diverged.
    """
    x, table, targets, *_ = operands(3, 4, 20)
    x = x.at[0].set(jnp.nan).at[1, 0].set(jnp.inf)
    nats, lse = jax.jit(lambda *a: chunked(*a, chunk=8))(x, table, targets)
    assert not np.isfinite(nats[:2]).any() and np.isfinite(nats[2]) and np.isfinite(lse[2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vmap_over_replicas(dtype):
    """Breaks if the loop cannot be mapped, or mixes replicas."""
    each = [operands(6, 8, 20, dtype, seed) for seed in (1, 2)]
    run = jax.jit(jax.vmap(lambda *a: with_gradients(*a, chunk=8)))
    got = run(*(jnp.stack(a) for a in zip(*each, strict=True)))
    for i, one in enumerate(each):
        assert_agree([a[i] for a in got], exact(*one), dtype)


def test_memory_does_not_grow_with_the_vocabulary():
    """Breaks if logits, or a second copy of the table, are held."""
    X, D = 64, 16

    def temporary(V):
        shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((X, D), (V, D))]
        targets = jax.ShapeDtypeStruct((X,), jnp.int32)
        run = jax.grad(lambda x, table, t: chunked(x, table, t)[0].sum(), (0, 1))
        compiled = jax.jit(run).lower(*shapes, targets).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    small, large = temporary(4096), temporary(65_536 + 3)
    assert large < small + 4096
    assert large < 5 * X * 1024 * 4


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 (simulated) devices")
@pytest.mark.parametrize("strategy, tensor", [("fsdp", None), ("fsdp_tp", 4)])
def test_a_mesh_equals_one_device(strategy, tensor):
    """Breaks if the parts of a cut vocabulary are put together wrongly, or if a device is given
    rows of the table that are not its own.
    """
    args = operands(16, 8, 44)
    mesh = make_mesh(strategy, jax.devices()[:8], tensor=tensor)
    parts = jax.sharding.PartitionSpec
    rows, cut = parts("data"), parts("tensor" if tensor else None)
    specs = [jax.NamedSharding(mesh, s) for s in (rows, cut, rows, rows, rows)]
    with jax.set_mesh(mesh):
        run = jax.jit(lambda *a: with_gradients(*a, chunk=4), in_shardings=specs)
        compiled = run.lower(*args).compile()
        got = compiled(*jax.device_put(args, tuple(specs)))
    assert_agree(got, exact(*args), "float32")
    assert "all-gather" not in compiled.as_text()


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 (simulated) devices")
def test_a_vocabulary_that_the_mesh_does_not_divide_is_refused():
    """Breaks if it fails inside a reshape, without a remedy."""
    x, table, targets, *_ = operands(8, 4, 21)
    mesh = make_mesh("fsdp_tp", jax.devices()[:8])
    with jax.set_mesh(mesh), pytest.raises(UserError, match="vocab 21 .* use 20 or 22"):
        jax.jit(chunked)(x, table, targets)
