"""What a config.json says of a model: its keys, by family, and what each is called here.

A family's record has the keys that matter, with transformers' defaults; `ours` in a field names the
setting of `TransformerConfig` that it is, in both directions, and `FIXED` holds what all models of
the family share. What cannot be done here is a `Literal` of the one value that can. Other keys of
the file (dropout, initialisation, ids) change no logit and are not read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from lm.config import UserError, build, within
from lm.models import EncoderDecoderConfig, TransformerConfig

LARGEST = 1 << 24  # of any size: no vocabulary, width or context comes near it
DEEPEST = 1 << 12  # layers

Activation = Literal["gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu", "relu"]
# An activation of theirs -> ours; Llama's is always gated, and T5's says so.
ACTIVATIONS = {
    **{"gelu_new": "gelu", "gelu_pytorch_tanh": "gelu", "gelu_fast": "gelu"},
    **{"gelu": "gelu_exact", "relu": "relu", "silu": "swiglu"},
}
GATED = {"relu": "relu", "gated-gelu": "geglu", "gated-silu": "swiglu"}


def _is(ours: str, default: Any = dataclasses.MISSING) -> Any:
    """A key that is our setting `ours`."""
    return dataclasses.field(default=default, metadata={"ours": ours})


class Settings:
    """What the records of the families share: sizes are sane, and both directions."""

    CONFIG: ClassVar[type[Any]] = TransformerConfig
    FIXED: ClassVar[Mapping[str, Any]] = {}

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            size = getattr(self, field.name)
            if type(size) is int:
                deep = "layers" in field.metadata.get("ours", "")
                within(field.name, size, 0, DEEPEST if deep else LARGEST)

    def model(self, dtype: str) -> Any:
        """The config of a model of ours, of which everything has this dtype."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        given = {f: getattr(self, f.name) for f in fields if "ours" in f.metadata}
        found = {
            f.metadata["ours"]: SAID.get(f.name, _SAME)[0](value)
            for f, value in given.items()
            if value is not None
        }
        if self.CONFIG is TransformerConfig:
            found = {"kv_heads": found["heads"], "mlp_size": 4 * found["width"], **found}
        else:
            found = {"decoder_layers": found["layers"], **found}
        dtypes = {"dtype": dtype, "param_dtype": dtype}
        return build(self.CONFIG, {**found, **self.FIXED, **dtypes}, "config.json")

    @classmethod
    def of(cls, c: Any) -> Any:
        """The record of a model of ours."""
        fields = [f for f in dataclasses.fields(cls) if "ours" in f.metadata]  # type: ignore[arg-type]
        values = {f.name: getattr(c, f.metadata["ours"]) for f in fields}
        theirs = {name: SAID.get(name, _SAME)[1](value) for name, value in values.items()}
        return build(cls, theirs, "config.json")  # refuses what the family cannot say


@dataclasses.dataclass(frozen=True)
class GPT2(Settings):
    """config.json of type gpt2."""

    FIXED = {"norm": "layer", "bias": "all", "positions": "learned"}

    vocab_size: int = _is("vocab_size")
    n_positions: int = _is("context")
    n_embd: int = _is("width")
    n_layer: int = _is("layers")
    n_head: int = _is("heads")
    n_inner: int | None = _is("mlp_size", None)
    activation_function: Activation = _is("activation", "gelu_new")
    layer_norm_epsilon: float = _is("norm_epsilon", 1e-5)
    tie_word_embeddings: bool = _is("head", True)
    scale_attn_weights: Literal[True] = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    add_cross_attention: Literal[False] = False


@dataclasses.dataclass(frozen=True)
class NeoX(Settings):
    """config.json of type gpt_neox."""

    FIXED = {"norm": "layer", "bias": "all"}

    vocab_size: int = _is("vocab_size")
    hidden_size: int = _is("width")
    num_hidden_layers: int = _is("layers")
    num_attention_heads: int = _is("heads")
    intermediate_size: int = _is("mlp_size")
    max_position_embeddings: int = _is("context")
    hidden_act: Activation = _is("activation", "gelu")
    layer_norm_eps: float = _is("norm_epsilon", 1e-5)
    rotary_pct: float = _is("rotary_fraction", 0.25)
    rotary_emb_base: float = _is("rope_base", 10_000.0)
    use_parallel_residual: bool = _is("block", True)
    tie_word_embeddings: bool = _is("head", False)
    rope_type: Literal["default"] = "default"
    attention_bias: Literal[True] = True


@dataclasses.dataclass(frozen=True)
class Llama(Settings):
    """config.json of type llama, and of the types that differ from it by little."""

    vocab_size: int = _is("vocab_size")
    hidden_size: int = _is("width")
    num_hidden_layers: int = _is("layers")
    num_attention_heads: int = _is("heads")
    intermediate_size: int = _is("mlp_size")
    max_position_embeddings: int = _is("context")
    num_key_value_heads: int | None = _is("kv_heads", None)
    hidden_act: Literal["silu"] = _is("activation", "silu")
    rms_norm_eps: float = _is("norm_epsilon", 1e-6)
    rope_theta: float = _is("rope_base", 10_000.0)
    rope_scaling: tuple[float, ...] = _is("rope_scaling", ())
    tie_word_embeddings: bool = _is("head", False)
    head_dim: int | None = None
    attention_bias: Literal[False] = False
    mlp_bias: Literal[False] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_dim not in (None, self.hidden_size // max(self.num_attention_heads, 1)):
            raise UserError(
                f"head_dim is {self.head_dim}, and hidden_size / num_attention_heads"
                f" {self.hidden_size} / {self.num_attention_heads}; models can be loaded where they"
                " are equal"
            )


@dataclasses.dataclass(frozen=True)
class Mistral(Llama):
    """Llama with a window."""

    sliding_window: int | None = _is("window", 4096)


@dataclasses.dataclass(frozen=True)
class Qwen2(Llama):
    """Llama with a bias of queries, keys and values."""

    FIXED = {"bias": "qkv"}

    use_sliding_window: Literal[False] = False


@dataclasses.dataclass(frozen=True)
class Bert(Settings):
    """config.json of type bert, with the head that fills masks."""

    FIXED = {
        **{"norm": "layer", "block": "post", "bias": "all", "positions": "learned"},
        **{"direction": "both", "head": "mlm"},
    }

    vocab_size: int = _is("vocab_size")
    hidden_size: int = _is("width")
    num_hidden_layers: int = _is("layers")
    num_attention_heads: int = _is("heads")
    intermediate_size: int = _is("mlp_size")
    max_position_embeddings: int = _is("context", 512)
    type_vocab_size: int = _is("token_types", 2)
    hidden_act: Activation = _is("activation", "gelu")
    layer_norm_eps: float = _is("norm_epsilon", 1e-12)
    position_embedding_type: Literal["absolute"] = "absolute"
    is_decoder: Literal[False] = False
    add_cross_attention: Literal[False] = False
    tie_word_embeddings: Literal[True] = True


@dataclasses.dataclass(frozen=True)
class T5(Settings):
    """config.json of type t5, the first one and 1.1."""

    CONFIG = EncoderDecoderConfig
    # Of training rows, which a loaded model has none of yet: the length that T5 was trained with.
    FIXED = {"positions": "relative", "source_length": 512}

    vocab_size: int = _is("vocab_size")
    d_model: int = _is("width")
    d_kv: int = _is("head_width")
    d_ff: int = _is("mlp_size")
    num_layers: int = _is("layers")
    num_heads: int = _is("heads")
    num_decoder_layers: int | None = _is("decoder_layers", None)
    feed_forward_proj: Literal["relu", "gated-gelu", "gated-silu"] = _is("activation", "relu")
    layer_norm_epsilon: float = _is("norm_epsilon", 1e-6)
    head: Literal["tied", "tied_scaled", "untied"] = _is("head", "tied_scaled")
    relative_attention_num_buckets: Literal[32] = 32
    relative_attention_max_distance: Literal[128] = 128

    @classmethod
    def of(cls, c: EncoderDecoderConfig) -> Any:
        """The record of a model of ours, with what it leaves to be derived."""
        layers = c.decoder_layers or c.layers
        return super().of(dataclasses.replace(c, head_width=c.head_size, decoder_layers=layers))


def _names(table: Mapping[str, str]) -> tuple[Any, Any]:
    """Both directions of a table of names; of two that are one of ours the first is written, and a
    name that is not in it stays, for the record to refuse.
    """
    back = {ours: theirs for theirs, ours in reversed([*table.items()])}
    return lambda name: table.get(name, name), lambda name: back.get(name, name)


def _as_it_is(value: Any) -> Any:
    return value


_SAME = _as_it_is, _as_it_is
_CONTEXT = _as_it_is, lambda size: size or 4096

# A key whose value is said otherwise here: how theirs becomes ours, and back.
SAID: dict[str, tuple[Any, Any]] = {
    "activation_function": _names(ACTIVATIONS),
    "hidden_act": _names(ACTIVATIONS),
    "feed_forward_proj": _names(GATED),
    "tie_word_embeddings": (lambda t: "tied" if t else "untied", lambda head: head == "tied"),
    "use_parallel_residual": (lambda p: "parallel" if p else "pre", lambda b: b == "parallel"),
    "sliding_window": (lambda size: size or 0, lambda size: size or None),
    # A context of 0 has no end, and they must name one.
    "max_position_embeddings": _CONTEXT,
    "n_positions": _CONTEXT,
}


def flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with what it says in records and in several spellings among the others: the
    rotation, and T5's head. Raises `UserError` for a rotation that is not known.
    """
    found = dict(config)
    tied = config.get("tie_word_embeddings") is not False
    scaled = config.get("scale_decoder_outputs", tied)  # newer files say it apart
    found["head"] = "tied_scaled" if tied and scaled else "tied" if tied else "untied"
    rope = {**_mapping(found, "rope_scaling"), **_mapping(found, "rope_parameters")}
    if "rope_theta" in rope:
        found |= {"rope_theta": rope["rope_theta"], "rotary_emb_base": rope["rope_theta"]}
    if "partial_rotary_factor" in rope:
        found["rotary_pct"] = rope["partial_rotary_factor"]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(
            f"config.json has a rotation of type {str(kind)[:40]!r}; 'default' and 'llama3' can be"
            " loaded"
        )
    found.pop("rope_scaling", None)
    if kind == "llama3":
        found["rope_scaling"] = [rope.get(name) for name in LLAMA3]
    return found


# The four numbers of Llama 3's rotation, in our order.
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _mapping(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, Mapping):
        raise UserError(f"config.json has {name} {str(value)[:40]!r}; it must be a mapping")
    return value


def written(settings: Settings) -> dict[str, Any]:
    """The record as config.json has it, in the spelling that old and new readers know."""
    found = {k: v for k, v in dataclasses.asdict(settings).items() if v is not None}  # type: ignore[call-overload]
    found.pop("rope_type", None)  # the one there is
    if isinstance(settings, T5):
        head = found.pop("head")
        found |= {"tie_word_embeddings": head != "untied", "is_encoder_decoder": True}
        found |= {"scale_decoder_outputs": head == "tied_scaled", "decoder_start_token_id": 0}
    scaling = found.pop("rope_scaling", ())
    if scaling:
        pairs = dict(zip(LLAMA3, scaling, strict=True))
        before = {"original_max_position_embeddings": int(scaling[3])}
        found["rope_scaling"] = {"rope_type": "llama3", **pairs, **before}
    return found


def read(kind: type[Settings], config: Mapping[str, Any]) -> Settings:
    """The record of a config.json, of which other keys are left alone; raises `UserError`."""
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return build(kind, {k: v for k, v in flat(config).items() if k in known}, "config.json")
