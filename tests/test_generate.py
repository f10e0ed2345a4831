"""Generation against a loop that runs the whole model for every token, for every kind of model."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

from lm import generate as g
from lm.config import UserError
from lm.generate import decode, encode_prompt
from lm.generate.decode import pad_left, pieces
from lm.generate.sampling import choose_sampler
from lm.models import TransformerConfig, build, initialise
from lm.models.lstm import LSTMConfig

V = 61
CONFIGS = {
    "transformer": TransformerConfig(V, 2, 32, 4, 2, 48),
    "lstm": LSTMConfig(V, 2, 24),
}


def letters(ids):
    return "".join(chr(0x41 + i) for i in ids)


TOKENIZER: Any = SimpleNamespace(
    begin=lambda text: np.array([ord(c) - 0x41 for c in text], np.int32),
    encode=lambda text: np.array([ord(c) - 0x41 for c in text], np.int32),
    decode=letters,
    eos_id=None,
    template=None,
)


@dataclasses.dataclass(frozen=True)
class Model:
    """What is needed of `lm.pretrained.Loaded`."""

    model: Any
    params: Any
    config: Any
    tokenizer: Any


def load(kind):
    config = CONFIGS[kind]
    params = nn.unbox(initialise(config, jax.random.key(1)))
    # Larger weights, so that tokens differ and the past matters.
    params = jax.tree.map(lambda a: a * 3 if a.ndim > 1 else a, params)
    return Model(build(config), params, config, TOKENIZER)


LOADED = {kind: load(kind) for kind in CONFIGS}
PROMPTS = ["HELLO", "A", "THEQUICKBROWNFOXJUMPS"]
WHOLE = jax.jit(
    lambda model, params, *columns: model.apply({"params": params}, *columns), static_argnums=0
)
LENGTH = 40


def whole_logits(loaded, ids):
    """Logits [V] after ids, by the whole model over a row of one fixed length."""
    row = np.zeros((3, 1, LENGTH), np.int32)
    row[0, 0, : len(ids)], row[1, 0, : len(ids)] = ids, 1
    row[2, 0, : len(ids)] = np.arange(len(ids))
    return np.asarray(WHOLE(loaded.model, loaded.params, *row)[0, len(ids) - 1])


def go_on(loaded, prompt, count, adjust=lambda logits, ids: logits):
    ids = list(TOKENIZER.begin(prompt))
    for _ in range(count):
        ids.append(int(np.argmax(adjust(whole_logits(loaded, ids), ids))))
    return tuple(ids[-count:])


@pytest.fixture(scope="module", params=CONFIGS)
def loaded(request):
    return LOADED[request.param]


def test_greedy_of_unequal_prompts_is_the_whole_model_token_by_token(loaded):
    """Breaks if padding is seen, positions are off, or the cache loses a column."""
    found = g.generate(loaded, PROMPTS, options=g.Options(tokens=11))
    for prompt, answer in zip(PROMPTS, found, strict=True):
        assert answer.ids == go_on(loaded, prompt, 11)
        assert (answer.text, answer.end) == (letters(answer.ids), "length")
        assert answer.prompt_tokens == len(prompt)


def test_a_long_prompt_in_pieces_is_the_same(monkeypatch):
    """Breaks if a later piece does not see an earlier one."""
    loaded = LOADED["transformer"]
    want = g.generate(loaded, PROMPTS, options=g.Options(tokens=9))
    monkeypatch.setattr(decode, "PIECE", 16)
    monkeypatch.setattr(decode, "LEAST_PIECE", 4)
    assert pieces(21) == [8, 16]
    assert pieces(17) == [4, 16]
    assert g.generate(loaded, PROMPTS, options=g.Options(tokens=9)) == want


def test_the_widths_of_pieces():
    assert pieces(1) == [16]
    assert pieces(512) == [512]
    assert pieces(513) == [16, 512]
    assert pieces(1300) == [512, 512, 512]
    tokens, segments, positions = pad_left([np.array([5, 6]), np.array([7])], 3)
    assert tokens.tolist() == [[0, 5, 6], [0, 0, 7]]
    assert segments.tolist() == [[0, 1, 1], [0, 0, 1]]
    assert positions.tolist() == [[0, 0, 1], [0, 0, 0]]


SAMPLER = choose_sampler(1.5, top_k=40, top_p=0.95)


def test_a_seed_gives_the_same_text_alone_and_among_others():
    loaded = LOADED["transformer"]
    options = [g.Options(tokens=9, seed=seed) for seed in (3, 4, 5)]
    together = g.generate(loaded, PROMPTS, SAMPLER, options)
    alone = g.generate(loaded, PROMPTS[2:], SAMPLER, options[2])
    assert together[2:] == alone
    other = g.generate(loaded, PROMPTS, SAMPLER, g.Options(tokens=9, seed=99))
    assert all(a.ids != b.ids for a, b in zip(other, together, strict=True))


def test_tokens_of_a_dispatch_change_nothing():
    found = []
    for count in (3, 8):
        options = g.Options(tokens=10, seed=1)
        prompts = LOADED["transformer"], PROMPTS[2:], SAMPLER, options
        each = list(g.stream(*prompts, per_dispatch=count))
        assert [piece.end for piece in each][-1] == "length"
        assert all(piece.end == "" for piece in each[:-1])
        found.append("".join(piece.text for piece in each))
    assert found[0] == found[1]


def test_rows_end_by_themselves():
    """Of one batch one row ends at the model's end, one at a stop string, one at its limit."""
    loaded = LOADED["transformer"]
    free = g.generate(loaded, PROMPTS, options=g.Options(tokens=12))
    end = free[0].ids[4]
    stop = letters(free[1].ids[6:8])
    first = letters(free[1].ids).index(stop)
    tokenizer = SimpleNamespace(**{**vars(TOKENIZER), "eos_id": end})
    ending = dataclasses.replace(loaded, tokenizer=tokenizer)
    options = [g.Options(12), g.Options(12, stop=(stop,)), g.Options(3)]
    found = g.generate(ending, PROMPTS, options=options)
    for answer, whole in zip(found, free, strict=True):
        kept = whole.ids[: whole.ids.index(end)] if end in whole.ids else whole.ids
        assert answer.ids == kept[: len(answer.ids)]
    assert found[0].end == "stop"
    assert found[0].ids == free[0].ids[: free[0].ids.index(end)]
    if end not in free[1].ids[: first + 2]:
        assert found[1].text == letters(free[1].ids[:first])
        assert found[1].end == "stop"
    assert len(found[2].ids) == 3 or end in free[2].ids[:3]


def test_the_penalty_counts_the_prompt_and_the_answer():
    def adjust(logits, ids):
        seen = np.isin(np.arange(V), ids)
        return np.where(seen, np.where(logits > 0, logits / 1.7, logits * 1.7), logits)

    loaded, none = LOADED["transformer"], g.Options(tokens=8)
    options = [dataclasses.replace(none, repetition_penalty=1.7), none, none]
    found = g.generate(loaded, PROMPTS, options=options)
    assert found[0].ids == go_on(loaded, PROMPTS[0], 8, adjust)
    assert found[1].ids == go_on(loaded, PROMPTS[1], 8)


def test_a_closed_stream_stops():
    pieces_ = g.stream(LOADED["transformer"], PROMPTS, options=g.Options(tokens=100))
    assert next(pieces_).row == 0
    pieces_.close()


def test_a_text_begins_as_the_model_was_trained_to_see_it():
    """Breaks if a cell, trained on texts that begin with <bos>, is asked without it."""
    begun = SimpleNamespace(**vars(TOKENIZER) | {"begin": lambda text: np.array([7, 1], np.int32)})
    loaded = dataclasses.replace(LOADED["lstm"], tokenizer=begun)
    assert encode_prompt(loaded, "B").tolist() == [7, 1]
    assert encode_prompt(loaded, np.array([1])).tolist() == [1]
    with pytest.raises(UserError, match="the prompt is empty"):
        encode_prompt(loaded, "")


@pytest.mark.parametrize(
    ("prompts", "settings", "words"),
    [
        ([""], {}, "the prompt is empty"),
        (["A" * 50], {}, "the prompt has 50 tokens; the model's context is 32"),
        ([], {}, "0 prompts"),
        (["A"], {"tokens": 0}, "tokens is 0"),
        (["A"], {"stop": ("",)}, "a stop string is empty"),
        (["A"], {"seed": -1}, "seed is -1"),
        (["A"], {"repetition_penalty": 0}, "repetition_penalty is 0"),
    ],
)
def test_bad_input_is_a_sentence_before_anything_runs(prompts, settings, words):
    config = dataclasses.replace(CONFIGS["transformer"], context=32)
    loaded = dataclasses.replace(LOADED["transformer"], config=config)
    with pytest.raises(UserError, match=words):
        g.stream(loaded, prompts, options=g.Options(**settings))


def test_an_answer_ends_with_the_context():
    config = dataclasses.replace(CONFIGS["transformer"], context=32)
    loaded = dataclasses.replace(LOADED["transformer"], config=config)
    answer = g.generate(loaded, ["A" * 30], options=g.Options(tokens=100))[0]
    assert (len(answer.ids), answer.end) == (2, "length")
