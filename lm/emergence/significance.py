"""Is a score above chance, how many would be by luck alone, and how small a rise can be seen?

With n items at chance c, a score of τ or better comes by luck with

    q = P(Bin(n, c) >= ceil(τ n)),

and among M sizes × T tasks somewhere with 1 - (1 - q)^(MT), MTq times on average: 32 items at
c = 1/2 are 0.1 above it in one of twelve sizes three times out of four. So tests over a table are
corrected for their number, by Holm (1979: no false claim at all, at alpha) and by Benjamini and
Hochberg (1995: a share alpha of the claims may be false).

The items of a rung are not independent given its size, since seeds differ: n is divided by the
dispersion D = 1 + (items per seed - 1) ρ, Pearson's chi² between seeds over its degrees of freedom.
The same D stands in the minimum detectable effect, the rise that a one-sided exact test at alpha
finds with the stated power.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from scipy import special, stats

from lm.config import UserError

if TYPE_CHECKING:
    import pandas as pd


class Luck(NamedTuple):
    """What chance alone does: in one test, anywhere among the tests, and how often on average."""

    one: float
    anywhere: float
    expected: float


@dataclass(frozen=True)
class AboveChance:
    """One size of one task against chance; `n` are the items after the dispersion's discount.

    `p` is exact and one-sided, `holm` and `bh` are corrected over all tests of the table. NaN where
    there was nothing to test.
    """

    task: str
    level: str
    params: int
    seeds: int
    value: float
    chance: float
    n: int
    p: float
    holm: float
    bh: float


@dataclass(frozen=True)
class Detectable:
    """The least rise above chance that one size of a task can show; NaN if none can be."""

    task: str
    level: str
    chance: float
    items: int
    seeds: int
    dispersion: float
    rise: float


def above_chance(hits: int, n: int, chance: float) -> float:
    """P(Bin(n, chance) >= hits): the exact one-sided p-value; NaN without items.

    Chance 0 gives 0 for any hit, chance 1 gives 1. Raises `UserError` outside of [0, 1] and n.
    """
    _check(n, chance)
    if not 0 <= hits <= max(n, 0):
        raise UserError(f"{hits} hits of {n} items; hits lie between 0 and the items")
    return float(stats.binom.sf(hits - 1, n, chance)) if n > 0 else float("nan")


def look_elsewhere(n: int, chance: float, threshold: float, tests: int = 1) -> Luck:
    """The luck of a score of `threshold` or more in `tests` tests of n items each.

    Raises `UserError` without items or tests.
    """
    _check(n, chance)
    if n < 1 or tests < 1:
        raise UserError(f"{n} items in {tests} tests; both must be at least 1")
    # 0.3 of 100 is 30 items, though 0.1 + 0.2 is a little more than 0.3.
    least = int(np.ceil(threshold * n - 1e-9))
    q = float(stats.binom.sf(least - 1, n, chance))
    anywhere = -np.expm1(tests * np.log1p(-q)) if q < 1 else 1.0
    return Luck(q, float(anywhere), tests * q)


def adjust(p: Sequence[float], method: Literal["holm", "bh"]) -> np.ndarray:
    """p-values [K] corrected for their number; NaN is no test: it stays and is not counted."""
    found = np.asarray(p, np.float64)
    real = np.isfinite(found)
    adjusted = np.full(found.shape, np.nan)
    if method == "bh" and real.any():
        adjusted[real] = stats.false_discovery_control(found[real])
    elif real.any():
        # Not statsmodels: its Holm collects garbage, a tenth of a second a call in a large process.
        order = np.argsort(found[real])
        stepped = found[real][order] * np.arange(real.sum(), 0, -1)
        back = np.empty_like(stepped)
        back[order] = np.minimum(np.maximum.accumulate(stepped), 1)
        adjusted[real] = back
    return adjusted


def dispersion(values: np.ndarray, n: np.ndarray) -> float:
    """Pearson's chi² over its degrees of freedom of rates [S] of n items [S]; 1 for one seed.

    1 means seeds that differ no more than their items do; below 1 is luck.
    """
    values, n = np.asarray(values, np.float64), np.asarray(n, np.float64)
    if len(values) < 2:
        return 1.0
    p = np.average(values, weights=n)
    p = np.clip(p, 0.5 / n.sum(), 1 - 0.5 / n.sum())
    return float(np.sum(n * (values - p) ** 2) / (p * (1 - p)) / (len(values) - 1))


def against_chance(rows: "pd.DataFrame") -> list[AboveChance]:
    """Every size of every task against chance, corrected over all of them, in order of name.

    `rows` are final exact-match rows, one per seed (`lm.emergence.onset.final_rows`). Left
    out are controls, other formats than the canonical, seeds that diverged, and rows without value,
    items or chance. A task has one dispersion, of the median over its sizes and at least 1.
    """
    good = _usable(rows)
    found = []
    for (task, level), ladder in good.groupby(["task", "level"]):
        discount = _discount(ladder)
        for params, rung in ladder.groupby("params"):
            total = rung["n"].sum()
            n = max(1, round(total / discount))
            value = float(np.average(rung["value"], weights=rung["n"]))
            chance = float(rung["chance"].iloc[0])
            p = above_chance(round(value * n), n, chance)
            found.append((task, level, int(params), len(rung), value, chance, n, p))
    p_values = [one[-1] for one in found]
    holm, bh = adjust(p_values, "holm"), adjust(p_values, "bh")
    return [
        AboveChance(*one, float(h), float(b)) for one, h, b in zip(found, holm, bh, strict=True)
    ]


def minimum_detectable_effect(
    items: int,
    chance: float,
    seeds: int = 1,
    dispersion: float = 1.0,
    alpha: float = 0.05,
    power: float = 0.8,
    tests: int = 1,
) -> float:
    """The least rise above chance that the exact test finds with probability `power`.

    The test is at alpha / tests on items · seeds / dispersion items. With k* the least count that
    is significant, the rate sought solves P(Bin(n, p) >= k*) = I_p(k*, n - k* + 1) = power. NaN
    where no count is significant, or chance is 1. Raises `UserError` on arguments out of range.
    """
    _check(items, chance)
    if not (0 < alpha < 1 and 0 < power < 1 and dispersion > 0 and seeds >= 1 and tests >= 1):
        raise UserError(
            f"alpha {alpha}, power {power}, dispersion {dispersion}, seeds {seeds}, tests {tests}: "
            "the first two lie in (0, 1), the others are positive"
        )
    n = max(1, round(items * seeds / max(dispersion, 1.0)))
    # Chance 0 makes one hit significant, as isf(…, 0) = 0 says.
    least = int(stats.binom.isf(alpha / tests, n, chance)) + 1
    if least > n:
        return float("nan")
    return float(special.betaincinv(least, n - least + 1, power)) - chance


def detectable(
    rows: "pd.DataFrame", alpha: float = 0.05, power: float = 0.8, tests: int | None = None
) -> list[Detectable]:
    """The minimum detectable effect of one size of every task, in order of name.

    `rows` as for `against_chance`. A task's items and seeds are the medians over its sizes, its
    dispersion as there. `tests` is the number that alpha is divided by, the sizes of the task if
    it is None.
    """
    found = []
    for (task, level), ladder in _usable(rows).groupby(["task", "level"]):
        by_size = ladder.groupby("params")
        items, seeds = int(ladder["n"].median()), int(by_size.size().median())
        discount, chance = _discount(ladder), float(ladder["chance"].iloc[0])
        count = by_size.ngroups if tests is None else tests
        rise = minimum_detectable_effect(items, chance, seeds, discount, alpha, power, count)
        found.append(Detectable(task, level, chance, items, seeds, discount, rise))
    return found


def _usable(rows: "pd.DataFrame") -> "pd.DataFrame":
    rows = rows[(rows["role"] == "ladder") & (rows["format"] == 0)]
    finite = np.isfinite(rows["value"]) & np.isfinite(rows["chance"]) & (rows["n"] > 0)
    return rows[finite & (rows["metric"] == "exact_match") & (rows["status"] == "ok")]


def _discount(ladder: "pd.DataFrame") -> float:
    """The median over sizes of dispersion over its own median when seeds differ by items alone, at
    least 1. The median, since a bimodal size says nothing of the others; and that of chi² with 2
    degrees of freedom lies at 0.69, so three seeds would else discount too little.
    """
    each = []
    for _, rung in ladder.groupby("params"):
        free = len(rung) - 1
        usual = stats.chi2.median(free) / free if free else 1.0
        each.append(dispersion(rung["value"].to_numpy(), rung["n"].to_numpy()) / usual)
    return max(1.0, float(np.median(each)))


def _check(n: int, chance: float) -> None:
    if n < 0 or not 0 <= chance <= 1:
        raise UserError(
            f"chance {chance} of {n} items; chance lies in [0, 1] and items are not < 0"
        )
