"""Hop, boolean and syllogism: answered from their text alone, in every format and turn, by solvers
that share no code with the generators."""

import collections
import itertools
import math
import re

import numpy as np
import pytest
from turns import contexts

from lm import tasks
from lm.tasks import logic

ROW = 63  # characters beside <bos> and <eos>
LEVELS = [
    *((logic.hop, level) for level in (1, 2, 3, 4)),
    *((logic.boolean, level) for level in (1, 2, 3, 4)),
    *((logic.syllogism, level) for level in (1, 2)),
]


# Per format: what ends the graph, an edge, the last question.
HOP = (
    (r"\?", "(?P<a>[A-L])(?P<b>[A-L])", r"(?P<h>\d)(?P<x>[A-L])"),
    (";", "(?P<a>[A-L])>(?P<b>[A-L])", r"(?P<x>[A-L])(?P<h>\d)="),
    (":", "(?P<b>[A-L])(?P<a>[A-L])", r"(?P<h>\d)(?P<x>[A-L])"),
    (" ", "(?P<a>[A-L])-(?P<b>[A-L])", r"(?P<h>\d) from (?P<x>[A-L]):"),
    (r"\d", r"\((?P<a>[A-L])(?P<b>[A-L])\)", r"(?P<h>\d)\*(?P<x>[A-L])="),
)


def graph(format, text):
    """The edges of a prompt."""
    end, edge, _ = HOP[format]
    return {m["a"]: m["b"] for m in re.finditer(edge, re.split(end, text)[0])}


def solve_hop(format, text):
    question = re.search(HOP[format][2] + "$", text)
    node = question["x"]
    for _ in range(int(question["h"])):
        node = graph(format, text)[node]
    return node


# Per format: sign that keeps, sign that negates, and, or, exclusive or.
BOOLEAN = ("+-&|^", ".!*+%", "ynAOX", "=~^v#", "pq&/,")


def formula(format, text):
    """The formula of a prompt in Python: literals are digits, operators & | ^."""
    keep, negate, *operators = BOOLEAN[format]
    text = re.sub(r"^(eval |\? |<)|( is |=|:| >|>)$", "", text)
    text = re.sub(re.escape(keep) + "([01])", r"\1", text)
    text = re.sub(re.escape(negate) + "([01])", lambda m: str(1 - int(m[1])), text)
    table = dict(zip(operators, "&|^", strict=True))
    return "".join(table.get(character, character) for character in text)


def solve_boolean(format, text):
    python = formula(format, text)
    assert re.fullmatch("[01&|^()]+", python), python
    return "FT"[eval(python)]


SYLLOGISM = (
    ("([A-J])<([A-J])", "([A-J])#([A-J])", "([A-J])([A-J])", False),
    ("([A-J]) is ([A-J])(?=[.])", "([A-J]) no ([A-J])", r"([A-J]) is ([A-J])\?", False),
    ("([A-J])>([A-J])", "([A-J])!([A-J])", "([A-J]):([A-J])=", True),
    ("all ([A-J]) ([A-J])", "not ([A-J]) ([A-J])", "([A-J]) ([A-J]):", False),
    (r"\(([A-J])\+([A-J])\)", r"\(([A-J])-([A-J])\)", "([A-J])/([A-J])=", False),
)


def solve_syllogism(format, text):
    """By all kinds of things there can be: each belongs to some of the terms."""
    every, none, ask, backwards = SYLLOGISM[format]
    a, b = re.search(f"{ask}$", text).groups()
    within = [p[::-1] if backwards else p for p in re.findall(every, text)]
    apart = re.findall(none, text)
    terms = sorted({term for pair in (*within, *apart) for term in pair})
    assert len(within) + len(apart) == 4 and len(terms) == 5
    kinds = [
        set(kind)
        for size in range(6)
        for kind in itertools.combinations(terms, size)
        if all(q in kind for p, q in within if p in kind)
        and not any(p in kind and q in kind for p, q in apart)
    ]
    with_a = [kind for kind in kinds if a in kind]
    assert with_a
    if all(b in kind for kind in with_a):
        return "y"
    return "u" if any(b in kind for kind in with_a) else "n"


SOLVERS = {"hop": solve_hop, "boolean": solve_boolean, "syllogism": solve_syllogism}


@pytest.mark.parametrize(("make", "level"), LEVELS, ids=lambda x: getattr(x, "__name__", x))
def test_every_turn_of_every_format_is_answered_from_its_text(make, level):
    """Catches wrong answers, answers among no choices, formats that change keys or answers (a leak
    from one format's training to another's test), and examples that are longer than a row."""
    first = [tasks.examples(make(level, f), "train", 1, 30) for f in range(tasks.FORMATS)]
    for format in range(tasks.FORMATS):
        task = make(level, format)
        assert (task.level, task.ability, task.format) == (str(level), "logic", format)
        found = tasks.examples(task, "train", 1, 30, task.turns)
        for example, alone in zip(found, first[format], strict=True):
            assert (example.prompt, example.answer) == (alone.prompt, alone.answer)
            assert example.answer in example.choices
            turns = list(contexts(example))
            assert len(turns) == task.turns
            assert len("".join(turns[-1])) <= ROW
            for text, answer in turns:
                assert SOLVERS[task.name](format, text) == answer, text
        said = [(e.answer, e.choices, e.key) for e in found]
        assert said == [(e.answer, e.choices, e.key) for e in first[0]]
        assert format == 0 or not {e.prompt for e in found} & {e.prompt for e in first[0]}


@pytest.mark.parametrize("hops", [1, 2, 3, 4])
def test_hop_walks_one_cycle_that_is_not_shorter_backwards(hops):
    """Catches a cycle in which h steps back answer the question, two cycles in place of one, and
    keys that know more than the set of nodes."""
    pairs = set()
    for example in logic.hop(hops).generate(np.random.default_rng(0), 1000, 1):
        edges = graph(0, example.prompt)
        node, path = example.prompt[-1], []
        for _ in edges:
            path.append(node)
            node = edges[node]
        assert node == path[0] and sorted(path) == sorted(edges)
        assert len(edges) >= 2 * hops and set(example.choices) == set(edges) - {path[0]}
        pairs.add((example.key, frozenset(edges)))
    assert len({k for k, _ in pairs}) == len({s for _, s in pairs}) == len(pairs)
    nodes, letters = logic.CYCLES[hops]
    assert 0.8 * math.comb(letters, nodes) < len(pairs) <= math.comb(letters, nodes)


def tree(text):
    """A formula as nested sets: (operator, sorted parts)."""
    parts, depth, last = [], 0, 0
    sign = ""
    for i, c in enumerate(text + "="):
        depth += (c == "(") - (c == ")")
        if depth == 0 and c in "&|^=":
            parts.append(text[last:i])
            sign, last = (c if c != "=" else sign), i + 1
    return sign, tuple(sorted(repr(tree(p[1:-1])) if p[0] == "(" else p for p in parts))


@pytest.mark.parametrize("depth", [1, 2])
def test_boolean_has_one_key_for_all_orders_and_for_the_dual(depth):
    """Catches keys that know the order of parts, and duals with keys of their own: the test split
    would hold more of one answer."""
    found = logic.boolean(depth).generate(np.random.default_rng(0), 8000, 1)
    trees, answers = collections.defaultdict(set), collections.defaultdict(set)
    for e in found:
        trees[e.key].add(tree(e.prompt.removesuffix("=")))
        answers[e.key].add(e.answer)
    all_trees = [t for some in trees.values() for t in some]
    assert len(all_trees) == len(set(all_trees))
    if depth == 1:
        assert len(trees) == 3 * math.comb(6, 3)
        assert {len(t) for t in trees.values()} == {len(a) for a in answers.values()} == {1}
    else:
        assert max(map(len, trees.values())) == 2
        assert all(len(answers[k]) == len(trees[k]) for k in trees)


@pytest.mark.parametrize("level", [1, 2])
def test_syllogism_premises_allow_every_answer(level):
    """Catches premises from which the answer can be guessed before the question is read."""
    for example in tasks.examples(logic.syllogism(level), "train", 2, 60):
        body, asked = example.prompt.split("?")
        joined = {frozenset((p[0], p[2])) for p in body.split(",")}
        terms = sorted(set().union(*joined))
        assert example.key == "syllogism:" + "".join(terms)

        def near(a, b, joined=joined, terms=terms):
            direct = frozenset((a, b)) in joined
            between = any({frozenset((a, t)), frozenset((t, b))} <= joined for t in terms)
            return direct if level == 1 else between and not direct

        assert near(*asked)
        pairs = [p for p in itertools.permutations(terms, 2) if near(*p)]
        assert {solve_syllogism(0, f"{body}?{a}{b}") for a, b in pairs} == set("nuy")


@pytest.mark.parametrize(
    ("make", "level", "value"),
    [
        (logic.hop, 1, 1 / 4),
        (logic.hop, 3, 1 / 5),
        (logic.hop, 4, 1 / 7),
        (logic.boolean, 1, 1 / 2),
        (logic.boolean, 2, 1 / 2),
        (logic.syllogism, 1, 1 / 3),
        (logic.syllogism, 2, 1 / 3),
    ],
)
def test_chance_is_a_guess_among_the_choices(make, level, value):
    """Catches answers that lean one way, in a split or beside any single character."""
    found = tasks.chance(make(level), n=1000)
    error = math.sqrt(value * (1 - value) / 1000)
    assert found.baselines["choices"] == pytest.approx(value)
    assert found.value < value + 4 * error


def test_boolean_splits_are_balanced_exactly():
    """Catches a test split with 56 % of one answer, which a majority guess scores."""
    found = tasks.examples(logic.boolean(2), "test", 5, 3000)
    true = np.mean([e.answer == "T" for e in found])
    assert true == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(3000))
