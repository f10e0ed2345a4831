"""How much of an outcome's variance is size, format, seed and item.

Outcomes y of a task are labelled with size p, seed s (within its size), format f and item i; every
seed of every size answers every item in every format. The model is additive in random effects,

    y = μ + p + f + i + pf + pi + fi + pfi + s(p) + sf(p) + si(p) + rest

and each variance is found by the method of moments: with MS_e the mean square of effect e and c_e
the number of outcomes that share one value of it,

    E[MS_e] = Σ over effects e' that contain e of c_e' σ²_e',       solved from the rest upwards

(Searle, Casella & McCulloch 1992, chapter 4). No likelihood is searched, so nothing fails to
converge on a bimodal size. An estimate may come out below zero, which says that the variance is
small: it is reported as 0 with a flag. A factor with one value is left out, and its variance is
then part of the others.

Intervals are generalised (Weerahandi 1993): each MS is divided by draws of chi²/df and the same
equations are solved. They suppose normal effects, and for size they speak of a ladder of sizes
drawn like these. Outcomes of 0 and 1 have their variance p(1 - p) in `rest`, whatever the model
knows: compare components with each other and with `total`, not with 1.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from lm.config import UserError
from lm.emergence.seeds import Interval

if TYPE_CHECKING:
    import pandas as pd

FACTORS = ("size", "seed", "format", "item")
DRAWS = 4000


@dataclass(frozen=True)
class Component:
    """The variance of one effect, e.g. `size`, `format`, `size:format`; `rest` is the last one.

    `negative` marks an estimate below zero, given as 0; `freedom` are its degrees of freedom.
    `share` is the part of the total.
    """

    effect: str
    variance: float
    ci: Interval
    share: float
    freedom: int
    negative: bool


@dataclass(frozen=True)
class Components:
    """All components of a task, with the counts of values of every factor, and what was left out
    to make the table full.
    """

    mean: float
    total: float
    components: tuple[Component, ...]
    counts: dict[str, int]
    dropped: int

    def of(self, effect: str) -> Component:
        """One component by name; `KeyError` if that effect was not varied."""
        found = {component.effect: component for component in self.components}
        return found[effect]


def components(frame: "pd.DataFrame", level: float = 0.95, seed: int = 0) -> Components:
    """The components of outcomes in long form: columns size, seed, format, item, value.

    A missing format, seed or item column counts as one value of it. Seeds belong to their size,
    whatever their names. Items that are not there for every size, seed and format are left out,
    and seeds beyond the fewest of any size. Raises `UserError` on doubled or non-finite outcomes
    and where nothing is left.
    """
    table, dropped = full_table(frame)
    return decompose(table, level, seed, dropped)


def decompose(y: np.ndarray, level: float = 0.95, seed: int = 0, dropped: int = 0) -> Components:
    """The components of a full table [size, seed, format, item].

    Raises `UserError` where it is empty, holds NaN, or no factor has two values.
    """
    y = np.asarray(y, np.float64)
    if y.ndim != 4 or y.size < 2 or not np.isfinite(y).all():
        raise UserError(f"a full [size, seed, format, item] of finite outcomes; not {y.shape}")
    effects = _effects(y.shape)
    square, freedom = _squares(y, effects)
    weight = np.array([y.size / np.prod([y.shape[axis] for axis in e]) for e in effects])
    contains = np.array([[set(e) <= set(other) for other in effects] for e in effects])
    found = _solve(square / freedom, weight, contains)

    rng = np.random.default_rng(seed)
    chi2 = rng.chisquare(freedom, (DRAWS, len(effects)))
    drawn = np.maximum(_solve(square / chi2, weight, contains), 0)
    low, high = np.quantile(drawn, [0.5 - level / 2, 0.5 + level / 2], axis=0)
    total = float(np.maximum(found, 0).sum())
    parts = tuple(
        Component(
            *(_name(e, effects), float(max(variance, 0.0)), Interval(float(a), float(b))),
            *(float(max(variance, 0.0)) / total if total else float("nan"), int(df)),
            bool(variance < -1e-12 * max(total, 1.0)),
        )
        for e, variance, a, b, df in zip(effects, found, low, high, freedom, strict=True)
    )
    counts = dict(zip(FACTORS, y.shape, strict=True))
    return Components(float(y.mean()), total, parts, counts, dropped)


def full_table(frame: "pd.DataFrame") -> tuple[np.ndarray, int]:
    """[size, seed, format, item] from long form, and how many outcomes had to be left out."""
    factors = [name for name in FACTORS if name in frame]
    frame = frame[[*factors, "value"]].assign(
        **{name: 0 for name in FACTORS if name not in factors}
    )
    if frame.empty or not np.isfinite(frame["value"].to_numpy(np.float64)).all():
        raise UserError("outcomes must be finite, and there must be some; leave out what diverged")
    if frame.duplicated(list(FACTORS)).any():
        raise UserError(
            "one size, seed, format and item has two outcomes; keep the last evaluation"
        )
    names = frame[["size", "seed"]].drop_duplicates().sort_values(["size", "seed"])
    names["rank"] = names.groupby("size").cumcount()
    fewest = int(names.groupby("size").size().min())
    kept = frame.merge(names[names["rank"] < fewest], on=["size", "seed"])
    wide = kept.pivot(index=["size", "rank", "format"], columns="item", values="value")
    counts = *(kept[name].nunique() for name in ("size", "rank", "format")), -1
    if len(wide) != np.prod(counts[:3]):
        raise UserError("a size and seed lacks a whole format; give every seed the same formats")
    wide = wide.dropna(axis=1)
    if wide.shape[1] == 0:
        raise UserError("no item was answered by every size, seed and format")
    table = wide.sort_index().to_numpy(np.float64).reshape(counts)
    return table, len(frame) - table.size


def _effects(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The sets of axes that make an effect, small before large; a seed brings its size along."""
    axes = [axis for axis, count in enumerate(shape) if count > 1]
    if not axes:
        raise UserError("no factor has two values; variance needs something that varies")
    sets = [c for k in range(1, len(axes) + 1) for c in combinations(axes, k)]
    if 0 in axes:
        sets = [c for c in sets if 1 not in c or 0 in c]
    return sets


def _squares(y: np.ndarray, effects: list[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """Sum of squares and degrees of freedom of every effect."""
    part: dict[tuple[int, ...], np.ndarray] = {(): y.mean(keepdims=True)}
    free: dict[tuple[int, ...], int] = {(): 1}
    for e in effects:
        inner = [other for other in part if set(other) < set(e)]
        part[e] = y.mean(axis=tuple(set(range(4)) - set(e)), keepdims=True)
        part[e] = part[e] - sum(part[other] for other in inner)
        free[e] = int(np.prod([y.shape[axis] for axis in e])) - sum(free[o] for o in inner)
    squares = [y.size / part[e].size * float((part[e] ** 2).sum()) for e in effects]
    return np.array(squares), np.array([free[e] for e in effects])


def _solve(mean_square: np.ndarray, weight: np.ndarray, contains: np.ndarray) -> np.ndarray:
    """Variances [..., E] from mean squares [..., E]: the largest effect first."""
    found = np.zeros_like(mean_square)
    for e in reversed(range(len(weight))):
        above = contains[e].copy()
        above[e] = False
        rest = (found[..., above] * weight[above]).sum(-1)
        found[..., e] = (mean_square[..., e] - rest) / weight[e]
    return found


def _name(effect: tuple[int, ...], effects: list[tuple[int, ...]]) -> str:
    """`seed` is a seed within its size; the effect of all factors is the rest."""
    if effect == effects[-1] and len(effects) > 1:
        return "rest"
    return ":".join(FACTORS[axis] for axis in effect if not (axis == 0 and 1 in effect))
