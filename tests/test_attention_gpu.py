"""Attention on a GPU, without one: the arguments given to cuDNN against `reference`, what is
refused, and the fused calls in programs compiled for an H100.
"""

import re
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lm.attention import Mask, gpu, reference

# What XLA must know of the device it compiles for: the figures of an H100 with 80 GiB.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
}
"""
QUICK = {"xla_backend_optimization_level": 0}  # compiling is nearly all the time of these tests
FUSED = {"__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"}
BIASED = {"__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"}
ROWS = jnp.sort(jnp.arange(24).reshape(2, 12) * 7 % 3, axis=1)  # zeros first: rows without keys


def case(T=12, S=12, N=4, K=2, H=8, dtype="bfloat16", **mask):
    """Shapes, dtype and mask of one call with two rows."""
    shapes = [(2, T, N, H), (2, S, K, H), (2, S, K, H)]
    return SimpleNamespace(shapes=shapes, dtype=jnp.dtype(dtype), mask=Mask(**mask))


# What cuDNN says itself.
OURS = {
    "full": case(),
    "causal": case(causal=True),
    "cross": case(T=6),
    "causal, T < S": case(T=6, causal=True),
    "causal, T > S": case(S=6, causal=True),
    "window": case(causal=True, window=3),
    "window of one": case(causal=True, window=1),
    "lengths": case(lengths=jnp.array([5, 0])),
    "causal, lengths": case(causal=True, lengths=jnp.array([0, 12])),
    "one head": case(N=1, K=1, causal=True),
}
HALF = {"float16": case(dtype="float16", causal=True)}  # XLA on a CPU has no such products
# What it does not, and takes as an array.
OTHERS = {
    "segments": case(causal=True, q_segments=ROWS),
    "segments, full": case(q_segments=ROWS, k_segments=ROWS[::-1]),
    "prefix": case(causal=True, prefix=jnp.array([5, 0])),
    "prefix, window": case(causal=True, window=2, prefix=jnp.array([5, 0])),
    "window, T > S": case(T=12, S=6, causal=True, window=3),
    "window on both sides": case(window=3),
    "window, lengths": case(causal=True, window=3, lengths=jnp.array([5, 0])),
}


def with_gradients(function, given, operands):
    """The output and the gradients of q, k and v."""
    *operands, dout = operands
    out, pull = jax.vjp(lambda *a: function(*a, given.mask, scale=0.3), *operands)
    return out, *pull(dout)


def check(function, given):
    """The function against `reference` in float32 on the same operands: XLA's form of either
    library rounds its products to 8 bits (2^-9) as the operands are.
    """
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [*given.shapes, given.shapes[0]]
    drawn = zip(keys, shapes, strict=True)
    operands = [jax.random.normal(key, s).astype(given.dtype) for key, s in drawn]
    got = jax.jit(lambda *a: with_gradients(function, given, a), compiler_options=QUICK)(*operands)
    exact = [a.astype(jnp.float32) for a in operands]
    run = jax.jit(lambda *a: with_gradients(reference.attention, given, a), compiler_options=QUICK)
    want = run(*exact)
    sees = np.broadcast_to(given.mask.as_array(*(s[1] for s in shapes[:2])).any(-1), shapes[0][:2])
    assert all(a.dtype == given.dtype for a in got)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        assert np.abs(a - b).max() <= 3e-2 * max(np.abs(b).max(), 1), name
        if name in ("out", "dq"):
            assert not a[~sees].any(), f"{name} of rows that see nothing"


@pytest.fixture
def installed(monkeypatch):
    """As if cuDNN were there."""
    monkeypatch.setattr(gpu, "find_spec", lambda name: name)


@pytest.mark.parametrize("name", OURS | OTHERS)
def test_what_cudnn_is_asked_is_what_the_mask_says(name, monkeypatch, installed):
    """Breaks if the window is off by one, lengths hide the wrong keys, an empty row is not zero,
    the scale is lost, T != S puts query 0 elsewhere, or a part of the mask is lost on its way into
    the array. XLA's form has the same arguments.
    """
    given = (OURS | OTHERS)[name]
    monkeypatch.setattr(gpu, "CUDNN", "xla")
    operands = [jax.ShapeDtypeStruct(s, given.dtype) for s in given.shapes]
    assert gpu.supports(*operands, given.mask) == ""
    check(gpu.attention, given)


@pytest.mark.parametrize("name", OURS | OTHERS)
def test_only_what_is_no_structure_becomes_an_array(name, monkeypatch):
    """Breaks if T x S numbers are made for a mask that cuDNN can say, or blocks above the diagonal
    are no longer skipped.
    """
    asked = []

    def library(q, k, v, **arguments):
        asked.append(arguments)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", library)
    given = (OURS | OTHERS)[name]
    gpu.attention(*(jnp.zeros(s, given.dtype) for s in given.shapes), given.mask, scale=1.0)
    assert ("mask" in asked[0]) == (name in OTHERS)
    assert asked[0]["is_causal"] == (given.mask.causal and given.mask.prefix is None)


@pytest.mark.parametrize("axes", [(0, 0, 0, 0), (0, None, 0, None)])
def test_replicas_become_rows(axes, monkeypatch, installed):
    """Breaks if jax's own rule, which fails for a bias that heads share, is asked; if replicas are
    mixed, or if one that is not mapped gets the gradient of one replica.
    """
    asked = []
    monkeypatch.setattr(gpu, "CUDNN", "xla")
    library = jax.nn.dot_product_attention

    def counted(q, *rest, **arguments):
        asked.append(q.shape[0])
        return library(q, *rest, **arguments)

    monkeypatch.setattr(jax.nn, "dot_product_attention", counted)
    keys = jax.random.split(jax.random.key(1), 3)
    q, k, v = (
        jax.random.normal(key, (3, 2, 12, n, 8)) for key, n in zip(keys, (4, 2, 2), strict=True)
    )
    rows = jnp.stack([ROWS, ROWS[::-1], jnp.ones_like(ROWS)])
    operands = [a if axis == 0 else a[0] for a, axis in zip((q, k, v, rows), axes, strict=True)]

    def loss(backend, q, k, v, rows):
        return (backend.attention(q, k, v, Mask(True, q_segments=rows), scale=0.3) ** 2).sum()

    def gradients(backend):
        def total(q, k, v):
            one = partial(loss, backend)
            return jax.vmap(one, in_axes=axes)(q, k, v, operands[3]).sum()

        return jax.grad(total, argnums=(0, 1, 2))(*operands[:3])

    for a, b in zip(gradients(gpu), gradients(reference), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert asked[-1] == 6


def test_no_kernel_is_asked_for_a_row_without_keys(monkeypatch, installed):
    """Breaks if a kernel's 0/0 gets into a gradient, where a zero times NaN stays NaN."""
    asked = []

    def library(q, k, v, **arguments):
        asked.append(arguments["key_value_seq_lengths"])
        return q

    def array(q, k, v, seen, causal, scale):
        asked.append(seen)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", library)
    monkeypatch.setattr(gpu, "_array", array)
    for given in (OURS["causal, lengths"], OTHERS["segments"]):
        assert not given.mask.as_array(12, 12).any(-1).all()
        gpu.attention(*(jnp.zeros(s, given.dtype) for s in given.shapes), given.mask, scale=1.0)
    lengths, seen = asked
    assert lengths.tolist() == [1, 12]
    assert (seen & (jnp.arange(12) <= jnp.arange(12)[:, None])).any(-1).all()


@pytest.mark.parametrize(
    "given, reason",
    [
        (case(dtype="float32"), "dtypes float32, float32, float32 are not all bfloat16"),
        (case(H=12), "head size 12 is not a multiple of 8"),
        (case(H=136), "head size 136 is not a multiple of 8 up to 128"),
        (case(T=11, S=7, causal=True), "lengths T = 11, S = 7 are not both even"),
    ],
)
def test_what_cudnn_cannot_is_refused(given, reason, installed):
    """Breaks if something else runs in silence, or if jax's own error comes from deep inside."""
    operands = [jax.ShapeDtypeStruct(s, given.dtype) for s in given.shapes]
    assert gpu.supports(*operands, given.mask).startswith(reason)


def test_without_cudnn_the_reason_says_what_to_install(monkeypatch):
    """Breaks if a machine without CUDA is given a kernel that it cannot lower."""
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    operands = [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in OURS["causal"].shapes]
    assert "pip install 'onset-lm[cuda]'" in gpu.supports(*operands, Mask())


def test_a_mask_that_fills_the_memory_is_refused(installed):
    """Breaks if long rows with segments take T x S bytes where `blockwise` takes none, or if the
    rows of a batch that devices share are counted on each.
    """
    shape = jax.ShapeDtypeStruct((8, 16_384, 8, 64), jnp.bfloat16)
    rows = jax.ShapeDtypeStruct((8, 16_384), jnp.int32)
    mask = Mask(True, q_segments=rows)
    assert "a mask of 2147483648 entries is above" in gpu.supports(shape, shape, shape, mask)
    assert gpu.supports(shape, shape, shape, Mask(True)) == ""
    with jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("data",))):
        assert gpu.supports(shape, shape, shape, mask) == ""


@pytest.fixture(scope="module")
def h100():
    """A mesh of one H100 to compile for."""
    if find_spec("jax_cuda13_plugin") is None:
        pytest.skip("needs the cuda extra: pip install 'onset-lm[cuda]'")
    from jax.experimental import topologies

    found = topologies.get_topology_desc(
        "h100", platform="cuda", topology="1x1x1", target_config=H100
    )
    return Mesh(np.array(found.devices), ("data",), axis_types=(AxisType.Auto,))


def calls(given, mesh, replicas=0):
    """The library calls in a program of forward and backward, compiled for the mesh."""
    everywhere = NamedSharding(mesh, PartitionSpec())

    def run(mask, *operands):
        return with_gradients(gpu.attention, SimpleNamespace(mask=mask), operands)

    lead = (replicas,) if replicas else ()
    shapes = [
        jax.ShapeDtypeStruct(lead + s, given.dtype, sharding=everywhere)
        for s in [*given.shapes, given.shapes[0]]
    ]
    mask = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(lead + a.shape, jnp.int32, sharding=everywhere), given.mask
    )
    run = jax.vmap(run) if replicas else run
    text = jax.jit(run).lower(mask, *shapes).compile().as_text()
    return set(re.findall(r'custom_call_target="([^"]*)"', text))


@pytest.mark.parametrize("name", OURS | HALF | OTHERS)
def test_compiled_for_an_h100_it_is_the_fused_call(name, h100):
    """Breaks if jax falls back to plain products, forward or backward."""
    found = calls((OURS | HALF | OTHERS)[name], h100)
    assert found == (FUSED if name not in OTHERS else BIASED)


@pytest.mark.parametrize("name", ["causal", "lengths", "segments"])
def test_replicas_are_one_fused_call(name, h100):
    """Breaks if a population on a GPU cannot be mapped."""
    found = calls((OURS | OTHERS)[name], h100, replicas=3)
    assert found == (BIASED if name in OTHERS else FUSED)
