"""Code: what does a small program print?

`f=3,c=8,a=f+4,b=c*3?a` assigns digits to variables and asks for one; arithmetic is modulo 10. The
level is the *dependency depth*: how many statements must be followed, one after the other, to know
the answer. Level 1 is a look-up among five assignments, level 0 among three. From level 2 on two
chains of statements are interleaved; names are random letters, so a variable's chain has to be read
off the program.

Operands are 1 to 9 after + and -, and 3, 7 or 9 after *: the units modulo 10. So every step is a
bijection of the digits, every answer is equally likely whatever operands are seen, and nothing less
than the whole chain tells it. In a look-up the values differ: a guess among five is right once in
five.

*alias*: `f=3,c=f,a=8,b=a?c` is a program whose later statements copy variables; the level is the
number of statements to follow. It is what remains of *program* when arithmetic is taken out, so
the two tell whether following or computing is what a model lacks.
"""

import dataclasses

import numpy as np

from lm.tasks.task import Example, Task, turns_in_row

NAMES = "abcdefghij"
STEPS = (
    *(("+", k) for k in range(1, 10)),
    *(("-", k) for k in range(1, 10)),
    *(("*", k) for k in (3, 7, 9)),
)
# Level: lengths of the chains, longest first; at most so many turns: variables to ask for are few.
CHAINS = {
    0: ((1, 1, 1), 10),
    1: ((1, 1, 1, 1, 1), 8),
    2: ((2, 2), 6),
    3: ((3, 3), 6),
    4: ((4, 3), 6),
    6: ((6, 3), 6),
}
COPY = ("", 0)
ALIASES = {2: ((2, 2, 2), 8), 3: ((3, 3, 3), 8)}
STRICT = 3  # from this depth on there are chains enough (10 · 21²) to hold out the chain itself


@dataclasses.dataclass(frozen=True)
class Code:
    """One way to write a program: variable `{v}` gets `{e}`, the first question, the next."""

    statement: str
    comma: str
    ask: str
    again: str


FORMATS = (
    Code("{v}={e}", ",", "?{v}", ",{v}"),
    Code("{v}={e}", ";", ";print({v})", ";print({v})"),
    Code("{v}:{e}", " ", " {v}=", " {v}="),
    Code("{e}>{v}", "|", "|{v}?", "|{v}?"),
    Code("{v}={e}", " ", " show {v}:", " {v}:"),
)


def program(statements: int = 1, format: int = 0) -> Task:
    """Programs whose answer takes `statements` statements, one after the other; 0 is an easier 1.

    The key is all chains, without names, order and question. From level 3 on it is the first three
    statements of the chain that is asked for, at every level alike, and a variable of another chain
    is only asked for where it is less deep: no program in training tells a held-out answer.
    """
    lengths, most = CHAINS[statements]
    form = FORMATS[format]
    total = sum(lengths)

    def generate(rng: np.random.Generator, n: int, turns: int) -> list[Example]:
        names = np.argsort(rng.random((n, len(NAMES))), axis=1)[:, :total].tolist()
        values = np.argsort(rng.random((n, 10)), axis=1)[:, : len(lengths)].tolist()
        drawn = rng.integers(0, len(STEPS), (n, total)).tolist()
        steps = [[STEPS[i] for i in row] for row in drawn]
        order = np.argsort(rng.random((n, total)), axis=1).tolist()
        asked = rng.random((turns, n)).T.tolist()
        return [
            _program("program", form, lengths, *draw)
            for draw in zip(names, values, steps, order, asked, strict=True)
        ]

    two = generate(np.random.default_rng(0), 1, 2)[0]
    turns = min(most, turns_in_row(two))
    held_out = 0.15 if statements <= 1 else 0.1
    return Task("program", str(statements), generate, "code", format, turns, held_out)


def alias(statements: int = 2, format: int = 0) -> Task:
    """Programs that only copy: `statements` statements lead from the variable to its value.

    The key is the set of values, for lm.tasks.recall's reason.
    """
    lengths, most = ALIASES[statements]
    form = FORMATS[format]
    total = sum(lengths)

    def generate(rng: np.random.Generator, n: int, turns: int) -> list[Example]:
        names = np.argsort(rng.random((n, len(NAMES))), axis=1)[:, :total].tolist()
        values = np.argsort(rng.random((n, 10)), axis=1)[:, : len(lengths)].tolist()
        order = np.argsort(rng.random((n, total)), axis=1).tolist()
        asked = rng.random((turns, n)).T.tolist()
        return [
            _program("alias", form, lengths, v, b, [COPY] * total, o, a)
            for v, b, o, a in zip(names, values, order, asked, strict=True)
        ]

    two = generate(np.random.default_rng(0), 1, 2)[0]
    turns = min(most, turns_in_row(two))
    return Task("alias", str(statements), generate, "code", format, turns, held_out=0.15)


def _program(
    name: str,
    form: Code,
    lengths: tuple[int, ...],
    names: list[int],
    values: list[int],
    steps: list[tuple[str, int]],
    order: list[int],
    asked: list[float],
) -> Example:
    """`order` mixes the chains, each of which keeps its own order; `asked` chooses variables."""
    fresh, operations = iter(names), iter(steps)
    chains: list[list[tuple[str, str, int]]] = []  # variable, expression, value
    plain: list[str] = []  # the chains without names
    for length, value in zip(lengths, values, strict=True):
        chain = [(NAMES[next(fresh)], str(value), value)]
        text = str(value)
        for _ in range(length - 1):
            sign, k = next(operations)
            value = {"+": value + k, "-": value - k, "*": value * k, "": value}[sign] % 10
            step = f"{sign}{k}" if sign else ""
            chain.append((NAMES[next(fresh)], chain[-1][0] + step, value))
            text += step
        chains.append(chain)
        plain.append(text)
    depth = lengths[0]
    first = int(asked[0] * lengths.count(depth))
    copies = name == "alias"
    if depth < STRICT or copies:
        key = ",".join(sorted(plain))
        known = [v for chain in chains for v in chain]
    else:
        key = plain[first][: 2 * STRICT - 1]
        known = [v for chain in chains for v in chain[: None if chain is chains[first] else 2]]
    questions = [chains[first][-1], *(known[int(u * len(known))] for u in asked[1:])]
    owners = [chain for chain in chains for _ in chain]
    waiting = {id(chain): iter(chain) for chain in chains}
    mixed = [next(waiting[id(owners[i])]) for i in order]
    body = form.comma.join(form.statement.format(v=v, e=e) for v, e, _ in mixed)
    turns = [
        ((form.again if i else form.ask).format(v=v), str(value))
        for i, (v, _, value) in enumerate(questions)
    ]
    return Example(
        prompt=body + turns[0][0],
        answer=turns[0][1],
        choices=tuple(map(str, sorted(values)) if depth == 1 or copies else "0123456789"),
        key=f"{name}:{key}",
        more=tuple(turns[1:]),
    )
