"""Which tiles of a mask the programs of `tpu` visit, and how.

A tile is R = G Q rows (Q queries, each with the G heads that share a kv head) by C keys. What
causality and the window leave of T x S is known while tracing: `steps` lists those tiles, and they
alone are fetched. What prefix, lengths and segments leave of them is known when running: `show`
says of each whether it is hidden (fetched, not computed), seen whole, or needs the mask.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from lm.attention.mask import Mask

SKIP, WHOLE, PART = 0, 1, 2  # kinds of tiles
MAX_BLOCKS = 1 << 13  # blocks of queries or of keys: 13 bits of a step
# Steps are 4 bytes each of 1 MiB of scalar memory, up to three times: the plan, and two buffers of
# kinds. 131,072 queries of 8 heads in tiles of 128 by 1,024 keys, causal, are 66,048.
MAX_STEPS = 70_000


class Tiles(NamedTuple):
    """Sizes and the static part of a mask."""

    T: int
    S: int
    G: int  # heads of a kv head
    Q: int  # queries of a tile
    C: int  # keys of a tile
    causal: bool
    window: int | None
    prefix: bool  # whether a prefix may show what causality and the window hide

    @property
    def rows(self) -> int:
        return self.G * self.Q

    @property
    def counts(self) -> tuple[int, int]:
        """Blocks of queries and of keys."""
        return -(-self.T // self.Q), -(-self.S // self.C)


class Shown(NamedTuple):
    """The arrays of a mask, cut into tiles; None where the mask has no such part.

    Block specifications and references in a program take the same form.
    """

    kinds: Any  # [B, 1, P], per step
    bounds: Any  # [B, 1, 2]: prefix and length
    q_segments: Any  # [B, blocks, 1, R]
    k_segments: Any  # [B, blocks, 1, C]


def row_of(step: Any) -> Any:
    """The query block of a step."""
    return step >> 17


def column_of(step: Any) -> Any:
    """The key block of a step."""
    return (step >> 4) & (MAX_BLOCKS - 1)


def kind_of(step: Any) -> Any:
    """What causality, window and the end of the keys leave of the tile of a step."""
    return (step >> 2) & 3


def band(tiles: Tiles) -> np.ndarray:
    """The kind of every tile by causality, window and the end of the keys: [blocks, blocks]."""
    (nq, nk), T, S, Q, C = tiles.counts, tiles.T, tiles.S, tiles.Q, tiles.C
    i, j = np.arange(nq)[:, None], np.arange(nk)[None]
    near, far = i * Q - np.minimum(j * C + C, S) + 1, np.minimum(i * Q + Q, T) - 1 - j * C
    # t - s takes every value in [near, far] within the tile.
    reach = T + S if tiles.window is None else tiles.window - 1
    low = 0 if tiles.causal else -reach
    some = (far >= low) & (near <= reach)
    every = (near >= low) & (far <= reach) & (j * C + C <= S)
    return np.where(every, WHOLE, np.where(some, PART, SKIP))


def steps(tiles: Tiles, *, by_keys: bool) -> np.ndarray:
    """The tiles to visit, query block by query block or key block by key block: int32 [P].

    Bits of a step: first and last of its block (1 + 1), kind (2), key block (13), query block (14).
    """
    kinds = band(tiles)
    visit = (kinds != SKIP) | tiles.prefix
    # A block that sees nothing is visited once, to write its zeros: at the far end, where it keeps
    # the order in which rows are finished (`finished`).
    visit[:, -1] |= ~visit.any(1)
    if by_keys:
        visit[-1] |= ~visit.any(0)
    j, i = np.nonzero(visit.T) if by_keys else np.nonzero(visit)[::-1]
    block = j if by_keys else i
    new = np.flatnonzero(np.diff(block)) + 1
    first, last = np.zeros_like(i), np.zeros_like(i)
    first[np.r_[0, new]] = last[np.r_[new - 1, -1]] = 1
    return (first | last << 1 | kinds[i, j] << 2 | j << 4 | i << 17).astype(np.int32)


def finished(plan: np.ndarray) -> np.ndarray:
    """For steps by keys: first and last of its *row* (1 + 1 bits), and the row to be written next.

    Rows of a band are finished in ascending order, so each is the output block from the step after
    the one that finished its predecessor until it is itself finished.
    """
    i = row_of(plan)
    P, rows = len(i), int(i.max()) + 1
    first, last = np.full(rows, P), np.zeros(rows, int)
    np.minimum.at(first, i, np.arange(P))
    np.maximum.at(last, i, np.arange(P))
    assert (np.diff(last) > 0).all()
    p = np.arange(P)
    return ((p == first[i]) | (p == last[i]) << 1 | np.searchsorted(last, p) << 2).astype(np.int32)


def show(mask: Mask, tiles: Tiles, *, by_keys: bool) -> Shown:
    """The arrays of the mask, cut into tiles; `by_keys` is the order of the steps."""
    (nq, nk), Q, C = tiles.counts, tiles.Q, tiles.C
    bounds = kinds = rows = columns = None
    if mask.q_segments is not None:
        keys = mask.q_segments if mask.k_segments is None else mask.k_segments
        rows = pad(mask.q_segments, nq * Q).reshape(-1, nq, 1, Q)
        columns = pad(keys, nk * C).reshape(-1, nk, 1, C)
    if tiles.prefix or mask.lengths is not None:
        prefix = mask.prefix if tiles.prefix and mask.prefix is not None else jnp.int32(0)
        lengths = jnp.int32(tiles.S) if mask.lengths is None else mask.lengths
        pair = jnp.broadcast_arrays(prefix, jnp.minimum(lengths, tiles.S))
        bounds = jnp.stack(pair, axis=-1)[:, None].astype(jnp.int32)
    if bounds is not None or rows is not None:
        kinds = _kinds(steps(tiles, by_keys=by_keys), tiles, bounds, rows, columns)[:, None]
    if rows is not None:
        rows = jnp.tile(rows, tiles.G)
    return Shown(kinds, bounds, rows, columns)


def pad(x: Array, length: int) -> Array:
    """[B, T, ...] -> [B, length, ...], filled with zeros."""
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1])] + [(0, 0)] * (x.ndim - 2))


def _kinds(
    plan: np.ndarray, tiles: Tiles, bounds: Array | None, rows: Array | None, columns: Array | None
) -> Array:
    """What prefix, lengths and segments leave of each step: int32 [B, P].

    Blocks whose ranges of segment numbers do not meet see nothing of each other, so packed
    documents in ascending order cost their own tiles only.
    """
    i, j, kind = row_of(plan), column_of(plan), kind_of(plan)
    start, end = j * tiles.C, (j + 1) * tiles.C
    some, every = jnp.asarray(kind != SKIP)[None], jnp.asarray(kind == WHOLE)[None]
    if bounds is not None:
        prefix, length = bounds[:, 0, :1], bounds[:, 0, 1:]
        some = (some | (start < prefix)) & (start < length)
        every = (every | (end <= prefix)) & (end <= length)
    if rows is not None and columns is not None:
        (low, high, holes), (left, right, gaps) = _ranges(rows), _ranges(columns)
        low, high, holes = low[:, i], high[:, i], holes[:, i]
        left, right, gaps = left[:, j], right[:, j], gaps[:, j]
        some &= (low <= right) & (left <= high)
        every &= (low == right) & (high == left) & ~holes & ~gaps
    return jnp.where(some, jnp.where(every, WHOLE, PART), SKIP).astype(jnp.int32)


def _ranges(segments: Array) -> tuple[Array, Array, Array]:
    """Of each block: the smallest and largest segment, and whether some of it is padding."""
    most, padding = jnp.iinfo(jnp.int32).max, segments == 0
    low = jnp.where(padding, most, segments).min((2, 3))
    high = jnp.where(padding, -most, segments).max((2, 3))
    return low, high, padding.any((2, 3))
