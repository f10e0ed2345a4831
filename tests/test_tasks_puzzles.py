"""Parity, ListOps, Dyck and unscramble in every format, answered by solvers that share no code with
the generators."""

import collections
import functools
import itertools
import math
import re

import numpy as np
import pytest

from lm import tasks
from lm.tasks.puzzles import dyck, listops, parity, unscramble

ROW = 63  # characters beside <bos> and <eos>
LEVELS = [
    *((parity, bits) for bits in (10, 14, 20)),
    *((listops, depth) for depth in (1, 2, 3)),
    *((dyck, kinds) for kinds in (2, 3, 4)),
    *((unscramble, length) for length in (3, 4, 5, 6)),
]
COMMAS = {
    "parity": (",", " ", " ", "", "."),
    "listops": (",", " ", ";", " ", ";"),
    "dyck": (",", ".", " ", "|", ";"),
    "unscramble": (",", " ", "", "; ", "|"),
}


@functools.cache
def train(make, level, format):
    """(question without comma, answer) of the turns of training examples, by example."""
    task = make(level, format)
    comma = COMMAS[task.name][format]
    found = []
    for e in tasks.examples(task, "train", 1, 400, task.turns):
        assert len(e.prompt + e.answer) + sum(len(p + a) for p, a in e.more) <= ROW
        assert len(e.more) < task.turns
        assert all(p.startswith(comma) for p, _ in e.more)
        more = [(p.removeprefix(comma), a) for p, a in e.more]
        found.append([(e.prompt, e.answer), *more])
    return found


# Per format: zero, one, and the rest of a question.
PARITY = (("0", "1", "="), ("a", "b", "[?]"), ("-", "[+]", ":"), ("0", "1", r"[\[\]]"))
PARITY += (("x", "o", "^odd |[?]"),)


def bits_of(format, text):
    zero, one, rest = PARITY[format]
    text = re.sub(one, "1", re.sub(zero, "0", re.sub(rest, "", text)))
    assert set(text) <= {"0", "1"}
    return np.array([int(c) for c in text])


@functools.cache
def counted(level, format):
    """The one triple of places whose parity agrees with all answers of training."""
    turns = [turn for row in train(parity, level, format) for turn in row]
    bits = np.array([bits_of(format, prompt) for prompt, _ in turns])
    answers = np.array([int(a) for _, a in turns])
    triples = [np.array(t) for t in itertools.combinations(range(level), 3)]
    agree = [t for t in triples if (bits[:, t].sum(axis=1) % 2 == answers).all()]
    assert len(agree) == 1
    return agree[0]


def solve_parity(level, format, text):
    return str(bits_of(format, text)[counted(level, format)].sum() % 2)


DIGITS = ("", " ", ",", "", "[.]")
NODES = (
    r"\((?P<o>[v^m+])(?P<x>X)\)",
    r"\[(?P<o>[nxds]) (?P<x>X)\]",
    r"(?P<o>min|max|med|sum)\((?P<x>X)\)",
    "<(?P<x>X)(?P<o>[_~|&])>",
    r"(?P<o>[LHMS])\((?P<x>X)\)",
)
NAMES = (("v", "^", "m"), ("n", "x", "d"), ("min", "max", "med"), ("_", "~", "|"), "LHM")


def solve_listops(level, format, text):
    """Replaces an innermost node by its value until none is left."""
    node = NODES[format].replace("X", DIGITS[format].join(3 * ["[0-9]"]))

    def value(m):
        x = sorted(int(c) for c in re.findall("[0-9]", m["x"]))
        lowest, highest, median = NAMES[format]
        among = {lowest: x[0], highest: x[2], median: x[1]}
        return str(among.get(m["o"], sum(x) % 10))

    for _ in range(level):
        text, times = re.subn(node, value, text)
        assert times == 1
    return re.fullmatch("(?:eval )?([0-9])(?:=|[?]|:| -> )", text)[1]


def solve_dyck(level, format, text):
    """Deletes pairs that stand together until none does."""
    word = re.sub(r"[^()\[\]{}<>]", "", re.sub("^close ", "", text))
    assert word[-1] in ")]}>", "the answer stands beside the question"
    while word != (shorter := re.sub(r"\(\)|\[\]|\{\}|<>", "", word)):
        word = shorter
    return dict(zip("([{<", ")]}>", strict=True))[word[-1]]


STATEMENTS = ("!", ":", "=", "word ", "* ")


@functools.cache
def lexicon(level, format):
    """The words that are stated in training, by their letters."""
    turns = [t for row in many(level, format) for t in row if t[0] == STATEMENTS[format]]
    words = {word for _, word in turns}
    assert len({"".join(sorted(w)) for w in words}) == len(words) == 500
    return {"".join(sorted(w)): w for w in words}


@functools.cache
def many(level, format):
    """Turns of enough training examples to state each of 500 words."""
    task = unscramble(level, format)
    comma = COMMAS["unscramble"][format]
    found = tasks.examples(task, "train", 2, 10_000 // (task.turns - 1), task.turns)
    return [[(e.prompt, e.answer), *((p.removeprefix(comma), a) for p, a in e.more)] for e in found]


def solve_unscramble(level, format, text):
    if text == STATEMENTS[format]:
        return None
    letters = re.sub("[^a-z]", "", text.removeprefix("sort "))
    # One lexicon for all formats; it is read off two of them.
    return lexicon(level, 3 * (format == 3))["".join(sorted(letters))]


SOLVERS = {
    "parity": solve_parity,
    "listops": solve_listops,
    "dyck": solve_dyck,
    "unscramble": solve_unscramble,
}


@pytest.mark.parametrize(("make", "level"), LEVELS, ids=lambda x: getattr(x, "__name__", x))
def test_every_turn_of_every_format_is_answered_from_its_text(make, level):
    """Catches wrong answers, held-out words that training never states, formats that ask other
    questions, and examples longer than a row."""
    said = []
    for format in range(tasks.FORMATS):
        task = make(level, format)
        ability = "logic" if make is listops else "control"
        assert (task.level, task.ability, task.format) == (str(level), ability, format)
        test = tasks.items(task, "test", 0, 40)
        turns = [(e.prompt, e.answer) for e in test]
        turns += [turn for row in train(make, level, format)[:40] for turn in row]
        for text, answer in turns:
            assert SOLVERS[task.name](level, format, text) in (answer, None), text
        assert all(e.answer in e.choices for e in test)
        said.append([(e.answer, e.choices, e.key) for e in test])
        assert said[format] == said[0]


@pytest.mark.parametrize(
    ("make", "level"), [(parity, 10), (listops, 1), (dyck, 2), (unscramble, 4)]
)
def test_no_training_turn_asks_what_is_held_out(make, level):
    """Catches a leak through further turns, which are not filtered by their key."""
    task = make(level)
    drawn = task.generate(np.random.default_rng(3), 20_000, 1)
    split = {e.prompt: tasks.split_of(e.key, task.held_out) for e in drawn}
    held_out = {prompt for prompt, s in split.items() if s != "train"}
    rows = many(level, 0) if make is unscramble else train(make, level, 0)
    asked = {prompt for row in rows for prompt, _ in row[1:]}
    assert not asked & held_out and len(held_out) > 50
    if make is unscramble:  # by word: a word has 24 orders
        words = {e.answer for e in drawn if e.prompt in held_out}
        assert words and not words & {w for row in rows for p, w in row if p != "!"}


def test_parity_is_balanced_in_every_split_and_told_by_no_two_bits():
    """Catches a key that knows a bit of the subset: the test would hold more of one answer."""
    task = parity(10)
    found = {e.prompt: e for e in task.generate(np.random.default_rng(0), 20_000, 1)}
    assert len(found) == 1024
    by_key = collections.defaultdict(list)
    for e in found.values():
        by_key[e.key].append(e)
    assert len(by_key) == 128
    bits = {p: bits_of(0, p) for p in found}
    for items in by_key.values():
        assert sorted(e.answer for e in items) == 4 * ["0"] + 4 * ["1"]
        table = np.array([bits[e.prompt] for e in items])
        answers = np.array([int(e.answer) for e in items])
        assert (table.std(axis=0) > 0).sum() == 3
        for i, j in itertools.product(counted(10, 0), repeat=2):
            both = table[:, i] == table[:, j]
            assert answers[both].mean() == 0.5


def test_listops_has_one_key_for_all_orders_of_arguments():
    """Catches keys that know the order: (v35 8) in training would answer (v853) in the test."""
    drawn = listops(1).generate(np.random.default_rng(0), 20_000, 1)
    pairs = {(e.key, e.prompt[1] + "".join(sorted(e.prompt[2:5]))) for e in drawn}
    assert len({k for k, _ in pairs}) == len({p for _, p in pairs}) == len(pairs)
    assert len(pairs) == 4 * math.comb(12, 3)
    deep = listops(2).generate(np.random.default_rng(0), 20_000, 1)
    orders = collections.defaultdict(set)
    for e in deep:
        orders[e.key].add(e.prompt)
    assert max(map(len, orders.values())) > 1
    assert all(len({tuple(sorted(p)) for p in o}) == 1 for o in orders.values())


def test_dyck_has_one_key_for_all_names_of_brackets():
    """Catches keys that know the kind: renaming a training word would answer a held-out one."""
    drawn = dyck(3).generate(np.random.default_rng(0), 20_000, 1)
    key = {e.prompt: e.key for e in drawn}
    swap, shared = str.maketrans("([])", "[()]"), 0
    for prompt, found in key.items():
        other = prompt.translate(swap)
        shared += other != prompt and other in key
        assert key.get(other, found) == found
    assert shared > 1000
    answers = collections.Counter(e.answer for e in drawn)
    assert all(abs(n / 20_000 - 1 / 3) < 0.015 for n in answers.values())


def test_letters_are_shuffled_evenly():
    """Catches scrambles that leave the word out or prefer it: the order would tell something."""
    drawn = unscramble(3).generate(np.random.default_rng(0), 12_000, 1)
    orders = collections.Counter(
        tuple(e.prompt.index(letter) for letter in e.answer) for e in drawn
    )
    assert len(orders) == 6
    assert all(abs(n / 12_000 - 1 / 6) < 4.5 * math.sqrt(5 / 36 / 12_000) for n in orders.values())


@pytest.mark.parametrize("format", [0, 3])
def test_chance_of_listops_is_that_of_copying_an_argument(format):
    """Catches a chance of 1/10, which an argument that is copied beats by far."""
    every = list(itertools.product("v^m+", *3 * ["0123456789"]))
    right = collections.defaultdict(collections.Counter)
    for o, *x in every:
        right[x[0]][solve_listops(1, 0, f"({o}{''.join(x)})=")] += 1
    share = sum(c.most_common(1)[0][1] for c in right.values()) / len(every)
    found = tasks.chance(listops(1, format), n=4000)
    assert found.value == pytest.approx(share, abs=0.03)
    assert share == pytest.approx(0.325)


@pytest.mark.parametrize(
    ("make", "level", "low", "high"),
    [
        (parity, 10, 0.5, 0.5),
        (parity, 20, 0.5, 0.5),
        (dyck, 2, 0.5, 1 / 4 + 3 / 4 / 2),
        (dyck, 4, 0.25, 1 / 4 + 3 / 4 / 4),
        (unscramble, 3, 1 / 2, 1 / 2),
        (unscramble, 6, 1 / 36, 1 / 36),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_chance_is_what_the_format_allows(make, level, low, high):
    """Catches shortcuts: a bit, a place of the word, an order of letters that tells the answer."""
    found = tasks.chance(make(level), n=2000)
    assert found.baselines["choices"] == pytest.approx(1 / level if make is dyck else low)
    assert low - 1e-9 <= found.value < high + 3.5 * math.sqrt(high * (1 - high) / 2000)
