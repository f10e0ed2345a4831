"""The words and numbers a reader sees, the same on the page and in the terminal."""

from typing import NamedTuple


class Look(NamedTuple):
    """How a verdict is shown, and what it means in half a sentence."""

    colour: str
    terminal: str
    gloss: str


STYLE = {
    "emergent": Look("#0b6b4f", "bold green", "begins within a decade of size"),
    "metric-induced": Look("#8a5a00", "yellow", "jumps in exact match only"),
    "smooth": Look("#0059a6", "blue", "improves without a threshold"),
    "flat": Look("#555555", "white", "does not change with size"),
    "inverse": Look("#a3231f", "red", "gets worse with size"),
    "undetermined": Look("#6b4c9a", "magenta", "cannot be decided from this ladder"),
}


def si(value: float | None) -> str:
    """A size in three digits: 784, 1.57k, 24.7k, 1.2M; a dash for None."""
    if value is None:
        return "–"
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g}"


def between(pair: list[float] | None) -> str:
    """An interval of sizes in words; empty for None."""
    return "–" if pair is None else f"{si(pair[0])} to {si(pair[1])}"
