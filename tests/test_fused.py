"""The fused kernel of small models against the model written down in float64, and its bits.

tests/test_fused_cells.py has where it is taken.
"""

import hashlib
import os
import subprocess
import sys
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm import native, objectives
from lm.data.loader import Batch
from lm.models import Transformer, TransformerConfig, fused, initialise

QUICK = {"xla_backend_optimization_level": 0}
# Error of a gradient against its largest entry, and of the loss: some hundreds of roundings of
# 2^-24. Angles are float32, so that those of far positions are off by more.
BOUND, FAR = 1e-5, 3e-4


class Case(NamedTuple):
    """Shape of a batch and of a model; `far` puts positions up to 1000."""

    B: int
    T: int
    V: int
    layers: int
    D: int
    N: int
    K: int
    F: int
    gated: bool = True
    tied: bool = True
    base_width: int = 0
    far: bool = False


# Tiles are 32, 64 or 128 tokens; a batch has min(B / 4, 4) parts; no vector divides 6, 10 or 20.
CASES = {
    "one token": Case(1, 1, 2, 1, 6, 1, 1, 10, gated=False),
    "odd widths": Case(3, 5, 17, 2, 10, 1, 1, 7, tied=False),
    "four parts and a rest": Case(17, 27, 128, 2, 20, 2, 1, 43, base_width=5),
    "a whole tile": Case(16, 32, 17, 1, 16, 2, 2, 32),
    "just above a tile": Case(3, 33, 40, 1, 48, 6, 3, 64, gated=False, tied=False),
    "the widest": Case(1, 64, 65, 2, 64, 4, 2, 170),
    "the longest": Case(3, 128, 17, 2, 16, 2, 1, 16, gated=False, base_width=4),
    "far positions": Case(2, 70, 17, 2, 6, 1, 1, 10, tied=False, far=True),
}


def make_config(case):
    return TransformerConfig(
        vocab_size=case.V,
        layers=case.layers,
        width=case.D,
        heads=case.N,
        kv_heads=case.K,
        mlp_size=case.F,
        activation="swiglu" if case.gated else "gelu",
        head="tied" if case.tied else "untied",
        base_width=case.base_width,
        attention="reference",  # of XLA's path; our kernel would be compiled for each head size
    )


def make_params(config, seed=0):
    """Parameters of about their usual size, norms that are not 1; NumPy, so that no x64 harms."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: nn.unbox(initialise(config, jax.random.key(0))))
    return jax.tree_util.tree_map_with_path(
        lambda path, a: (
            ("norm" in str(path)) + rng.standard_normal(a.shape) / max(4, a.shape[-1]) ** 0.5
        ).astype(np.float32),
        shapes,
    )


def make_batch(case, seed=0):
    """Rows of up to three documents and padding; the first is one document as long as the row.

    Padding has no weight, as in use, but in the last row: there it sees nothing, not even itself.
    """
    rng = np.random.default_rng([seed, 1])
    shape = case.B, case.T
    segments = np.sort(rng.integers(0, 4, shape), axis=1)[:, ::-1].copy()
    segments[0] = 1
    positions = rng.integers(0, 1000, shape) if case.far else np.zeros(shape, int)
    for t in range(1, case.T if not case.far else 0):
        same = segments[:, t] == segments[:, t - 1]
        positions[:, t] = np.where(same, positions[:, t - 1] + 1, 0)
    weights = rng.random(shape) * (segments > 0) * (rng.random(shape) > 0.2)
    weights[0, 0], weights[-1] = 0.5, rng.random(case.T)
    tokens, targets = rng.integers(0, case.V, (2, *shape))
    ints = (a.astype(np.int32) for a in (tokens, targets, segments, positions))
    tokens, targets, segments, positions = ints
    return Batch(tokens, targets, weights.astype(np.float32), segments, positions)


def plain(config, params, batch):
    """The loss, as the docstring of lm/models/transformer.py has it, in the dtype of `params`."""
    c, (B, T), layers = config, batch.tokens.shape, params["layers"]
    K, G, H = c.kv_heads, c.group, c.head_size

    def norm(x, scale):
        return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + c.norm_epsilon) * scale

    angle = batch.positions[..., None] * c.rope_base ** (-2 * np.arange(H // 2) / H)
    cos, sin = jnp.cos(angle)[:, :, None, None], jnp.sin(angle)[:, :, None, None]

    def turn(x):
        a, b = x[..., : H // 2], x[..., H // 2 :]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    same = batch.segments[:, :, None] == batch.segments[:, None, :]
    seen = same & (batch.segments[:, None, :] > 0) & np.tri(T, dtype=bool)
    seen = seen[:, None, None]
    x = params["embed"][batch.tokens]
    for i in range(c.layers):
        w = {name: a[i] for name, a in layers.items()}
        qkv = (norm(x, w["norm1"]) @ w["qkv"]).reshape(B, T, K, G + 2, H)
        q, k, v = turn(qkv[..., :G, :]), turn(qkv[..., G : G + 1, :])[..., 0, :], qkv[..., -1, :]
        scores = jnp.einsum("btkgh,bskh->bkgts", q, k) * H**-0.5
        p = jnp.where(seen, jax.nn.softmax(jnp.where(seen, scores, -1e99)), 0)
        x = x + jnp.einsum("bkgts,bskh->btkgh", p, v).reshape(B, T, -1) @ w["out"]
        y = norm(x, w["norm2"])
        up = y @ w["up"]
        if c.activation == "swiglu":
            act = jax.nn.silu(y @ w["gate"]) * up
        else:
            act = 0.5 * up * (1 + jnp.tanh((2 / np.pi) ** 0.5 * (up + 0.044715 * up**3)))
        x = x + act @ w["down"]
    table = params["embed" if c.head == "tied" else "head"]
    logits = norm(x, params["norm"]) @ table.T / c.width_ratio
    nats = jax.nn.logsumexp(logits, -1)
    nats -= jnp.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    return (nats * batch.weights).sum() / batch.weights.sum()


def exact(config, params, batch):
    """The loss and its gradient in float64."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
        run = jax.jit(jax.value_and_grad(partial(plain, config)), compiler_options=QUICK)
        return jax.tree.map(np.asarray, run(wide, batch))


def kernel_of(config):
    """(params, batch) -> the loss and its gradient."""
    return jax.value_and_grad(lambda params, batch: fused.loss(config, params, batch)[0])


def by_kernel(config):
    """The same, compiled."""
    return jax.jit(kernel_of(config), compiler_options=QUICK)


def by_xla(config):
    """The same by `objectives.causal`, compiled."""
    model = Transformer(config)
    run = jax.value_and_grad(lambda params, batch: objectives.causal(model, params, batch)[0])
    return jax.jit(run, compiler_options=QUICK)


def assert_close(found, wanted, bound):
    """The loss and every leaf of the gradient, against its largest entry."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(wanted), strict=True
    ):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error = abs(a - b).max() / max(abs(b).max(), 1e-3)
        assert error <= bound, (jax.tree_util.keystr(path), error)  # NaN is not


def same_bits(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_kernel_is_the_model(case):
    """Breaks if a tile, a group of heads, padding, a document's end, a position, a scale or any
    gradient is computed wrongly, or memory that nothing has written is read.
    """
    config, batch = make_config(case), make_batch(case)
    params = make_params(config)
    found = by_kernel(config)(params, batch)
    assert_close(found, exact(config, params, batch), FAR if case.far else BOUND)


@pytest.mark.parametrize("march", ["haswell", "x86-64"])
def test_narrower_vectors_compute_the_same(march, monkeypatch):
    """Breaks if the kernel leans on vectors of 16 lanes or on this machine's instructions."""
    skip_unless_it_runs(march)
    narrow(monkeypatch, march)
    monkeypatch.setattr(fused, "TARGET", f"{fused.TARGET}_{march}")
    for name in ("odd widths", "four parts and a rest", "just above a tile"):
        config, batch = make_config(CASES[name]), make_batch(CASES[name])
        params = make_params(config)
        run = by_kernel(config)
        assert fused.TARGET in run.lower(params, batch).as_text()
        assert_close(run(params, batch), exact(config, params, batch), BOUND)


def skip_unless_it_runs(march):
    features = ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            features = file.read()
    if {"haswell": " avx2 ", "x86-64": " sse2 "}[march] not in features:
        pytest.skip(f"this processor does not run code for {march}")


def narrow(monkeypatch, march):
    """Kernels are compiled for another processor, and sooner."""
    flags = [flag for flag in native.FLAGS if flag not in ("-O3", "-march=native")]
    monkeypatch.setattr(native, "FLAGS", ("-O1", f"-march={march}", *flags))


SMALL = CASES["odd widths"]._replace(B=8, T=12, layers=1)


@pytest.fixture(scope="module")
def small():
    """A model with parameters, a batch, and its loss and gradient by the kernel and by XLA."""
    config = make_config(SMALL)
    return config, make_params(config), make_batch(SMALL), by_kernel(config), by_xla(config)


def test_both_paths_agree(small):
    """Breaks if `objectives.fused` and `causal` are not the same objective."""
    config, params, batch, kernel, xla = small
    assert_close(kernel(params, batch), xla(params, batch), 2 * BOUND)
    loss, metrics = jax.jit(partial(objectives.fused, Transformer(config)))(params, batch)
    assert loss == metrics.loss
    assert np.isclose(metrics.weight, batch.weights.sum(), rtol=1e-6)


def test_no_weight_is_no_loss(small):
    """Breaks if 0/0 gets into a gradient."""
    _, params, batch, kernel, _ = small
    found = kernel(params, batch._replace(weights=0 * batch.weights))
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(found))


def test_large_activations_stay_finite(small):
    """Breaks if sigmoid, softmax or the loss overflow where their values do not."""
    config, params, batch, kernel, _ = small
    large = jax.tree.map(lambda a: 30 * a, params)
    found = kernel(large, batch)
    wanted = exact(config, large, batch)
    assert wanted[0] > 30
    assert_close(found[0], wanted[0], 1e-4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("where", ["embed", "head", "qkv", "up"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_what_is_not_finite_is_seen(small, where, value):
    """Breaks if the kernel, unlike XLA, drops a NaN or an overflow: a replica that diverged would
    go on. One entry is enough; that of the head is of a token that is no target.
    """
    _, params, batch, kernel, xla = small
    batch = batch._replace(targets=np.maximum(batch.targets, 1))
    spoilt = jax.tree.map(np.copy, params)
    leaf = spoilt["layers"][where] if where in spoilt["layers"] else spoilt[where]
    leaf.reshape(-1)[batch.tokens[0, 0] * SMALL.D if where == "embed" else 3] = value

    def finite(found):
        return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))

    assert finite(kernel(spoilt, batch)) == finite(xla(spoilt, batch))
    if np.isnan(value):
        assert np.isnan(kernel(spoilt, batch)[0])


def test_indices_out_of_range_are_as_in_xla(small):
    """Breaks if the kernel reads outside a table, or what is NaN in XLA is a number here."""
    _, params, batch, kernel, xla = small
    targets = batch.targets.copy()
    targets[-1, :3] = -1, SMALL.V, 2**31 - 1
    negative = batch.tokens.copy()
    negative[0, :2] = -1, -SMALL.V
    for changed in (batch._replace(targets=targets), batch._replace(tokens=negative)):
        assert_close(kernel(params, changed), xla(params, changed), 2 * BOUND)
    for token in (SMALL.V, -SMALL.V - 1, 2**31 - 1, -(2**31)):
        tokens = batch.tokens.copy()
        tokens[0, 0] = token
        changed = batch._replace(tokens=tokens)
        assert np.isnan(xla(params, changed)[0]) and np.isnan(kernel(params, changed)[0])


def replicas():
    """Parameters and batches of three replicas, stacked; 9 rows are two parts and a rest."""
    case = SMALL._replace(B=9)
    params = [make_params(make_config(case), seed) for seed in range(3)]
    batches = [make_batch(case, seed) for seed in range(3)]
    return jax.tree.map(lambda *a: np.stack(a), *zip(params, batches, strict=True))


def test_a_replica_has_the_same_bits_anywhere():
    """Breaks if a replica's sums depend on its neighbours, on the mapping or on the call."""
    one = kernel_of(make_config(SMALL))
    both = replicas()
    beside = jax.jit(jax.vmap(one))
    found = beside(*both)
    assert same_bits(found, beside(*both))
    assert same_bits(found, jax.jit(lambda a: jax.lax.map(lambda b: one(*b), a))(both))
    twice = jax.jit(jax.vmap(jax.vmap(one)))(*jax.tree.map(lambda a: a[None], both))
    assert same_bits(found, jax.tree.map(lambda a: a[0], twice))
    for i in range(3):
        alone = jax.jit(one)(*jax.tree.map(lambda a, i=i: a[i], both))
        assert same_bits(alone, jax.tree.map(lambda a, i=i: a[i], found))


def digest():
    """Hash of the loss and gradient of three replicas; also run by a process with one thread."""
    found = jax.jit(jax.vmap(kernel_of(make_config(SMALL))))(*replicas())
    data = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(found))
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("threads", [1, 4])
def test_threads_change_no_bit(threads):
    """Breaks if the order of a sum depends on who is done first or on how many work."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"NPROC": str(threads)}
    code = "import test_fused; print(test_fused.digest())"
    command = [sys.executable, "-c", code]
    folder = os.path.dirname(__file__)
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == digest(), done.stderr


def test_the_cotangent_is_a_factor(small):
    """Breaks if the gradient kept from the forward pass is not scaled by what comes back."""
    config, params, batch, kernel, _ = small
    scaled = jax.jit(jax.grad(lambda p: 3 * fused.loss(config, p, batch)[0] ** 2))(params)
    loss, gradient = kernel(params, batch)
    wanted = jax.tree.map(lambda g: 6 * loss * g, gradient)
    assert_close(scaled, wanted, 1e-6)
