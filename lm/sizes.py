"""One dial gives a whole model; its parameters and FLOPs are counted exactly.

`ladder("2x16")` is 2 layers of width 16; names such as "7b" are larger shapes of the usual
proportions. The head size of a ladder model is the smallest even divisor of the width that reaches
16, or the whole width below that: 1, 1, 2, 4 heads at widths 8, 16, 32, 64. Rotary positions need
the room: with heads of 8, fewer seeds learn recall (experiments/LOG.md). The MLP is 4 D wide
(gelu), or 8/3 D (swiglu), where its three matrices hold as much as the two of the other.

FLOPs are those of the products, 2 per multiply-add. A sequence of T tokens costs forward

    2 T (weights of the layers and of the head) + 4 L N H T (T + 1) / 2

for only T (T + 1) / 2 pairs are seen under a causal mask, fewer through a window, and all T^2 in
both directions; a decoder has pairs with its source too. An LSTM has no pairs, and a layer of it
eight matrices of width x cells. Looking up an embedding is free, norms and other element-wise work
are left out, backward is twice forward, and recomputing it (remat, blockwise) is not counted.
"""

from dataclasses import dataclass
from typing import Any

from lm.attention.relative import BUCKETS
from lm.config import UserError, nearest
from lm.models import Config, EncoderDecoderConfig, LSTMConfig, TransformerConfig
from lm.models.config import GATED


@dataclass(frozen=True)
class Parameters:
    """Counts of parameters; `embedding` is the tables of tokens, positions and types and an untied
    head, `non_embedding` the rest.
    """

    total: int
    non_embedding: int
    embedding: int


_LARGE = {"head": "untied", "activation": "swiglu", "dtype": "bfloat16"}

# name: layers, width, heads, kv heads, mlp. Head size 128; about the size of the name with a
# vocabulary of 32,000.
NAMED: dict[str, tuple[int, int, int, int, int]] = {
    "125m": (12, 768, 6, 2, 2560),
    "350m": (24, 1024, 8, 4, 3072),
    "1b": (20, 2048, 16, 4, 5632),
    "3b": (28, 3072, 24, 8, 8192),
    "7b": (32, 4096, 32, 8, 13312),
    "13b": (40, 5120, 40, 8, 16384),
    "34b": (48, 8192, 64, 8, 22528),
    "70b": (80, 8192, 64, 8, 28672),
}


def ladder(size: str, **settings: Any) -> Any:
    """The model of a size, "LxD" (layers x width) or one of `NAMED`; `settings` are further fields,
    and win. Its kind is a Transformer's unless they say otherwise; an encoder-decoder has as many
    layers in each of its two stacks.

    Ladder models have GELU, tied embeddings and a vocabulary of 128 unless `settings` say
    otherwise; named ones have SwiGLU, an untied head, bfloat16 products and a vocabulary of 32,000.
    """
    if settings.get("kind") == "lstm":
        layers, width = _parse(size)
        return LSTMConfig(**({"vocab_size": 128, "layers": layers, "width": width} | settings))
    if size in NAMED and settings.get("kind") != "encoder_decoder":
        layers, width, heads, kv_heads, mlp = NAMED[size]
        shape: dict[str, Any] = _LARGE | {
            "vocab_size": 32_000,
            "mlp_size": mlp,
            "kv_heads": kv_heads,
        }
    else:
        layers, width = _parse(size)
        heads = _heads(width)
        shape = {"vocab_size": 128, "activation": "gelu", "kv_heads": settings.get("heads", heads)}
        gated = settings.get("activation", "gelu") in GATED
        shape["mlp_size"] = 2 * round(4 * width / 3) if gated else 4 * width
    shape |= {"layers": layers, "width": width, "heads": heads}
    if settings.get("kind") == "encoder_decoder":
        del shape["kv_heads"]
        return EncoderDecoderConfig(**(shape | settings))
    return TransformerConfig(**(shape | settings))


def _parse(size: str) -> tuple[int, int]:
    """The two numbers of "LxD"."""
    layers, x, width = size.partition("x")
    if not (x and layers.isascii() and layers.isdigit() and width.isascii() and width.isdigit()):
        raise UserError(
            f"no size {size!r}; use LAYERSxWIDTH such as 2x16, or a name,"
            f" {nearest(size, list(NAMED))}"
        )
    if int(layers) < 1 or int(width) < 4 or int(width) % 2:
        raise UserError(
            f"size {size!r} cannot be built; use 1 layer or more and an even width of 4 or more"
        )
    return int(layers), int(width)


def _heads(width: int) -> int:
    """Heads of a ladder model."""
    least = min(width, 16)
    return width // next(h for h in range(least, width + 1, 2) if width % h == 0)


def parameters(config: Config) -> Parameters:
    """Exact counts."""
    c = config
    if isinstance(c, LSTMConfig):
        tables = c.vocab_size * c.width * (2 if c.head == "untied" else 1)
        layers = c.layers * (_lstm_weights(c) + 4 * c.memory)
        return Parameters(layers + tables, layers, tables)
    if isinstance(c, EncoderDecoderConfig):
        tables = c.vocab_size * c.width * (2 if c.head == "untied" else 1)
        tables += 2 * c.context * c.width if c.positions == "learned" else 0
        layers = c.decoder.layers * (2 * _cross_weights(c) + _norm(c.decoder))
        for part in (c.encoder, c.decoder):
            layers += part.layers * (_layer_weights(part) + _layer_vectors(part)) + _top(part)
        return Parameters(layers + tables, layers, tables)
    rows = c.vocab_size * (2 if c.head == "untied" else 1) + c.token_types
    tables = c.width * (rows + (c.context if c.positions == "learned" else 0))
    layers = c.layers * (_layer_weights(c) + _layer_vectors(c))
    top = _top(c)
    if c.head == "mlm":
        biased = c.width if c.bias == "all" else 0
        top += c.width * c.width + biased + _norm(c) + c.vocab_size
    return Parameters(layers + top + tables, layers + top, tables)


def flops_forward(config: Config, length: int, *, causal: bool = True) -> int:
    """Exact FLOPs of the forward pass of one sequence; `causal=False` counts all T^2 pairs of
    attention, whatever the model sees.
    """
    c = config
    if isinstance(c, LSTMConfig):
        return 2 * length * (c.layers * _lstm_weights(c) + c.vocab_size * c.width)
    if isinstance(c, EncoderDecoderConfig):
        return _two_stacks(c, c.source_length, length - c.source_length, causal)
    weights = c.layers * _layer_weights(c) + c.vocab_size * c.width
    weights += c.width * c.width if c.head == "mlm" else 0
    pairs = _pairs(c, length) if causal else length * length
    return 2 * length * weights + 4 * c.layers * c.heads * c.head_size * pairs


def _two_stacks(c: EncoderDecoderConfig, source: int, target: int, causal: bool) -> int:
    """Forward FLOPs of a source and a target: what reads the memory is made once of the source and
    has a pair for each of its tokens and of the target's.
    """
    e, d, features = c.encoder, c.decoder, c.heads * c.head_size
    weights = d.layers * (_layer_weights(d) + _cross_weights(c)) + c.vocab_size * c.width
    pairs = _pairs(d, target) if causal else target * target
    return (
        2 * source * (e.layers * _layer_weights(e) + d.layers * _cross_weights(c))
        + 2 * target * weights
        + 4 * features * (e.layers * source**2 + d.layers * (pairs + target * source))
    )


def _pairs(c: TransformerConfig, length: int) -> int:
    """Pairs of a query and a key that it sees."""
    reach = min(c.window or length, length)  # tokens that the last one sees to its left, and itself
    behind = reach * (reach + 1) // 2 + (length - reach) * reach
    return behind if c.direction == "causal" else 2 * behind - length


def flops_per_sequence(config: Config, length: int) -> int:
    """Exact FLOPs, forward + backward, of one causal sequence of `length` tokens."""
    return 3 * flops_forward(config, length)


def flops_per_token(config: Config, length: int) -> float:
    """Mean FLOPs per token, forward + backward, in causal sequences of `length` tokens."""
    return flops_per_sequence(config, length) / length


def six_n(config: Config) -> int:
    """The convention C = 6 N D per token, N non-embedding: no attention, no head (Kaplan et al.
    2020, section 2.1).
    """
    return 6 * parameters(config).non_embedding


def _layer_weights(c: TransformerConfig) -> int:
    """Entries of the matrices of one layer: q and out, k and v, and the MLP's two or three."""
    attention = 2 * c.width * c.head_size * (c.heads + c.kv_heads)
    return attention + c.width * c.mlp_size * (3 if c.gated else 2)


def _lstm_weights(c: LSTMConfig) -> int:
    """Entries of the matrices of one layer: input and recurrent, and the projection."""
    return 8 * c.width * c.memory + (c.memory * c.width if c.projected else 0)


def _layer_vectors(c: TransformerConfig) -> int:
    """Entries of the norms and biases of one layer."""
    entries = 2 * _norm(c) + (2 * c.head_size if c.qk_norm == "rms" else 0)
    if c.bias != "none":
        entries += c.head_size * (c.heads + 2 * c.kv_heads)
    if c.bias == "all":
        entries += 2 * c.width + c.mlp_size * (2 if c.gated else 1)
    return entries


def _cross_weights(c: EncoderDecoderConfig) -> int:
    """Entries of the matrices of one layer on either side of the look into the source: queries and
    out, or keys and values.
    """
    return 2 * c.width * c.heads * c.head_size


def _top(c: TransformerConfig) -> int:
    """Entries of the norm of the final states, or of a post-norm model's embedding, and of the bias
    by distance.
    """
    return _norm(c) + (BUCKETS * c.heads if c.positions == "relative" else 0)


def _norm(c: TransformerConfig) -> int:
    """Entries of a norm over the width."""
    return c.width * (2 if c.norm == "layer" else 1)
