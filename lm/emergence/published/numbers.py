"""A number of ours beside the published one, and what a published curve comes to.

A tolerance is part of the number: a difference ("±0.01"), a share ("±1%"), a limit ("at least",
"at most") or "exact". A name that ends in * has a reference that its authors do not print: what we
computed once with other code, or a limit.
"""

import math
from typing import Any, NamedTuple


class Number(NamedTuple):
    """One line of the table."""

    what: str
    ours: float
    published: float
    tolerance: str
    ok: bool


class Result(NamedTuple):
    """The numbers of one name, and its figure as a Vega-Lite specification with its data."""

    numbers: list[Number]
    figure: dict[str, Any]


def within(what: str, ours: float, published: float, tolerance: float) -> Number:
    """Agrees if the two differ by at most `tolerance`."""
    ok = abs(ours - published) <= tolerance
    return Number(what, float(ours), float(published), f"±{tolerance:g}", bool(ok))


def share(what: str, ours: float, published: float, percent: float) -> Number:
    """Agrees if the two differ by at most `percent` per cent of the published."""
    ok = abs(ours - published) <= percent / 100 * abs(published)
    return Number(what, float(ours), float(published), f"±{percent:g}%", bool(ok))


def at_least(what: str, ours: float, limit: float) -> Number:
    """Agrees if ours is not below the limit."""
    return Number(what, float(ours), float(limit), "at least", bool(ours >= limit))


def at_most(what: str, ours: float, limit: float) -> Number:
    """Agrees if ours is not above the limit."""
    return Number(what, float(ours), float(limit), "at most", bool(ours <= limit))


def exact(what: str, ours: float, published: float) -> Number:
    """Agrees if the two are equal: counts, and what is exactly zero."""
    return Number(what, float(ours), float(published), "exact", bool(ours == published))


def show(value: float) -> str:
    """Five digits that count: 0.34731, 2143.4, 0.00101827, 1.22e-16, 240."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e9:
        return str(int(value))
    digits = 5 if abs(value) >= 0.01 else 6 if abs(value) >= 1e-6 else 3
    return f"{value:.{digits}g}"
