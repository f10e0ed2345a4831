"""Reversed and modular addition: right sums in every format, carries drawn evenly, no leaks."""

import collections
import re
import string

import numpy as np
import pytest

from lm import tasks
from lm.tasks import arithmetic

ROW = 63  # characters beside <bos> and <eos>
# Signs as in the prompts, written down anew.
MODULAR = {10: "%", 23: "@", 59: "$", 97: "&"}
LEVELS = [
    *((arithmetic.addition, digits) for digits in (1, 2, 3, 4)),
    *((arithmetic.reversed_addition, digits) for digits in (1, 2, 3, 4)),
    *((arithmetic.modular, p) for p in MODULAR),
]


def operands(format, text, sign):
    """The two operands as they are written."""
    text = text.removeprefix("sum ") if format == 4 else text
    found = re.findall("[a-zA-Z0-9]+", text)
    assert sign in text
    return (found[3], found[1]) if format == 4 else (found[0], found[1])


def residue(p, text):
    if p == 10:
        return string.digits.index(text)
    symbols = string.ascii_lowercase + string.ascii_uppercase + string.digits
    return symbols.index(text) if p <= 62 else int(text)


def solved(name, level, format, text, answer):
    """Whether the answer is right, from the text alone."""
    sign = MODULAR[level] if name == "modular" else "~" if name == "reversed_addition" else "+"
    a, b = operands(format, text, sign)
    if name == "modular":
        return residue(level, answer) == (residue(level, a) + residue(level, b)) % level
    if name == "reversed_addition":
        assert len(a) == len(b) == level
        a, b, answer = a[::-1], b[::-1], answer[::-1]
    return len(answer) == level + 1 and int(a) + int(b) == int(answer)


@pytest.mark.parametrize(("make", "level"), LEVELS, ids=lambda x: getattr(x, "__name__", x))
def test_every_format_is_answered_from_its_text(make, level):
    """Catches wrong sums, formats that change keys or answers, and answers among no choices."""
    first = tasks.examples(make(level), "train", 1, 200)
    for format in range(tasks.FORMATS):
        task = make(level, format)
        assert (task.level, task.ability, task.format) == (str(level), "arithmetic", format)
        found = tasks.examples(task, "train", 1, 200)
        for e in found:
            assert solved(task.name, level, format, e.prompt, e.answer), e
            assert len(e.prompt + e.answer) <= ROW and (e.answer in e.choices or not e.choices)
        assert [(e.answer, e.key) for e in found] == [(e.answer, e.key) for e in first]
        assert format == 0 or not {e.prompt for e in found} & {e.prompt for e in first}


@pytest.mark.parametrize("format", range(5))
def test_one_prompt_has_one_answer(format):
    """Catches two tasks with one prompt: learned together, neither could be learned."""
    answers = collections.defaultdict(set)
    for make, level in LEVELS:
        if make is not arithmetic.addition or level == 2:
            task = make(level, format)
            for e in task.generate(np.random.default_rng(0), 4000, 1):
                answers[e.prompt].add((e.answer, task.name))
    assert max(map(len, answers.values())) == 1


def test_canonical_prompts():
    """Catches a change of the formats that published results are about."""

    def prompts(task, n=3000):
        return {e.prompt: e.answer for e in task.generate(np.random.default_rng(0), n, 1)}

    assert prompts(arithmetic.addition(1))["7+5="] == "12"
    assert prompts(arithmetic.reversed_addition(1))["7~5="] == "21"
    assert prompts(arithmetic.modular(10))["7%5="] == "2"
    assert prompts(arithmetic.modular(23))["c@k="] == "m"


def test_carries_are_those_on_paper():
    """Catches a count that forgets a carry that was itself carried over, as in 95 + 5."""
    assert arithmetic.carries(95, 5) == 2 and arithmetic.carries(123, 456) == 0
    assert arithmetic.carries(0, 0) == 0 and arithmetic.carries(9999, 1) == 4
    for a, b in np.random.default_rng(0).integers(0, 10_000, (200, 2)).tolist():
        carry = count = 0
        for place in range(4):
            carry = (a // 10**place % 10 + b // 10**place % 10 + carry) // 10
            count += carry
        assert arithmetic.carries(a, b) == count


@pytest.mark.parametrize("digits", [2, 4])
def test_numbers_of_carries_are_drawn_evenly(digits):
    """Catches plain random pairs, of which few have no carry or all of them."""
    found = arithmetic.reversed_addition(digits).generate(np.random.default_rng(0), 5000, 1)
    pairs = [map(int, e.key.removeprefix("addition:").split("+")) for e in found]
    counts = collections.Counter(arithmetic.carries(a, b) for a, b in pairs)
    share = 1 / (digits + 1)
    assert sorted(counts) == list(range(digits + 1))
    error = (share * (1 - share) / 5000) ** 0.5
    assert all(abs(c / 5000 - share) < 4 * error for c in counts.values())


def test_reversed_addition_holds_out_the_pairs_of_addition():
    """Catches a pair that is trained in one direction of writing and tested in the other."""
    plain = {e.key for e in tasks.examples(arithmetic.addition(2), "test", 0, 3000)}
    turned = {e.key for e in tasks.examples(arithmetic.reversed_addition(2), "train", 0, 6000)}
    assert len(plain) > 200 and len(turned) > 3000 and not plain & turned


@pytest.mark.parametrize("p", [23, 59])
def test_modular_has_one_key_for_both_orders(p):
    """Catches ordered keys: k@c in training would answer c@k in the test."""
    by_key = collections.defaultdict(set)
    for e in arithmetic.modular(p).generate(np.random.default_rng(0), 12_000, 1):
        by_key[e.key].add(frozenset((e.prompt[0], e.prompt[2])))
    assert {len(s) for s in by_key.values()} == {1}
    assert len(set().union(*by_key.values())) == len(by_key) > 0.95 * p * (p + 1) / 2


@pytest.mark.parametrize(("p", "items"), [(10, 30), (23, 117), (59, 600)])
def test_chance_of_modular_is_one_residue(p, items):
    """Catches sums that lean to some residues, and a test of fewer items than the page says."""
    found = tasks.chance(arithmetic.modular(p), n=1000)
    assert found.baselines["uniform"] == pytest.approx(1 / p)
    assert found.value < 1 / p + 4 * (1 / p / items) ** 0.5
    assert len(tasks.items(arithmetic.modular(p), "test", 0, 2 * items)) >= items
