"""The three Pallas programs of `tpu`: forward, gradient of k and v (and q), gradient of q.

One grid step is one visible tile: R = G Q rows (Q queries, each with the G heads that share a kv
head) by C keys. Tiles are held transposed, [C, R]: statistics are then rows of R lanes and one
register high, their maximum and sum run over sublanes, and the accumulator [H, R] fills all lanes
at H = 64 too. Scores are kept in powers of two, log2(e) being part of their scale:

    s = scale log2(e) k q' + mask   m' = max(m, max s)   p = 2^(s - m')   a' = a 2^(m - m') + v' p
    gradient: p = 2^(s - L)   ds = p (v dout' - D)   dv += p dout   dk += ds q   dq' += k' ds

Which tiles there are, and which of them need a mask: lm/attention/tpu_tiles.py.
"""

from collections.abc import Callable
from functools import partial
from math import e as E
from math import log2
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lm.attention import tpu_tiles
from lm.attention.tpu_tiles import PART, WHOLE, Shown, Tiles, column_of, kind_of, row_of

HIDDEN = -1e30  # a hidden score; finite, so that no difference of two of them is NaN
LOG2_E = log2(E)
VMEM_BYTES = 64 << 20  # of the 128 MiB of v5e, v5p and v6e; the default is 16 MiB


def forward(
    q: Array, k: Array, v: Array, shown: Shown, *, scale: float, tiles: Tiles
) -> tuple[Array, Array]:
    """q [B, K, blocks, R, H], k [B, K, S, H], v [B, K, H, S] -> out like q, L [B, K, blocks, 1, R].

    L is the log-sum-exp to base 2.
    """
    H, R, C = q.shape[-1], tiles.rows, tiles.C
    plan = tpu_tiles.steps(tiles, by_keys=False)
    plan_kinds = set(kind_of(plan))

    def kernel(*refs: Any) -> None:
        plan, q, k, v, offsets, shown, out, lse, acc, top, total = refs
        p = pl.program_id(2)
        step = plan[p]

        @pl.when(step & 1 != 0)
        def begin() -> None:
            acc[...] = jnp.zeros(acc.shape, jnp.float32)
            # Above HIDDEN, so that a row that sees nothing has p = 0 throughout.
            top[...] = jnp.full(top.shape, HIDDEN / 2, jnp.float32)
            total[...] = jnp.zeros(total.shape, jnp.float32)

        def tile(masked: bool) -> None:
            s = _dot(k[...], q[...], "nt") * (scale * LOG2_E)
            s = _hide(s, step, tiles, offsets, shown) if masked else s
            old = top[...]
            new = jnp.maximum(old, s.max(0, keepdims=True))
            e, shrink = jnp.exp2(s - new), jnp.exp2(old - new)
            top[...] = new
            total[...] = total[...] * shrink + e.sum(0, keepdims=True)
            acc[...] = acc[...] * shrink + _dot(v[...], e.astype(v.dtype), "nn")

        _by_kind(tile, plan_kinds, shown, step, p)

        @pl.when(step & 2 != 0)
        def end() -> None:
            sums = jnp.maximum(total[...], 0.5)
            out[...] = (acc[...] / sums).T.astype(out.dtype)
            lse[...] = top[...] + jnp.log2(sums)

    stats = jax.ShapeDtypeStruct((*q.shape[:3], 1, R), jnp.float32)
    out, lse = _call(
        kernel,
        [plan],
        (q, k, v),
        shown,
        tiles,
        in_specs=[_rows(R, H), _keys(C, H), _keys_turned(H, C)],
        outs=[(q, _rows(R, H)), (stats, _rows(1, R))],
        scratch=[(H, R), (1, R), (1, R)],
        products=2,
    )
    return out, lse


def backward_keys(
    operands: tuple[Array, ...], shown: Shown, *, scale: float, tiles: Tiles, one_pass: bool
) -> tuple[Array, ...]:
    """Gradients of k and v, and in `one_pass` of q too, from (q, k, v, dout, L, D[, k turned]).

    q, dout [B, K, blocks, R, H]; k, v [B, K, S, H]; L, D [B, K, blocks, 1, R]. In `one_pass` the
    gradient of all queries of a kv head stays in fast memory, G T H floats, and the products are
    five instead of seven.
    """
    q, k, v = operands[:3]
    H, R, C = q.shape[-1], tiles.rows, tiles.C
    plan = tpu_tiles.steps(tiles, by_keys=True)
    plan_kinds = set(kind_of(plan))
    plans = [plan, tpu_tiles.finished(plan)] if one_pass else [plan]

    def kernel(*refs: Any) -> None:
        plan, *refs = refs  # type: ignore[assignment]
        if one_pass:
            row_plan, q, k, v, dout, lse, delta, kt, offsets, shown, dk, dv, dq, dks, dvs, dqs = (
                refs
            )
        else:
            q, k, v, dout, lse, delta, offsets, shown, dk, dv, dks, dvs = refs
        p = pl.program_id(2)
        step = plan[p]

        @pl.when(step & 1 != 0)
        def begin() -> None:
            dks[...] = jnp.zeros(dks.shape, jnp.float32)
            dvs[...] = jnp.zeros(dvs.shape, jnp.float32)

        if one_pass:

            @pl.when(row_plan[p] & 1 != 0)
            def begin_row() -> None:
                dqs[row_of(step)] = jnp.zeros((H, R), jnp.float32)

        def tile(masked: bool) -> None:
            s = _dot(k[...], q[...], "nt") * (scale * LOG2_E)
            s = _hide(s, step, tiles, offsets, shown) if masked else s
            e = jnp.exp2(s - lse[...])
            ds = e * (_dot(v[...], dout[...], "nt") - delta[...])
            ds = ds.astype(q.dtype)
            dvs[...] += _dot(e.astype(q.dtype), dout[...], "nn")
            dks[...] += _dot(ds, q[...], "nn")
            if one_pass:
                dqs[row_of(step)] += _dot(kt[...], ds, "nn")

        _by_kind(tile, plan_kinds, shown, step, p)

        @pl.when(step & 2 != 0)
        def end() -> None:
            dk[...] = (dks[...] * scale).astype(dk.dtype)
            dv[...] = dvs[...].astype(dv.dtype)

        if one_pass:

            @pl.when(row_plan[p] & 2 != 0)
            def end_row() -> None:
                dq[...] = (dqs[row_of(step)] * scale).T.astype(dq.dtype)

    in_specs = [_rows(R, H), _keys(C, H), _keys(C, H), _rows(R, H), _rows(1, R), _rows(1, R)]
    outs = [(k, _keys(C, H)), (v, _keys(C, H))]
    scratch: list[tuple[int, ...]] = [(C, H), (C, H)]
    if one_pass:
        in_specs.append(_keys_turned(H, C))
        outs.append((q, _rows_finished(R, H)))
        scratch.append((tiles.counts[0], H, R))
    return _call(
        kernel,
        plans,
        operands,
        shown,
        tiles,
        in_specs=in_specs,
        outs=outs,
        scratch=scratch,
        products=5 if one_pass else 4,
    )


def backward_queries(
    operands: tuple[Array, ...], shown: Shown, *, scale: float, tiles: Tiles
) -> Array:
    """The gradient of q from (q, k, v, dout, L, D, k turned), as in `backward_keys`."""
    q = operands[0]
    H, R, C = q.shape[-1], tiles.rows, tiles.C
    plan = tpu_tiles.steps(tiles, by_keys=False)
    plan_kinds = set(kind_of(plan))

    def kernel(*refs: Any) -> None:
        plan, q, k, v, dout, lse, delta, kt, offsets, shown, dq, dqs = refs
        p = pl.program_id(2)
        step = plan[p]

        @pl.when(step & 1 != 0)
        def begin() -> None:
            dqs[...] = jnp.zeros(dqs.shape, jnp.float32)

        def tile(masked: bool) -> None:
            s = _dot(k[...], q[...], "nt") * (scale * LOG2_E)
            s = _hide(s, step, tiles, offsets, shown) if masked else s
            e = jnp.exp2(s - lse[...])
            ds = e * (_dot(v[...], dout[...], "nt") - delta[...])
            dqs[...] += _dot(kt[...], ds.astype(q.dtype), "nn")

        _by_kind(tile, plan_kinds, shown, step, p)

        @pl.when(step & 2 != 0)
        def end() -> None:
            dq[...] = (dqs[...] * scale).T.astype(dq.dtype)

    keys = [_keys(C, H), _keys(C, H)]
    rows = [_rows(R, H), _rows(1, R), _rows(1, R)]
    return _call(
        kernel,
        [plan],
        operands,
        shown,
        tiles,
        in_specs=[_rows(R, H), *keys, *rows, _keys_turned(H, C)],
        outs=[(q, _rows(R, H))],
        scratch=[(H, R)],
        products=3,
    )[0]


def _by_kind(
    tile: Callable[[bool], None], planned: set[int], shown: Shown, step: Array, p: Array
) -> None:
    """Compute the tile unless it is hidden, with the mask only where it is needed.

    A second body without the mask saves 1 to 11 % of the instructions of a tile seen whole.
    """
    kind = kind_of(step) if shown.kinds is None else shown.kinds[0, p]
    for name, masked in ((WHOLE, False), (PART, True)):
        if name in planned or shown.kinds is not None:
            pl.when(kind == name)(partial(tile, masked))


def _dot(a: Array, b: Array, form: str) -> Array:
    """a b ("nn") or a b' ("nt"), summed in float32; float32 operands stay float32."""
    dims = (((1,), (1 if form == "nt" else 0,)), ((), ()))
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _hide(s: Array, step: Array, tiles: Tiles, offsets: Any, shown: Shown) -> Array:
    """Scores [C, R] with those that the mask hides at HIDDEN."""
    key = column_of(step) * tiles.C + lax.broadcasted_iota(jnp.int32, s.shape, 0)
    ahead = row_of(step) * tiles.Q + offsets[...] - key  # t - s
    seen = key < (tiles.S if shown.bounds is None else shown.bounds[0, 1])
    near = None
    if tiles.causal:
        near = ahead >= 0
    if tiles.window is not None:
        inside = (ahead if tiles.causal else jnp.abs(ahead)) < tiles.window
        near = inside if near is None else near & inside
    if near is not None:
        if tiles.prefix:
            near |= key < shown.bounds[0, 0]
        seen &= near
    if shown.q_segments is not None:
        rows, columns = shown.q_segments[...], shown.k_segments[...]
        # Segments of keys arrive along lanes, which is compact, and are turned here.
        columns = jnp.broadcast_to(columns, (8, tiles.C)).T[:, :1]
        seen &= (rows == columns) & (rows != 0)
    return jnp.where(seen, s, HIDDEN)


def _rows(*shape: int) -> pl.BlockSpec:
    """The query block of a step, of [B, K, blocks, *shape]."""
    return pl.BlockSpec(
        (None, None, None, *shape), lambda b, h, p, plan, *_: (b, h, row_of(plan[p]), 0, 0)
    )


def _rows_finished(*shape: int) -> pl.BlockSpec:
    """The query block to be written next, by the second plan."""
    return pl.BlockSpec(
        (None, None, None, *shape), lambda b, h, p, plan, rows: (b, h, rows[p] >> 2, 0, 0)
    )


def _keys(C: int, H: int) -> pl.BlockSpec:
    """The key block of a step, of [B, K, S, H]."""
    return pl.BlockSpec((None, None, C, H), lambda b, h, p, plan, *_: (b, h, column_of(plan[p]), 0))


def _keys_turned(H: int, C: int) -> pl.BlockSpec:
    """The key block of a step, of [B, K, H, S]."""
    return pl.BlockSpec((None, None, H, C), lambda b, h, p, plan, *_: (b, h, 0, column_of(plan[p])))


def _shown_specs(shown: Shown, tiles: Tiles) -> Shown:
    steps = 0 if shown.kinds is None else shown.kinds.shape[2]
    scalars = partial(pl.BlockSpec, memory_space=pltpu.SMEM)
    specs = Shown(
        kinds=scalars((None, 1, steps), lambda b, h, p, *_: (b, 0, 0)),
        bounds=scalars((None, 1, 2), lambda b, h, p, *_: (b, 0, 0)),
        q_segments=pl.BlockSpec(
            (None, None, 1, tiles.rows), lambda b, h, p, plan, *_: (b, row_of(plan[p]), 0, 0)
        ),
        k_segments=pl.BlockSpec(
            (None, None, 1, tiles.C), lambda b, h, p, plan, *_: (b, column_of(plan[p]), 0, 0)
        ),
    )
    return Shown(*(None if a is None else s for a, s in zip(shown, specs, strict=True)))


def _call(
    kernel: Callable,
    plans: list[np.ndarray],
    operands: tuple[Array, ...],
    shown: Shown,
    tiles: Tiles,
    *,
    in_specs: list,
    outs: list,
    scratch: list[tuple[int, ...]],
    products: int,
) -> tuple[Array, ...]:
    """Run `kernel` at every (row of the batch, kv head, step).

    Its references are plans, operands, offsets [1, R] (which query of its block a row is), shown,
    outputs and scratch. `products`: how many of them a tile costs, for the scheduler of XLA.
    """
    (K, H), P = operands[0].shape[1::3], len(plans[0])
    offsets = np.tile(np.arange(tiles.Q, dtype=np.int32), tiles.G)[None]

    def run(operands: tuple[Array, ...], shown: Shown) -> tuple[Array, ...]:
        B = operands[0].shape[0]
        # Inside shard_map an output must say over which mesh axes it varies: as the queries do.
        varies = jax.typeof(operands[0]).manual_axis_type
        entries = B * K * P * tiles.rows * tiles.C
        return pl.pallas_call(
            kernel,
            out_shape=[
                jax.ShapeDtypeStruct((B, *a.shape[1:]), a.dtype, manual_axis_type=varies)
                for a, _ in outs
            ],
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(plans),
                grid=(B, K, P),
                in_specs=[
                    *in_specs,
                    pl.BlockSpec((1, tiles.rows), lambda *_: (0, 0)),
                    _shown_specs(shown, tiles),
                ],
                out_specs=[spec for _, spec in outs],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=VMEM_BYTES,
            ),
            cost_estimate=pl.CostEstimate(
                flops=2 * products * entries * H,
                transcendentals=entries,
                bytes_accessed=sum(a.size * a.dtype.itemsize for a in operands),
            ),
        )(*(jnp.asarray(plan) for plan in plans), *operands, jnp.asarray(offsets), shown)

    return _fold_replicas(run)(operands, shown)


def _fold_replicas(run: Callable) -> Callable:
    """Make `vmap` put the mapped axis into the batch, the first axis of all arrays of `run`.

    The rule of Pallas, one more axis of the grid, fails in TPU interpret mode in jax 0.12 (it does
    not extend `dimension_semantics`).
    """
    folded = jax.custom_batching.custom_vmap(run)

    @folded.def_vmap
    def rule(size: int, mapped: Any, *args: Any) -> tuple[tuple[Array, ...], tuple[bool, ...]]:
        def fold(a: Array, is_mapped: bool) -> Array:
            a = a if is_mapped else jnp.broadcast_to(a, (size, *a.shape))
            return a.reshape(-1, *a.shape[2:])

        outs = folded(*jax.tree.map(fold, args, tuple(mapped)))
        return tuple(a.reshape(size, -1, *a.shape[1:]) for a in outs), (True,) * len(outs)

    return folded
