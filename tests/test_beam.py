"""Beam search against transformers' on its own tiny models, and against trying every text."""

import itertools
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn
from safetensors.numpy import load_file

from lm.config import UserError
from lm.generate.beam import Beams, beam_search
from lm.generate.decode import read_prompts
from lm.models import LSTMConfig, build, initialise

FOUND = json.loads((Path(__file__).parent / "data" / "beams.json").read_text())
PARITY = Path(__file__).parents[1].parent / "shared" / "data" / "parity"
ENDING = {False: "heuristic", True: "first", "never": "never"}


@pytest.mark.parametrize("name", ["t5_v11_gated", "llama_gqa"])
def test_the_texts_and_scores_are_those_of_transformers(name):
    if not (PARITY / name).is_dir():
        pytest.skip("the parity sets are not here (shared/data/parity)")
    from lm.pretrained import load

    loaded = load(PARITY / name)
    inputs = load_file(PARITY / name / "reference.safetensors")
    rows = [
        ids[m > 0] for ids, m in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    for search in (s for s in FOUND["searches"] if s["model"] == name):
        W = search["beams"]
        rows = rows[: len(search["texts"]) // W]
        filled = read_prompts(loaded.model, loaded.params, rows, FOUND["tokens"])
        beams = Beams(W, search["penalty"], ENDING[search["early"]])
        limits = {"tokens": FOUND["tokens"], "eos": (search["end"],)}
        found = beam_search(loaded.model, loaded.params, filled, beams, **limits)
        flat = [text for row in found for text in row]
        assert [list(text.ids) for text in flat] == search["texts"], search
        np.testing.assert_allclose([t.score for t in flat], search["scores"], rtol=1e-4, atol=1e-4)


V, END, TOKENS = 5, 3, 3


def every_text(loaded, prompt, penalty):
    """The scores of all texts of at most TOKENS tokens, by the whole model."""
    model, params = loaded
    whole = jax.jit(lambda p, *columns: jax.nn.log_softmax(model.apply({"params": p}, *columns)))
    found = {}
    for length in range(1, TOKENS + 1):
        for ids in itertools.product(range(V), repeat=length):
            if END in ids[:-1] or (ids[-1] != END and length < TOKENS):
                continue
            row = np.zeros((1, len(prompt) + TOKENS), np.int32)
            row[0, : len(prompt) + length] = [*prompt, *ids]
            places = np.arange(row.shape[1])[None]
            logp = whole(params, row, np.ones_like(row), places)[0]
            total = sum(float(logp[len(prompt) + n - 1, i]) for n, i in enumerate(ids))
            found[ids] = total / length**penalty
    return found


def test_wide_beams_find_the_best_of_all_texts():
    config = LSTMConfig(V, 1, 8)
    params = nn.unbox(initialise(config, jax.random.key(0)))
    params = jax.tree.map(lambda a: a * 4, params)
    loaded = build(config), params
    prompt = np.array([1, 4], np.int32)
    filled = read_prompts(*loaded, [prompt], TOKENS)
    beams = Beams(25, 0.7, "never")
    found = beam_search(*loaded, filled, beams, tokens=TOKENS, eos=(END,))[0]
    want = every_text(loaded, prompt, 0.7)
    best = sorted(want, key=lambda ids: -want[ids])[: len(found)]
    assert [text.ids for text in found[:5]] == best[:5]
    np.testing.assert_allclose([t.score for t in found], [want[t.ids] for t in found], rtol=1e-4)


def test_widths_out_of_range_are_a_sentence():
    with pytest.raises(UserError, match="beams is 0"):
        Beams(0)
