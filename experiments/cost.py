"""What a study will cost, before it starts: parameters, FLOPs, memory and time of every point."""

from collections import Counter
from collections.abc import Sequence

from rich.console import Console

from experiments.display import print_columns
from lm.config import UserError
from lm.models import Config, EncoderDecoderConfig, LSTMConfig
from lm.sizes import flops_per_sequence, parameters
from lm.train.cell import Cell, Point

# One core of a 2025 server beside another worker (float32, rows of 32, the fused step), fitted to
# the nine cells of the desk study, 800 to 62,000 parameters, evaluation included: within 13 % of
# each. A token costs time for data and dispatch beside its FLOPs, and more the more layers.
FLOPS_PER_SECOND = 136e9
SECONDS_PER_TOKEN = 0.05e-6
SECONDS_PER_TOKEN_LAYER = 0.17e-6
COMPILE_SECONDS = 5.0  # with a cold compile cache
COLUMNS = ("point", "params", "total", "replicas", "tokens", "steps", "FLOPs", "MiB", "min")


def seconds(cell: Cell) -> float:
    """Estimated seconds of one core for all replicas of a cell, within about a factor of two."""
    tokens = cell.steps * cell.tokens_per_step
    per_token = flops_per_sequence(cell.model, cell.data.length) / cell.data.length
    each = (
        per_token / FLOPS_PER_SECOND
        + SECONDS_PER_TOKEN
        + SECONDS_PER_TOKEN_LAYER * _layers(cell.model)
    )
    return COMPILE_SECONDS + len(cell.replicas) * tokens * each


def memory(cell: Cell) -> int:
    """Estimated bytes: parameters, gradient and two moments of every replica, and one replica's
    activations in float32.
    """
    m, rows, length = cell.model, cell.data.rows, cell.data.length
    state = state_memory(cell)
    if isinstance(m, LSTMConfig):
        per_layer = 2 * m.width + 12 * m.memory
    else:
        per_layer = 8 * m.width + 2 * m.mlp_size + 2 * m.heads * length
    activations = 4 * rows * length * (_layers(m) * per_layer + 4 * m.vocab_size)
    return state + activations


def _layers(model: Config) -> int:
    """Of both stacks where there are two, as if each had the whole row."""
    if isinstance(model, EncoderDecoderConfig):
        return model.encoder.layers + model.decoder.layers
    return model.layers


def state_memory(cell: Cell) -> int:
    """Bytes of what must be there whatever else is: the part of `memory` that is exact."""
    return 4 * parameters(cell.model).total * (3 * len(cell.replicas) + 1)


def check_memory(cells: Sequence[Cell], there: float) -> None:
    """Refuses a cell whose state alone is larger than the machine, in bytes."""
    for cell in cells:
        if (need := state_memory(cell)) > there:
            total, count = parameters(cell.model).total, len(cell.replicas)
            raise UserError(
                f"cell {cell.name} needs {need / 2**30:,.0f} GiB for {total:,} parameters of"
                f" {count} replicas, gradient and moments; this machine has {there / 2**30:,.0f};"
                " take a smaller size or fewer seeds, or see what accelerators would need (lm plan)"
            )


def show(points: Sequence[Point], cells: Sequence[Cell], console: Console) -> None:
    """Prints a table of all points, a line per cell's estimate, and the sum."""
    rows = []
    by_point = {r.point: c for c in cells for r in c.replicas}
    counts_of = {c.name: Counter(r.point for r in c.replicas) for c in cells}
    for p in points:
        cell = by_point[p.name]
        count = counts_of[cell.name][p.name]
        tokens = cell.steps * cell.tokens_per_step
        flops = flops_per_sequence(p.model, p.data.length) / p.data.length * tokens * count
        rows.append(
            (
                p.name + (" (control)" if p.role == "control" else ""),
                f"{parameters(p.model).non_embedding:,}",
                f"{parameters(p.model).total:,}",
                str(count),
                f"{tokens:,}",
                f"{cell.steps:,}",
                f"{flops:.2e}",
                f"{memory(cell) / 2**20:,.0f}",
                f"{seconds(cell) / 60 * count / len(cell.replicas):.1f}",
            )
        )
    print_columns(console, COLUMNS, rows, left=COLUMNS[:1])
    total = sum(map(seconds, cells))
    counts = len(points), sum(len(c.replicas) for c in cells), len(cells)
    words = zip(counts, ("point", "replica", "cell"), strict=True)
    console.print(
        ", ".join(f"{n} {word}{'s' * (n != 1)}" for n, word in words),
        f"about {total / 60:.1f} minutes of one core (give or take a factor of two)",
        "dry run: nothing was written",
        sep="; ",
        highlight=False,
    )
