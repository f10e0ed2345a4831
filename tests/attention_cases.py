"""The cases of attention that every backend is held against, and the exact answer to each.

The exact answer is `reference` computed in float64 on the operands as they are, rounded to their
dtype. An error is compared with the largest entry of the exact array, or with 1 if that is smaller:
where softmax has one key, gradients are zero and only rounding is left.
"""

import contextlib
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from lm.attention import BACKENDS, Mask, attention, reference

NAMES = ("out", "dq", "dk", "dv")

# Largest error of the output and of the gradients, for operands of unit normal entries. float32:
# some tens of roundings (2^-24). bfloat16: its rounding is 2^-9, and a gradient is a sum of
# products of two factors that were rounded.
BOUNDS = {"float32": (2e-6, 4e-6), "bfloat16": (8e-3, 1.6e-2)}

# Compiling is nearly all the time of these tests. Plain calls are optimised, as in use; the others
# and the exact answers are not, which halves it.
QUICK = {"xla_backend_optimization_level": 0}

# Head sizes, the first for the table below. The kernel for CPUs is compiled anew for each.
HEADS = {"tpu": (64, 128)}
OTHERS = (16, 3, 40, 64)

# Backends that need a machine of their own and cannot be run slowly on this one.
ELSEWHERE = ("gpu", "splash")


class Case(NamedTuple):
    """Shape, mask and scale of one call; `parts` are the arrays of the mask that are given."""

    B: int = 2
    T: int = 150
    S: int = 150
    N: int = 2
    K: int = 2
    H: int = 16
    causal: bool = False
    window: int | None = None
    parts: tuple[str, ...] = ()
    scale: float | None = None
    seed: int = 0


# 150 is several blocks and a rest for every backend; 131 is prime.
STRUCTURES = {
    "causal": Case(causal=True),
    "full": Case(),
    "window": Case(causal=True, window=40),
    "window on both sides": Case(window=40),
    "segments": Case(causal=True, parts=("segments",)),
    "prefix": Case(causal=True, parts=("prefix",)),
    "lengths": Case(parts=("lengths",)),
    "cross": Case(T=75, S=203),
    "cross, causal": Case(T=203, S=75, causal=True),
    "cross, segments": Case(T=75, S=203, parts=("segments", "k_segments")),
    "grouped": Case(N=6, causal=True),
    "one head": Case(N=1, K=1, causal=True),
    "odd": Case(T=131, S=131, N=3, K=3, causal=True),
    "empty rows": Case(causal=True, parts=("empty", "lengths")),
    "everything": Case(
        *(4, 131, 150, 4, 2, 16),
        causal=True,
        window=40,
        parts=("segments", "k_segments", "prefix", "lengths"),
        scale=0.3,
    ),
}

# What a backend must be able to run, in both dtypes: otherwise its part of the battery would pass
# by being skipped.
REQUIRED = {
    "reference": tuple(STRUCTURES),
    "blockwise": tuple(STRUCTURES),
    "cpu": tuple(STRUCTURES),
    "tpu": tuple(STRUCTURES),
}


def here(impl: str):
    """The context in which a backend runs on a CPU: kernels for TPUs are interpreted."""
    if impl == "tpu":
        return pltpu.force_tpu_interpret_mode(pltpu.InterpretParams())
    return contextlib.nullcontext()


def heads(impl: str) -> tuple[int, ...]:
    """The head sizes that a backend is tried with."""
    return HEADS.get(impl, OTHERS)


def structure(impl: str, name: str) -> Case:
    """The case of the table in a head size that the backend has."""
    return STRUCTURES[name]._replace(H=heads(impl)[0])


@st.composite
def drawn(draw, impl):
    """Any shape from 1 up, any combination of the parts of a mask."""
    T = draw(st.integers(1, 90))
    parts = draw(st.sets(st.sampled_from(["segments", "k_segments", "prefix", "lengths"])))
    K = draw(st.integers(1, 2))
    return Case(
        B=draw(st.sampled_from([1, 2, 3])),
        T=T,
        S=draw(st.one_of(st.just(T), st.integers(1, 90))),
        N=K * draw(st.integers(1, 3)),
        K=K,
        H=draw(st.sampled_from(heads(impl))),
        causal=draw(st.booleans()),
        window=draw(st.one_of(st.none(), st.integers(1, 40), st.integers(80, 99))),
        parts=tuple(sorted(parts | ({"segments"} if "k_segments" in parts else set()))),
        scale=draw(st.sampled_from([None, 0.05, 1.0])),
        seed=draw(st.integers(0, 99)),
    )


def operands(case: Case, dtype: str = "float32", seed: int = 0) -> tuple:
    """q, k, v, the mask, and the gradient of the output; another seed is another replica."""
    B, T, S, N, K, H = case[:6]
    rng = np.random.default_rng([case.seed, seed])

    def normal(*shape):
        return rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype))

    q, k, v, dout = normal(B, T, N, H), normal(B, S, K, H), normal(B, S, K, H), normal(B, T, N, H)
    return q, k, v, make_mask(case, rng), dout


def make_mask(case: Case, rng: np.random.Generator) -> Mask:
    """The mask with drawn arrays. Segments 0 to 3 are documents and padding, packed in rising order
    in even cases and in any order in odd ones; some have no keys.
    """
    B, T, S, parts = case.B, case.T, case.S, case.parts

    def segments(length):
        drawn = rng.integers(0, 4, (B, length), np.int32)
        return drawn if case.seed % 2 else np.sort(drawn)

    q_segments = segments(T) if "segments" in parts else None
    if "empty" in parts:  # a row of the batch without documents, and a tail of padding
        q_segments = np.ones((B, T), np.int32)
        q_segments[0], q_segments[1:, T // 2 :] = 0, 0
    # Without segments of their own, the keys take those of the queries: that needs T = S.
    apart = q_segments is not None and ("k_segments" in parts or T != S)
    arrays = (
        q_segments,
        segments(S) if apart else None,
        rng.integers(0, S + 1, B, np.int32) if "prefix" in parts else None,
        rng.integers(0, S + 3, B, np.int32) if "lengths" in parts else None,
    )
    return Mask(case.causal, case.window, *arrays)


def skip_reason(impl: str, case: Case, dtype: str) -> str:
    """Why the backend cannot run the case, or ""."""
    return BACKENDS[impl].supports(*operands(case, dtype)[:4])


def with_gradients(impl: str, scale: float | None = None):
    """(q, k, v, mask, dout) -> the output and the gradients of q, k and v."""

    def run(q, k, v, mask, dout):
        out, pull = jax.vjp(lambda *a: attention(*a, mask, scale=scale, impl=impl), q, k, v)
        return out, *pull(dout)

    return run


@partial(jax.jit, static_argnames="scale", compiler_options=QUICK)
def _exact(q, k, v, mask, dout, scale):
    out, pull = jax.vjp(lambda *a: reference.attention(*a, mask, scale=scale), q, k, v)
    seen = jnp.broadcast_to(mask.as_array(q.shape[1], k.shape[1]), (*q.shape[:2], k.shape[1]))
    return out, *pull(dout), seen.any(2), seen.any(1)


def exact(case: Case, q, k, v, mask, dout) -> list[np.ndarray]:
    """The output and the gradients by `reference` in float64; then which queries see a key [B, T],
    and which keys are seen [B, S].
    """
    scale = case.H**-0.5 if case.scale is None else case.scale
    # Widened here: XLA's CPU compiler aborts on some fused conversions of bfloat16 to float64.
    q, k, v, dout = (np.asarray(a, np.float64) for a in (q, k, v, dout))
    with jax.enable_x64(True):
        return [np.asarray(a) for a in _exact(q, k, v, mask, dout, scale)]


def plain(run, case, dtype):
    """One call: what it gives, and the operands of each answer in it."""
    return _alone(jax.jit(run), case, dtype)


def quick(run, case, dtype):
    """One call that is not optimised."""
    return _alone(jax.jit(run, compiler_options=QUICK), case, dtype)


def _alone(run, case, dtype):
    one = operands(case, dtype)
    return run(*one), [(one, lambda a: a)]


def vmapped(run, case, dtype):
    """Two replicas side by side, each with its own operands and mask."""
    return _replicas(jax.vmap(run), case, dtype)


def looped(run, case, dtype):
    """Two replicas one after another."""
    return _replicas(lambda *a: jax.lax.map(lambda one: run(*one), a), case, dtype)


def _replicas(run, case, dtype):
    both = [operands(case, dtype, seed) for seed in (0, 1)]
    run = jax.jit(run, compiler_options=QUICK)
    found = run(*jax.tree.map(lambda *a: np.stack(a), *both))
    return found, [(one, lambda a, i=i: a[i]) for i, one in enumerate(both)]


def sharded(run, case, dtype):
    """The batch cut over two devices, by hand."""
    cut = PartitionSpec("data")
    by_hand = jax.shard_map(run, mesh=_mesh(case), in_specs=cut, out_specs=cut)
    return _alone(jax.jit(by_hand, compiler_options=QUICK), case, dtype)


def partitioned(run, case, dtype):
    """The batch cut over two devices by the compiler, as in a training step on a mesh."""
    one = operands(case, dtype)
    cut = NamedSharding(_mesh(case), PartitionSpec("data"))
    run = jax.jit(run, out_shardings=cut, compiler_options=QUICK)
    return run(*jax.device_put(one, cut)), [(one, lambda a: a)]


def _mesh(case):
    devices = jax.devices()[: 2 - case.B % 2]
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def assert_close(found, case, answers, dtype) -> None:
    """Every answer is that of `exact` within the bounds of the dtype.

    The error of a logit grows with its size, which by default is about 1, and that of a sum with
    the root of the number of its terms.
    """
    logits = 1.0 if case.scale is None else case.scale * case.H**0.5
    growth = max(1.0, logits) * max(1.0, case.S / 256, case.T / 256) ** 0.5
    for one, cut in answers:
        *wanted, queries, keys = exact(case, *one)
        for name, a, want in zip(NAMES, found, wanted, strict=True):
            got = cut(np.asarray(a)).astype(np.float64)
            assert got.shape == want.shape and a.dtype == dtype and want.dtype == np.float64, name
            assert np.isfinite(got).all(), name
            bound = BOUNDS[dtype][name != "out"] * growth * max(1.0, abs(want).max())
            assert abs(got - want).max() <= bound, (name, abs(got - want).max(), bound)
            # Zero, not merely small, for a query that sees no key and a key that no query sees.
            seen = queries if name in ("out", "dq") else keys
            assert not got[~seen].any(), f"{name} of an empty row"
