"""Studies of pairs: what is trained on and scored, what is written, and the verbs that load it."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import linen as nn

from experiments import pair_data, seq2seq, summarization
from lm import models, sizes
from lm.cli import main
from lm.config import UserError
from lm.data.loader import read_rows
from lm.data.pair_readers import PairsConfig
from lm.data.tokenizer import BOS, EOS, TokenizerConfig
from lm.eval.text import statistics
from lm.pretrained import Loaded
from lm.pretrained.tokenizer import from_ours
from lm.rundir import write_json
from lm.translate import answers

WORDS = ("ka", "lo", "mi", "nu", "pe", "ra")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs whose target is the source in capitals, and what a study prepares of them."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    sources = sorted({" ".join(rng.choice(WORDS, rng.integers(2, 6))) for _ in range(400)})
    (folder / "a.tsv").write_text("".join(f"{s}\t{s.upper()}\n" for s in sources))
    config = pair_data.DataConfig(
        *(PairsConfig("tsv", str(folder / "a.tsv")), TokenizerConfig("char", 128), 48),
        answer=16,
        items=7,
    )
    return pair_data.prepared(config, folder), config, folder


@pytest.fixture(scope="module")
def loaded(data):
    size = data[0].tokenizer.vocab_size
    config = sizes.ladder("2x16", vocab_size=size, activation="swiglu", context=48)
    params = nn.unbox(models.initialise(config, jax.random.key(3)))
    # Fresh weights say the same token for ever; larger ones answer to the source.
    params["layers"] = jax.tree.map(lambda w: 3 * w, params["layers"])
    return Loaded(models.build(config), params, from_ours(data[0].tokenizer), config)


def test_only_targets_have_weight(data):
    prepared, *_ = data
    rows = read_rows(prepared.train, np.arange(prepared.train.rows))
    assert prepared.train.rows < prepared.train.documents
    text = "".join(prepared.tokenizer.decode(rows.targets[rows.weights > 0]))
    assert text and text == text.upper() and "\n" not in text
    assert (rows.targets[rows.weights > 0] == EOS).sum() == prepared.train.documents


def test_held_out_pairs_are_scored_beside_a_copy(data):
    prepared, config, folder = data
    assert len(prepared.heldout) == config.items
    assert prepared.baseline == [source for source, _ in prepared.heldout]
    again = pair_data.prepared(config, folder)
    assert again.heldout == prepared.heldout and again.train.about == prepared.train.about


def test_sources_that_leave_no_room_are_not_asked(data):
    _, config, folder = data
    tight = pair_data.prepared(dataclasses.replace(config, length=30, answer=18), folder)
    assert max(len(source) for source, _ in tight.heldout) < 10
    with pytest.raises(UserError, match="no pair fits"):
        pair_data.prepared(dataclasses.replace(config, length=4), folder)


def test_the_lead_is_cut_where_it_is_best():
    train = [(f"one two three four five six seven eight nine {i}.", "one two three") for i in "ab"]
    assert pair_data.best_lead(train) == 5


def greedy(loaded, source, limit):
    """The slow way: the whole row anew for every token."""
    ids = [BOS, *loaded.tokenizer.encode(source + "\n")]
    written = []
    while len(written) < limit:
        row = np.zeros((1, 48), np.int32)
        row[0, : len(ids)] = ids
        ids.append(int(loaded.logits(row)[0, len(ids) - 1].argmax()))
        if ids[-1] == EOS:
            break
        written.append(ids[-1])
    return " ".join(loaded.tokenizer.decode(written).split())


def test_answers_are_greedy_and_in_their_order(data, loaded):
    sources = [source for source, _ in data[0].heldout]
    written = answers(loaded, sources, tokens=16)
    assert written == [greedy(loaded, source, 16) for source in sources]
    assert len(set(written)) > 1
    assert answers(loaded, ["", sources[0]], tokens=16) == ["", written[0]]


def test_an_encoder_decoder_reads_the_source_as_it_was_trained_to(data):
    """Rows of training are the oracle: the source and <eos>, padding, and the target so far."""
    tokenizer, S, limit = data[0].tokenizer, 24, 10
    config = models.EncoderDecoderConfig(
        *(tokenizer.vocab_size, 2, 16, 2, 32), source_length=S, positions="relative"
    )
    params = nn.unbox(models.initialise(config, jax.random.key(1)))
    params = jax.tree.map(lambda w: 2 * w, params)
    loaded = Loaded(models.build(config), params, from_ours(tokenizer), config)
    apply = jax.jit(loaded.model.apply)
    sources = [source for source, _ in data[0].heldout if len(source) < S][:3]
    columns = np.arange(S + limit)
    positions = np.where(columns < S, columns, columns - S)[None].astype(np.int32)
    for source, text in zip(sources, answers(loaded, sources, tokens=limit), strict=True):
        read, written = [*tokenizer.encode(source), EOS], [BOS]
        while len(written) <= limit:
            row, segments = np.zeros((2, 1, S + limit), np.int32)
            row[0, : len(read)], segments[0, : len(read)] = read, 1
            row[0, S : S + len(written)], segments[0, S : S + len(written)] = written, 1
            logits = apply({"params": params}, row, segments, positions)
            written.append(int(logits[0, S + len(written) - 1].argmax()))
            if written[-1] == EOS:
                break
        ids = [i for i in written[1:] if i != EOS]
        assert text == " ".join(tokenizer.decode(ids).split())
    assert text


def test_the_verbs_load_what_a_study_keeps(data, loaded, tmp_path, capsys, monkeypatch):
    prepared, config, _ = data
    s = seq2seq.Settings(
        *(config, loaded.config, seq2seq.optim.OptimConfig(), seq2seq.TrainConfig(1)),
        seq2seq.SeedConfig(),
    )
    seq2seq.keep(s, loaded.params, prepared, tmp_path / "model-0")
    sources = [source for source, _ in prepared.heldout][:2]
    wanted = answers(loaded, sources, tokens=16)
    checkpoint = str(tmp_path / "model-0")
    assert main(["translate", checkpoint, sources[0], "--tokens=16"]) == 0
    assert capsys.readouterr().out == wanted[0] + "\n"
    place = tmp_path / "in.txt"
    place.write_text("\n".join(sources))
    with place.open() as file:
        monkeypatch.setattr("sys.stdin", file)
        assert main(["summarize", checkpoint, "-", "--tokens=16", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found == [{"source": s, "text": t} for s, t in zip(sources, wanted, strict=True)]
    assert main(["translate", checkpoint, sources[0], "--tokens=16", "--beams=3"]) == 0
    for mistake in (["", "x"], [checkpoint, " "], [checkpoint, "x", "--beams=0"], ["nowhere", "x"]):
        assert main(["translate", *mistake]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_ladder_of_a_study_of_pairs():
    """Breaks if apt's folder or a budget is lost on the way, smoke has two sizes, or a wrong name
    trains something.
    """
    config = summarization.get_config()
    config.update({"texts": "docstrings,synopses", "lists": "somewhere"})
    points = {point["name"]: point for point in summarization.points(config)}
    assert len(points) == 8 and "data.pairs.path" not in points["docstrings-2x16"]
    assert points["synopses-4x64"]["data.pairs.path"] == "somewhere"
    assert points["synopses-4x64"]["train.tokens"] == 8 * points["docstrings-4x64"]["train.tokens"]
    config.update({"scale": "smoke", "texts": "synopses", "train": {"tokens": 1000}})
    assert [(p["name"], p["train.tokens"]) for p in summarization.points(config)] == [
        ("synopses-2x16", 100)
    ]
    config.texts = "synopsis"
    with pytest.raises(UserError, match="did you mean 'synopses'"):
        summarization.points(config)


def test_beams_are_of_the_kept_model_and_stored_outputs_stay(data, loaded, tmp_path):
    """Breaks if BEAMS is not searched with, or what was stored is scored in its place."""
    prepared, config, folder = data
    s = SimpleNamespace(model=loaded.config)
    seq2seq.keep(s, loaded.params, prepared, tmp_path / "it" / "model-0")
    sources, references = (list(texts) for texts in zip(*prepared.heldout, strict=True))
    lines = [
        {"source": a, "text": b, "reference": b, "baseline": a}
        for a, b in zip(sources, references, strict=True)
    ]
    stored = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "it" / "outputs-0.jsonl").write_text(stored)
    about = {"it": {"config": {"data": {"lang": "en", "answer": 8}}}}
    write_json(tmp_path / "study.json", {"points": [{"name": "it"}], "cell_configs": about})
    assert all(row["result"].score.value == 100 for row in seq2seq.summary(tmp_path)[:2])
    found = {r["result"].metric: r["result"].score.value for r in seq2seq.summary(tmp_path, 3)}
    written = {beams: answers(loaded, sources, tokens=8, beams=beams) for beams in (1, 3)}
    chrf = {b: statistics(w, references, ("chrf",), "en") for b, w in written.items()}
    assert written[1] != written[3]
    assert found["chrf"] == pytest.approx(chrf[3]["chrf"].value, rel=1e-6)
    made = len(list(folder.glob("pairs-*.lock")))
    pair_data.prepared(dataclasses.replace(config, beams=3), folder)
    assert len(list(folder.glob("pairs-*.lock"))) == made
