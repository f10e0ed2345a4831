"""Addition in decimal digits: the classic ability whose exact match jumps while its per-digit
measures may not.

`47+25=072`: two numbers of up to `digits` digits and their sum in exactly `digits + 1` digits, so
that the answer's length gives nothing away. The key is the unordered pair: 25+47 is never a test of
47+25.
"""

import numpy as np

from lm.tasks.task import Example, Task

# One-digit sums have 55 unordered pairs: 5 % would leave three of them for testing.
HELD_OUT = {1: 0.3, 2: 0.05, 3: 0.05}


def addition(digits: int) -> Task:
    """Sums of two numbers below 10**digits."""

    def generate(rng: np.random.Generator, n: int, turns: int) -> list[Example]:
        pairs = rng.integers(0, 10**digits, (n, 2)).tolist()
        return [
            Example(f"{a}+{b}=", f"{a + b:0{digits + 1}d}", (), f"addition:{min(a, b)}+{max(a, b)}")
            for a, b in pairs
        ]

    return Task("addition", str(digits), generate, held_out=HELD_OUT[digits])
