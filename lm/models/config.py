"""What a Transformer is: one frozen record, whose defaults are the model of our own studies; and
what two of them are, an encoder and a decoder.

The settings below `z_loss` are for what others trained. Each is left out of a config where it is at
its default (`metadata={"omit": True}`), so that fingerprints from before there was a choice stay:

    GPT-2          activation gelu, norm layer, bias all, positions learned, context 1024
    GPT-NeoX       activation gelu_exact, norm layer, bias all, block parallel, head untied,
                   rotary_fraction 0.25
    Llama          the defaults, head untied; Llama 3 has rope_scaling, Mistral window, Qwen2 the
                   bias qkv
    BERT           activation gelu_exact, norm layer, bias all, block post, positions learned,
                   direction both, token_types 2, head mlm
"""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from lm.attention import BACKENDS
from lm.config import UserError, divides, nearest, positive, within

GATED = ("swiglu", "geglu")


def _new(default: Any) -> Any:
    """A setting that finished studies did not have; its default is what they did."""
    return field(default=default, metadata={"omit": True})


@dataclass(frozen=True)
class TransformerConfig:
    """Shape and numerics of a Transformer; `mlp_size` is F, `width` D, `heads` N, `kv_heads` K."""

    vocab_size: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp_size: int
    # gelu is the one by tanh; a gated MLP multiplies act(gate) by up.
    activation: Literal["swiglu", "gelu", "gelu_exact", "relu", "geglu"] = "swiglu"
    norm_epsilon: float = 1e-6
    qk_norm: Literal["none", "rms"] = "none"
    head: Literal["tied", "untied", "mlm"] = "tied"  # mlm: dense, activation, norm, tied, bias
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
    kind: Literal["transformer"] = _new("transformer")
    norm: Literal["rms", "layer"] = _new("rms")  # layer: with a bias
    # pre: x + f(norm(x)); post: norm(x + f(x)), and the embedding is normalised instead of the
    # final states; parallel: x + attention(norm1(x)) + mlp(norm2(x)).
    block: Literal["pre", "post", "parallel"] = _new("pre")
    bias: Literal["none", "qkv", "all"] = _new("none")  # all: of every product but the head's
    # relative: a bias of the scores by distance, which are not scaled, as in T5.
    positions: Literal["rotary", "learned", "relative"] = _new("rotary")
    context: int = _new(0)  # positions that the model knows, the rows of a learned table; 0: no end
    rotary_fraction: float = _new(1.0)  # of a head's features, the first, that are rotated
    # Llama 3: factor, low and high frequency factor, context before; lm/attention/rotary.py.
    rope_scaling: tuple[float, ...] = _new(())
    window: int = _new(0)  # a token sees itself and the window - 1 before it; 0: all
    direction: Literal["causal", "both"] = _new("causal")
    token_types: int = _new(0)
    head_width: int = _new(0)  # H, where it is not width / heads

    def __post_init__(self) -> None:
        for name in ("vocab_size", "layers", "width", "heads", "kv_heads", "mlp_size"):
            positive(name, getattr(self, name))
        for name in ("norm_epsilon", "rope_base"):
            positive(name, getattr(self, name))
        for name in ("base_width", "context", "window", "token_types", "head_width"):
            within(name, getattr(self, name), 0)
        within("z_loss", self.z_loss, 0, 1)
        within("dropout", self.dropout, 0, 1)
        if self.dropout == 1:
            raise UserError("dropout 1 drops everything; use less than 1")
        if self.attention not in ("auto", *BACKENDS):
            remedy = nearest(self.attention, ["auto", *BACKENDS])
            raise UserError(f"attention {self.attention!r} is not a backend; {remedy}")
        if not self.head_width:
            divides("heads", self.heads, "width", self.width)
        divides("kv_heads", self.kv_heads, "heads", self.heads)
        check_positions(self)

    @property
    def head_size(self) -> int:
        """H."""
        return self.head_width or self.width // self.heads

    @property
    def group(self) -> int:
        """Query heads per kv head, N / K."""
        return self.heads // self.kv_heads

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate."""
        return self.activation in GATED

    @property
    def attention_scale(self) -> float | None:
        """What scores are multiplied by; None for 1/sqrt(H)."""
        return 1.0 if self.positions == "relative" else None

    @property
    def rotated(self) -> int:
        """Features of a head that carry its position by rotation; an odd number is that of the
        frequencies' formula, and one more is rotated, as GPT-NeoX has it.
        """
        return int(self.head_size * self.rotary_fraction) if self.positions == "rotary" else 0

    @property
    def width_ratio(self) -> float:
        """m of muP; 1 when it is off."""
        return self.width / self.base_width if self.base_width else 1.0


@dataclass(frozen=True)
class EncoderDecoderConfig:
    """Shape and numerics of an encoder and a decoder of `layers` each; letters as above.

    T5 has positions relative, activation relu and head tied_scaled; T5 1.1 activation geglu and
    head untied.
    """

    vocab_size: int
    layers: int
    width: int
    heads: int
    mlp_size: int
    source_length: int = 0  # columns of a training row that are the source, padding included
    decoder_layers: int = 0  # 0: as many as `layers`
    head_width: int = 0  # H, where it is not width / heads
    activation: Literal["swiglu", "gelu", "gelu_exact", "relu", "geglu"] = "swiglu"
    norm: Literal["rms", "layer"] = "rms"
    norm_epsilon: float = 1e-6
    positions: Literal["rotary", "learned", "relative"] = "rotary"
    context: int = 0  # rows of a learned table, of which the encoder and the decoder have one each
    rope_base: float = 10_000.0
    head: Literal["tied", "tied_scaled", "untied"] = "tied"  # scaled: logits times width**-0.5
    dropout: float = 0.0
    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    attention: str = "auto"
    layer_loop: Literal["scan", "unroll"] = "scan"
    remat: Literal["none", "dots", "full"] = "none"
    base_width: int = 0  # muP, as for a Transformer
    loss: Literal["auto", "logits", "chunked"] = "auto"
    z_loss: float = 0.0
    kind: Literal["encoder_decoder"] = "encoder_decoder"

    def __post_init__(self) -> None:
        positive("source_length", self.source_length)
        within("decoder_layers", self.decoder_layers, 0)
        within("z_loss", self.z_loss, 0, 1)
        _ = self.encoder, self.decoder  # refuse what a stack cannot be

    @property
    def encoder(self) -> TransformerConfig:
        """The stack that reads the source."""
        return self._stack(self.layers, "both")

    @property
    def decoder(self) -> TransformerConfig:
        """The stack that writes the target; what reads the source is beside it."""
        return self._stack(self.decoder_layers or self.layers, "causal")

    @property
    def head_size(self) -> int:
        """H."""
        return self.head_width or self.width // self.heads

    @property
    def width_ratio(self) -> float:
        """m of muP; 1 when it is off."""
        return self.width / self.base_width if self.base_width else 1.0

    def _stack(self, layers: int, direction: Literal["causal", "both"]) -> TransformerConfig:
        own = {f.name for f in fields(TransformerConfig)} - {"kind", "head", "layers"}
        shared = {f.name: getattr(self, f.name) for f in fields(self) if f.name in own}
        made = {"kv_heads": self.heads, "direction": direction, "layers": layers}
        return TransformerConfig(**(shared | made))


def check_positions(c: TransformerConfig) -> None:
    """Refuses settings of positions that no model can have, or that nothing would read."""
    if c.positions == "learned" and not c.context:
        raise UserError("positions 'learned' need a row for each; give context, such as 1024")
    if c.positions != "rotary" and (c.rotary_fraction != 1 or c.rope_scaling):
        raise UserError(
            "rotary_fraction and rope_scaling are of rotary positions, positions is"
            f" {c.positions!r}; leave them out"
        )
    if not 0 < c.rotary_fraction <= 1:
        raise UserError(f"rotary_fraction is {c.rotary_fraction}; it must be above 0 and at most 1")
    if c.positions == "rotary" and c.rotary_fraction == 1 and c.head_size % 2:
        made = "" if c.head_width else f" (width {c.width} / heads {c.heads})"
        raise UserError(
            f"head size {c.head_size}{made} is odd;"
            " rotary positions need an even one, change heads or width"
        )
    if c.positions == "rotary" and not c.rotated:
        raise UserError(
            f"rotary_fraction {c.rotary_fraction} of a head of {c.head_size} rotates nothing; use"
            f" {1 / c.head_size:.3g} or more"
        )
    if c.rope_scaling and (len(c.rope_scaling) != 4 or not all(x > 0 for x in c.rope_scaling)):
        raise UserError(
            f"rope_scaling is {list(c.rope_scaling)}; it must be four positive numbers: factor, low"
            " and high frequency factor, and the context before"
        )
    if c.rope_scaling and c.rope_scaling[1] >= c.rope_scaling[2]:
        raise UserError(
            f"rope_scaling has a low frequency factor of {c.rope_scaling[1]}, not below the high"
            f" one of {c.rope_scaling[2]}; Llama 3 has 1 and 4"
        )


def deviation(config: Any, name: str) -> float:
    """Standard deviation of the normal initialiser of a weight; norms start at one, biases at zero.

    The residual stream grows the same at every depth: what is added to it is 1/sqrt(2 L) smaller.
    """
    base = config.base_width or config.width
    branch = (2 * config.layers) ** -0.5
    return {
        "embed": base**-0.5,
        "position_embed": base**-0.5,
        "type_embed": base**-0.5,
        "head": base**-0.5,
        "relative": config.width**-0.5,
        "transform": config.width**-0.5,
        "qkv": config.width**-0.5,
        "cross_q": config.width**-0.5,
        "cross_kv": config.width**-0.5,
        "cross_out": (config.heads * config.head_size) ** -0.5 * branch,
        "out": (config.heads * config.head_size) ** -0.5 * branch,
        "gate": config.width**-0.5,
        "up": config.width**-0.5,
        "down": config.mlp_size**-0.5 * branch,
    }[name]
