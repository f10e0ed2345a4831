"""Programs: run by Python, or read by a solver that shares no code with the generator."""

import collections
import math
import re

import numpy as np
import pytest
from turns import contexts

from lm import tasks
from lm.tasks import code

ROW = 63  # characters beside <bos> and <eos>
# Per format: a statement, the last question.
READ = (
    ("(?P<v>[a-j])=(?P<e>[^,?]+)", "[?,](?P<v>[a-j])"),
    ("(?P<v>[a-j])=(?P<e>[^;]+)", r";print\((?P<v>[a-j])\)"),
    ("(?P<v>[a-j]):(?P<e>[^ ]+)", " (?P<v>[a-j])="),
    ("(?P<e>[^|>]+)>(?P<v>[a-j])", r"\|(?P<v>[a-j])\?"),
    ("(?P<v>[a-j])=(?P<e>[^ ]+)", " (?P<v>[a-j]):"),
)


def statements(format, text):
    """Variable: its expression, in the order of the text."""
    return {m["v"]: m["e"] for m in re.finditer(READ[format][0], text)}


def chain(format, text):
    """Expressions to follow for the last question, the last first."""
    program, variable, found = statements(format, text), re.search(READ[format][1] + "$", text), []
    name = variable["v"]
    while name.isalpha():
        found.append(program[name])
        name = program[name][0]
    return found


def solve(format, text):
    *steps, value = chain(format, text)
    for step in reversed(steps):
        value = str(eval(value + step[1:]) % 10)
    return value


def plain(expressions):
    """A chain without names: 3+4*7."""
    return expressions[-1] + "".join(e[1:] for e in reversed(expressions[:-1]))


@pytest.mark.parametrize("level", list(code.CHAINS))
def test_every_turn_of_every_format_is_answered_from_its_text(level):
    """Catches wrong answers, variables used before they are set, another depth than the level's,
    formats that change keys or answers, and examples that are longer than a row."""
    first = [tasks.examples(code.program(level, f), "train", 1, 40) for f in range(tasks.FORMATS)]
    for format in range(tasks.FORMATS):
        task = code.program(level, format)
        assert (task.level, task.ability, task.format) == (str(level), "code", format)
        found = tasks.examples(task, "train", 1, 40, task.turns)
        for example, alone in zip(found, first[format], strict=True):
            assert (example.prompt, example.answer) == (alone.prompt, alone.answer)
            assert example.answer in example.choices
            turns = list(contexts(example))
            assert len(turns) == task.turns and len("".join(turns[-1])) <= ROW
            assert len(chain(format, example.prompt)) == max(level, 1)
            for text, answer in turns:
                assert solve(format, text) == answer, text
            assert len(statements(format, example.prompt)) == sum(code.CHAINS[level][0])
        said = [(e.answer, e.choices, e.key) for e in found]
        assert said == [(e.answer, e.choices, e.key) for e in first[0]]
        assert format == 0 or not {e.prompt for e in found} & {e.prompt for e in first[0]}


@pytest.mark.parametrize("level", [1, 2, 6])
def test_python_prints_the_answer(level):
    """Catches programs that do not run in their order."""
    for example in tasks.examples(code.program(level, 1), "train", 2, 60):
        printed = []
        exec(example.prompt, {"print": printed.append})
        assert str(printed[0] % 10) == example.answer


@pytest.mark.parametrize("level", [1, 2])
def test_the_key_is_the_set_of_chains(level):
    """Catches keys that know names, order or the question."""
    pairs = set()
    for e in code.program(level).generate(np.random.default_rng(0), 4000, 1):
        lines = statements(0, e.prompt)
        used = {text[0] for text in lines.values()}
        ends = [v for v in lines if v not in used]
        pairs.add((e.key, tuple(sorted(plain(chain(0, f"{e.prompt},{v}")) for v in ends))))
    assert len({k for k, _ in pairs}) == len({c for _, c in pairs}) == len(pairs)
    assert level == 2 or len(pairs) == math.comb(10, 5)


def test_no_training_program_tells_a_held_out_chain():
    """Catches a distractor, or the beginning of a longer chain, that is asked for in training and
    is a test item of its own."""
    levels = [level for level in code.CHAINS if level >= code.STRICT]
    assert len({code.program(level).held_out for level in levels}) == 1
    told, tested = set(), set()
    for level in levels:
        task = code.program(level)
        for e in tasks.examples(task, "train", 0, 1500, task.turns):
            told |= {plain(c)[:5] for c in (chain(0, t) for t, _ in contexts(e)) if len(c) >= 3}
        tested |= {plain(chain(0, e.prompt))[:5] for e in tasks.examples(task, "test", 0, 300)}
    assert len(told) > 1500 and len(tested) > 200
    assert not told & tested


@pytest.mark.parametrize(("level", "value"), [(0, 1 / 3), (1, 1 / 5), (2, 0.1), (6, 0.1)])
def test_chance_is_a_guess_among_digits(level, value):
    """Catches answers that lean to some digits, or that one operand gives away."""
    found = tasks.chance(code.program(level), n=1000)
    assert found.baselines["choices"] == pytest.approx(value)
    assert found.value < value + 4 * math.sqrt(value * (1 - value) / 1000)


@pytest.mark.parametrize("operand", range(len(code.STEPS)))
def test_no_operation_gives_its_result_away(operand):
    """Catches a step that is no bijection, as *5 or *2, after which five digits are impossible."""
    sign, k = code.STEPS[operand]
    assert {eval(f"{x}{sign}{k}") % 10 for x in range(10)} == set(range(10))


def test_answers_are_equally_likely():
    """Catches a digit that is rarer than the others."""
    found = code.program(3).generate(np.random.default_rng(0), 10_000, 1)
    counts = collections.Counter(e.answer for e in found)
    assert set(counts) == set("0123456789")
    assert all(abs(c - 1000) < 4.5 * 30 for c in counts.values())
