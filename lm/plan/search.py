"""When a cell does not fit: the nearest setting that does.

Settings are tried in the order of what they cost: remat (time), strategy (time on the links), rows
of a batch (another experiment: the optimiser sees other batches). The estimate orders them, the
compiler has the last word.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Literal, get_args

from lm.plan import estimate
from lm.plan.topology import Topology
from lm.sharding import Strategy
from lm.train.cell import Cell

Remat = Literal["none", "dots", "full"]
REMATS: tuple[Remat, ...] = get_args(Remat)
CONFIRMATIONS = 4  # compilations spent on one cell


def changed(cell: Cell, remat: Remat, strategy: Strategy, halvings: int) -> Cell | None:
    """The cell under other settings; None if its sources have too few rows to be halved."""
    mixture = {}
    for name, source in cell.data.mixture.items():
        rows, rest = divmod(source.rows, 2**halvings)
        if rest or not rows:
            return None
        mixture[name] = dataclasses.replace(source, rows=rows)
    return dataclasses.replace(
        cell,
        model=dataclasses.replace(estimate.transformer(cell), remat=remat),
        train=dataclasses.replace(cell.train, strategy=strategy),
        data=dataclasses.replace(cell.data, mixture=mixture),
    )


def say(cell: Cell, other: Cell) -> str:
    """What differs, as settings on a command line."""
    parts, remat = [], estimate.transformer(other).remat
    if remat != estimate.transformer(cell).remat:
        parts.append(f"model.remat={remat}")
    if other.train.strategy != cell.train.strategy:
        parts.append(f"train.strategy={other.train.strategy}")
    if other.data.rows != cell.data.rows:
        parts.append(f"data rows {cell.data.rows} -> {other.data.rows}")
    return ", ".join(parts)


def candidates(cell: Cell, topology: Topology) -> Iterator[Cell]:
    """Other settings whose estimate fits, the nearest first."""
    strategies = [s for s in get_args(Strategy) if s in ("replicated", "fsdp", "fsdp_tp")]
    here = REMATS.index(estimate.transformer(cell).remat), strategies.index(cell.train.strategy)
    for halvings in range(8):
        for s in range(here[1], len(strategies)):
            for r in range(here[0], len(REMATS)):
                if (r, s, halvings) == (*here, 0):
                    continue
                other = changed(cell, REMATS[r], strategies[s], halvings)
                if other is None or _uneven(other, topology):
                    continue
                if estimate.memory(other, topology).total <= topology.chip.limit:
                    yield other


def nearest(cell: Cell, topology: Topology, fits: Callable[[Cell], bool] | None) -> Cell | None:
    """The first candidate that `fits` confirms, or the first of all without it; None if none."""
    for i, other in enumerate(candidates(cell, topology)):
        if fits is None or fits(other):
            return other
        if i + 1 >= CONFIRMATIONS:
            return None
    return None


def _uneven(cell: Cell, topology: Topology) -> bool:
    """Whether batch or weights do not divide the devices."""
    over, c = estimate.spread(cell, topology), estimate.transformer(cell)
    cut = cell.train.strategy != "replicated"
    return bool(
        cell.data.rows % over.data
        or topology.devices % (cell.train.replica_devices * over.tensor)
        or (cut and c.width % over.data)
        or any(n % over.tensor for n in (c.kv_heads, c.mlp_size, c.vocab_size))
    )
