"""lm-eval's requests against a full forward for each, its local tasks from the command line, and
what is refused.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import linen as nn

pytest.importorskip("lm_eval", reason="the extra 'harness' is not installed")

from lm_eval.api.registry import get_model
from others import tiny

from lm.config import UserError
from lm.data import tokenizer as ours
from lm.eval.harness import OnsetLM
from lm.models import Transformer, TransformerConfig, initialise
from lm.pretrained import Loaded, load
from lm.pretrained.tokenizer import from_ours

ROOT = Path(__file__).parents[1]
TASKS = ROOT / "tests/harness"
LENGTH = 40


@cache
def loaded(**settings):
    config = TransformerConfig(104, layers=1, width=8, heads=1, kv_heads=1, mlp_size=16, **settings)
    fresh = nn.unbox(initialise(config, jax.random.key(0)))
    params = jax.tree.map(lambda p: 3 * p if p.ndim > 1 else p, fresh)
    trained = ours.train(["a b"], ours.TokenizerConfig("char", 104), ours.ASCII)
    return Loaded(Transformer(config), params, from_ours(trained), config)


@cache
def forward():
    return jax.jit(
        lambda *rows: jax.nn.log_softmax(loaded().model.apply({"params": loaded().params}, *rows))
    )


def log_p(ids):
    """log p [T, V] of what follows each of these ids."""
    row, seen = np.zeros((1, LENGTH), np.int32), np.zeros((1, LENGTH), np.int32)
    row[0, : len(ids)], seen[0, : len(ids)] = ids, 1
    return np.asarray(forward()(row, seen, np.arange(LENGTH)[None]))[0, : len(ids)]


def ids_of(text):
    return [ours.BOS, *loaded().tokenizer.encode(text)]


def naive(context, continuation, limit=LENGTH):
    whole = ids_of(context + continuation)
    n = len(continuation)
    seen = whole[-(limit + 1) :]
    p, target = log_p(seen[:-1])[-n:], np.array(whole[-n:])
    return p[np.arange(n), target].sum(), bool((p.argmax(1) == target).all())


def ask(method, *args, **settings):
    model = OnsetLM(loaded(), **settings)
    return getattr(model, method)([SimpleNamespace(args=a) for a in args]), model


def test_it_is_registered_under_our_name():
    assert get_model("onset") is OnsetLM


def test_log_likelihoods_are_those_of_a_full_forward():
    pairs = [
        *(("One two", " three"), ("One two", " four"), ("One two ", "three"), ("", "x y")),
        ("a context that is longer", " z"),
    ]
    found, _ = ask("loglikelihood", *pairs, max_length=LENGTH)
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        want = naive(context, continuation)
        if context.endswith(" "):  # the space belongs to what follows
            want = naive(context[:-1], " " + continuation)
        assert total == pytest.approx(want[0], abs=1e-4)
        assert greedy == want[1]


def test_what_does_not_fit_is_cut_at_the_left_and_said(capsys):
    (found,), model = ask("loglikelihood", ("a long context", " and more"), max_length=12)
    assert found[0] == pytest.approx(naive("a long context", " and more", 12)[0], abs=1e-4)
    assert model.truncated == 1
    assert "1 of 1 requests were above 12 tokens" in capsys.readouterr().err


def test_rolling_scores_every_character_once():
    text = "A text of thirty-four characters.."
    (found,), _ = ask("loglikelihood_rolling", (text,), max_length=16)
    whole = ids_of(text)
    want = 0.0
    for i in range(1, len(whole)):  # each with what its window holds
        first = (i - 1) // 16 * 16
        start = first if i + 16 - (i - 1) % 16 <= len(whole) else len(whole) - 17
        want += log_p(whole[start:i])[-1, whole[i]]
    assert found == pytest.approx(want, abs=1e-3)
    assert ask("loglikelihood_rolling", ("",))[0] == [0.0]


def test_generation_is_greedy_and_stops():
    """Against a loop over full forwards; the stop string is a character that comes."""
    ids = ids_of("ab")
    for _ in range(8):
        ids.append(int(log_p(ids)[-1].argmax()))
    text = loaded().tokenizer.decode(ids[3:])
    asked = [
        ("ab", {"until": [], "max_gen_toks": 8}),
        ("ab", {"until": [text[3]], "max_tokens": 8}),
    ]
    found, _ = ask("generate_until", *asked)
    assert found == [text, text[: text.index(text[3])]]


@pytest.mark.parametrize(
    ("ask_", "says"),
    [
        (lambda: OnsetLM(loaded(direction="both")), "does not read from the left to the right"),
        (lambda: OnsetLM(dataclasses.replace(loaded(), tokenizer=None)), "has no tokenizer"),
        (lambda: OnsetLM(loaded(), max_length=0), "max_length is 0"),
        (lambda: ask("loglikelihood", ("a", "")), "the continuation '' has no tokens"),
        (
            lambda: ask("generate_until", ("a", {"max_gen_toks": 40}), max_length=40),
            "an answer of 40 tokens leaves no room",
        ),
        (lambda: ask("generate_until", ("a", {"num_beams": 4})), "has 'num_beams', which is not"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(ask_, says):
    with pytest.raises(UserError, match=says):
        ask_()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("harness") / "tiny", 8)


@pytest.mark.slow
def test_local_tasks_run_from_the_command_line(lm, model, monkeypatch):
    """Without a network; accuracy is that of the log-likelihoods."""
    monkeypatch.chdir(ROOT)
    names = "onset_choice,onset_generate,onset_rolling"
    command = ["eval", model, f"--harness={names}", f"--include_path={TASKS}"]
    done = lm(*command, "--limit=6", "--json")
    assert done.code == 0, done.err
    found = {(r["task"], r["metric"]): r for r in done.json["results"]}
    assert {task for task, _ in found} == set(names.split(","))
    assert {r["n"] for r in found.values()} == {4, 6}  # there are four texts
    read = load(model)
    right = 0
    for line in (TASKS / "choices.jsonl").read_text().splitlines()[:6]:
        item = json.loads(line)
        context = f"Question: {item['question']}\nAnswer:"
        totals = [naive_of(read, context, " " + choice) for choice in item["choices"]]
        right += int(np.argmax(totals)) == item["answer"]
    assert found["onset_choice", "acc"]["value"] == pytest.approx(right / 6)
    assert 0 < found["onset_rolling", "bits_per_byte"]["value"] < 20
    assert 0 <= found["onset_generate", "exact_match"]["value"] <= 1
    assert done.json["checkpoint"] == str(model) and done.json["truncated"] == 0


def naive_of(read, context, continuation):
    before, whole = (read.tokenizer.begin(t) for t in (context, context + continuation))
    logits = np.asarray(jax.nn.log_softmax(read.logits(whole[None])))[0]
    return sum(logits[i - 1, whole[i]] for i in range(len(before), len(whole)))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((f"--include_path={TASKS}", "--harness=onset_choise"), "did you mean 'onset_choice'?"),
        (("--include_path=nowhere", "--harness=x"), "--include_path nowhere is not a folder"),
        (("--harness=",), "--harness is ''; name a task"),
        (
            (f"--include_path={TASKS}", "--harness=arc_easy"),
            "items that are not on this machine need --download",
        ),
        (("--harness=arc_easy", "--limit=0"), "--limit is 0"),
        (("--harness=arc_easy", "--nonsense"), "`lm eval --harness --help` shows what there is"),
    ],
)
def test_mistakes_on_the_command_line_are_one_sentence(lm, model, arguments, says):
    assert says in lm("eval", model, *arguments).refusal


def test_without_lm_eval_the_extra_is_named(lm, model, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    sentence = "lm-eval is not installed; install the extra: pip install 'onset-lm[harness]'"
    assert lm("eval", model, "--harness=arc_easy").refusal == sentence


@pytest.mark.slow
def test_lm_evals_own_command_line_knows_us(model):
    """By `python -m`, with all that it can."""
    tasks = ["--include_path", str(TASKS), "--tasks", "onset_choice", "--limit", "2"]
    chosen = ["--model", "onset", "--model_args", f"path={model},max_length=64"]
    command = [sys.executable, "-m", "lm.eval.harness", "run", *chosen, *tasks]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "onset_choice" in done.stdout and "|acc" in done.stdout.replace(" ", "")
