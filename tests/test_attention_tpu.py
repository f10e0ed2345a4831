"""The TPU kernels without a TPU: simulated, lowered, and, where libtpu is installed, compiled.

The simulation fills fresh memory with NaN and raises on a race. It costs seconds a program, so
tiles are 16 by 16 here; a real one has multiples of 128.
"""

import importlib.util
import os
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import Mesh as Devices
from jax.sharding import NamedSharding, PartitionSpec

from lm.attention import reference, splash, tpu, tpu_tiles
from lm.attention.mask import Mask
from lm.attention.tpu import Blocks
from lm.attention.tpu_tiles import PART, SKIP, WHOLE, Tiles

# Largest difference to the reference in float32, for outputs and gradients of unit normal operands.
TOLERANCE = {"float32": 2e-5, "bfloat16": 6e-2}
SMALL = Blocks(16, 16, one_pass=True)
TWO_PASSES = Blocks(16, 16, one_pass=False)


@pytest.fixture
def simulated():
    """Programs for a TPU run on the CPU, slowly."""
    parameters = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    with pltpu.force_tpu_interpret_mode(parameters):
        yield
    pltpu.reset_tpu_interpret_mode_state()  # or a failure would fail the tests after it


def operands(B, T, S, N, K, H, dtype="float32"):
    """q, k, v and an output gradient."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
    return [jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)]


def with_gradients(attention, q, k, v, dout, mask):
    """The output and the gradients of q, k and v."""
    out, pull = jax.vjp(lambda *a: attention(*a, mask, scale=0.3), q, k, v)
    return out, *pull(dout)


def assert_equals_reference(got, q, k, v, dout, mask, tolerance):
    want = with_gradients(
        reference.attention, *(a.astype("float32") for a in (q, k, v, dout)), mask
    )
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        a = np.asarray(a, np.float32)
        np.testing.assert_allclose(a, b, atol=tolerance, rtol=tolerance, err_msg=name)


def documents(*rows):
    """Segment numbers [B, T] from the lengths of documents; a last 0 is written as padding."""
    return jnp.array([np.repeat(np.arange(1, len(r) + 1) % len(r), r) for r in rows], jnp.int32)


SEGMENTS = documents((20, 10, 10), (8, 16, 16))
CASES = {
    "causal": ((1, 40, 40, 1, 1, 64), Mask(causal=True), SMALL, "float32"),
    "window, groups, more keys": (
        (1, 24, 40, 4, 2, 64),
        Mask(causal=True, window=9),
        TWO_PASSES,
        "float32",
    ),
    "window, rows past the keys": ((1, 40, 20, 2, 1, 64), Mask(window=5), SMALL, "bfloat16"),
    "prefix and lengths": (
        (2, 40, 30, 2, 1, 64),
        Mask(causal=True, prefix=jnp.array([20, 0]), lengths=jnp.array([25, 0])),
        TWO_PASSES,
        "float32",
    ),
    "everything": (
        (2, 40, 40, 3, 1, 64),
        Mask(
            causal=True,
            window=12,
            q_segments=SEGMENTS,
            k_segments=SEGMENTS[::-1],
            prefix=jnp.array([0, 17]),
            lengths=jnp.array([40, 33]),
        ),
        SMALL,
        "float32",
    ),
    "default blocks": ((1, 40, 40, 2, 1, 128), Mask(causal=True), None, "float32"),
}


@pytest.mark.parametrize("case", CASES)
def test_tpu_equals_reference(case, simulated):
    """Breaks if a tile, statistic, group or gradient is wrong, if fresh memory is read, or if two
    steps race.
    """
    shape, mask, blocks, dtype = CASES[case]
    q, k, v, dout = operands(*shape, dtype)
    run = partial(with_gradients, partial(tpu.attention, blocks=blocks))
    assert_equals_reference(
        jax.jit(run)(q, k, v, dout, mask), q, k, v, dout, mask, TOLERANCE[dtype]
    )


@pytest.mark.parametrize("window", [None, 1, 7, 30])
@pytest.mark.parametrize("causal", [False, True])
def test_steps_are_the_visible_tiles(causal, window):
    """Breaks if a tile that has something to see is not visited, one that has nothing is fetched,
    the mask is left out where it is needed or applied where it is not, or a row is written early.
    """
    for T, S in ((40, 40), (16, 64), (90, 20), (1, 33)):
        tiles = Tiles(T, S, 1, Q=8, C=16, causal=causal, window=window, prefix=False)
        (nq, nk), seen = tiles.counts, np.zeros((-(-T // 8) * 8, -(-S // 16) * 16), bool)
        seen[:T, :S] = Mask(causal, window).as_array(T, S)[0]
        seen[T:] = seen[T - 1]  # rows of padding are judged by real ones
        seen = seen.reshape(nq, 8, nk, 16).swapaxes(1, 2)
        some = seen.any((2, 3))
        want = np.where(seen.all((2, 3)), WHOLE, np.where(some, PART, SKIP))
        for by_keys in (False, True):
            plan = tpu_tiles.steps(tiles, by_keys=by_keys)
            i, j = tpu_tiles.row_of(plan), tpu_tiles.column_of(plan)
            kinds = np.full((nq, nk), SKIP)
            kinds[i, j] = tpu_tiles.kind_of(plan)
            np.testing.assert_array_equal(kinds, want)
            # Blocks that see nothing are visited once all the same, to write zeros.
            empty = (~some).all(1).sum() + (by_keys and (~some).all(0).sum())
            assert len(set(zip(i, j, strict=True))) == len(plan) <= some.sum() + empty
            block = j if by_keys else i
            assert sorted(set(block)) == list(range(nk if by_keys else nq))
            for b in set(block):
                mine = plan[block == b]
                assert (np.diff(np.flatnonzero(block == b)) == 1).all()
                assert (mine[:-1] & 2 == 0).all() and (mine[1:] & 1 == 0).all()
                assert mine[0] & 1 and mine[-1] & 2
        rows = tpu_tiles.finished(plan)
        assert (np.diff(rows >> 2) >= 0).all()
        for r in range(nq):
            (mine,) = np.nonzero(i == r)
            assert rows[mine[0]] & 1 and not (rows[mine[1:]] & 1).any()
            assert rows[mine[-1]] & 2 and not (rows[mine[:-1]] & 2).any()
            assert rows[mine[-1]] >> 2 == r


@pytest.mark.parametrize("causal", [False, True])
def test_kinds_follow_the_arrays_of_a_mask(causal):
    """Breaks if a tile is skipped that has something to see, or taken whole that has something to
    hide.
    """
    T, S, Q, C, found = 32, 48, 8, 16, set()
    for seed in range(24):
        rng = np.random.default_rng(seed)
        rows, columns = (
            np.sort(rng.integers(1, 3, (2, n)), 1) * (np.arange(n) < rng.integers(1, 2 * n, (2, 1)))
            for n in (T, S)
        )
        prefix, lengths = rng.integers(-1, 2, (2, 2)) + C * rng.integers(1, 4, (2, 2))
        parts = {"q_segments": rows, "k_segments": columns, "prefix": prefix, "lengths": lengths}
        names = ("prefix",), ("lengths",), ("q_segments", "k_segments"), tuple(parts)
        parts = {name: parts[name] for name in names[seed % 4]}
        mask = Mask(causal, **{name: jnp.asarray(a, jnp.int32) for name, a in parts.items()})
        tiles = Tiles(T, S, 1, Q, C, causal, None, prefix="prefix" in parts and causal)
        seen = np.broadcast_to(mask.as_array(T, S), (2, T, S)).reshape(2, 4, Q, 3, C)
        plan = tpu_tiles.steps(tiles, by_keys=False)
        kinds = tpu_tiles.show(mask, tiles, by_keys=False).kinds
        kinds = np.full(plan.shape, WHOLE)[None] if kinds is None else np.asarray(kinds)[:, 0]
        i, j = tpu_tiles.row_of(plan), tpu_tiles.column_of(plan)
        some, every = seen.any((2, 4))[:, i, j], seen.all((2, 4))[:, i, j]
        assert (some <= (kinds != SKIP)).all() and ((kinds == WHOLE) <= every).all()
        found |= set(kinds.ravel())
        # Without segments the judgement is exact.
        if "q_segments" not in parts:
            np.testing.assert_array_equal(
                np.broadcast_to(kinds, some.shape),
                np.where(every, WHOLE, np.where(some, PART, SKIP)),
            )
    assert found == {SKIP, PART, WHOLE}


@pytest.mark.parametrize(
    "mask, poisoned",
    [
        (Mask(causal=True), slice(16, 48)),
        (Mask(lengths=jnp.array([16])), slice(16, 48)),
        (Mask(q_segments=documents((16, 0)), k_segments=documents((16, 32, 0))), slice(16, 48)),
    ],
    ids=["causal", "lengths", "segments"],
)
def test_hidden_tiles_are_not_computed(mask, poisoned, simulated):
    """Breaks if a tile that nobody sees is computed: 0 times a NaN of its values is NaN."""
    q, k, v, dout = operands(1, 16, 48, 1, 1, 64)
    k, v = (a.at[:, poisoned].set(jnp.nan) for a in (k, v))
    run = partial(with_gradients, partial(tpu.attention, blocks=SMALL))
    got = jax.jit(run)(q, k, v, dout, mask)
    assert all(jnp.isfinite(a).all() for a in got)
    assert not got[2][:, poisoned].any() and not got[3][:, poisoned].any()


def test_vmap_over_replicas(simulated):
    """Breaks if replicas are mixed, or share the mask of the first."""
    q, k, v, dout = (jnp.stack([a, 2 * a]) for a in operands(2, 24, 24, 2, 1, 64))
    segments = jnp.stack([documents((16, 8, 0), (4, 20)), documents((2, 2, 20), (24, 0))])
    attention = partial(tpu.attention, blocks=SMALL)

    def run(q, k, v, dout, segments):
        return with_gradients(attention, q, k, v, dout, Mask(True, q_segments=segments))

    mapped = jax.jit(jax.vmap(run))(q, k, v, dout, segments)
    for r in range(2):
        mask = Mask(True, q_segments=segments[r])
        assert_equals_reference([a[r] for a in mapped], q[r], k[r], v[r], dout[r], mask, 1e-4)


def test_shard_map(simulated):
    """Breaks if an output does not say over which mesh axes it varies."""
    q, k, v, dout = operands(2, 24, 24, 2, 1, 64)
    mesh = Devices(np.array(jax.devices()[:2]), ("data",))
    spec = PartitionSpec("data")
    attention = partial(tpu.attention, blocks=SMALL)
    lengths = jnp.array([24, 9])

    def run(q, k, v, dout, lengths):
        return with_gradients(attention, q, k, v, dout, Mask(True, lengths=lengths))

    sharded = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec))
    got = sharded(q, k, v, dout, lengths)
    assert_equals_reference(got, q, k, v, dout, Mask(True, lengths=lengths), 2e-5)


def test_splash_equals_reference(simulated):
    """Breaks if the window is off by one, the scale is lost, or padding is not zero."""
    q, k, v, dout = operands(1, 256, 256, 2, 1, 64)
    mask = Mask(causal=True, window=30, q_segments=documents((100, 56, 100)))
    got = jax.jit(partial(with_gradients, splash.attention))(q, k, v, dout, mask)
    assert_equals_reference(got, q, k, v, dout, mask, 2e-5)


SHAPES = {
    "bf16": ((2, 1024, 1024, 4, 4, 128), {"causal": True}, "bfloat16"),
    "f32, groups": ((1, 1000, 1000, 4, 2, 64), {"causal": True}, "float32"),
    "window": ((1, 2048, 2048, 2, 2, 256), {"causal": True, "window": 300}, "bfloat16"),
    "packed": ((2, 1024, 1024, 4, 2, 64), {"causal": True, "segments": True}, "bfloat16"),
    "cross, padded": ((2, 300, 700, 6, 2, 128), {"bounds": True}, "bfloat16"),
    "long": ((1, 8192, 8192, 4, 1, 128), {"causal": True}, "bfloat16"),
}
FOR_SPLASH = ("bf16", "window", "packed", "long")


def abstract(case, **where):
    """q, k, v, an output gradient and the mask of a case of SHAPES, as shapes."""
    (B, T, S, N, K, H), parts, dtype = SHAPES[case]
    q, k = (
        jax.ShapeDtypeStruct(s, jnp.dtype(dtype), **where) for s in ((B, T, N, H), (B, S, K, H))
    )
    segments = jax.ShapeDtypeStruct((B, T), jnp.int32, **where) if "segments" in parts else None
    number = jax.ShapeDtypeStruct((B,), jnp.int32, **where) if "bounds" in parts else None
    causal, window = parts.get("causal", False), parts.get("window")
    return q, k, k, q, Mask(causal, window, segments, prefix=number, lengths=number)


@pytest.mark.parametrize(
    "backend, case", [(tpu, c) for c in SHAPES] + [(splash, c) for c in FOR_SPLASH]
)
def test_lowers_for_tpu(backend, case):
    """Breaks if Mosaic refuses a program, forward or backward; no TPU and no libtpu are needed."""
    shapes = abstract(case)
    assert backend.supports(*shapes[:3], shapes[4]) == ""
    run = jax.jit(partial(with_gradients, backend.attention))
    text = jax.export.export(run, platforms=["tpu"])(*shapes).mlir_module()
    assert text.count("tpu_custom_call") >= 2  # forward and backward


def test_lowers_for_tpu_under_vmap():
    """Breaks if the fold of replicas into the batch cannot be lowered."""
    *shapes, mask = abstract("packed")
    shapes = [jax.ShapeDtypeStruct((3, *a.shape), a.dtype) for a in shapes]
    run = jax.vmap(partial(with_gradients, tpu.attention), (0, 0, 0, 0, None))
    text = jax.export.export(jax.jit(run), platforms=["tpu"])(*shapes, mask).mlir_module()
    assert "tpu_custom_call" in text


@pytest.fixture(scope="module")
def topologies():
    """One device of each kind that the compiler in libtpu can compile for."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install 'onset-lm[tpu]'")
    from jax.experimental import topologies

    # Compiling needs no TPU, no host of one, and no lock on it.
    os.environ.update(ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_SKIP_MDS_QUERY="1")
    return {
        name: topologies.get_topology_desc(platform="tpu", topology_name=name).devices[0]
        for name in ("v5e:2x2", "v5p:2x2x1")
    }


# A program for a device that is not there can be cached, but not read back.
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache")
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1"])
@pytest.mark.parametrize("case", SHAPES)
def test_compiles_for_tpu(case, name, topologies):
    """Breaks if the real compiler refuses a program, forward or backward: for its layouts, its
    scalar or its fast memory.
    """
    where = NamedSharding(Devices(np.array([topologies[name]]), ("x",)), PartitionSpec())
    shapes = abstract(case, sharding=where)
    run = jax.jit(partial(with_gradients, tpu.attention))
    memory = run.lower(*shapes).compile().memory_analysis()
    # No array of T x S: at most six times the operands and results, in copies and statistics.
    essential = memory.argument_size_in_bytes + memory.output_size_in_bytes
    assert memory.peak_memory_in_bytes < 6 * essential


@pytest.mark.parametrize(
    "backend, shape, mask, words",
    [
        (tpu, (1, 64, 64, 2, 1, 80), Mask(), "head size 80 is not one of"),
        (tpu, (1, 2**18, 2**18, 8, 1, 64), Mask(), "tiles are more than"),
        (splash, (1, 128, 128, 2, 1, 80), Mask(), "head size 80"),
        (splash, (1, 100, 128, 2, 1, 64), Mask(), "lengths 100 and 128"),
        (splash, (1, 128, 128, 2, 1, 64), Mask(lengths=jnp.ones(1)), "lengths of a mask"),
        (splash, (1, 256, 128, 2, 1, 64), Mask(window=9), "nothing to see"),
    ],
)
def test_reasons(backend, shape, mask, words):
    """Breaks if a backend takes operands that it cannot run."""
    B, T, S, N, K, H = shape
    q, k = (jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in ((B, T, N, H), (B, S, K, H)))
    assert words in backend.supports(q, k, k, mask)
    for wrong in (jnp.float16, jnp.float32):
        other = jax.ShapeDtypeStruct(k.shape, wrong)
        assert backend.supports(q, other, other, mask)


def test_blocks_make_whole_registers():
    """Breaks if a block is not a multiple of 128 rows and keys, or one of its registers is all
    padding.
    """
    for T, S, N, K in ((1, 1, 1, 1), (600, 513, 5, 1), (1000, 8192, 12, 4), (90_000, 700, 40, 1)):
        q, k = (jax.ShapeDtypeStruct((1, n, h, 64), jnp.bfloat16) for n, h in ((T, N), (S, K)))
        Q, C, _ = tpu.blocks_for(q, k)
        assert Q * N // K % 128 == 0 and C % 128 == 0
        assert -T % Q < -(-T // Q) * 128 and -S % C < -(-S // C) * 128
