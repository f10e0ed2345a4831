"""The LSTM language model: layers of memory cells, one step of time after another.

    z = x U + h R + b                           [i f g o] = z, the products of all four gates in one
    c = sigmoid(f) c + sigmoid(i) tanh(g)
    h = sigmoid(o) tanh(c)                      or that times `project`, where there is one
    logits = h head'

Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000 and, where `cells` is
above `width`, the projection of Sak et al. 2014: `torch.nn.LSTM` with `hidden_size` cells and
`proj_size` width, its two biases added up. Where a document begins (position 0) h and c are zero,
so documents of a row see nothing of each other; padding changes nothing in `extend`.

x U has no part in the recurrence and is one product for all steps before it. With the gradient, 16
rows of 128 tokens at width 256 take 108 ms that way on one core and 132 with [x h] times one matrix
in every step; at width 64 it is 6.8 against 6.2, for 64 rows of 32. Dropout falls on what goes
into a layer and into the head, not on what goes from step to step (Zaremba et al. 2014). Embeddings
are scaled up to numbers of order one, as no norm does it. Under muP (lm.models) the three products
of a layer are hidden weights. On a mesh the gates of a layer are not cut: their parts would have to
meet at every step.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array, lax

from lm.attention import Ring
from lm.config import UserError, positive, within
from lm.models.layers import dropout, logits, parameter, product
from lm.sharding import constrain

State = tuple[Array, Array]  # h [B, D], c float32 [B, C]; of all layers [L, B, ...]


@dataclass(frozen=True)
class LSTMConfig:
    """Shape and numerics of an LSTM; `width` D is that of the embedding and of every layer's
    output, `cells` C are memory cells of a layer, 0 for as many as the width.
    """

    vocab_size: int
    layers: int
    width: int
    cells: int = 0
    head: Literal["tied", "untied"] = "tied"
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    base_width: int = 0  # muP: the width at which learning rates are tuned; 0 is off
    loss: Literal["auto", "logits", "chunked"] = "auto"  # lm/objectives.py says what auto takes
    z_loss: float = 0.0
    kind: Literal["lstm"] = "lstm"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "layers", "width"):
            positive(name, getattr(self, name))
        within("base_width", self.base_width, 0)
        within("z_loss", self.z_loss, 0, 1)
        within("dropout", self.dropout, 0, 1)
        if self.dropout == 1:
            raise UserError("dropout 1 drops everything; use less than 1")
        if self.cells and self.cells < self.width:
            raise UserError(
                f"cells {self.cells} are fewer than the width {self.width} that they are projected"
                " to; use more, or 0 for a layer without projection"
            )

    @property
    def memory(self) -> int:
        """C."""
        return self.cells or self.width

    @property
    def projected(self) -> bool:
        """Whether C cells give D numbers by a product."""
        return self.memory > self.width

    @property
    def width_ratio(self) -> float:
        """m of muP; 1 when it is off."""
        return self.width / self.base_width if self.base_width else 1.0


def deviation(config: LSTMConfig, name: str) -> float:
    """Standard deviation of the normal initialiser of a weight."""
    fan_in = {"input": config.width, "recurrent": config.width, "project": config.memory}
    return fan_in.get(name, config.base_width or config.width) ** -0.5


def _weight(module: Any, name: str, shape: tuple[int, ...], *axes: str | None) -> Array:
    init = nn.initializers.normal(deviation(module.config, name))
    return parameter(module, name, shape, axes, init)


def _bias(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Zeros, and ones for the forget gate, so that a fresh cell remembers (Jozefowicz et al. 2015,
    section 2.2).
    """
    return jnp.zeros(shape, dtype).at[shape[0] // 4 : shape[0] // 2].set(1)


class Layer(nn.Module):
    """One layer over all steps of time."""

    config: LSTMConfig

    @nn.compact
    def __call__(
        self, x: Array, state: State, key: Array | None, fresh: Array, real: Array | None
    ) -> tuple[Array, State]:
        """x [T, B, D] -> ([T, B, D], state after the last step); `key` switches dropout on.

        Rows that are `fresh` [T, B] begin at zero; those that are not `real` keep their state.
        """
        c, (T, B, D) = self.config, x.shape
        x = dropout(x, c.dropout, key).reshape(T * B, D)
        bias = parameter(self, "bias", (4 * c.memory,), (None,), _bias)
        z = product(x, _weight(self, "input", (D, 4 * c.memory), "embed", None)) + bias
        over_time = nn.scan(_step, variable_broadcast="params", split_rngs={"params": False})
        state, x = over_time(self, state, (z.reshape(T, B, -1), fresh, real))
        return x, state


def _step(layer: Layer, state: State, inputs: tuple) -> tuple[State, Array]:
    """One step of time: z [B, 4C], fresh and real [B] -> (state, h [B, D])."""
    c, (z, fresh, real) = layer.config, inputs
    h, memory = (jnp.where(fresh[:, None], 0, part) for part in state)
    z = z + h @ _weight(layer, "recurrent", (c.width, 4 * c.memory), "embed", None)
    i, f, g, o = jnp.split(z.astype(jnp.float32), 4, axis=-1)
    memory = jax.nn.sigmoid(f) * memory + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = (jax.nn.sigmoid(o) * jnp.tanh(memory)).astype(z.dtype)
    if c.projected:
        h = h @ _weight(layer, "project", (c.memory, c.width), None, "embed")
    if real is None:
        return (h, memory), h
    old = real[:, None]
    return (jnp.where(old, h, state[0]), jnp.where(old, memory, state[1])), h


class LSTM(nn.Module):
    """A recurrent language model; what it takes and gives is what `Transformer` does."""

    config: LSTMConfig

    def __call__(
        self, tokens: Array, segments: Array, positions: Array, *, deterministic: bool = True
    ) -> Array:
        """tokens, segments, positions int32 [B, T] -> logits float32 [B, T, V].

        A document begins where its position is 0. Dropout needs `deterministic=False` and
        `rngs={"dropout": key}`.
        """
        return self.head(*self.hidden(tokens, segments, positions, deterministic=deterministic))

    def hidden(
        self, tokens: Array, segments: Array, positions: Array, *, deterministic: bool = True
    ) -> tuple[Array, Array]:
        """What the logits are the product of: final states [B, T, D] and the head's table [V, D].

        The logits are this product over `width_ratio`.
        """
        if isinstance(segments, Ring):
            raise UserError(
                "several devices share each row, which an LSTM reads from its first token to its"
                " last; use a mesh without 'sequence'"
            )
        state = fresh_state(self.config, len(tokens))
        return self.states(tokens, positions, state, None, deterministic)[:2]

    def extend(
        self,
        tokens: Array,
        segments: Array,
        positions: Array,
        cache: Any,
        keep: Literal["last", "all"] = "last",
    ) -> tuple[Array, Any]:
        """Logits float32 [B, 1 or T, V] of T more columns, and the `lm.models.cache.Cache` with
        them.

        Padding (segment 0) leaves the state of its row as it is.
        """
        real = jnp.asarray(segments) > 0
        x, table, state = self.states(tokens, positions, cache.layers, real, True)
        filled = lax.dynamic_update_slice(cache.segments, segments, (0, cache.length))
        cache = cache._replace(layers=state, segments=filled, length=cache.length + x.shape[1])
        return self.head(x[:, -1:] if keep == "last" else x, table), cache

    def head(self, x: Array, table: Array) -> Array:
        """x [B, T, D], table [V, D] -> logits [B, T, V]."""
        (B, T, D), V = x.shape, len(table)
        y = logits(x.reshape(B * T, D), table) / self.config.width_ratio
        return constrain(y.reshape(B, T, V), ("batch", "seq", "vocab"))

    @nn.compact
    def states(
        self,
        tokens: Array,
        positions: Array,
        state: State,
        real: Array | None,
        deterministic: bool,
    ) -> tuple[Array, Array, State]:
        """Final states [B, T, D], the head's table, and the layers' state (h [L, B, D], c [L, B,
        C]) after `state`; without `real` [B, T] every token counts.
        """
        c = self.config
        table = _weight(self, "embed", (c.vocab_size, c.width), "vocab", "embed")
        x = constrain(jnp.take(table, tokens, axis=0), ("batch", "seq", None))
        x = (x / deviation(c, "embed")).swapaxes(0, 1)
        keys = None
        if c.dropout and not deterministic:
            keys = jax.random.split(self.make_rng("dropout"), c.layers + 1)
            keys, last = keys[:-1], keys[-1]
        every_layer = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, nn.broadcast, nn.broadcast),
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        turned = None if real is None else real.T
        x, state = every_layer(c, name="layers")(x, state, keys, (positions == 0).T, turned)
        x = x if keys is None else dropout(x, c.dropout, last)
        if c.head == "untied":
            table = _weight(self, "head", (c.vocab_size, c.width), "vocab", "embed")
        return constrain(x.swapaxes(0, 1), ("batch", "seq", None)), table, state


def fresh_state(config: LSTMConfig, batch: int) -> State:
    """The state of all layers before the first token, zeros: h [L, B, D], c float32 [L, B, C]."""
    shape = config.layers, batch
    return (
        jnp.zeros((*shape, config.width), config.dtype),
        jnp.zeros((*shape, config.memory), jnp.float32),
    )
