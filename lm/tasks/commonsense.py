"""Commonsense: what is known of a fixed world, and what follows from it.

*taxonomy*: `kap?` asks for property p of the thing `ka`; the answer is one of the four values that
p can have. Things belong to classes, classes to wider ones, and a thing has what its classes have:
`ka<mo` says that `ka` is a `mo`, `pmo=T` that a `mo` has value T of p. The level says who has the
property: 1 the thing's own class, 2 the class above, 3 the one above that. At level `exception`
(one cell of ten) the thing differs from its class, and `pka=V` says so. At level `place` a thing is
part of a whole (`ka-wo`), and is where the whole is (`@wo=3`): `ka@?`.

The world is one fixed table, the same for every study: 192 things, 16 + 8 + 4 classes, 24
properties. A question is a *cell*, a thing and a property. Training holds all statements and the
questions of four cells out of five (three at levels `exception` and `place`, which have few); test
asks the others, which no training example asks in any phrasing. They follow from the statements
alone, in 2, 3 or 4 steps; an exception was stated, but never asked for.

Statements are turns that follow a question in a training example: they need no key, and test items
have no further turns. There are four roots because each of the four values of a property must be
right equally often: with two roots the property alone would tell half of the answer. A model that
inherits without regard to exceptions scores 0 at level `exception`, below its chance of 1/4.
"""

import dataclasses
import functools
import itertools
import string

import numpy as np

from lm.tasks.controls import WORLD
from lm.tasks.task import ROW, Example, Task, split_of

THINGS, LEAVES, PARENTS, ROOTS, WHOLES = 192, 16, 8, 4, 16
PROPERTIES = "abcdefghijklmnopqrstuvwx"
VALUES = ("ABCD", "EFGH", "IJKL", "MNOP", "QRST", "UVWX")  # four properties share each
PLACE = "@"
PLACES = "1234"
EXCEPTIONS = 0.1  # share of cells
HELD_OUT = {"1": 0.1, "2": 0.1, "3": 0.1, "exception": 0.2, "place": 0.2}


@dataclasses.dataclass(frozen=True)
class Phrases:
    """One way to state that `{a}` is a kind of, is part of, or has of `{p}` what follows; and to
    ask.
    """

    kind: str
    part: str
    has: str
    ask: str
    comma: str


FORMATS = (
    Phrases("{a}<", "{a}-", "{p}{a}=", "{a}{p}?", ","),
    Phrases("{a} is ", "{a} in ", "{a} has {p} ", "{p} of {a}? ", "."),
    Phrases("{a}:", "{a}/", "{a}.{p}:", "?{p}{a} ", " "),
    Phrases("kind({a})=", "part({a})=", "{p}({a})=", "ask {a} {p}:", ";"),
    Phrases("a {a} is a ", "a {a} is in a ", "the {p} of a {a} is ", "{a}, what {p}: ", "|"),
)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A question: which value a thing has of a property, and the values it could be."""

    thing: str
    trait: str
    value: str
    choices: str
    level: str

    @property
    def key(self) -> str:
        """Canonical, and the same in every phrasing."""
        return f"taxonomy:{self.thing}:{self.trait}"


@dataclasses.dataclass(frozen=True)
class Statement:
    """`kind` is the phrase that says it; `trait`, the property, is empty for links."""

    kind: str
    subject: str
    trait: str
    object: str


@dataclasses.dataclass(frozen=True)
class World:
    """All cells, and the statements that each level follows from."""

    cells: tuple[Cell, ...]
    statements: dict[str, tuple[Statement, ...]]


@functools.cache
def world() -> World:
    """The fixed world."""
    rng = np.random.default_rng(WORLD)
    codes = ["".join(pair) for pair in itertools.product(string.ascii_lowercase, repeat=2)]
    drawn = iter(rng.permutation(codes).tolist())
    things, leaves, parents, roots, wholes = (
        list(itertools.islice(drawn, count)) for count in (THINGS, LEAVES, PARENTS, ROOTS, WHOLES)
    )
    leaf = (rng.permutation(THINGS) % LEAVES).tolist()
    whole = (rng.permutation(THINGS) % WHOLES).tolist()
    place = [PLACES[i % 4] for i in rng.permutation(WHOLES)]
    links = [Statement("kind", thing, "", leaves[i]) for thing, i in zip(things, leaf, strict=True)]
    up = [Statement("kind", name, "", parents[i // 2]) for i, name in enumerate(leaves)]
    top = [Statement("kind", name, "", roots[i // 2]) for i, name in enumerate(parents)]
    classes = {"1": (leaves, 1), "2": (parents, 2), "3": (roots, 4)}  # names, leaves in each
    has: dict[str, list[Statement]] = {"1": [], "2": [], "3": [], "exception": []}
    cells = []
    for p, name in enumerate(PROPERTIES):
        level, values = "123"[p % 3], VALUES[p // 4]
        names, below = classes[level]
        # Permutations in a row: classes side by side differ, and every value is as frequent.
        value = np.concatenate([rng.permutation(4) for _ in range(len(names) // 4)]).tolist()
        has[level] += [
            Statement("has", c, name, values[v]) for c, v in zip(names, value, strict=True)
        ]
        differs = (rng.random(THINGS) < EXCEPTIONS).tolist()
        shift = rng.integers(1, 4, THINGS).tolist()
        for t, thing in enumerate(things):
            v = value[leaf[t] // below]
            if differs[t]:
                own = values[(v + shift[t]) % 4]
                cells.append(Cell(thing, name, own, values, "exception"))
                has["exception"].append(Statement("has", thing, name, own))
            else:
                cells.append(Cell(thing, name, values[v], values, level))
    cells += [
        Cell(thing, PLACE, place[whole[t]], PLACES, "place") for t, thing in enumerate(things)
    ]
    parts = [
        *(Statement("part", thing, "", wholes[i]) for thing, i in zip(things, whole, strict=True)),
        *(Statement("has", name, PLACE, where) for name, where in zip(wholes, place, strict=True)),
    ]
    statements = {
        "1": (*links, *has["1"]),
        "2": (*links, *up, *has["2"]),
        "3": (*links, *up, *top, *has["3"]),
        "exception": (*links, *up, *top, *itertools.chain(*has.values())),
        "place": tuple(parts),
    }
    return World(tuple(cells), statements)


def taxonomy(level: str = "1", format: int = 0) -> Task:
    """Cells of one level of the world; the key is the cell.

    Half of the further turns of an example are statements that the level follows from, the others
    training questions of the level; for exceptions, which are stated in any case, of levels 1 to 3
    too, so that there is something to except from.
    """
    form = FORMATS[format]
    cells = [c for c in world().cells if c.level == level]
    asked = ("1", "2", "3", level) if level == "exception" else (level,)
    questions = [
        (form.ask.format(a=c.thing, p=c.trait), c.value)
        for c in world().cells
        if c.level in asked and split_of(c.key, HELD_OUT[c.level]) == "train"
    ]
    stated = [
        (getattr(form, s.kind).format(a=s.subject, p=s.trait), s.object)
        for s in world().statements[level]
    ]
    firsts = [
        Example(form.ask.format(a=c.thing, p=c.trait), c.value, tuple(c.choices), c.key)
        for c in cells
    ]

    def generate(rng: np.random.Generator, n: int, turns: int) -> list[Example]:
        first = rng.integers(0, len(firsts), n).tolist()
        if turns == 1:
            return [firsts[i] for i in first]
        which = rng.integers(0, 2, (turns - 1, n)).T.tolist()
        places = rng.random((turns - 1, n)).T.tolist()
        found = []
        for i, kinds, row in zip(first, which, places, strict=True):
            more = []
            for kind, u in zip(kinds, row, strict=True):
                among = stated if kind else questions
                prompt, answer = among[int(u * len(among))]
                more.append((form.comma + prompt, answer))
            found.append(dataclasses.replace(firsts[i], more=tuple(more)))
        return found

    longest = max(len(form.comma + prompt + answer) for prompt, answer in (*questions, *stated))
    turns = 1 + (ROW - max(len(e.prompt + e.answer) for e in firsts)) // longest
    return Task("taxonomy", level, generate, "commonsense", format, turns, HELD_OUT[level])
