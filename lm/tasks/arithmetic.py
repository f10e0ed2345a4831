"""Addition in decimal digits, plain and reversed, and modular addition.

*addition*: `47+25=072`: two numbers of up to `digits` digits and their sum in exactly `digits + 1`
digits, so that the answer's length gives nothing away. The classic ability whose exact match jumps
while its per-digit measures may not.

*reversed_addition*: `74~52=270` is the same sum with the last digit first, so that every digit can
be written as soon as its carry is known (Lee et al. 2023). Operands have exactly `digits` digits,
and the number of carries is drawn evenly: of plain random pairs of four digits, one in twenty has
four.

*modular*: `c@k=m` is addition modulo 23. A residue is one symbol, the first p of `SYMBOLS`, or a
digit for p = 10: then an answer is one token, nothing but training says which residue a symbol is,
and the answers can be listed as choices. There are 62 symbols; for p = 97 a residue has two digits.

Every operation has its own sign, so that tasks which are learned together never ask two things by
one prompt. The key is the unordered pair: 25+47 is never a test of 47+25, written either way.
"""

import string

import numpy as np

from lm.tasks.task import Example, Task

# `{o}` is the sign of the operation.
FORMATS = (
    "{a}{o}{b}=",
    "({a}){o}({b}):",
    "{a} {o} {b} is ",
    "{o}({a},{b})=",
    "sum {o} of {b} and {a}: ",
)
# One-digit sums have 55 unordered pairs: 5 % would leave three of them for testing.
HELD_OUT = {1: 0.3, 2: 0.05, 3: 0.05, 4: 0.05}
# Modulus: sign, and share held out of its 55, 276, 1,770 or 4,753 pairs.
MODULI = {10: ("%", 0.3), 23: ("@", 0.2), 59: ("$", 0.2), 97: ("&", 0.15)}
SYMBOLS = string.ascii_lowercase + string.ascii_uppercase + string.digits


def addition(digits: int, format: int = 0) -> Task:
    """Sums of two numbers below 10**digits."""
    form = FORMATS[format]

    def generate(rng: np.random.Generator, n: int, turns: int) -> list[Example]:
        return [
            Example(
                prompt=form.format(a=a, b=b, o="+"),
                answer=f"{a + b:0{digits + 1}d}",
                choices=(),
                key=f"addition:{min(a, b)}+{max(a, b)}",
            )
            for a, b in rng.integers(0, 10**digits, (n, 2)).tolist()
        ]

    return Task("addition", str(digits), generate, "arithmetic", format, held_out=HELD_OUT[digits])


def carries(a: int, b: int) -> int:
    """How many digits are carried when a and b, both at least 0, are added on paper."""
    # A carry takes ten from a place and adds one to the next: the digits lose nine.
    lost = sum(map(int, f"{a}{b}")) - sum(map(int, str(a + b)))
    return lost // 9


def reversed_addition(digits: int, format: int = 0) -> Task:
    """Sums of two numbers of `digits` digits, all written from the last digit to the first, with 0
    to `digits` carries equally often; keys and shares are those of `addition`.
    """
    form = FORMATS[format]

    def generate(rng: np.random.Generator, n: int, turns: int) -> list[Example]:
        found = []
        for a, b in _evenly_carried(rng, n, digits).tolist():
            x, y, answer = f"{a:0{digits}d}", f"{b:0{digits}d}", f"{a + b:0{digits + 1}d}"
            found.append(
                Example(
                    prompt=form.format(a=x[::-1], b=y[::-1], o="~"),
                    answer=answer[::-1],
                    choices=(),
                    key=f"addition:{min(a, b)}+{max(a, b)}",
                )
            )
        return found

    share = HELD_OUT[digits]
    return Task("reversed_addition", str(digits), generate, "arithmetic", format, held_out=share)


def _evenly_carried(rng: np.random.Generator, n: int, digits: int) -> np.ndarray:
    """[n, 2] numbers below 10**digits, uniform for a number of carries that is itself uniform."""
    wanted = rng.integers(0, digits + 1, n)
    pairs = np.zeros((n, 2), np.int64)
    missing = np.arange(n)
    while len(missing):
        drawn = rng.integers(0, 10**digits, (len(missing), 2))
        pairs[missing] = drawn
        count = np.zeros(len(missing), np.int64)
        for place in 10 ** np.arange(1, digits + 1):
            count += (drawn % place).sum(axis=1) >= place
        missing = missing[count != wanted[missing]]
    return pairs


def modular(p: int, format: int = 0) -> Task:
    """a + b modulo p."""
    form = FORMATS[format]
    sign, held_out = MODULI[p]
    symbols = string.digits if p == 10 else SYMBOLS
    single = p <= len(symbols)
    residues = tuple(symbols[:p]) if single else tuple(f"{i:02d}" for i in range(p))

    def generate(rng: np.random.Generator, n: int, turns: int) -> list[Example]:
        return [
            Example(
                prompt=form.format(a=residues[a], b=residues[b], o=sign),
                answer=residues[(a + b) % p],
                choices=residues if single else (),
                key=f"modular:{p}:{min(a, b)}+{max(a, b)}",
            )
            for a, b in rng.integers(0, p, (n, 2)).tolist()
        ]

    return Task("modular", str(p), generate, "arithmetic", format, held_out=held_out)
