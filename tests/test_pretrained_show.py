"""`lm weights`: what is in a model, before it is loaded; and export from the command line."""

import json
import shutil

import jax
import numpy as np
import pytest
from pretrained_cases import TINY, random_model

from lm import pretrained


def test_a_folder(lm):
    done = lm("weights", TINY, "--json")
    about = json.loads(done.out)
    assert (about["family"], about["parameters"], about["non_embedding"]) == ("llama", 5200, 3920)
    assert about["tensors"] == {"F32": 21} and about["bytes"] == 4 * 5200
    assert about["tokenizer"] is None and about["left_out"] == []
    text = lm("weights", TINY).out
    assert "5,200 (3,920 without embeddings)" in text and max(map(len, text.splitlines())) <= 100


def test_a_cell_of_ours(lm, finished):
    about = json.loads(lm("weights", f"{finished / '2x4'}:1", "--json").out)
    assert (about["family"], about["config"]["layers"]) == ("ours", 2)
    assert about["tokenizer"]["eos"] == 2


@pytest.mark.parametrize("name", ["t5", "gpt2", "bert"])
def test_every_kind_of_config_is_told(lm, name, tmp_path):
    pretrained.export(random_model(name), tmp_path / "m")
    done = lm("weights", tmp_path / "m")
    assert done.code == 0 and "2 layers of width 12, 3 heads" in done.out


def test_export(lm, tmp_path):
    done = lm("weights", TINY, f"--export={tmp_path / 'out'}")
    assert done.code == 0 and f"{tmp_path / 'out'} (llama)" in done.out
    one, other = pretrained.load(TINY), pretrained.load(tmp_path / "out")
    pairs = zip(jax.tree.leaves(one.params), jax.tree.leaves(other.params), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    assert "give a new folder" in lm("weights", TINY, f"--export={tmp_path / 'out'}").refusal


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("nowhere",), "nowhere is no model"),
        ((TINY, "--dtype=float16", "--export=x"), "no weights of 'float16'"),
        ((TINY, "--expotr=x"), "lm weights --help"),
        ((TINY / "config.json",), "does not begin with GGUF"),
    ],
)
def test_mistakes_are_one_sentence(lm, arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in lm("weights", *arguments).refusal
    assert not list(tmp_path.iterdir())


def test_tensors_that_do_not_fit_are_seen_without_loading_them(lm, tmp_path):
    shutil.copytree(TINY, tmp_path / "m")
    config = json.loads((TINY / "config.json").read_text()) | {"intermediate_size": 25}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert "of another shape (6)" in lm("weights", tmp_path / "m").refusal
