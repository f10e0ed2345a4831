"""Recall, rules and the two controls in every format: answered from their text alone."""

import collections
import hashlib
import re

import numpy as np
import pytest
from turns import contexts

from lm import tasks
from lm.tasks import controls
from lm.tasks.recall import recall, rule

ROW = 63  # characters beside <bos> and <eos>
LEVELS = [(recall, 3), (recall, 5), (rule, 9), (rule, 11), (rule, 13)]
# Per format: an edge or pair, the question.
RECALL = (
    ("(?P<a>[A-J])(?P<b>[A-J])(?=[,?])", "[?,](?P<x>.)$"),
    ("(?P<a>[A-J])>(?P<b>[A-J])", "(?P<x>.)=$"),
    ("(?P<b>[A-J])(?P<a>[A-J])(?=[.:])", "[:.](?P<x>.)$"),
    ("(?P<a>[A-J])-(?P<b>[A-J])", "(?P<x>.):$"),
    (r"\((?P<a>[A-J])(?P<b>[A-J])\)", "(?P<x>.)=$"),
)
RULE = (
    ("(?P<a>.)>(?P<b>.)", "(?P<x>.)>$"),
    ("(?P<a>.)=(?P<b>.)", "(?P<x>.)=$"),
    (r"f\((?P<a>.)\)(?P<b>.)", r"f\((?P<x>.)\)$"),
    (None, "(?P<x>.):$"),
    (r"(?P<a>.) to (?P<b>\S)", "(?P<x>.) to $"),
)


def shown(patterns, text, most):
    """What the first `most` pairs of a prompt say."""
    found = [(m["a"], m["b"]) for m in re.finditer(patterns[0], text)]
    return dict(found[:most])


def solve_recall(format, level, text):
    patterns = RECALL[format]
    return shown(patterns, text, level)[re.search(patterns[1], text)["x"]]


def solve_rule(format, level, text):
    """By trying every slope and offset."""
    pattern, ask = RULE[format]
    if pattern:
        points = shown(RULE[format], text, 3)
    else:
        points = dict(zip("012", text.split("|")[0].split(), strict=True))
    place = int(re.search(ask, text)["x"], 17)
    points = {int(x, 17): int(y, 17) for x, y in points.items()}
    answers = {
        (a * place + b) % level
        for a in range(level)
        for b in range(level)
        if all((a * x + b) % level == y for x, y in points.items())
    }
    assert len(answers) == 1, f"{text} is answered by {answers}"
    return "0123456789abcdefg"[answers.pop()]


SOLVERS = {"recall": solve_recall, "rule": solve_rule}


@pytest.mark.parametrize(("make", "level"), LEVELS, ids=lambda x: getattr(x, "__name__", x))
def test_every_turn_of_every_format_is_answered_from_its_text(make, level):
    """Catches wrong answers, choices without the answer, formats that ask other questions, prompts
    of two formats that cannot be told apart, and examples longer than a row."""
    said = []
    for format in range(tasks.FORMATS):
        task = make(level, format)
        assert (task.level, task.ability, task.format) == (str(level), "in-context", format)
        for example in tasks.examples(task, "train", 1, 60, task.turns):
            turns = list(contexts(example))
            assert len(turns) == task.turns >= 5 and len("".join(turns[-1])) <= ROW
            assert example.answer in example.choices
            for text, answer in turns:
                assert SOLVERS[task.name](format, level, text) == answer, text
        test = tasks.items(task, "test", 0, 60)
        said.append([(e.answer, e.choices, e.key) for e in test])
        assert said[format] == said[0]
    two = {make(level, f).generate(np.random.default_rng(0), 1, 1)[0].prompt for f in range(5)}
    assert len(two) == 5


CANONICAL = {
    "recall 3": "66af1895",
    "recall 5": "7abd7702",
    "labels": "186ec6df",
    "bigram": "dd5166ce",
}


def test_canonical_prompts_have_not_changed():
    """Catches a change of the prompts, answers or draws that earlier studies were run with."""
    made = {"recall 3": recall(3), "recall 5": recall(5)}
    made |= {"labels": controls.random_labels(), "bigram": controls.bigram()}
    bits = {}
    for name, task in made.items():
        drawn = task.generate(np.random.default_rng(7), 300, task.turns)
        text = repr([(e.prompt, e.answer, e.choices, e.key, e.more) for e in drawn])
        bits[name] = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    assert bits == CANONICAL
    rows = tasks.examples(recall(5), "train", 0, 100, recall(5).turns)
    assert max(len("".join(list(contexts(e))[-1])) for e in rows) + 2 <= 33


@pytest.mark.parametrize("m", [9, 11, 13])
def test_rules_are_held_out_whole_and_their_values_are_even(m):
    """Catches a key that knows the question, slopes that give a value twice, and an uneven draw,
    which a guesser could use."""
    found = rule(m).generate(np.random.default_rng(0), 12_000, 1)
    values = collections.Counter(e.answer for e in found)
    share = 1 / m
    error = np.sqrt(share * (1 - share) / len(found))
    assert len(values) == m
    assert all(abs(v / len(found) - share) < 4.5 * error for v in values.values())
    pairs = {(e.key, e.prompt.rsplit(",", 1)[0]) for e in found}
    assert len({k for k, _ in pairs}) == len({s for _, s in pairs}) == len(pairs)
    assert all(len(set(e.choices)) == len(e.choices) == m - 3 for e in found)
    asked = collections.Counter(e.prompt[-2] for e in found)
    assert set(asked) == set("0123456789abc"[3:m])


@pytest.mark.parametrize(("m", "format"), [(9, 0), (11, 3), (13, 4)])
def test_chance_of_rules_is_a_guess_among_the_values_not_shown(m, format):
    """Catches a chance of 1/m, which forgets that three values are excluded, and a place of the
    prompt that tells the answer."""
    found = tasks.chance(rule(m, format), n=3000)
    assert found.baselines["choices"] == pytest.approx(1 / (m - 3))
    assert found.value == found.baselines["choices"]


@pytest.mark.parametrize("format", range(tasks.FORMATS))
def test_controls_ask_the_same_in_every_format(format):
    """Catches formats that lose the key or the chain, and chains that do not fit a row."""
    labels, chain = controls.random_labels(format), controls.bigram(format=format)
    plain = controls.random_labels().generate(np.random.default_rng(0), 3000, 1)
    found = labels.generate(np.random.default_rng(0), 3000, 1)
    assert [(e.answer, e.key) for e in found] == [(e.answer, e.key) for e in plain]
    assert len({e.prompt for e in found}) == len({e.key for e in found})
    base = 2 if format == 4 else 10 if format == 3 else 16
    for e in found:
        number = re.search("[0-9a-fA-F]{3,}", e.prompt.removeprefix("label of"))[0]
        assert int(number, base) == int(e.key.split(":")[1])
    letters = re.compile(f"[^{controls.STATES}]")
    for e in tasks.examples(chain, "train", 0, 50, chain.turns):
        text = e.prompt + e.answer + "".join(p + a for p, a in e.more)
        assert len(text) <= ROW
        assert letters.sub("", text.removeprefix("chain:")) == e.key.removeprefix("bigram:")
        assert len(e.more) + 1 == chain.turns == 28
    for e in tasks.items(chain, "test", 0, 50):
        seen = letters.sub("", e.prompt.removeprefix("chain:")) + e.answer
        assert e.key.removeprefix("bigram:").startswith(seen)
