"""Logic in context: following edges several times, Boolean formulae, syllogisms.

*hop*: `CA,FG,AF,GE,EC?2A` shows the shuffled edges of a random cycle and asks where two steps from
A lead. One step is recall; h steps are h look-ups, one after the other (Sanford et al. 2024). The
cycle has at least 2h nodes, so that walking backwards is never shorter. Chance is a guess among its
other nodes.

*boolean*: `(+1&-0&+1)|-1|+0=` is T or F. A node has three parts: two literals and the node below,
or three literals at the bottom; depth counts nodes. + keeps a digit and - negates it: with a bare
digit in first place the digit itself would tell something. Operators are drawn first, then the
answer, then literals that give it, so no single character beats 1/2.

*syllogism*: `A<B,B#C,...?AC` says that all A are B and no B is C. y: all A are C. n: no A is C. u:
neither follows. The level is how many premises the question's terms are apart. All premises hang
together in a path, and every set of them has questions with each of the three answers, so they tell
nothing before the question is read.
"""

import dataclasses
import itertools

import numpy as np

from lm.tasks.task import Example, Task, turns_in_row

ALPHABET = "ABCDEFGHIJKL"


@dataclasses.dataclass(frozen=True)
class Hop:
    """One way to write a graph: an edge from `{a}` to `{b}`, the question for `{h}` hops from
    `{x}`, and the next question.
    """

    edge: str
    comma: str
    ask: str
    again: str


HOP_FORMATS = (
    Hop("{a}{b}", ",", "?{h}{x}", ",{h}{x}"),
    Hop("{a}>{b}", " ", ";{x}{h}=", ";{x}{h}="),
    Hop("{b}{a}", ".", ":{h}{x}", ".{h}{x}"),
    Hop("{a}-{b}", "|", " {h} from {x}:", " {h} from {x}:"),
    Hop("({a}{b})", "", "{h}*{x}=", " {h}*{x}="),
)
# Hops: nodes of the cycle, and letters that they are drawn from.
CYCLES = {1: (5, 10), 2: (5, 10), 3: (6, 10), 4: (8, 12)}


def hop(hops: int = 1, format: int = 0) -> Task:
    """`hops` steps along a random cycle; the key is the set of nodes, for the reason given in
    lm.tasks.recall.
    """
    nodes, letters = CYCLES[hops]
    form = HOP_FORMATS[format]

    def generate(rng: np.random.Generator, n: int, turns: int) -> list[Example]:
        cycles = np.argsort(rng.random((n, letters)), axis=1)[:, :nodes]
        shown = np.argsort(rng.random((n, nodes)), axis=1)
        # With replacement, so that nothing follows by elimination. Turns come first in the draw:
        # the first question does not depend on how many follow.
        asked = rng.integers(0, nodes, (turns, n)).T
        drawn = zip(cycles.tolist(), shown.tolist(), asked.tolist(), strict=True)
        return [_hop(form, hops, *draw) for draw in drawn]

    two = generate(np.random.default_rng(0), 1, 2)[0]
    return Task("hop", str(hops), generate, "logic", format, turns_in_row(two), held_out=0.15)


def _hop(form: Hop, hops: int, cycle: list[int], shown: list[int], asked: list[int]) -> Example:
    names = [ALPHABET[i] for i in cycle]
    size = len(names)
    edges = form.comma.join(form.edge.format(a=names[i], b=names[(i + 1) % size]) for i in shown)
    (first, answer), *more = [(names[i], names[(i + hops) % size]) for i in asked]
    return Example(
        prompt=edges + form.ask.format(h=hops, x=first),
        answer=answer,
        choices=tuple(name for name in names if name != first),
        key="hop:" + "".join(sorted(names)),
        more=tuple((form.again.format(h=hops, x=x), y) for x, y in more),
    )


@dataclasses.dataclass(frozen=True)
class Boolean:
    """One way to write a formula: signs that keep and negate; and, or, exclusive or; what stands
    around it.
    """

    signs: str
    operators: str
    before: str
    after: str


BOOLEAN_FORMATS = (
    Boolean("+-", "&|^", "", "="),
    Boolean(".!", "*+%", "", " is "),
    Boolean("yn", "AOX", "eval ", ":"),
    Boolean("=~", "^v#", "? ", " >"),
    Boolean("pq", "&/,", "<", ">"),
)
AND, OR, XOR = range(3)
# Values that a node's three parts can have, by its operator and its own value.
PARTS = {
    (operator, value): [
        parts for parts in itertools.product((0, 1), repeat=3) if value_of(parts) == value
    ]
    for operator, value_of in ((AND, min), (OR, max), (XOR, lambda parts: sum(parts) % 2))
    for value in (0, 1)
}
# Depth 1 has 60 formulae up to order, of which 11 (30 prompts) are the test.
BOOLEAN_HELD_OUT = {1: 0.3, 2: 0.15, 3: 0.15, 4: 0.15}


def boolean(depth: int = 1, format: int = 0) -> Task:
    """Formulae of `depth` nested nodes; the key forgets the order of parts.

    From depth 2 on a formula and its dual (& for |, 1 for 0) have one key: their answers are
    opposite, which balances every split exactly. Depth 1 has too few formulae for it.
    """
    form = BOOLEAN_FORMATS[format]

    def generate(rng: np.random.Generator, n: int, turns: int) -> list[Example]:
        answers = rng.integers(0, 2, n).tolist()
        operators = rng.integers(0, 3, (n, depth)).tolist()
        ways = rng.random((n, depth)).tolist()
        places = rng.integers(0, 3, (n, depth)).tolist()
        negated = rng.integers(0, 2, (n, depth, 3)).tolist()
        found = []
        for answer, *nodes in zip(answers, operators, ways, places, negated, strict=True):
            text, plain, dual = _formula(form, answer, list(zip(*nodes, strict=True)))
            found.append(
                Example(
                    prompt=form.before + text + form.after,
                    answer="FT"[answer],
                    choices=("F", "T"),
                    key="boolean:" + (min(plain, dual) if depth > 1 else plain),
                )
            )
        return found

    return Task("boolean", str(depth), generate, "logic", format, held_out=BOOLEAN_HELD_OUT[depth])


def _formula(
    form: Boolean, value: int, nodes: list[tuple[int, float, int, list[int]]]
) -> tuple[str, str, str]:
    """A formula of that value, its canonical text and its dual's; of each node, from the outside
    in: the operator, which of the values of its parts, the place of the node below, the negations.
    """
    (operator, way, place, negated), *below = nodes
    ways = PARTS[operator, value]
    parts = ways[int(way * len(ways))]
    literals = list(zip(parts, negated, strict=True))
    written = [f"{form.signs[no]}{part ^ no}" for part, no in literals]
    plain = [f"{'+-'[no]}{part ^ no}" for part, no in literals]
    dual = [f"{'+-'[no]}{1 ^ part ^ no}" for part, no in literals]
    if below:
        inner = _formula(form, parts[place], below)
        written[place], plain[place], dual[place] = (f"({text})" for text in inner)
    return (
        form.operators[operator].join(written),
        "&|^"[operator].join(sorted(plain)),
        "|&^"[operator].join(sorted(dual)),
    )


@dataclasses.dataclass(frozen=True)
class Syllogism:
    """One way to write premises, all `{a}` or no `{a}` are `{b}`, and questions."""

    every: str
    none: str
    comma: str
    ask: str
    again: str


SYLLOGISM_FORMATS = (
    Syllogism("{a}<{b}", "{a}#{b}", ",", "?{a}{b}", ",{a}{b}"),
    Syllogism("{a} is {b}", "{a} no {b}", ".", ".{a} is {b}?", ".{a} is {b}?"),
    Syllogism("{b}>{a}", "{b}!{a}", " ", " {a}:{b}=", " {a}:{b}="),
    Syllogism("all {a} {b}", "not {a} {b}", "|", "|{a} {b}:", "|{a} {b}:"),
    Syllogism("({a}+{b})", "({a}-{b})", "", "{a}/{b}=", " {a}/{b}="),
)
TERMS = 5  # of ten letters
ALL, CONVERSE, NO = range(3)  # of a premise between neighbours i and i + 1 of the path

Pairs = dict[str, list[tuple[int, int]]]


def syllogism(premises: int = 1, format: int = 0) -> Task:
    """What follows for terms that are `premises` premises apart; the key is the set of terms."""
    form = SYLLOGISM_FORMATS[format]
    patterns = _patterns(premises)

    def generate(rng: np.random.Generator, n: int, turns: int) -> list[Example]:
        terms = np.argsort(rng.random((n, 10)), axis=1)[:, :TERMS].tolist()
        chosen = rng.integers(0, len(patterns), n).tolist()
        shown = np.argsort(rng.random((n, TERMS - 1)), axis=1).tolist()
        swapped = rng.integers(0, 2, (n, TERMS - 1)).tolist()
        asked = rng.random((turns, n, 2)).transpose(1, 0, 2).tolist()
        return [
            _syllogism(form, t, *patterns[c], *rest)
            for t, c, *rest in zip(terms, chosen, shown, swapped, asked, strict=True)
        ]

    two = generate(np.random.default_rng(0), 1, 2)[0]
    turns = turns_in_row(two)
    return Task("syllogism", str(premises), generate, "logic", format, turns, held_out=0.15)


def _patterns(premises: int) -> list[tuple[tuple[int, ...], Pairs]]:
    """Kinds of the premises along the path for which each answer has a question, with the pairs of
    terms by answer.
    """
    found = []
    for pattern in itertools.product((ALL, CONVERSE, NO), repeat=TERMS - 1):
        answers = _conclusions(pattern)
        pairs: Pairs = {"n": [], "u": [], "y": []}
        for a, b in itertools.permutations(range(TERMS), 2):
            if abs(a - b) == premises:
                pairs[answers[a][b]].append((a, b))
        if all(pairs.values()):
            found.append((pattern, pairs))
    return found


def _conclusions(pattern: tuple[int, ...]) -> list[list[str]]:
    """[TERMS][TERMS] answers to "are all a b?"."""
    within = np.eye(TERMS, dtype=bool)
    apart = np.zeros((TERMS, TERMS), bool)
    for i, kind in enumerate(pattern):
        if kind == NO:
            apart[i, i + 1] = apart[i + 1, i] = True
        else:
            within[(i, i + 1) if kind == ALL else (i + 1, i)] = True
    within = np.linalg.matrix_power(within.astype(int), TERMS) > 0
    apart = within @ apart @ within.T  # what lies in two sets that are apart is apart
    return np.where(within, "y", np.where(apart, "n", "u")).tolist()


def _syllogism(
    form: Syllogism,
    terms: list[int],
    pattern: tuple[int, ...],
    pairs: Pairs,
    shown: list[int],
    swapped: list[int],
    asked: list[list[float]],
) -> Example:
    """`swapped` turns "no A is B" round, which says the same; a row of `asked` chooses an answer
    and a question with it.
    """
    names = [ALPHABET[i] for i in terms]
    written = []
    for i in shown:
        around = pattern[i] == CONVERSE or (pattern[i] == NO and swapped[i])
        a, b = (names[i + 1], names[i]) if around else (names[i], names[i + 1])
        written.append((form.none if pattern[i] == NO else form.every).format(a=a, b=b))
    turns: list[tuple[str, str]] = []
    for u, v in asked:
        answer = "nuy"[int(3 * u)]
        a, b = (names[i] for i in pairs[answer][int(v * len(pairs[answer]))])
        turns.append(((form.again if turns else form.ask).format(a=a, b=b), answer))
    return Example(
        prompt=form.comma.join(written) + turns[0][0],
        answer=turns[0][1],
        choices=("n", "u", "y"),
        key="syllogism:" + "".join(sorted(names)),
        more=tuple(turns[1:]),
    )
