"""The curves that a metric can follow against size, and what is compared with them: its seeds.

With x = log10(parameters), a curve is mean(x) = left + (right - left) u(x), where the position u
goes from 0 to 1 and, with w the 10-90% width in decades, is one of

    constant      0
    line          (x - first) / (last - first)
    power         a rate grows from chance as N^c, a loss falls to its limit as N^-c (Kaplan 2020)
    broken power  the same with slope c before a break d and c' after it (Caballero et al. 2023)
    logistic      1 / (1 + exp(-2 ln 9 (x - x50) / w))
    hinge         clip(1/2 + 0.8 (x - x50) / w, 0, 1)
    step          0 up to one size, 1 from the next

Logistic and hinge can be sharp and are fitted twice: *sharp* (w <= 1 decade) and *wide* (w >= 1). A
step is sharp: it is where they end when no size lies within the transition, with fewer parameters.
Power laws are held to slopes that take a decade from 10 to 90% and are wide, so the broken one is
the most flexible curve that a sharp one has to beat. "Is it sharp?" is then one comparison of AICc
between two sets of curves (Burnham & Anderson 2002: AICc = -2 ln L + 2k + 2k(k+1)/(n-k-1), n =
seeds).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

SHARP_WIDTH = 1.0  # decades; nature has no such number, so this one is fixed before the data
NARROWEST, WIDEST = 0.02, 8.0
STEEPEST_POWER = np.log10(9) / SHARP_WIDTH  # from 10% to 90% of a power law in one decade
BREAK = 0.2  # decades over which a broken power law turns

Box = list[tuple[float, float]]


@dataclass(frozen=True)
class Curve:
    """One metric of one task at the end of training: a value per seed.

    x log10 parameters, y value, n items: [J]. `floor` is the left end of a rate's transition:
    chance, or the mean of the smallest sizes where that is below chance.
    """

    kind: Literal["rate", "continuous"]
    x: np.ndarray
    y: np.ndarray
    n: np.ndarray
    floor: float = 0.0

    @cached_property
    def sizes(self) -> np.ndarray:
        """The distinct x, ascending."""
        return np.unique(self.x)

    @cached_property
    def at(self) -> np.ndarray:
        """Which of `sizes` each seed has: [J]."""
        return np.searchsorted(self.sizes, self.x)

    @cached_property
    def moments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the seeds of each size: how many, their mean, their sum of squares around it: [S]."""
        count = np.bincount(self.at).astype(np.float64)
        inside = np.bincount(self.at, (self.y - self.means[self.at]) ** 2)
        return count, self.means, inside

    @cached_property
    def means(self) -> np.ndarray:
        """The mean of the seeds at each of `sizes`."""
        return np.array([self.y[self.x == size].mean() for size in self.sizes])

    @property
    def span(self) -> float:
        """Decades from the smallest size to the largest."""
        return float(self.sizes[-1] - self.sizes[0])


class Candidate(NamedTuple):
    """A shape: its position `u(shape [G, k], x [S]) -> [G, S]` and the box of its parameters.

    `mid` says whether any size can lie within the transition, and so scatter more.
    """

    name: str
    sharp: bool
    position: Callable[[np.ndarray, np.ndarray], np.ndarray]
    box: Box
    mid: bool = True


def candidates(curve: Curve) -> list[Candidate]:
    """The shapes compared on this curve; a midpoint may lie half the ladder outside of it."""
    first, last = curve.sizes[0], curve.sizes[-1]

    def line(shape: np.ndarray, x: np.ndarray) -> np.ndarray:
        return np.broadcast_to((x - first) / (last - first), (len(shape), len(x)))

    def grown(climb: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
        """The position on a power law with log10 `climb(x)`: [G, S]."""
        ends = climb(np.array([first, last]))
        if curve.kind == "rate":
            return 10 ** (climb(x) - ends[:, 1:])
        return (1 - 10 ** (ends[:, :1] - climb(x))) / (1 - 10 ** (ends[:, :1] - ends[:, 1:]))

    def power(shape: np.ndarray, x: np.ndarray) -> np.ndarray:
        return grown(lambda at: shape * at, x)

    def broken(shape: np.ndarray, x: np.ndarray) -> np.ndarray:
        before, after, turn = shape[:, :1], shape[:, 1:2], shape[:, 2:]

        def climb(at: np.ndarray) -> np.ndarray:
            past = BREAK / np.log(10) * np.logaddexp(0, np.log(10) / BREAK * (at - turn))
            return before * at + (after - before) * past

        return grown(climb, x)

    gaps = (curve.sizes[:-1] + curve.sizes[1:]) / 2

    def step(shape: np.ndarray, x: np.ndarray) -> np.ndarray:
        return (x > gaps[np.minimum(shape.astype(int), len(gaps) - 1)]).astype(np.float64)

    middle = (first - 0.5 * curve.span, last + 0.5 * curve.span)
    narrow, one, wide = np.log10([NARROWEST, SHARP_WIDTH, WIDEST])
    slope = (0.02, STEEPEST_POWER)
    return [
        Candidate("constant", False, lambda shape, x: np.zeros((len(shape), len(x))), [], False),
        Candidate("line", False, line, []),
        Candidate("power", False, power, [slope]),
        *(Candidate(name, True, u, [middle, (narrow, one)]) for name, u in TRANSITIONS.items()),
        *(Candidate(name, False, u, [middle, (one, wide)]) for name, u in TRANSITIONS.items()),
        Candidate("step", True, step, [(0.0, float(len(gaps)))], False),
        Candidate("broken power", False, broken, [slope, slope, (first, last)]),
    ]


def logistic(shape: np.ndarray, x: np.ndarray) -> np.ndarray:
    """shape [G, 2]: x50 and log10 of the 10-90% width."""
    z = 2 * np.log(9) * (x - shape[:, :1]) / 10 ** shape[:, 1:]
    return 1 / (1 + np.exp(-np.clip(z, -60, 60)))


def hinge(shape: np.ndarray, x: np.ndarray) -> np.ndarray:
    """shape as for `logistic`: flat, a straight ramp, flat."""
    return np.clip(0.5 + 0.8 * (x - shape[:, :1]) / 10 ** shape[:, 1:], 0, 1)


TRANSITIONS = {"logistic": logistic, "hinge": hinge}  # those with a midpoint and a width
