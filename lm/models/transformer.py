"""The decoder-only Transformer: pre-norm blocks, rotary positions, grouped queries.

    x = embed(tokens)
    x = x + out(attention(rope(q), rope(k), v))    where [q k v] = qkv(norm(x))      per layer
    x = x + down(silu(gate(y)) * up(y))            where y = norm(x)                 per layer
    logits = norm(x) head'

A document sees itself only (segments), and positions restart in each. Weights are two-dimensional
products on [B*T, D]. The columns of `qkv` are ordered by kv head, [K, (N/K queries, key, value),
H], so that a cut along K is a cut along heads. `gate` and `up` are not one, for a cut along F would
separate them; as [D, 2, F] their product takes 5 times as long on a CPU.

Width transfer (muP; Yang et al. 2022, table 8, for Adam), with m = width / base_width: hidden
weights have standard deviation 1/sqrt(fan-in) and learning rate 1/m; embedding, head and norms keep
both; the logits are multiplied by 1/m.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from lm.attention import BACKENDS, Mask, Ring, attention, rotary_attention
from lm.attention.rotary import rope_angles, rotate, split_heads
from lm.config import UserError, divides, nearest, positive, within
from lm.models.layers import dropout, logits, parameter, product, rms_norm
from lm.sharding import constrain


@dataclass(frozen=True)
class TransformerConfig:
    """Shape and numerics of a Transformer; `mlp_size` is F, `width` D, `heads` N, `kv_heads` K."""

    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp_size: int
    activation: Literal["swiglu", "gelu"] = "swiglu"
    norm_epsilon: float = 1e-6
    qk_norm: Literal["none", "rms"] = "none"
    head: Literal["tied", "untied"] = "tied"
    rope_base: float = 10_000.0
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    attention: str = "auto"
    layer_loop: Literal["scan", "unroll"] = "scan"
    remat: Literal["none", "dots", "full"] = "none"
    base_width: int = 0  # muP: the width at which learning rates are tuned; 0 is off
    loss: Literal["auto", "logits", "chunked"] = "auto"  # lm/objectives.py says what auto takes
    z_loss: float = 0.0  # training adds z_loss * lse^2 (Chowdhery et al. 2022, section 5: 1e-4)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "layers", "width", "heads", "kv_heads", "mlp_size"):
            positive(name, getattr(self, name))
        for name in ("norm_epsilon", "rope_base"):
            positive(name, getattr(self, name))
        within("base_width", self.base_width, 0)
        within("z_loss", self.z_loss, 0, 1)
        within("dropout", self.dropout, 0, 1)
        if self.dropout == 1:
            raise UserError("dropout 1 drops everything; use less than 1")
        if self.attention not in ("auto", *BACKENDS):
            remedy = nearest(self.attention, ["auto", *BACKENDS])
            raise UserError(f"attention {self.attention!r} is not a backend; {remedy}")
        divides("heads", self.heads, "width", self.width)
        divides("kv_heads", self.kv_heads, "heads", self.heads)
        if self.head_size % 2:
            raise UserError(
                f"head size {self.head_size} (width {self.width} / heads {self.heads}) is odd;"
                " rotary positions need an even one, change heads or width"
            )

    @property
    def head_size(self) -> int:
        """H."""
        return self.width // self.heads

    @property
    def group(self) -> int:
        """Query heads per kv head, N / K."""
        return self.heads // self.kv_heads

    @property
    def width_ratio(self) -> float:
        """m of muP; 1 when it is off."""
        return self.width / self.base_width if self.base_width else 1.0


def deviation(config: TransformerConfig, name: str) -> float:
    """Standard deviation of the normal initialiser of a weight; norms start at one."""
    base = config.base_width or config.width
    branch = (2 * config.layers) ** -0.5  # the residual stream grows the same at every depth
    return {
        "embed": base**-0.5,
        "head": base**-0.5,
        "qkv": config.width**-0.5,
        "out": config.width**-0.5 * branch,
        "gate": config.width**-0.5,
        "up": config.width**-0.5,
        "down": config.mlp_size**-0.5 * branch,
    }[name]


def _weight(module: Any, name: str, shape: tuple[int, ...], *axes: str | None) -> Array:
    init = nn.initializers.normal(deviation(module.config, name))
    return parameter(module, name, shape, axes, init)


def _scale(module: Any, name: str, size: int) -> Array:
    return parameter(module, name, (size,), (None,), nn.initializers.ones)


class Block(nn.Module):
    """One layer: attention, then the MLP, each on the normalised stream and added to it."""

    config: TransformerConfig

    @nn.compact
    def __call__(
        self, x: Array, key: Array | None, mask: Mask | Ring, angles: tuple
    ) -> tuple[Array, None]:
        """x [B, T, D] -> ([B, T, D], None); `key` switches dropout on."""
        c, D = self.config, self.config.width
        keys = (None, None) if key is None else jax.random.split(key)

        h = rms_norm(x, _scale(self, "norm1", D), c.norm_epsilon)
        h = self.attend(h, mask, angles)
        x = constrain(x + dropout(h, c.dropout, keys[0]), ("batch", "seq", None))

        h = rms_norm(x, _scale(self, "norm2", D), c.norm_epsilon)
        h = self.mlp(h)
        return constrain(x + dropout(h, c.dropout, keys[1]), ("batch", "seq", None)), None

    def attend(self, x: Array, mask: Mask | Ring, angles: tuple) -> Array:
        """x [B, T, D] -> [B, T, D]."""
        c = self.config
        (B, T, D), K, G, H = x.shape, c.kv_heads, c.group, c.head_size
        w = _weight(self, "qkv", (D, K * (G + 2) * H), "embed", "heads")
        qkv = product(x.reshape(B * T, D), w)
        qkv = constrain(qkv.reshape(B, T, K, G + 2, H), ("batch", "seq", "kv_heads", None, "head"))
        if c.qk_norm == "rms":
            q, k, v = split_heads(qkv)
            q = rms_norm(q, _scale(self, "q_norm", H), c.norm_epsilon)
            k = rms_norm(k, _scale(self, "k_norm", H), c.norm_epsilon)
            a = attention(rotate(q, angles), rotate(k, angles), v, mask, impl=c.attention)
        else:
            a = rotary_attention(qkv, angles, mask, impl=c.attention)
        out = _weight(self, "out", (K * G * H, D), "heads", "embed")
        return product(a.reshape(B * T, K * G * H), out).reshape(B, T, D)

    def mlp(self, x: Array) -> Array:
        """x [B, T, D] -> [B, T, D]."""
        c = self.config
        (B, T, D), F = x.shape, c.mlp_size
        x = x.reshape(B * T, D)
        h = product(x, _weight(self, "up", (D, F), "embed", "mlp"))
        if c.activation == "swiglu":
            gate = product(x, _weight(self, "gate", (D, F), "embed", "mlp"))
            h = jax.nn.silu(gate) * h
        else:
            h = jax.nn.gelu(h, approximate=True)
        return product(h, _weight(self, "down", (F, D), "mlp", "embed")).reshape(B, T, D)


class Transformer(nn.Module):
    """A decoder-only language model."""

    config: TransformerConfig

    def __call__(
        self, tokens: Array, segments: Array, positions: Array, *, deterministic: bool = True
    ) -> Array:
        """tokens, segments, positions int32 [B, T] -> logits float32 [B, T, V].

        Segments are 1.. for documents and 0 for padding. Dropout needs `deterministic=False` and
        `rngs={"dropout": key}`.
        """
        c, (B, T) = self.config, tokens.shape
        x, table = self.hidden(tokens, segments, positions, deterministic=deterministic)
        y = logits(x.reshape(B * T, c.width), table) / c.width_ratio
        return constrain(y.reshape(B, T, c.vocab_size), ("batch", "seq", "vocab"))

    @nn.compact
    def hidden(
        self, tokens: Array, segments: Array, positions: Array, *, deterministic: bool = True
    ) -> tuple[Array, Array]:
        """What the logits are the product of: final states [B, T, D] and the head's table [V, D].

        The logits are this product over `width_ratio`.
        """
        c = self.config
        table = _weight(self, "embed", (c.vocab_size, c.width), "vocab", "embed")
        x = constrain(jnp.take(table, tokens, axis=0), ("batch", "seq", None))
        keys = None
        if c.dropout and not deterministic:
            keys = jax.random.split(self.make_rng("dropout"), c.layers + 1)
            x, keys = dropout(x, c.dropout, keys[0]), keys[1:]

        dealt = isinstance(segments, Ring)  # rows that several devices share
        mask = segments if dealt else Mask(causal=True, q_segments=segments)
        angles = rope_angles(positions, c.head_size, c.rope_base)
        x, _ = _stack(c)(c, name="layers")(x, keys, mask, angles)

        x = rms_norm(x, _scale(self, "norm", c.width), c.norm_epsilon)
        if c.head == "untied":
            table = _weight(self, "head", (c.vocab_size, c.width), "vocab", "embed")
        return x, table


def _stack(config: TransformerConfig) -> Any:
    """Block repeated over depth, its parameters stacked along a leading axis `layers`."""
    block: Any = Block
    if config.remat != "none":
        keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        block = nn.remat(Block, prevent_cse=False, policy=keep if config.remat == "dots" else None)
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast, nn.broadcast),
        length=config.layers,
        unroll=config.layers if config.layer_loop == "unroll" else 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )


def initialise(config: TransformerConfig, key: Array) -> Any:
    """Fresh parameters, boxed with their logical axes; `nn.unbox` gives plain arrays."""
    row = jnp.zeros((1, 1), jnp.int32)
    return Transformer(config).init(key, row, row, row)["params"]


def abstract(config: TransformerConfig) -> Any:
    """The boxed shapes of the parameters, for any size at no cost."""
    return jax.eval_shape(lambda: initialise(config, jax.random.key(0)))


def logical_axes(config: TransformerConfig) -> Any:
    """The tree of parameters with a tuple of axis names in place of each."""

    def boxed(leaf: Any) -> bool:
        return isinstance(leaf, nn.Partitioned)

    return jax.tree.map(lambda leaf: leaf.names, abstract(config), is_leaf=boxed)


def mup_multipliers(config: TransformerConfig) -> Any:
    """The tree of parameters with a factor of Adam's learning rate: 1/m for hidden weights."""
    hidden = {"qkv", "out", "gate", "up", "down"}
    return jax.tree_util.tree_map_with_path(
        lambda path, _: 1 / config.width_ratio if path[-1].key in hidden else 1.0,
        nn.unbox(abstract(config)),
    )
