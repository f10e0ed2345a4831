"""Families of models: which tensor of a file is which parameter of ours, as literal tables.

A family is a table of rows (our parameter, the file's tensor, the layout), total over everything
that a model of it may have; a row counts where the model has the parameter. `{}` is the layer.
Nothing else in the library knows a name of a tensor.
"""

import dataclasses
from typing import Any, NamedTuple

from lm.config import UserError
from lm.pretrained import settings
from lm.pretrained.layouts import (
    Layout,
    columns,
    cross_key,
    cross_value,
    key,
    paired_key,
    paired_query,
    query,
    same,
    turned,
    value,
)


class Row(NamedTuple):
    """A tensor: the path of our parameter, the name in the file, and how it lies in ours; `gated`
    is of names that depend on whether the MLP has a gate.
    """

    ours: str
    theirs: str
    layout: Layout = same
    gated: bool | None = None


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of model of other people.

    `prefix` may be missing from all names of a file; `spare` is a pattern of tensors that say
    nothing new (buffers, heads of another task); `twins` are tensors that repeat another one.
    `older` are endings of names that are spelt otherwise in old files.
    """

    name: str
    architecture: str
    settings: type[settings.Settings]
    rows: tuple[Row, ...]
    prefix: str = ""
    spare: str = "(?!)"
    twins: tuple[tuple[str, str], ...] = ()
    older: tuple[tuple[str, str], ...] = ()


GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    settings.GPT2,
    (
        Row("embed", "transformer.wte.weight"),
        Row("position_embed", "transformer.wpe.weight"),
        Row("layers/norm1", "transformer.h.{}.ln_1.weight"),
        Row("layers/norm1_bias", "transformer.h.{}.ln_1.bias"),
        Row("layers/qkv", "transformer.h.{}.attn.c_attn.weight", columns),
        Row("layers/qkv_bias", "transformer.h.{}.attn.c_attn.bias", columns),
        Row("layers/out", "transformer.h.{}.attn.c_proj.weight"),
        Row("layers/out_bias", "transformer.h.{}.attn.c_proj.bias"),
        Row("layers/norm2", "transformer.h.{}.ln_2.weight"),
        Row("layers/norm2_bias", "transformer.h.{}.ln_2.bias"),
        Row("layers/up", "transformer.h.{}.mlp.c_fc.weight"),
        Row("layers/up_bias", "transformer.h.{}.mlp.c_fc.bias"),
        Row("layers/down", "transformer.h.{}.mlp.c_proj.weight"),
        Row("layers/down_bias", "transformer.h.{}.mlp.c_proj.bias"),
        Row("norm", "transformer.ln_f.weight"),
        Row("norm_bias", "transformer.ln_f.bias"),
        Row("head", "lm_head.weight"),
    ),
    prefix="transformer.",
    spare=r"transformer\.h\.\d+\.attn\.(masked_)?bias",
    twins=(("lm_head.weight", "transformer.wte.weight"),),
)

NEOX = Family(
    "gpt_neox",
    "GPTNeoXForCausalLM",
    settings.NeoX,
    (
        Row("embed", "gpt_neox.embed_in.weight"),
        Row("layers/norm1", "gpt_neox.layers.{}.input_layernorm.weight"),
        Row("layers/norm1_bias", "gpt_neox.layers.{}.input_layernorm.bias"),
        # Rows are [N, (query, key, value), H], which is our order with one query to a key.
        Row("layers/qkv", "gpt_neox.layers.{}.attention.query_key_value.weight", turned),
        Row("layers/qkv_bias", "gpt_neox.layers.{}.attention.query_key_value.bias"),
        Row("layers/out", "gpt_neox.layers.{}.attention.dense.weight", turned),
        Row("layers/out_bias", "gpt_neox.layers.{}.attention.dense.bias"),
        Row("layers/norm2", "gpt_neox.layers.{}.post_attention_layernorm.weight"),
        Row("layers/norm2_bias", "gpt_neox.layers.{}.post_attention_layernorm.bias"),
        Row("layers/up", "gpt_neox.layers.{}.mlp.dense_h_to_4h.weight", turned),
        Row("layers/up_bias", "gpt_neox.layers.{}.mlp.dense_h_to_4h.bias"),
        Row("layers/down", "gpt_neox.layers.{}.mlp.dense_4h_to_h.weight", turned),
        Row("layers/down_bias", "gpt_neox.layers.{}.mlp.dense_4h_to_h.bias"),
        Row("norm", "gpt_neox.final_layer_norm.weight"),
        Row("norm_bias", "gpt_neox.final_layer_norm.bias"),
        Row("head", "embed_out.weight"),
    ),
    prefix="gpt_neox.",
    spare=r"gpt_neox\.layers\.\d+\.attention\.((masked_)?bias|rotary_emb\.inv_freq)",
    twins=(("embed_out.weight", "gpt_neox.embed_in.weight"),),
)

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    settings.Llama,
    (
        Row("embed", "model.embed_tokens.weight"),
        Row("layers/norm1", "model.layers.{}.input_layernorm.weight"),
        Row("layers/qkv", "model.layers.{}.self_attn.q_proj.weight", query),
        Row("layers/qkv", "model.layers.{}.self_attn.k_proj.weight", key),
        Row("layers/qkv", "model.layers.{}.self_attn.v_proj.weight", value),
        Row("layers/qkv_bias", "model.layers.{}.self_attn.q_proj.bias", query),
        Row("layers/qkv_bias", "model.layers.{}.self_attn.k_proj.bias", key),
        Row("layers/qkv_bias", "model.layers.{}.self_attn.v_proj.bias", value),
        Row("layers/out", "model.layers.{}.self_attn.o_proj.weight", turned),
        Row("layers/norm2", "model.layers.{}.post_attention_layernorm.weight"),
        Row("layers/gate", "model.layers.{}.mlp.gate_proj.weight", turned),
        Row("layers/up", "model.layers.{}.mlp.up_proj.weight", turned),
        Row("layers/down", "model.layers.{}.mlp.down_proj.weight", turned),
        Row("norm", "model.norm.weight"),
        Row("head", "lm_head.weight"),
    ),
    prefix="model.",
    spare=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    twins=(("lm_head.weight", "model.embed_tokens.weight"),),
)
MISTRAL = dataclasses.replace(
    LLAMA, name="mistral", architecture="MistralForCausalLM", settings=settings.Mistral
)
QWEN2 = dataclasses.replace(
    LLAMA, name="qwen2", architecture="Qwen2ForCausalLM", settings=settings.Qwen2
)

_BERT_LAYER = "bert.encoder.layer.{}."
BERT = Family(
    "bert",
    "BertForMaskedLM",
    settings.Bert,
    (
        Row("embed", "bert.embeddings.word_embeddings.weight"),
        Row("position_embed", "bert.embeddings.position_embeddings.weight"),
        Row("type_embed", "bert.embeddings.token_type_embeddings.weight"),
        Row("embed_norm", "bert.embeddings.LayerNorm.weight"),
        Row("embed_norm_bias", "bert.embeddings.LayerNorm.bias"),
        Row("layers/qkv", _BERT_LAYER + "attention.self.query.weight", query),
        Row("layers/qkv", _BERT_LAYER + "attention.self.key.weight", key),
        Row("layers/qkv", _BERT_LAYER + "attention.self.value.weight", value),
        Row("layers/qkv_bias", _BERT_LAYER + "attention.self.query.bias", query),
        Row("layers/qkv_bias", _BERT_LAYER + "attention.self.key.bias", key),
        Row("layers/qkv_bias", _BERT_LAYER + "attention.self.value.bias", value),
        Row("layers/out", _BERT_LAYER + "attention.output.dense.weight", turned),
        Row("layers/out_bias", _BERT_LAYER + "attention.output.dense.bias"),
        Row("layers/norm1", _BERT_LAYER + "attention.output.LayerNorm.weight"),
        Row("layers/norm1_bias", _BERT_LAYER + "attention.output.LayerNorm.bias"),
        Row("layers/up", _BERT_LAYER + "intermediate.dense.weight", turned),
        Row("layers/up_bias", _BERT_LAYER + "intermediate.dense.bias"),
        Row("layers/down", _BERT_LAYER + "output.dense.weight", turned),
        Row("layers/down_bias", _BERT_LAYER + "output.dense.bias"),
        Row("layers/norm2", _BERT_LAYER + "output.LayerNorm.weight"),
        Row("layers/norm2_bias", _BERT_LAYER + "output.LayerNorm.bias"),
        Row("transform", "cls.predictions.transform.dense.weight", turned),
        Row("transform_bias", "cls.predictions.transform.dense.bias"),
        Row("transform_norm", "cls.predictions.transform.LayerNorm.weight"),
        Row("transform_norm_bias", "cls.predictions.transform.LayerNorm.bias"),
        Row("head_bias", "cls.predictions.bias"),
    ),
    prefix="bert.",
    spare=r"bert\.embeddings\.position_ids|bert\.pooler\..*|cls\.seq_relationship\..*",
    twins=(
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ),
    older=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
)


def _t5(side: str, block: str) -> tuple[Row, ...]:
    """What the encoder and the decoder have alike; `block` is where the MLP is."""
    own, mlp = side + ".block.{}.layer.0.", side + ".block.{}.layer." + block + "."
    return (
        Row(f"{side}/layers/norm1", own + "layer_norm.weight"),
        Row(f"{side}/layers/qkv", own + "SelfAttention.q.weight", query),
        Row(f"{side}/layers/qkv", own + "SelfAttention.k.weight", key),
        Row(f"{side}/layers/qkv", own + "SelfAttention.v.weight", value),
        Row(f"{side}/layers/out", own + "SelfAttention.o.weight", turned),
        Row(f"{side}/layers/norm2", mlp + "layer_norm.weight"),
        Row(f"{side}/layers/gate", mlp + "DenseReluDense.wi_0.weight", turned),
        Row(f"{side}/layers/up", mlp + "DenseReluDense.wi_1.weight", turned, gated=True),
        Row(f"{side}/layers/up", mlp + "DenseReluDense.wi.weight", turned, gated=False),
        Row(f"{side}/layers/down", mlp + "DenseReluDense.wo.weight", turned),
        Row(f"{side}/norm", f"{side}.final_layer_norm.weight"),
    )


_BIAS = ".block.0.layer.0.SelfAttention.relative_attention_bias.weight"
_CROSS = "decoder.block.{}.layer.1."
T5 = Family(
    "t5",
    "T5ForConditionalGeneration",
    settings.T5,
    (
        Row("embed", "shared.weight"),
        *_t5("encoder", "1"),
        Row("encoder/relative", "encoder" + _BIAS),
        *_t5("decoder", "2"),
        Row("decoder/relative", "decoder" + _BIAS),
        Row("decoder/layers/norm_cross", _CROSS + "layer_norm.weight"),
        Row("decoder/layers/cross_q", _CROSS + "EncDecAttention.q.weight", turned),
        Row("decoder/layers/cross_kv", _CROSS + "EncDecAttention.k.weight", cross_key),
        Row("decoder/layers/cross_kv", _CROSS + "EncDecAttention.v.weight", cross_value),
        Row("decoder/layers/cross_out", _CROSS + "EncDecAttention.o.weight", turned),
        Row("head", "lm_head.weight"),
    ),
    # Nothing reads the bias that the first checkpoints have between decoder and encoder.
    spare=r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
    twins=(
        ("lm_head.weight", "shared.weight"),
        ("encoder.embed_tokens.weight", "shared.weight"),
        ("decoder.embed_tokens.weight", "shared.weight"),
    ),
)

# Llama's names in GGUF; of Qwen2, whose rotation is ours, queries and keys lie as they are.
_GGUF = (
    Row("embed", "token_embd.weight"),
    Row("layers/norm1", "blk.{}.attn_norm.weight"),
    Row("layers/qkv", "blk.{}.attn_q.weight", paired_query),
    Row("layers/qkv", "blk.{}.attn_k.weight", paired_key),
    Row("layers/qkv", "blk.{}.attn_v.weight", value),
    Row("layers/qkv_bias", "blk.{}.attn_q.bias", query),
    Row("layers/qkv_bias", "blk.{}.attn_k.bias", key),
    Row("layers/qkv_bias", "blk.{}.attn_v.bias", value),
    Row("layers/out", "blk.{}.attn_output.weight", turned),
    Row("layers/norm2", "blk.{}.ffn_norm.weight"),
    Row("layers/gate", "blk.{}.ffn_gate.weight", turned),
    Row("layers/up", "blk.{}.ffn_up.weight", turned),
    Row("layers/down", "blk.{}.ffn_down.weight", turned),
    Row("norm", "output_norm.weight"),
    Row("head", "output.weight"),
)
_UNPAIRED: dict[Layout, Layout] = {paired_query: query, paired_key: key}

FAMILIES = {family.name: family for family in (GPT2, NEOX, LLAMA, MISTRAL, QWEN2, BERT, T5)}
GGUF = {
    "llama": dataclasses.replace(
        LLAMA, rows=_GGUF, prefix="", spare=r"rope_freqs\.weight", twins=()
    ),
    "qwen2": dataclasses.replace(
        QWEN2,
        rows=tuple(row._replace(layout=_UNPAIRED.get(row.layout, row.layout)) for row in _GGUF),
        prefix="",
        twins=(),
    ),
}


# Settings that say how a model is computed or trained, and not what it computes.
NUMERICS = {
    *("dropout", "dtype", "param_dtype", "attention", "layer_loop", "remat", "loss", "z_loss"),
    # A number of an encoder-decoder that may be left to others, and one that is of its data.
    *("head_width", "decoder_layers", "source_length"),
}


def family_of(c: Any) -> Family:
    """The family of which a model of ours is one, for export; raises `UserError` where none is."""
    for family in FAMILIES.values():
        try:
            again = family.settings.of(c).model(c.dtype)
        except (AttributeError, TypeError, UserError):  # it has what the family cannot say
            continue
        free = NUMERICS if getattr(c, "context", 0) else NUMERICS | {"context"}
        names = [f.name for f in dataclasses.fields(c) if f.name not in free]
        if all(getattr(again, name) == getattr(c, name) for name in names):
            return family
    raise UserError(
        f"no family of transformers ({', '.join(FAMILIES)}) has models of this shape; one with"
        " activation swiglu and nothing else out of the ordinary is a Llama"
    )
