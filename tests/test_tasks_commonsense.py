"""The world of `taxonomy`: questions follow from the statements of training, and from nothing less.

The solver reads statements off the text of training examples and follows the links.
"""

import collections
import functools
import re

import numpy as np
import pytest

from lm import tasks
from lm.tasks.commonsense import taxonomy

ROW = 63  # characters beside <bos> and <eos>
LEVELS = ("1", "2", "3", "exception", "place")
T, P = "(?P<a>[a-z]{2})", "(?P<p>[a-x@])"
# Per format: a link up, a part, a property that is stated, a question.
PATTERNS = (
    (f"{T}<", f"{T}-", f"{P}{T}=", f"{T}{P}[?]"),
    (f"{T} is ", f"{T} in ", f"{T} has {P} ", f"{P} of {T}[?] "),
    (f"{T}:", f"{T}/", f"{T}[.]{P}:", f"[?]{P}{T} "),
    (rf"kind\({T}\)=", rf"part\({T}\)=", rf"{P}\({T}\)=", f"ask {T} {P}:"),
    (f"a {T} is a ", f"a {T} is in a ", f"the {P} of a {T} is ", f"{T}, what {P}: "),
)
COMMAS = ",. ;|"


@functools.cache
def training(level, format):
    """What training examples say: links, parts, properties, and (thing, property) asked."""
    tables, asked = ({}, {}, {}), set()
    task = taxonomy(level, format)
    turns = set()
    for e in tasks.examples(task, "train", 0, 40_000 // task.turns, task.turns):
        assert len(e.more) + 1 == task.turns
        turns.add((e.prompt, e.answer))
        turns.update((p.removeprefix(COMMAS[format]), a) for p, a in e.more)
    for prompt, answer in turns:
        found = [re.fullmatch(p, prompt) for p in PATTERNS[format]]
        assert sum(map(bool, found)) == 1, f"{prompt!r} can be read in several ways, or none"
        which = next(i for i, m in enumerate(found) if m)
        about = tuple(v for _, v in sorted(found[which].groupdict().items()))
        if which == 3:
            asked.add(about)
        else:
            about = about if which == 2 else about[0]
            assert tables[which].setdefault(about, answer) == answer, "two statements differ"
    return *tables, asked


def solve(facts, thing, trait):
    """(answer, how many links are followed)."""
    kind, part, has, _ = facts
    up, steps = (part if trait == "@" else kind), 0
    while (thing, trait) not in has:
        thing, steps = up[thing], steps + 1
    return has[thing, trait], steps


@functools.cache
def cells(level, format=0):
    """{(thing, property): (example, split)}."""
    task = taxonomy(level, format)
    found = {e.prompt: e for e in task.generate(np.random.default_rng(0), 20_000, 1)}
    matches = [re.fullmatch(PATTERNS[format][3], prompt).groupdict() for prompt in found]
    return {
        (m["a"], m["p"]): (e, tasks.split_of(e.key, task.held_out))
        for m, e in zip(matches, found.values(), strict=True)
    }


def unseen(level, format=0):
    return {c: e for c, (e, split) in cells(level, format).items() if split == "test"}


@pytest.mark.parametrize("format", range(tasks.FORMATS))
@pytest.mark.parametrize("level", LEVELS)
def test_unseen_cells_follow_from_the_statements_of_training(level, format):
    """Catches statements that are missing, wrong or of another world, a level that needs another
    number of links, answers among no choices, and formats with other cells."""
    task = taxonomy(level, format)
    assert (task.level, task.ability, task.format) == (level, "commonsense", format)
    facts, found = training(level, format), unseen(level, format)
    assert {c: (e.answer, e.key) for c, e in found.items()} == {
        c: (e.answer, e.key) for c, e in unseen(level).items()
    }
    links = {"1": 1, "2": 2, "3": 3, "exception": 0, "place": 1}[level]
    for (thing, trait), e in found.items():
        assert solve(facts, thing, trait) == (e.answer, links)
        assert e.answer in e.choices and len(set(e.choices)) == 4 and not e.more


def test_no_training_turn_asks_a_cell_of_the_tests():
    """Catches a leak through further turns, which are not filtered by their key, and through the
    training of another level."""
    every = {c: split for level in LEVELS for c, (_, split) in cells(level).items()}
    held_out = {c for c, split in every.items() if split != "train"}
    things = {thing for thing, _ in every}
    for level in LEVELS:
        _, _, has, asked = training(level, 0)
        assert not asked & held_out and len(asked) > 100
        # What is stated of a thing itself is an exception, and only where exceptions are.
        stated = {c for c in has if c[0] in things}
        assert bool(stated) == (level == "exception")
        assert level != "exception" or unseen(level).keys() <= stated


def test_examples_fit_a_row_in_every_format():
    """Catches a phrase that makes the packing of the data fail."""
    for level in LEVELS:
        for format in range(tasks.FORMATS):
            task = taxonomy(level, format)
            assert task.turns >= 3
            for e in tasks.examples(task, "train", 1, 100, task.turns):
                assert len(e.prompt + e.answer) + sum(len(p + a) for p, a in e.more) <= ROW


def test_the_world_is_balanced_and_has_its_exceptions():
    """Catches a property whose commonest value is a good guess, classes of other sizes, and
    exceptions that are none or have a value of another type."""
    kind, _, has, _ = training("exception", 0)
    everything = {c: e for level in LEVELS[:4] for c, (e, _) in cells(level).items()}
    things = {thing for thing, _ in everything}
    assert len(things) == 192 and len(everything) == 192 * 24
    names = list(things)
    for size in (12, 24, 48):
        names = [kind[name] for name in names]
        assert set(collections.Counter(names).values()) == {size}
    classes = {c: v for c, v in has.items() if c[0] not in things}
    inherited = {(t, p): solve((kind, {}, classes, set()), t, p)[0] for t, p in everything}
    for trait in {p for _, p in everything}:
        counts = collections.Counter(v for (_, p), v in inherited.items() if p == trait)
        assert sorted(counts.values()) == [48] * 4
    differ = {c for c, e in everything.items() if e.answer != inherited[c]}
    assert differ == set(cells("exception"))
    assert len(differ) / len(everything) == pytest.approx(0.1, abs=4 * np.sqrt(0.09 / 4608))
    assert all(inherited[c] in everything[c].choices for c in differ)


@pytest.mark.parametrize(("level", "format"), [("1", 0), ("3", 2), ("exception", 4), ("place", 1)])
def test_chance_is_a_guess_among_four(level, format):
    """Catches a property or a letter of a name that tells the value."""
    found = tasks.chance(taxonomy(level, format), n=3000)
    cells_ = {"1": 127, "3": 149, "exception": 99, "place": 46}[level]
    assert found.baselines["choices"] == 0.25
    assert 0.25 <= found.value < 0.25 + 3 * np.sqrt(0.25 * 0.75 / cells_)
