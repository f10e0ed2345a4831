"""`lm bench verdicts`: how often the statistics are right about tables whose truth was planted.

What is asked of them was fixed before they were measured. Ladders come from `lm.emergence.planted`:
8-12 sizes, 5-20 seeds of which some are missing, 1,000 items. Every count has its Wilson interval.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

from lm.config import positive
from lm.emergence import onset, planted
from lm.emergence.bimodal import modes
from lm.emergence.seeds import wilson

Kinds = tuple[tuple[planted.Kind, bool], ...]
Asked = tuple[float, float] | None

SHARP: Kinds = (("sharp", False), ("sharp", True))
NULLS: Kinds = (("smooth", False), ("line", False), ("smooth", True), ("power", False))
MIRAGES: Kinds = (("mirage", False),)
SEEDS = 20
JUMPS = ("emergent", "metric-induced")


@dataclass(frozen=True)
class Measure:
    """A share of tables, its 95% interval, and the range it was asked to lie in (or None)."""

    what: str
    asked: Asked
    measured: float
    low: float
    high: float
    n: int
    ok: bool | None


def main(argv: list[str]) -> int:
    """`lm bench verdicts`; exit code 1 if a share lies outside of what was asked."""
    parser = argparse.ArgumentParser(
        prog="lm bench verdicts",
        description="Judges tables with a planted truth and says how often that was found.",
    )
    parser.add_argument("--tables", type=int, default=200, metavar="N", help="of each: default 200")
    parser.add_argument("--json", action="store_true", help="for machines: a list of measures")
    args = parser.parse_args(argv)
    positive("--tables", args.tables)
    from lm.bench import table

    with table.progress() as say:
        measures = list(measure(args.tables, say))
    if args.json:
        print(json.dumps([asdict(one) for one in measures]))
    else:
        show(measures)
    return int(any(one.ok is False for one in measures))


def measure(tables: int, say: Callable[[str], None] = lambda text: None) -> Iterator[Measure]:
    """Every measure, on `tables` tables each."""
    covered, called = Counter[str](), Counter[str]()
    for i, plant in enumerate(_plants(SHARP, tables)):
        say(f"sharp onsets: {i + 1} of {tables}")
        found, how = onset.judge(plant.rows), "split" if i % 2 else "sliding"
        ci = found.exact.onset_ci if found.exact else onset.NOWHERE
        covered[how] += ci.low <= plant.onset <= ci.high
        called[found.verdict] += 1
    halves = {"sliding": (tables + 1) // 2, "split": tables // 2}
    yield _share("95% interval covers the onset", (0.9, 0.99), covered.total(), tables)
    for how, n in halves.items():
        if n:
            yield _share(f"  of these, seeds {how}", None, covered[how], n)
    yield _share("sharp onsets called emergent", None, called["emergent"], tables)
    for name, kinds, asked in (
        ("smooth nulls called emergent or metric-induced", NULLS, (0.0, 0.05)),
        ("mirages called metric-induced", MIRAGES, (0.9, 1.0)),
    ):
        called = Counter()
        for i, plant in enumerate(_plants(kinds, tables)):
            say(f"{name}: {i + 1} of {tables}")
            called[onset.judge(plant.rows).verdict] += 1
        jumps = JUMPS if kinds is NULLS else JUMPS[1:]
        yield _share(name, asked, sum(called[jump] for jump in jumps), tables)
    items = np.full(SEEDS, 1000.0)
    groups: tuple[tuple[str, float | None, Asked], ...] = (
        (f"split seeds, 50/50, found at {SEEDS}", 0.5, (0.9, 1.0)),
        (f"split seeds, 80/20, found at {SEEDS}", 0.2, None),
        ("one overdispersed group called two", None, (0.0, 0.05)),
    )
    for name, share, wanted in groups:
        rungs = (planted.rung(seed, share, SEEDS) for seed in range(tables))
        yield _share(name, wanted, sum(modes(values, items).bimodal for values in rungs), tables)


def show(measures: list[Measure]) -> None:
    """Prints what was asked beside what was measured."""
    width = max(len(one.what) for one in measures)
    print(f"{'':{width}}  {'asked':>9}  {'measured':>8}  95% interval   tables")
    for one in measures:
        asked = f"{one.asked[0]:.0%}-{one.asked[1]:.0%}" if one.asked else ""
        ends = f"{one.low:.1%}-{one.high:.1%}"
        word = "" if one.ok is not False else "  MISSED"
        print(f"{one.what:{width}}  {asked:>9}  {one.measured:>8.1%}  {ends:>12}  {one.n:>6}{word}")


def _plants(kinds: Kinds, n: int) -> Iterator[planted.Planted]:
    """`n` random ladders, of each kind in turn."""
    for i in range(n):
        kind, split = kinds[i % len(kinds)]
        yield planted.draw(kind, i // len(kinds), split)


def _share(what: str, asked: Asked, hits: int, n: int) -> Measure:
    low, high = wilson(hits, n)
    # In whole tables: 99% of two are two.
    ok = None if asked is None else math.floor(asked[0] * n) <= hits <= math.ceil(asked[1] * n)
    return Measure(what, asked, hits / n, low, high, n, ok)
