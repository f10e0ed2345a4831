"""In context: looking up what was shown, and finding the rule behind it.

*recall* (associative recall, induction): `CA,FG,AF,GE,EC?A` shows the shuffled edges of a random
cycle and asks what follows A. The nodes are a random 5-cycle over ten letters, so nothing can be
stored in the weights: only a model that looks the query up in its context answers. Guessing among
the four other nodes gives 1/4. It needs two layers of attention (Olsson et al. 2022, "In-context
Learning and Induction Heads").

Commas keep the two places of a node apart: without them the token after an A is its successor in
one edge and the next edge's node in the other, which relative positions cannot tell. Fewer edges
are easier to learn and make more edges learnable: see experiments/LOG.md.

*rule*: `0>5,1>7,2>0,6>` shows f(x) = (a x + b) mod m at 0, 1 and 2 and asks for another x. Two of
the three values determine a and b, the third confirms them. a is a unit modulo m, so f takes every
value once, and a guess among the values not shown gives 1/(m - 3). Whole rules (a, b) are held out.
"""

import dataclasses
import math

import numpy as np

from lm.tasks.task import Example, Task, turns_in_row

ALPHABET = "ABCDEFGHIJ"


@dataclasses.dataclass(frozen=True)
class Recall:
    """One way to write a graph: an edge from `{a}` to `{b}`, the question for `{x}`, the next."""

    edge: str
    comma: str
    ask: str
    again: str


RECALL_FORMATS = (
    Recall("{a}{b}", ",", "?{x}", ",{x}"),
    Recall("{a}>{b}", " ", ";{x}=", ";{x}="),
    Recall("{b}{a}", ".", ":{x}", ".{x}"),
    Recall("{a}-{b}", "|", " after {x}:", " {x}:"),
    Recall("({a}{b})", "", "{x}=", " {x}="),
)


def recall(edges: int = 5, format: int = 0) -> Task:
    """Recall over cycles of `edges` nodes; the key is the set of nodes.

    A key that knew the order of the cycle would leave its reverse and its siblings in the training
    split: small models remember those and answer *below* chance on the cycle that was held out.
    """
    form = RECALL_FORMATS[format]

    def generate(rng: np.random.Generator, n: int, turns: int) -> list[Example]:
        cycles = np.argsort(rng.random((n, len(ALPHABET))), axis=1)[:, :edges]
        shown = np.argsort(rng.random((n, edges)), axis=1)
        # With replacement, so that nothing follows by elimination.
        asked = rng.integers(0, edges, (n, turns))
        return [_recall(form, c, s, q) for c, s, q in zip(cycles, shown, asked, strict=True)]

    # Ten turns less one for each edge fill a row of 32 tokens in the canonical format.
    turns = min(10 - edges, turns_in_row(generate(np.random.default_rng(0), 1, 2)[0]))
    return Task("recall", str(edges), generate, "in-context", format, turns, held_out=0.15)


def _recall(form: Recall, cycle: np.ndarray, shown: np.ndarray, asked: np.ndarray) -> Example:
    nodes = [ALPHABET[i] for i in cycle]
    follows = dict(zip(nodes, nodes[1:] + nodes[:1], strict=True))
    edges = form.comma.join(form.edge.format(a=nodes[i], b=follows[nodes[i]]) for i in shown)
    queries = [nodes[i] for i in asked]
    return Example(
        prompt=edges + form.ask.format(x=queries[0]),
        answer=follows[queries[0]],
        choices=tuple(node for node in nodes if node != queries[0]),
        key="recall:" + "".join(sorted(nodes)),
        more=tuple((form.again.format(x=query), follows[query]) for query in queries[1:]),
    )


@dataclasses.dataclass(frozen=True)
class Rule:
    """One way to write a table of f: the value `{y}` at `{x}`, the question for `{x}`."""

    pair: str
    comma: str
    ask: str
    again: str


RULE_FORMATS = (
    Rule("{x}>{y}", ",", ",{x}>", ",{x}>"),
    Rule("{x}={y}", ";", "?{x}=", ";{x}="),
    Rule("f({x}){y}", " ", " f({x})", " f({x})"),
    Rule("{y}", " ", "|{x}:", " {x}:"),
    Rule("{x} to {y}", ".", ". {x} to ", ". {x} to "),
)
SYMBOLS = "0123456789abcdefg"
SHOWN = 3
# Modulus: its units, the slopes a; times the modulus, that gives 54, 110 and 156 rules.
SLOPES = {m: tuple(a for a in range(1, m) if math.gcd(a, m) == 1) for m in (9, 11, 13)}


def rule(m: int = 9, format: int = 0) -> Task:
    """Affine rules modulo m at a place that was not shown; the key is the rule."""
    form = RULE_FORMATS[format]

    def generate(rng: np.random.Generator, n: int, turns: int) -> list[Example]:
        slopes = rng.choice(SLOPES[m], n).tolist()
        offsets = rng.integers(0, m, n).tolist()
        # Turns come first in the draw: the first question does not depend on how many follow.
        asked = rng.integers(SHOWN, m, (turns, n)).T.tolist()
        return [_rule(form, m, *draw) for draw in zip(slopes, offsets, asked, strict=True)]

    turns = turns_in_row(generate(np.random.default_rng(0), 1, 2)[0])
    return Task("rule", str(m), generate, "in-context", format, turns, held_out=0.2)


def _rule(form: Rule, m: int, slope: int, offset: int, asked: list[int]) -> Example:
    values = [SYMBOLS[(slope * x + offset) % m] for x in range(m)]
    pairs = [form.pair.format(x=SYMBOLS[x], y=values[x]) for x in range(SHOWN)]
    return Example(
        prompt=form.comma.join(pairs) + form.ask.format(x=SYMBOLS[asked[0]]),
        answer=values[asked[0]],
        choices=tuple(sorted(values[SHOWN:])),
        key=f"rule:{m}:{slope},{offset}",
        more=tuple((form.again.format(x=SYMBOLS[x]), values[x]) for x in asked[1:]),
    )
