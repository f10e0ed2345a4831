"""How a tensor of a file lies in a parameter of ours: a view of it, for both directions.

A layout takes one layer's parameter and gives a view of it whose elements, in C order, are those of
the file's tensor, and the shape of that tensor. Import writes into the view, export reads from it,
so the two cannot disagree. Letters as everywhere, with
G = N / K queries to a key; the columns of our `qkv` are [K, (G queries, key, value), H].
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class View(NamedTuple):
    """A view of a parameter, and the file's shape of it."""

    array: np.ndarray
    shape: tuple[int, ...]


type Layout = Callable[[np.ndarray, Any], View]


def same(a: np.ndarray, c: Any) -> View:
    """As it is."""
    return View(a, a.shape)


def turned(a: np.ndarray, c: Any) -> View:
    """[out, in] in the file, [in, out] here."""
    return View(a.T, a.T.shape)


def query(a: np.ndarray, c: Any) -> View:
    """The queries' part of `qkv` or of its bias: [N H, D] or [N H] in the file."""
    return _part(a, c, c.group + 2, slice(0, c.group))


def key(a: np.ndarray, c: Any) -> View:
    """The keys' part: [K H, D] or [K H]."""
    return _part(a, c, c.group + 2, c.group)


def value(a: np.ndarray, c: Any) -> View:
    """The values' part: [K H, D] or [K H]."""
    return _part(a, c, c.group + 2, c.group + 1)


def cross_key(a: np.ndarray, c: Any) -> View:
    """The keys' part of `cross_kv`, whose columns are [N, (key, value), H]."""
    return _part(a, c, 2, 0)


def cross_value(a: np.ndarray, c: Any) -> View:
    """The values' part of it."""
    return _part(a, c, 2, 1)


def columns(a: np.ndarray, c: Any) -> View:
    """GPT-2's [D, (q, k, v) N H], which is [in, out] already, or its bias."""
    return View(np.swapaxes(_heads(a, c, c.group + 2), -3, -2), a.shape)


def paired_query(a: np.ndarray, c: Any) -> View:
    """The queries' part as GGUF has it for Llama: its rotation pairs neighbours (2i, 2i + 1), where
    ours pairs i with i + H/2, so the rows of each head come in another order.
    """
    return _part(a, c, c.group + 2, slice(0, c.group), paired=True)


def paired_key(a: np.ndarray, c: Any) -> View:
    """The keys' part, in the same order."""
    return _part(a, c, c.group + 2, c.group, paired=True)


def _heads(a: np.ndarray, c: Any, parts: int) -> np.ndarray:
    """[..., K parts H] as [..., K, parts, H]."""
    return a.reshape(*a.shape[:-1], c.kv_heads, parts, c.head_size)


def _part(a: np.ndarray, c: Any, parts: int, which: int | slice, paired: bool = False) -> View:
    view = _heads(a, c, parts)[..., which, :]
    if paired:
        halves = view.reshape(*view.shape[:-1], 2, c.head_size // 2)
        view = np.swapaxes(halves, -1, -2)
    if a.ndim == 1:
        return View(view, (view.size,))
    view = np.moveaxis(view, 0, -1)
    return View(view, (math.prod(view.shape[:-1]), view.shape[-1]))
