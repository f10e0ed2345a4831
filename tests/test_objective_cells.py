"""Every kind of model and every objective through the same cell: data, training, resume, rows."""

from functools import partial

import jax
import numpy as np
import pytest
import tiny

from lm import tasks
from lm.config import UserError, fingerprint, to_dict
from lm.data import prepare as packing
from lm.data import tokenizer
from lm.data.loader import read_rows
from lm.data.words import word_places, word_table
from lm.generate.fill import fill
from lm.pretrained import load
from lm.rundir import read_json
from lm.train import loop, mixture
from lm.train.cell import build_point, cells
from lm.train.objective import held_out_view

TEXT = {"text": {"task": "text", "level": "", "rows": 8}}


def settings(text="", model=None, mix=None, **train):
    """A point of ten steps; `model` and `train` say what is unusual."""
    return {
        "name": "it",
        "model": {"size": "1x8", "vocab_size": 120} | (model or {}),
        "optim": {"learning_rate": 1e-2, "warmup_tokens": 500},
        "data": {
            "length": 32,
            "source": {"kind": "folder", "path": str(text)} if text else {},
            "tokenizer": {"kind": "char", "vocab_size": 112},
            "mixture": mix or TEXT,
        },
        "train": {"tokens": 20 * 8 * 32, "chunk": 5, "checkpoint_every": 10} | train,
        "eval": {"items": 16, "text_rows": 16, "first": 10, "batch": 16},
        "seeds": {"replicas": 2, "first": 3, "vary": ["init", "data", "dropout"]},
    }


def point(*args, **more):
    return build_point(settings(*args, **more))


LSTM = {"kind": "lstm"}
BOTH = {"direction": "both"}
MASKED = {"objective": "masked", "mask_unit": "words", "mask_rate": 0.2}
HALF = {"text": TEXT["text"] | {"rows": 4}}
RECALL = {"recall": {"task": "recall", "level": "3", "rows": 4, "examples": 100}}


def run(folder, cell, stops=()):
    """Trains a cell, asked to stop at these dispatches; returns its rows and parameter hashes."""
    data = folder / "data"
    mixture.prepare(cell, data)
    for at in (*stops, None):
        count = iter(range(1, 100))
        stop = partial(lambda count, at: next(count) == at, count, at)
        try:
            loop.train(cell, folder / "it", data, stop=stop, devices=jax.devices()[:1])
        except loop.Interrupted:
            assert at is not None
    return tiny.rows(folder / "it"), tiny.params(folder / "it")


@pytest.fixture(scope="module")
def text(study):
    return study.parent / "text"


@pytest.mark.parametrize(
    "model, train, mix, metrics",
    [
        (LSTM, {}, HALF | RECALL, {"nll", "bpb", "perplexity"}),
        (BOTH, MASKED, TEXT, {"masked_nll", "masked_accuracy", "pseudo_perplexity"}),
    ],
    ids=["lstm", "masked"],
)
def test_trains_resumes_and_measures(tmp_path, text, model, train, mix, metrics):
    """Breaks if a kind or an objective is not carried on bit for bit by a resume, learns nothing,
    or is measured as another is.
    """
    (cell,) = cells("s", [point(text, model, mix, **train)])
    whole = run(tmp_path / "whole", cell)
    cut = run(tmp_path / "cut", cell, stops=(2,))
    assert whole == cut
    rows = whole[0]
    assert {key[6] for key in rows if key[3] == "text"} == metrics
    assert len(set(whole[1].values())) == 2
    losses = {
        key[2]: float.fromhex(row[0])
        for key, row in rows.items()
        if key[1:2] + key[3:4] == (0, "train")
    }
    assert losses[20] < losses[5] - 0.1
    chance = [row[2] for key, row in rows.items() if key[6] == "masked_accuracy"]
    assert all(0.2 < float.fromhex(value) < 1 for value in chance)
    assert len(chance) == (4 if train else 0)  # of the trigram, beside each accuracy
    if train:
        (guesses,) = fill(load(tmp_path / "whole" / "it:1"), "the [MASK]odel reads", top=3)
        assert len(guesses) == 3 and guesses[0].probability > 1 / 120
    assert [tiny.events(tmp_path / "cut" / "it", kind) for kind in ("replay_mismatch",)] == [[]]


def test_masks_of_evaluation_are_fixed_and_whole(tmp_path, text):
    """Breaks if two evaluations mask other tokens, or the words that masks fall on are not those
    of the text.
    """
    (cell,) = cells("s", [point(text, BOTH, **MASKED)])
    mixture.prepare(cell, tmp_path)
    with pytest.raises(UserError, match="abilities are asked of causal models"):
        mixture.prepare_test(cell, tmp_path, tasks.task("recall", "3"), 5)
    prepared = mixture.load(cell, tmp_path)
    rows = read_rows(prepared.test["text", "", 0], np.arange(8))
    once, again = (held_out_view(cell, prepared.tokenizer)(rows) for _ in range(2))
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (once.weights[8:].sum(1) == 1).all()
    table = word_table(prepared.tokenizer)
    places = word_places(rows.tokens, rows.segments, table)
    for row, place, chosen in zip(rows.tokens, places, once.weights[:8], strict=True):
        for first in np.unique(place):
            word = prepared.tokenizer.decode(row[place == first])
            if row[first] >= 4:
                assert len(word) == 1 or word.replace("_", "a").isalnum(), word
                assert len(set(chosen[place == first])) == 1, word
    batch = mixture.loaders(cell, prepared)[0].batch(0)
    np.testing.assert_array_equal(batch.targets, word_places(batch.tokens, batch.segments, table))


def test_fingerprints_and_configs_stay(finished):
    """Breaks if a setting that is newer than a run directory shows in its config."""
    plain = to_dict(point())
    assert "kind" not in plain["model"] and "pairs" not in plain["data"]
    assert not {"objective", "mask_rate", "mask_unit", "span_length"} & set(plain["train"])
    assert fingerprint(point(model=LSTM)) != fingerprint(point())
    config = read_json(finished / "1x4" / "config.json")
    assert set(config["train"]) <= set(plain["train"])


def test_a_pair_is_a_row():
    """Breaks if the target is not where the decoder begins, padding is taken for a source, a token
    of the source has weight, or the bytes are not those of the target.
    """
    trained = tokenizer.train(
        ["uno dos tres", "one two three"], tokenizer.TokenizerConfig(vocab_size=110), tasks.ALPHABET
    )
    row = mixture.pair_row(("uno dos", "one"), trained, 10, 16)
    packed = packing.pack([row, row], "fit", 16)
    packed = packing.dataclasses.replace(packed, layout="pairs", about={"source_length": 10})
    batch = read_rows(packed, np.arange(2))
    assert packed.rows == 2
    tokens, targets, weights, segments, positions = (a[1] for a in batch)
    assert trained.decode(tokens[:7]) == "uno dos" and tokens[7] == tokenizer.EOS
    assert tokens[8:10].tolist() == [0, 0] and segments.tolist() == [1] * 8 + [0, 0] + [1] * 5 + [0]
    assert positions.tolist() == [*range(10), *range(6)]
    assert tokens[10] == tokenizer.BOS and trained.decode(targets[10:13]) == "one"
    assert targets[13] == tokenizer.EOS and np.flatnonzero(weights).tolist() == [10, 11, 12, 13]
    assert packed.token_bytes[:17].sum() == 3
    assert mixture.pair_row(("uno", "one two"), trained, 10, 16) is None
    long = mixture.pair_row(("uno dos tres", "one"), trained, 10, 16)
    assert trained.decode(long.tokens[:9]) == "uno dos t" and long.tokens[9] == tokenizer.EOS


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": BOTH}, "objective 'causal' does not train a model of kind transformer of both"),
        ({"objective": "masked"}, "masked a transformer with direction 'both'"),
        ({"objective": "masked", "model": LSTM}, "does not train a model of kind lstm"),
        ({"objective": "seq2seq"}, "seq2seq an encoder_decoder"),
        ({"objective": "masked", "model": BOTH, "mix": TEXT | RECALL}, "give it text alone"),
        ({"objective": "masked", "model": BOTH | {"vocab_size": 112}}, "model.vocab_size 113"),
        ({"mask_rate": 0.5}, "choose objective masked or span"),
        ({"label_smoothing": 0.1}, "choose objective seq2seq"),
        ({"mask_unit": "word"}, "use one of 'tokens', 'words'"),
        ({"model": {"kind": "lstmm"}}, "model.kind is 'lstmm'; use one of 'transformer', 'lstm'"),
        ({"model": LSTM | {"heads": 2}}, "model.heads is not a setting"),
        ({"mix": {"pairs": {"task": "pairs", "rows": 8}}}, "cannot learn from a mixture of pairs"),
        ({"strategy": "sequence", "model": LSTM}, "share the rows of a model of kind 'lstm'"),
        ({"strategy": "sequence"} | MASKED | {"model": BOTH}, "rows of a model of both directions"),
        ({"sequence_devices": 2, "model": {"window": 8}}, "rows of a model with window 8"),
    ],
    ids=str,
)
def test_what_does_not_go_together_is_a_sentence(changes, words):
    """Breaks if a model is trained by an objective that means nothing to it, or a setting is taken
    and not read.
    """
    with pytest.raises(UserError) as error:
        point(**changes)
    assert words in str(error.value)


SEQ2SEQ = {"kind": "encoder_decoder", "source_length": 20, "activation": "gelu"}


@pytest.mark.parametrize(
    "objective, metrics",
    [
        ("span", {"span_nll", "span_accuracy"}),
        ("seq2seq", {"nll", "bpb", "perplexity", "token_accuracy"}),
    ],
)
def test_encoder_decoders_train_and_measure(tmp_path, text, objective, metrics):
    """Breaks if spans are not cut out of the text, pairs are not read, the loss does not fall, or
    what is held out is measured under another task.
    """
    (tmp_path / "pairs.tsv").write_text(
        "".join(f"say {a}{b} now\tsaid {b}\n" for a in "abcdefgh" for b in "klmnopqr")
    )
    given = settings(text, SEQ2SEQ, objective=objective)
    if objective == "seq2seq":
        given["train"] |= {"label_smoothing": 0.1}
        given["data"] |= {
            "mixture": {"pairs": {"task": "pairs", "rows": 8}},
            "pairs": {"kind": "tsv", "path": str(tmp_path / "pairs.tsv")},
        }
    given["seeds"]["replicas"] = 1
    (cell,) = cells("s", [build_point(given)])
    rows, _ = run(tmp_path, cell)
    source = "pairs" if objective == "seq2seq" else "text"
    assert {key[6] for key in rows if key[3] == source} == metrics
    losses = [float.fromhex(row[0]) for key, row in sorted(rows.items()) if key[3] == "train"]
    assert losses[-1] < losses[0] - 0.1
