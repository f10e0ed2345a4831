"""Puzzles that others have studied: sparse parity, ListOps, Dyck words, word unscrambling.

*parity*: `0110100101=` asks whether an odd number of three fixed bits is set; the other bits are
noise. A model must find the subset, and no two bits tell anything (Barak et al. 2022; Michaud et
al. 2023). The key is the noise bits: all eight values of the subset stand together, so every split
is balanced exactly.

*listops*: `(v3(^518)2)=` is the smallest of 3, the largest of 5, 1, 8, and 2 (Nangia and Bowman
2018). v is the minimum, ^ the maximum, m the median, + the sum modulo 10. Every node has three
arguments, of which one is the node below; depth counts nodes. Order does not matter, and the key
forgets it. Copying an argument is right about three times in ten, which is its chance.

*dyck*: `([{}<>=` asks for the bracket that closes the innermost open one, here `]`. Up to three
brackets stand before the one that is asked for and two to five pairs after it, so no place in the
text names it more often than in a quarter of the words. The key is the word with its brackets
renamed in order of appearance, so every kind is right equally often.

*unscramble*: `anub=` is `banu`, a word of an invented lexicon of 500 in which no two have the same
letters. Training states every word (`!banu`) and unscrambles those that are not held out. Words
alternate between consonants and vowels; chance is a guess among the orders that do.
"""

import dataclasses
import functools
import itertools

import numpy as np

from lm.tasks.controls import WORLD
from lm.tasks.task import ROW, Example, Task, split_of


@dataclasses.dataclass(frozen=True)
class Question:
    """One way to ask: what stands before and after, and what comes before the next question."""

    before: str
    after: str
    comma: str


def _join(asked: list[Example], comma: str, held_out: float) -> Example:
    """The first question with the others as further turns, less those held out of training."""
    first, *rest = asked
    more = [(comma + e.prompt, e.answer) for e in rest if split_of(e.key, held_out) == "train"]
    return dataclasses.replace(first, more=tuple(more)) if more else first


def _turns(question: int, comma: str) -> int:
    """How many turns fill a row, for questions of so many characters with their answer."""
    return 1 + (ROW - question) // (question + len(comma))


PARITY_FORMATS = (
    ("01", Question("", "=", ",")),
    ("ab", Question("", "?", " ")),
    ("-+", Question("", ":", " ")),
    ("01", Question("[", "]", "")),
    ("xo", Question("odd ", "?", ".")),
)
ODD = 3  # bits of the subset
PARITY_HELD_OUT = {10: 0.15, 14: 0.1, 20: 0.05}


@functools.cache
def subset(bits: int) -> tuple[int, ...]:
    """The places that count, fixed for each number of bits."""
    chosen = np.random.default_rng((WORLD, bits)).permutation(bits)[:ODD]
    return tuple(sorted(chosen.tolist()))


def parity(bits: int = 10, format: int = 0) -> Task:
    """Parity of three fixed bits out of `bits`."""
    signs, form = PARITY_FORMATS[format]
    counted, share = subset(bits), PARITY_HELD_OUT[bits]

    def ask(row: list[int]) -> Example:
        noise = "".join(str(bit) for i, bit in enumerate(row) if i not in counted)
        return Example(
            prompt=form.before + "".join(signs[bit] for bit in row) + form.after,
            answer=str(sum(row[i] for i in counted) % 2),
            choices=("0", "1"),
            key=f"parity:{bits}:{noise}",
        )

    def generate(rng: np.random.Generator, n: int, turns: int) -> list[Example]:
        # Turns come first in the draw: the first question does not depend on how many follow.
        drawn = rng.integers(0, 2, (turns, n, bits)).transpose(1, 0, 2).tolist()
        return [_join([ask(row) for row in rows], form.comma, share) for rows in drawn]

    turns = _turns(len(form.before + form.after) + bits + 1, form.comma)
    return Task("parity", str(bits), generate, "control", format, turns, share)


@dataclasses.dataclass(frozen=True)
class Notation:
    """One way to write an expression: names of minimum, maximum, median and sum; a node of
    arguments `{x}`, and what stands between them.
    """

    names: tuple[str, str, str, str]
    node: str
    gap: str
    ask: Question


LISTOPS_FORMATS = (
    Notation(("v", "^", "m", "+"), "({o}{x})", "", Question("", "=", ",")),
    Notation(("n", "x", "d", "s"), "[{o} {x}]", " ", Question("", "?", " ")),
    Notation(("min", "max", "med", "sum"), "{o}({x})", ",", Question("", "=", ";")),
    Notation(("_", "~", "|", "&"), "<{x}{o}>", "", Question("", ":", " ")),
    Notation(("L", "H", "M", "S"), "{o}({x})", ".", Question("eval ", " -> ", ";")),
)
SOLVE = (min, max, lambda x: sorted(x)[1], lambda x: sum(x) % 10)
LISTOPS_HELD_OUT = {1: 0.15, 2: 0.05, 3: 0.05}


def listops(depth: int = 1, format: int = 0) -> Task:
    """Expressions of `depth` nested nodes; the key is the expression with arguments in order."""
    form, share = LISTOPS_FORMATS[format], LISTOPS_HELD_OUT[depth]

    def ask(operations: list[int], digits: list[list[int]], places: list[int]) -> Example:
        value, written, plain = 0, "", ""
        for level, (o, args, place) in enumerate(zip(operations, digits, places, strict=True)):
            texts, keys = [str(a) for a in args], [str(a) for a in args]
            if level:
                args = [*args]
                args[place], texts[place], keys[place] = value, written, plain
            value = SOLVE[o](args)
            written = form.node.format(o=form.names[o], x=form.gap.join(texts))
            plain = f"({'v^m+'[o]}{''.join(sorted(keys))})"
        prompt = form.ask.before + written + form.ask.after
        return Example(prompt, str(value), tuple("0123456789"), f"listops:{plain}")

    def generate(rng: np.random.Generator, n: int, turns: int) -> list[Example]:
        operations = rng.integers(0, 4, (turns, n, depth)).tolist()
        digits = rng.integers(0, 10, (turns, n, depth, 3)).tolist()
        places = rng.integers(0, 3, (turns, n, depth)).tolist()
        return [
            _join(
                [ask(operations[t][i], digits[t][i], places[t][i]) for t in range(turns)],
                form.ask.comma,
                share,
            )
            for i in range(n)
        ]

    longest = len(ask([0] * depth, [[0, 0, 0]] * depth, [0] * depth).prompt) + 1
    turns = _turns(longest, form.ask.comma)
    return Task("listops", str(depth), generate, "logic", format, turns, share)


DYCK_FORMATS = (
    ("", Question("", "=", ",")),
    (" ", Question("", " ? ", ".")),
    ("", Question("close ", ":", " ")),
    ("-", Question("", "-", "|")),
    ("", Question("'", "' + ", ";")),
)
OPEN, CLOSE = "([{<", ")]}>"
DYCK_BEFORE = 3  # most brackets before the one that is asked for
DYCK_PAIRS = (2, 5)  # least and most pairs after it: shorter words are too few to split
DYCK_LONGEST = DYCK_BEFORE + 1 + 2 * DYCK_PAIRS[1]
DYCK_HELD_OUT = 0.1


def dyck(kinds: int = 2, format: int = 0) -> Task:
    """The next closing bracket of a word with `kinds` kinds of brackets, 2 to 4."""
    gap, form = DYCK_FORMATS[format]

    def ask(word: str, answer: str) -> Example:
        renamed = {k: OPEN[i] for i, k in enumerate(dict.fromkeys(b for b in word if b in OPEN))}
        renamed |= {CLOSE[OPEN.index(k)]: CLOSE[OPEN.index(v)] for k, v in renamed.items()}
        return Example(
            prompt=form.before + gap.join(word) + form.after,
            answer=answer,
            choices=tuple(CLOSE[:kinds]),
            key=f"dyck:{kinds}:" + "".join(renamed[b] for b in word),
        )

    def generate(rng: np.random.Generator, n: int, turns: int) -> list[Example]:
        before = rng.integers(0, DYCK_BEFORE + 1, (turns, n)).tolist()
        pairs = rng.integers(DYCK_PAIRS[0], DYCK_PAIRS[1] + 1, (turns, n)).tolist()
        opens = (rng.random((turns, n, DYCK_LONGEST)) < 0.5).tolist()
        names = rng.integers(0, kinds, (turns, n, DYCK_LONGEST)).tolist()
        found = []
        for i in range(n):
            rows = [
                _dyck(before[t][i], pairs[t][i], opens[t][i], names[t][i]) for t in range(turns)
            ]
            found.append(_join([ask(*row) for row in rows], form.comma, DYCK_HELD_OUT))
        return found

    longest = DYCK_LONGEST * (1 + len(gap)) - len(gap) + len(form.before + form.after) + 1
    turns = _turns(longest, form.comma)
    return Task("dyck", str(kinds), generate, "control", format, turns, DYCK_HELD_OUT)


def _dyck(before: int, pairs: int, opens: list[bool], names: list[int]) -> tuple[str, str]:
    """A word of `before` brackets, an opening one, and `pairs` closed pairs; what closes it."""
    word = ""
    stack: list[int] = []
    for coin, name in zip(opens[:before], names[:before], strict=True):
        if coin or not stack:
            stack.append(name)
            word += OPEN[name]
        else:
            word += CLOSE[stack.pop()]
    asked = names[before]
    word += OPEN[asked]
    stack, left = [], 2 * pairs
    for coin, name in zip(opens[before + 1 :], names[before + 1 :], strict=True):
        if not left:
            break
        if not stack or (coin and len(stack) < left):
            stack.append(name)
            word += OPEN[name]
        else:
            word += CLOSE[stack.pop()]
        left -= 1
    return word, CLOSE[asked]


UNSCRAMBLE_FORMATS = (
    (Question("", "=", ","), "!"),
    (Question("", "?", " "), ":"),
    (Question("[", "]", ""), "="),
    (Question("sort ", ": ", "; "), "word "),
    (Question("", " -> ", "|"), "* "),
)
CONSONANTS, VOWELS = "bcdfghjklmnpqrstvwxz", "aeiou"
WORDS = 500
UNSCRAMBLE_HELD_OUT = 0.1


@functools.cache
def lexicon(length: int) -> tuple[str, ...]:
    """500 invented words of 3 to 6 letters, no letter twice in one, no two of the same letters."""
    rng = np.random.default_rng((WORLD, length))
    words: dict[str, str] = {}
    while len(words) < WORDS:
        consonants = rng.permutation(list(CONSONANTS))[: (length + 1) // 2]
        vowels = rng.permutation(list(VOWELS))[: length // 2]
        letters = itertools.chain(*itertools.zip_longest(consonants, vowels, fillvalue=""))
        word = "".join(letters)
        words.setdefault("".join(sorted(word)), word)
    return tuple(words.values())


def _orders(word: str) -> tuple[str, ...]:
    """The letters of a word in all orders that have consonants and vowels where it has them."""
    parts = (itertools.permutations(sorted(word[i::2])) for i in (0, 1))
    return tuple(
        "".join(itertools.chain(*itertools.zip_longest(*pair, fillvalue="")))
        for pair in itertools.product(*parts)
    )


def unscramble(length: int = 4, format: int = 0) -> Task:
    """The word of the lexicon that has these letters; the key is the word."""
    form, state = UNSCRAMBLE_FORMATS[format]
    words = lexicon(length)
    orders = [_orders(word) for word in words]

    def generate(rng: np.random.Generator, n: int, turns: int) -> list[Example]:
        chosen = rng.integers(0, WORDS, (turns, n)).T.tolist()
        states = rng.integers(0, 2, (turns, n)).T.tolist()
        shuffled = np.argsort(rng.random((turns, n, length)), axis=2).transpose(1, 0, 2).tolist()
        found = []
        for row, plain, order in zip(chosen, states, shuffled, strict=True):
            asked = []
            for word, places in zip(row, order, strict=True):
                scrambled = "".join(words[word][i] for i in places)
                prompt = form.before + scrambled + form.after
                key = f"unscramble:{words[word]}"
                asked.append(Example(prompt, words[word], orders[word], key))
            more = [
                (form.comma + (state if stated else e.prompt), e.answer)
                for e, stated in zip(asked[1:], plain[1:], strict=True)
                if stated or split_of(e.key, UNSCRAMBLE_HELD_OUT) == "train"
            ]
            found.append(dataclasses.replace(asked[0], more=tuple(more)))
        return found

    longest = len(form.before + form.after) + 2 * length
    turns = _turns(longest, form.comma)
    return Task(
        *("unscramble", str(length), generate, "control", format, turns, UNSCRAMBLE_HELD_OUT)
    )
