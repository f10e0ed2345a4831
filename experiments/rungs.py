"""Which sizes and seeds narrow the interval of an onset: what `lm run --refine` adds.

A 95% interval is wide because no size lies in it, or because the sizes in it have few seeds. With
log10 parameters x, sizes x_1 < x_2 < … and the interval [low, high], a round adds

    a size    in the gap (x_i, x_i+1) that covers most of the interval, at the even width of some
              depth whose x is nearest the middle of what it covers
    seeds     to the size nearest the onset: where no such width is left, or where its seeds are
              split and few (2 `FEW`)

All is pure: rows, a verdict and points in, points out.
"""

import dataclasses
import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lm.config import UserError
from lm.sizes import ladder, parameters
from lm.train.cell import Point

if TYPE_CHECKING:
    import pandas as pd

    from lm.emergence.onset import Verdict

FEW, MANY = 5, 20  # seeds of a size that is added; no size gets more than MANY
PRECISION = 0.2  # decades


class Proposal(NamedTuple):
    """A point to add, the point whose seeds it continues (or itself), and why, in half a sentence.

    `params` are its non-embedding parameters.
    """

    point: Point
    params: int
    reason: str


def propose(
    frame: "pd.DataFrame",
    verdict: "Verdict",
    points: Sequence[Point],
    taken: Collection[str] = (),
    precision: float = PRECISION,
) -> list[Proposal]:
    """What should narrow the interval of `verdict` most: nothing, if it is narrow enough.

    `frame` holds the rows of the task, `points` all points so far, `taken` names of cells.
    """
    low, high = np.log10(verdict.ci95)
    if not high - low > precision:
        return []
    ladder_points = [p for p in points if p.role == "ladder"]
    sizes = sorted({_x(p) for p in ladder_points})
    names = {p.name for p in points} | set(taken)
    plan = []
    gaps = sorted(zip(sizes, sizes[1:], strict=False), key=lambda g: -_overlap(g, low, high))
    for gap in gaps:
        if _overlap(gap, low, high) < (high - low) / 4:
            break
        middle = (max(gap[0], low) + min(gap[1], high)) / 2
        inside = [c for c in _between(ladder_points, names) if gap[0] < _x(c[0]) < gap[1]]
        if inside:
            point, left, right = min(inside, key=lambda c: abs(_x(c[0]) - middle))
            reason = f"between {left} and {right}, where the interval is widest"
            plan.append(Proposal(point, _params(point), reason))
            break
    rung = _rung(verdict, ladder_points)
    if rung is not None and (not plan or _split(frame, rung)):
        count = sum(p.seeds.replicas for p in ladder_points if _params(p) == _params(rung))
        more = min(max(FEW, count), MANY - count)
        if more > 0 and (not plan or count < 2 * FEW):
            reason = f"{more} more seeds of {rung.name}, beside the onset"
            plan.append(
                Proposal(_continued(rung, ladder_points, names, more), _params(rung), reason)
            )
    return plan


def same(a: Point, b: Point) -> bool:
    """Whether two points differ in nothing but their name and their seeds."""
    return a == dataclasses.replace(b, name=a.name, seeds=a.seeds)


def _between(points: Sequence[Point], taken: set[str]) -> list[tuple[Point, str, str]]:
    """Every even width between two neighbours of equal depth, with their names. Learning rate and
    tokens are interpolated; neighbours that differ in more have nothing between them.
    """
    found = []
    for a in points:
        wider = [p for p in points if p.model.layers == a.model.layers and _kin(a, p)]
        wider = [p for p in wider if p.model.width > a.model.width]
        if not wider:
            continue
        b = min(wider, key=lambda p: p.model.width)
        for width in range(a.model.width + 2 - a.model.width % 2, b.model.width, 2):
            if (point := _interpolated(a, b, width, taken)) is not None:
                found.append((point, a.name, b.name))
    return found


def _kin(a: Point, b: Point) -> bool:
    """Whether two points differ in nothing but name, model, learning rate, tokens and seeds."""
    plain = _spent(b, a.optim.learning_rate, a.train.tokens)
    return dataclasses.replace(plain, name=a.name, model=a.model, seeds=a.seeds) == a


def _interpolated(a: Point, b: Point, width: int, taken: set[str]) -> Point | None:
    model = _model(a, b, width)
    if model is None:
        return None
    share = math.log(width / a.model.width) / math.log(b.model.width / a.model.width)
    rate = a.optim.learning_rate ** (1 - share) * b.optim.learning_rate**share
    tokens = a.train.tokens ** (1 - share) * b.train.tokens**share
    seeds = min(max(FEW, a.seeds.replicas, b.seeds.replicas), MANY)
    return dataclasses.replace(
        _spent(a, float(f"{rate:.4g}"), round(tokens)),
        name=_free(_renamed(a, f"{model.layers}x{width}"), taken),
        model=model,
        seeds=dataclasses.replace(a.seeds, replicas=seeds),
    )


def _model(a: Point, b: Point, width: int) -> Any:
    """The ladder's model of this width, if a and b are the ladder's models of theirs (or share
    their heads) under the same further settings.
    """
    derived = ("layers", "width", "heads", "kv_heads", "mlp_size")
    for fixed in ((), ("heads", "kv_heads")):
        settings = {
            f.name: getattr(a.model, f.name)
            for f in dataclasses.fields(a.model)
            if f.init and (f.name not in derived or f.name in fixed)
        }
        try:
            made = [
                ladder(f"{a.model.layers}x{w}", **settings)
                for w in (a.model.width, b.model.width, width)
            ]
        except UserError:
            continue
        if made[:2] == [a.model, b.model]:
            return made[2]
    return None


def _spent(point: Point, rate: float, tokens: int) -> Point:
    """The point with another learning rate and budget."""
    optim = dataclasses.replace(point.optim, learning_rate=rate)
    return dataclasses.replace(
        point, optim=optim, train=dataclasses.replace(point.train, tokens=tokens)
    )


def _renamed(point: Point, size: str) -> str:
    """The name with another size in it (`code-2x8` -> `code-2x10`), or the size."""
    old = f"{point.model.layers}x{point.model.width}"
    return point.name.split("+")[0].replace(old, size) if old in point.name else size


def _free(name: str, taken: set[str]) -> str:
    """The name, or NAME+1, NAME+2, … if it is taken."""
    every = (f"{name}+{k}" if k else name for k in range(len(taken) + 1))
    return next(each for each in every if each not in taken)


def _continued(rung: Point, points: Sequence[Point], taken: set[str], more: int) -> Point:
    """The same setting with seeds that none of its points has."""
    first = max(p.seeds.first + p.seeds.replicas for p in points if same(p, rung))
    seeds = dataclasses.replace(rung.seeds, first=first, replicas=more)
    return dataclasses.replace(rung, name=_free(rung.name, taken), seeds=seeds)


def _rung(verdict: "Verdict", points: Sequence[Point]) -> Point | None:
    """The size nearest the onset that has room for seeds, as the point that was first at it."""
    room: dict[int, Point] = {}
    for point in points:
        count = sum(p.seeds.replicas for p in points if _params(p) == _params(point))
        if count < MANY:
            room.setdefault(_params(point), point)
    if not room:
        return None
    return room[min(room, key=lambda params: abs(math.log(params / verdict.onset)))]


def _split(frame: "pd.DataFrame", rung: Point) -> bool:
    """Whether some finished seeds of a size have the ability and some have not."""
    from lm.emergence import onset, seeds

    rows = frame[(frame["metric"] == "exact_match") & (frame["role"] == "ladder")]
    rows = onset.usable(onset.final_rows(rows))
    means = rows.groupby("params")["value"].mean().to_numpy()
    mark = seeds.threshold(float(rows["chance"].iloc[0]), means)
    through = rows[rows["params"] == _params(rung)]["value"] > mark
    return bool(0 < through.mean() < 1)


def _params(point: Point) -> int:
    return parameters(point.model).non_embedding


def _x(point: Point) -> float:
    return math.log10(_params(point))


def _overlap(gap: tuple[float, float], low: float, high: float) -> float:
    return min(gap[1], high) - max(gap[0], low)
