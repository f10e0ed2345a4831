"""Tensors in a file, before anything is loaded: their names, kinds, shapes and places.

A weights file is somebody else's: each of its lengths, counts and offsets may lie. Readers of a
format (`safetensors`, `gguf`) check all of them against the size of the file and against each
other, and give `Entry` records; only then is anything allocated, and never more than the file can
fill. `read` takes one tensor from the disk, by plain reads and not by mapping the file: mapped
pages would count as a second copy of the weights, and a file cut short meanwhile would kill the
process.
"""

import dataclasses
import functools
import json
import math
import os
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from lm.config import UserError

# The floating kinds, as both formats name them; the others are gguf's quantised ones.
FLOATS: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
MOST_AXES = 8
_PIECE = 1 << 16  # numbers dequantised at once: the temporaries are a few times as large


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor: `kind` is that of the file (`F32`, `BF16`, `Q4_1`), `start` and `size` bytes."""

    name: str
    kind: str
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int


def read(entry: Entry) -> np.ndarray:
    """The numbers of a tensor in its shape; quantised ones as float32, floats as they are stored.

    Raises `UserError` where the kind holds no floating numbers or the file has become shorter.
    """
    with open(entry.file, "rb") as file:
        file.seek(entry.start)
        if entry.kind in FLOATS:
            out = np.empty(entry.shape, FLOATS[entry.kind])
            _fill(file, entry, out.reshape(-1).view(np.uint8))
            return out
        return _dequantise(file, entry)


@functools.cache
def readable(kind: str) -> bool:
    """Whether `read` gives numbers of this kind."""
    if kind in FLOATS:
        return True
    try:
        size = block(kind)[1]
        quants.dequantize(np.zeros((1, size), np.uint8), GGMLQuantizationType[kind])
    except (KeyError, NotImplementedError):  # another format's kind, or whole numbers
        return False
    return True


def layout_problem(entries: Iterable[Entry], start: int, end: int) -> str:
    """Why the tensors do not fit into the bytes from `start` to `end` of a file, or nothing."""
    last, before = start, "the header"
    for entry in sorted(entries, key=lambda e: (e.start, e.size)):
        if entry.start < last:
            return f"{show(entry.name)} overlaps {before}"
        last, before = entry.start + entry.size, show(entry.name)
        if last > end:
            return f"{before} ends at byte {last:,}, the file has {end:,}"
    return ""


def show(value: Any) -> str:
    """A value of a file for a message: short and printable, whatever it is."""
    return reprlib.repr(value)


def numbers(shape: Iterable[int]) -> int:
    """The product of a shape, in integers that do not overflow."""
    return math.prod(int(n) for n in shape)


def block(kind: str) -> tuple[int, int]:
    """How many numbers of a quantised kind lie in one block, and the bytes of it."""
    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


def open_json(path: Path, largest: int) -> Any:
    """The JSON of a file of other people, of at most `largest` bytes; raises `UserError`."""
    if not path.is_file():
        raise UserError(f"{path} is not there, or no file; give a folder that has one")
    if (size := os.stat(path).st_size) > largest:
        raise UserError(f"{path} has {size:,} bytes; at most {largest:,} are read")
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); download it again") from error


def parse_json(text: bytes) -> Any:
    """JSON by the letter: raises `ValueError` at NaN, at a key that stands twice, and at nesting
    without end.
    """
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_refuse)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _refuse(word: str) -> Any:
    raise ValueError(f"{word} is no number of JSON")


def _fill(file: Any, entry: Entry, out: np.ndarray) -> None:
    if file.readinto(out) != out.size:
        raise UserError(
            f"{entry.file} has become shorter while it was read; download it again, and leave it be"
        )


def _dequantise(file: Any, entry: Entry) -> np.ndarray:
    if not readable(entry.kind):
        raise UserError(
            f"{entry.name!r} of {entry.file} holds {entry.kind}, which are no floating numbers;"
            " give weights as F32, F16 or BF16, or in a gguf quantisation"
        )
    width, size = block(entry.kind)
    out = np.empty(numbers(entry.shape), np.float32)
    piece = _PIECE // width * width
    for at in range(0, out.size, piece):
        count = min(piece, out.size - at)
        raw = np.empty(count // width * size, np.uint8)
        _fill(file, entry, raw)
        # One long row: the library goes through rows in groups of 16, and blocks know no rows.
        out[at : at + count] = quants.dequantize(raw[None], GGMLQuantizationType[entry.kind])[0]
    return out.reshape(entry.shape)
