"""The safetensors format: 8 bytes of length, a JSON header, and the numbers.

The `safetensors` library maps the file, which would be a second copy of the weights in memory, and
gives no places; so the header is read here, by the library's own rules: the tensors fill the rest
of the file without a gap and without an overlap. `tests/test_pretrained_safetensors.py` gives both
the same mutated files.
"""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lm.config import UserError
from lm.pretrained.tensors import MOST_AXES, Entry, layout_problem, numbers, parse_json, show

LONGEST_HEADER = 8 << 20  # bytes; 20,000 tensors take about 2 MB
_LARGEST = 1 << 62  # bytes, beyond which an offset is a lie

# Bytes of a number of each kind.
SIZES = {
    **{"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4},
    **{"F16": 2, "BF16": 2, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1},
    **{"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
}


def entries(path: Path) -> dict[str, Entry]:
    """The tensors of a file, by name; raises `UserError` where it is not whole safetensors."""
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 10 or length > size - 8:
            raise _broken(path, f"its header says {length:,} bytes, the file has {size:,}")
        if length > LONGEST_HEADER:
            raise _broken(path, f"its header has {length:,} bytes, at most {LONGEST_HEADER:,} do")
        header = _header(path, file.read(length))
    start = 8 + length
    found = {name: _entry(path, name, value, start) for name, value in header.items()}
    if problem := layout_problem(found.values(), start, size):
        raise _broken(path, problem)
    # Tensors that neither overlap nor leave the file fill it when they have all its bytes.
    if (used := start + sum(entry.size for entry in found.values())) != size:
        raise _broken(path, f"its tensors take {used:,} bytes, the file has {size:,}")
    return found


def write(path: Path, tensors: Iterable[tuple[str, np.ndarray]], layout: Mapping[str, Any]) -> None:
    """Writes the tensors one after another; `layout` is their header, from `plan`."""
    with open(path, "xb") as file:
        text = json.dumps({"__metadata__": {"format": "pt"}, **layout}, separators=(",", ":"))
        head = text.encode() + b" " * (-len(text.encode()) % 8)
        file.write(len(head).to_bytes(8, "little") + head)
        for name, array in tensors:
            begin, end = layout[name]["data_offsets"]
            if array.nbytes != end - begin:
                raise ValueError(f"{name} has {array.nbytes} bytes, its header says {end - begin}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def plan(shapes: Iterable[tuple[str, tuple[int, ...]]], kind: str) -> dict[str, Any]:
    """The header of tensors of one kind that follow each other."""
    header, at = {}, 0
    for name, shape in shapes:
        end = at + numbers(shape) * SIZES[kind]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    return header


def _header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = parse_json(text)
    except ValueError as error:
        raise _broken(path, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise _broken(path, "its header is no JSON object")
    more = header.pop("__metadata__", {})
    if not isinstance(more, dict) or not all(isinstance(v, str) for v in more.values()):
        raise _broken(path, "its __metadata__ is no mapping of texts")
    return header


def _entry(path: Path, name: str, value: Any, start: int) -> Entry:
    try:
        kind, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        each = SIZES[kind]
    except (KeyError, TypeError, ValueError) as error:
        raise _broken(path, f"{show(name)} lacks a dtype, shape or data_offsets") from error
    # Few and short factors first: the product of a million of them takes minutes.
    known = isinstance(shape, list) and len(shape) <= MOST_AXES
    whole = known and all(type(n) is int and 0 <= n < _LARGEST for n in (*shape, begin, end))
    if not whole or end - begin != numbers(shape) * each:
        text = f"{kind} {show(shape)}, its bytes are {show(begin)} to {show(end)}"
        raise _broken(path, f"{show(name)} is {text}")
    return Entry(name, kind, tuple(shape), path, start + begin, end - begin)


def _broken(path: Path, why: str) -> UserError:
    return UserError(f"{path} is no whole safetensors file: {why}; download it again")
