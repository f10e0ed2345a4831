"""Every backend of attention against the definition in float64: structures, shapes, dtypes, and the
ways in which training calls it.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    BOUNDS,
    ELSEWHERE,
    REQUIRED,
    STRUCTURES,
    Case,
    assert_close,
    drawn,
    exact,
    heads,
    here,
    looped,
    operands,
    partitioned,
    plain,
    quick,
    sharded,
    skip_reason,
    structure,
    vmapped,
    with_gradients,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lm import native
from lm.attention import BACKENDS, Mask, attention, blockwise

DTYPES = tuple(BOUNDS)
MODES = {"plain": plain, "vmap": vmapped, "shard_map": sharded}
IMPLS = [impl for impl in BACKENDS if impl not in ELSEWHERE]
# An interpreted kernel takes a second a call, and the interpreter cannot map one that says which
# axes of its grid are parallel: tests/test_attention_tpu.py does what is left out here.
QUICK_IMPLS = [impl for impl in IMPLS if impl != "tpu"]
ALL = [
    *((i, n, m, d) for i in QUICK_IMPLS for n in STRUCTURES for m in MODES for d in DTYPES),
    *(("tpu", name, "plain", "float32") for name in STRUCTURES if "tpu" in IMPLS),
    *(("tpu", "everything", m, "bfloat16") for m in ("plain", "shard_map") if "tpu" in IMPLS),
]


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Blocks of 32, so that rows of 150 have several."""
    before, blockwise.BLOCK = blockwise.BLOCK, 32
    yield
    blockwise.BLOCK = before


def check(impl, case, dtype="float32", mode=plain):
    """The backend gives the exact answer; skips with its reason where it cannot run the case."""
    if reason := skip_reason(impl, case, dtype):
        pytest.skip(f"{impl}: {reason}")
    with here(impl):
        found, answers = mode(with_gradients(impl, case.scale), case, dtype)
    assert_close(found, case, answers, dtype)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_backend_passes_by_being_skipped(impl):
    """Breaks if a backend joins without saying what it must run, or refuses some of that."""
    if impl == "cpu":
        try:
            native.find_compiler()
        except FileNotFoundError as error:
            pytest.skip(str(error))
    assert REQUIRED[impl], f"enter {impl} in REQUIRED"
    for name in REQUIRED[impl]:
        for dtype in DTYPES:
            assert skip_reason(impl, structure(impl, name), dtype) == "", (name, dtype)


@pytest.mark.parametrize("impl, name, mode, dtype", ALL)
def test_structures(impl, name, mode, dtype):
    """Breaks if a backend gets a mask, a grouping or a rest of a block wrong, cannot be mapped over
    replicas or cut over devices, or mixes rows or replicas.
    """
    check(impl, structure(impl, name), dtype, MODES[mode])


@pytest.mark.parametrize("mode", [looped, partitioned])
@pytest.mark.parametrize("impl", QUICK_IMPLS)
def test_in_a_loop_and_cut_by_the_compiler(impl, mode):
    """Breaks if a backend cannot stand in the loop over replicas of a CPU, or if a batch that lies
    on two devices is computed from one of them.
    """
    check(impl, structure(impl, "everything"), mode=mode)


@pytest.mark.parametrize("impl", QUICK_IMPLS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.data())
def test_drawn_cases(impl, data):
    """Breaks in any shape from 1 up, any combination of the parts of a mask, packed or mixed
    segments, any scale.
    """
    case, dtype = data.draw(drawn(impl)), data.draw(st.sampled_from(DTYPES))
    mode = data.draw(st.sampled_from([quick, quick, vmapped]))
    assume(not skip_reason(impl, case, dtype))
    check(impl, case, dtype, mode)


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 1, 1, 1, 1, causal=True),
        Case(1, 1, 70, 2, 1),
        Case(1, 70, 1, 2, 2, causal=True),
        Case(3, 7, 7, 5, 1, causal=True),
        Case(1, 17, 9, 1, 1, causal=True, window=2),
        Case(1, 9, 17, 1, 1, window=2),
    ],
)
@pytest.mark.parametrize("impl", QUICK_IMPLS)
def test_extremes(impl, case):
    """Breaks where one row, query, key or head is all there is, or where queries or keys lie so far
    past the other end that their last block sees nothing.
    """
    check(impl, case._replace(H=heads(impl)[0]), mode=quick)


@pytest.mark.parametrize("size", [30, 100])
@pytest.mark.parametrize("impl", QUICK_IMPLS)
def test_large_logits(impl, size):
    """Breaks if the maximum is not subtracted, or an exponential is cut off too early: the logits
    are of size 30 and 100, and the errors may be that much larger, not more.
    """
    case = structure(impl, "causal")
    check(impl, case._replace(scale=size * case.H**-0.5))


@pytest.mark.parametrize("impl", QUICK_IMPLS)
def test_long_rows(impl):
    """Breaks if errors grow faster than the root of the number of keys, as sums that are not kept
    in float32 do.
    """
    check(impl, Case(1, 2048, 2048, 1, 1, heads(impl)[0], causal=True))


@pytest.mark.parametrize("impl", QUICK_IMPLS)
def test_operands_that_are_cut_out_of_others(impl):
    """Breaks if a backend reads an operand by another layout than it has: q, k and v are parts of
    one product, with heads in front of time, as a projection may give them.
    """
    case = structure(impl, "grouped")
    q, k, v, mask, dout = operands(case)
    packed = np.concatenate([q, k, v], axis=2).swapaxes(1, 2)

    @jax.jit
    def run(packed, mask, dout):
        def call(packed):
            parts = jnp.split(packed, [case.N, case.N + case.K], axis=1)
            out = attention(*(a.swapaxes(1, 2) for a in parts), mask, impl=impl)
            return out.swapaxes(1, 2)

        out, pull = jax.vjp(call, packed)
        return out.swapaxes(1, 2), pull(dout.swapaxes(1, 2))[0].swapaxes(1, 2)

    out, gradient = run(packed, mask, dout)
    found = (out, *jnp.split(gradient, [case.N, case.N + case.K], axis=2))
    assert_close(found, case, [((q, k, v, mask, dout), lambda a: a)], "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("impl", QUICK_IMPLS)
def test_the_same_bits_twice(impl, dtype):
    """Breaks if the order of a sum depends on which thread is first."""
    case = structure(impl, "grouped")._replace(B=4)
    if reason := skip_reason(impl, case, dtype):
        pytest.skip(f"{impl}: {reason}")
    run, one = jax.jit(with_gradients(impl)), operands(case, dtype)
    first = [np.asarray(a).tobytes() for a in run(*one)]
    for _ in range(5):
        assert [np.asarray(a).tobytes() for a in run(*one)] == first


def test_the_exact_answer_is_in_float64():
    """Breaks if `reference` rounds to float32 on the way: central differences of its output, in
    float64, would not meet its gradients in nine digits.
    """
    case = Case(1, 4, 5, 2, 1, 3, causal=True, scale=0.7)
    q, k, v, mask, dout = operands(case)
    out, *gradients = exact(case, q, k, v, mask, dout)[:4]
    with jax.enable_x64(True):
        wide = [np.asarray(a, np.float64) for a in (q, k, v)]
        for i, gradient in enumerate(gradients):
            at = (0, 1, 0, 2)
            ends = []
            for sign in (1, -1):
                moved = [a.copy() for a in wide]
                moved[i][at] += sign * 1e-4
                ends.append((exact(case, *moved, mask, dout)[0] * np.asarray(dout)).sum())
            assert abs((ends[0] - ends[1]) / 2e-4 - gradient[at]) < 1e-8
    assert out.dtype == np.float64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wrong", ["scale", "group", "diagonal", "gradient"])
def test_the_bounds_tell_right_from_wrong(wrong, dtype):
    """Breaks if the bounds are so wide that a backend with an error would pass."""
    case = structure("reference", "grouped")

    def run(q, k, v, mask, dout):
        if wrong == "scale":
            q = q * 1.05
        if wrong == "group":
            k = k[:, :, ::-1]
        if wrong == "diagonal":
            mask = Mask(window=case.S, causal=False, lengths=mask.lengths)
        out, dq, dk, dv = with_gradients("reference")(q, k, v, mask, dout)
        return out, dq, dk * (1.05 if wrong == "gradient" else 1), dv

    found, answers = plain(run, case, dtype)
    with pytest.raises(AssertionError, match=re.escape("d") if wrong == "gradient" else "out"):
        assert_close([a.astype(dtype) for a in found], case, answers, dtype)
