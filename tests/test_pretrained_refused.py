"""Weights and configs that cannot be are refused in one sentence, which names both sides."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from pretrained_cases import TINY, change_config, random_model, save, tensors_of

from lm import pretrained
from lm.config import UserError


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a: a.pop("model.norm.weight"), r"- missing \(1\): model\.norm\.weight"),
        (lambda a: a.update(extra=np.zeros(2, "f4")), r"\+ not known \(1\): extra"),
        (
            lambda a: a.update({"model.norm.weight": np.zeros(17, "f4")}),
            r"of another shape \(1\): model\.norm\.weight \[17\] instead of \[16\]",
        ),
        (lambda a: a.clear(), r"- missing \(21\): model\.embed_tokens\.weight, .*, \.\.\.;"),
        (
            lambda a: a.update({"x\n\x1b[2J" * 99: np.zeros(2, "f4")}),
            r"not known \(1\): '?\"?'x\\\\?n",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_listed(change, says, tmp_path):
    shutil.copytree(TINY, tmp_path / "m")
    arrays = tensors_of(TINY)
    change(arrays)
    save(tmp_path / "m", arrays)
    with pytest.raises(UserError, match=says) as error:
        pretrained.load(tmp_path / "m")
    assert len(str(error.value)) < 1500


def test_a_tied_copy_that_is_none_is_refused(tmp_path):
    shutil.copytree(TINY, tmp_path / "m")
    change_config(tmp_path / "m", tie_word_embeddings=True)
    with pytest.raises(UserError, match="ties lm_head.weight to model.embed_tokens.weight"):
        pretrained.load(tmp_path / "m")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": ["llama"]}, "model_type .'llama'., which cannot be loaded"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; use one of 'silu'"),
        ({"hidden_size": "16"}, "hidden_size is '16'"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"hidden_size": 1 << 40}, "hidden_size is 1099511627776; it must be between"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"num_attention_heads": 0}, "head_dim is 4, and"),
        ({"num_key_value_heads": 3}, "kv_heads 3 does not divide heads 4"),
        ({"head_dim": 8}, "head_dim is 8"),
        ({"attention_bias": True}, "attention_bias is True; use one of False"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotation of type 'yarn'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope_scaling.0. is None"),
        ({"rope_parameters": "yarn"}, "must be a mapping"),
        ({"rms_norm_eps": 0}, "norm_epsilon is 0"),
        ({"intermediate_size": 25}, "of another shape .6.: model.layers.0.mlp.gate_proj.weight"),
        ({"num_hidden_layers": 4000}, "- missing .35,982.:"),
    ],
)
def test_a_config_that_cannot_be_is_refused(more, says, tmp_path):
    shutil.copytree(TINY, tmp_path / "m")
    change_config(tmp_path / "m", **more)
    with pytest.raises(UserError, match=says):
        pretrained.load(tmp_path / "m")


def test_what_is_no_model_is_refused(tmp_path):
    def refused(says: str, path: Path) -> None:
        with pytest.raises(UserError, match=says):
            pretrained.load(path)

    refused("is no model; give", tmp_path)
    refused("is no model; give", tmp_path / "nothing")
    shutil.copytree(TINY, tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    refused("no model.safetensors and no", tmp_path / "m")
    (tmp_path / "m" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused("is a pickle, which runs what is in it", tmp_path / "m")
    for text in ("", "[]", '{"a":1,"a":1}', "NaN", "[" * 10**6, "1" * 5000, '{"model_type":NaN}'):
        (tmp_path / "m" / "config.json").write_text(text)
        refused("config.json is", tmp_path / "m")
    (tmp_path / "m" / "config.json").write_bytes(b" " * (1 << 21))
    refused("at most 1,048,576 are read", tmp_path / "m")
    (tmp_path / "x.bin").write_bytes(b"weights")
    refused("does not begin with GGUF", tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("ids", "mask", "says"),
    [
        ([[40]], None, "have the id 40; this model has 0 to 39"),
        ([[-1]], None, "have the id -1"),
        ([[0] * 65], None, "context is 64"),
        ([0, 1], None, "give whole numbers"),
        ([[]], None, "one token or more"),
        ([[0.5]], None, "give whole numbers"),
        ([[1, 2]], [[1]], "attention_mask has the shape"),
        ([[1, 2]], [[1, 2]], "others than 0 and 1"),
    ],
)
def test_ids_that_a_model_does_not_have_are_refused(ids, mask, says):
    loaded = pretrained.load(TINY)
    with pytest.raises(UserError, match=says):
        loaded.logits(np.array(ids), None if mask is None else np.array(mask))
    with pytest.raises(UserError, match="for an encoder-decoder"):
        loaded.logits(np.array([[1]]), decoder_input_ids=np.array([[1]]))


def test_an_encoder_decoder_wants_a_target_for_each_source():
    loaded = random_model("t5")
    source = np.array([[1, 2], [3, 4]])
    for target, says in (
        (None, "decoder_input_ids are missing"),
        (source[:1], "have 1 rows and input_ids 2"),
        (source + 22, "decoder_input_ids have the id 26"),
    ):
        with pytest.raises(UserError, match=says):
            loaded.logits(source, decoder_input_ids=target)
