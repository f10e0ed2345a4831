"""What a worker makes of a case, and inputs that every implementation draws alike.

Implementations live in processes of their own, some of them without JAX, so inputs are functions of
a seed in NumPy and the results that are compared are NumPy arrays.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from lm.bench.cases import AttentionCase, TrainCase

# Steps whose losses are compared. AdamW divides by the root of its second moment, so what differs
# by rounding drifts apart from step to step.
CHECKED = 4

OPTIM = {
    "learning_rate": 1e-3,
    "b1": 0.9,
    "b2": 0.98,
    "epsilon": 1e-8,
    "weight_decay": 0.05,
    "clip": 1.0,
}


class Work(NamedTuple):
    """An implementation made ready for a case."""

    call: Callable[[], Any]  # does the work once, and is done when it returns
    results: Callable[[], dict[str, Any]]  # arrays: what all implementations must agree on
    steps: int = 1  # training steps in a call
    temporaries: int | None = None  # bytes, as the compiler counts them
    compile_s: float | None = None


def operands(case: AttentionCase) -> tuple[np.ndarray, ...]:
    """q [B, T, N, H], k and v [B, T, K, H], and a gradient of the output like q; float32."""
    rng = np.random.default_rng(0)
    heads = (case.heads, case.kv_heads, case.kv_heads, case.heads)
    shapes = [(case.batch, case.length, n, case.head_size) for n in heads]
    return tuple(rng.standard_normal(shape, np.float32) for shape in shapes)


def rows(case: TrainCase, replica: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets int32 [chunk, B, T] of one replica."""
    rng = np.random.default_rng(replica)
    shape = (case.chunk, case.rows, case.length + 1)
    ids = rng.integers(0, case.vocab, shape, dtype=np.int32)
    return ids[..., :-1], ids[..., 1:]


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The first value of a parameter, by its path in our tree: 1 for norms, else normal."""
    if "norm" in name:
        return np.ones(shape, np.float32)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    return rng.standard_normal(shape, np.float32) * np.float32(shape[-1] ** -0.5)
