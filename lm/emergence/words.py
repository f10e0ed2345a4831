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


ABILITIES = ("in-context", "logic", "commonsense", "code", "arithmetic", "control")
OTHER = "other"  # of a study that does not say


def ability_order(name: str) -> tuple[int, str]:
    """The place of an ability on the page."""
    return (ABILITIES.index(name) if name in ABILITIES else len(ABILITIES), name)


def p_value(p: float | None) -> str:
    """A p-value in one or two digits: 0.03, 2e-5, < 1e-15; a dash for None."""
    if p is None:
        return "–"
    if p < 1e-15:
        return "< 1e-15"
    return f"{p:.2g}" if p >= 0.001 else f"{p:.0e}".replace("e-0", "e-")


def listed(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([*([", ".join(names[:-1])] if names[1:] else []), *names[-1:]])


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
