"""Softmax cross-entropy of a linear head without its logits: memory that V does not enter.

With y = scale x table' the vocabulary is visited in chunks, once forward and once backward:

    m' = max(m, max y)   l' = l exp(m - m') + sum exp(y - m')   lse = m + log l   nats = lse - y[t]
    dy = scale (exp(y - lse) (dnats + dlse) - onehot(t) dnats)   dx += dy table   dtable = dy' x

Only lse [X] is kept; the gradient recomputes y, four products instead of three. Its `dy` is rounded
to the dtype of x before the two products, whose sums, like all statistics, are float32 or wider.
With 2,048 rows, D 256 and V 50,000 on a CPU it takes no longer than the logits, which fall out of
the cache, and 24 MiB of temporaries instead of 830; docs/speed.md has the figures.

A vocabulary that is cut over S devices is chunked within each cut, with statistics of their own [X,
S], so that these devices meet once at the end of a pass. Those that share the batch meet at every
chunk of the gradient, for its rows of dtable.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from lm.sharding import constrain, devices_along

CHUNK = 1024  # on a CPU 512 took up to 16 % longer, 2,048 up to 22 %, 8,192 20 %


def chunked(
    x: Array, table: Array, targets: Array, *, scale: float = 1.0, chunk: int = CHUNK
) -> tuple[Array, Array]:
    """-log softmax(scale x table')[target] and the log-sum-exp it came from, in nats.

    x [X, D], table [V, D], targets int [X] -> two float32 [X]; the log-sum-exp is what a z-loss
    squares. Differentiable in x and table, once. A chunk need not divide V.
    """
    return _chunked(x, table, targets, scale, chunk)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _chunked(
    x: Array, table: Array, targets: Array, scale: float, chunk: int
) -> tuple[Array, Array]:
    return _forward(x, table, targets, scale, chunk)[0]


def _forward(
    x: Array, table: Array, targets: Array, scale: float, chunk: int
) -> tuple[tuple[Array, Array], Any]:
    """The two results, and what the gradient needs."""
    cut = _Cut(constrain(table, ("vocab", None)), chunk)

    def visit(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, chosen = carry
        w, ids, fresh = cut.read(i)
        y = _logits(x, w, scale) + jnp.where(fresh, 0, -jnp.inf)
        hit = (targets[:, None, None] == ids) & fresh
        new = jnp.maximum(top, y.max(-1))
        total = total * jnp.exp(top - new) + jnp.exp(y - new[..., None]).sum(-1)
        return new, total, chosen + jnp.where(hit, y, 0).sum(-1)

    zeros = jnp.zeros((x.shape[0], cut.shards), _wide(x))
    start = tuple(constrain(a, ("batch", "vocab")) for a in (zeros - jnp.inf, zeros, zeros))
    tops, totals, chosen = lax.fori_loop(0, cut.chunks, visit, start)
    top = tops.max(-1)
    lse = top + jnp.log((totals * jnp.exp(tops - top[:, None])).sum(-1))
    return (lse - chosen.sum(-1), lse), (x, table, targets, lse)


def _backward(scale: float, chunk: int, saved: Any, given: tuple[Array, Array]) -> tuple:
    """Gradients of x and table."""
    x, table, targets, lse = saved
    dnats, dlse = given
    cut = _Cut(constrain(table, ("vocab", None)), chunk)

    def visit(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        dx, dtable = carry
        w, ids, fresh = cut.read(i)
        y = _logits(x, w, scale)
        p = jnp.exp(y - lse[:, None, None]) * (dnats + dlse)[:, None, None]
        hit = targets[:, None, None] == ids
        dy = ((p - jnp.where(hit, dnats[:, None, None], 0)) * scale).astype(x.dtype)
        # Rows that the chunk before had already: dtable gets the same values again, dx none.
        dx += _dot("xsc,scd->sxd", dy, jnp.where(fresh[:, None], w, 0))
        # A wide product that is turned afterwards, as a tall one is slow (layers.product); of two
        # axes, as with three XLA on a CPU has no bfloat16.
        wide = lax.optimization_barrier(_dot("xd,xc->dc", x, dy.reshape(x.shape[0], -1)))
        return dx, cut.write(dtable, i, wide.T.reshape(w.shape).astype(table.dtype))

    dx = constrain(jnp.zeros((cut.shards, *x.shape), _wide(x)), ("vocab", "batch", None))
    dx, dtable = lax.fori_loop(0, cut.chunks, visit, (dx, jnp.zeros_like(cut.table)))
    return dx.sum(0).astype(x.dtype), dtable.reshape(table.shape), None


_chunked.defvjp(_forward, _backward)


class _Cut(NamedTuple):
    """A table [V, D] as [S, V/S, D], one part for each device of the vocabulary's mesh axis, and
    its chunks [S, C, D].
    """

    rows: Array
    chunk: int

    @property
    def shards(self) -> int:
        """S."""
        return devices_along("vocab")

    @property
    def table(self) -> Array:
        """[S, V/S, D]."""
        V, D = self.rows.shape
        return constrain(self.rows.reshape(self.shards, -1, D), ("vocab", None, None))

    @property
    def size(self) -> int:
        """C."""
        return min(self.chunk, self.rows.shape[0] // self.shards)

    @property
    def chunks(self) -> int:
        return -(-self.rows.shape[0] // self.shards // self.size)

    def start(self, i: Array) -> Array:
        """The first row of chunk i: the last chunk ends at the last row, so it may overlap."""
        return jnp.minimum(i * self.size, self.rows.shape[0] // self.shards - self.size)

    def read(self, i: Array) -> tuple[Array, Array, Array]:
        """Chunk i: its rows [S, C, D], their ids [S, C], and which of them no other had [C]."""
        start, each = self.start(i), self.rows.shape[0] // self.shards
        w = lax.dynamic_slice_in_dim(self.table, start, self.size, axis=1)
        place = start + jnp.arange(self.size)
        return w, jnp.arange(self.shards)[:, None] * each + place, place >= i * self.size

    def write(self, table: Array, i: Array, rows: Array) -> Array:
        """The table [S, V/S, D] with the rows of chunk i replaced."""
        return lax.dynamic_update_slice_in_dim(table, rows, self.start(i), axis=1)


def _logits(x: Array, w: Array, scale: float) -> Array:
    """x [X, D], w [S, C, D] -> scale x w' [X, S, C]."""
    S, C, D = w.shape
    y = _dot("xd,cd->xc", x, w.reshape(S * C, D)).reshape(-1, S, C) * scale
    return constrain(y, ("batch", "vocab", None))


def _wide(x: Array) -> Any:
    """The dtype of sums and statistics."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _dot(letters: str, a: Array, b: Array) -> Array:
    return jnp.einsum(letters, a, b, preferred_element_type=_wide(a))
