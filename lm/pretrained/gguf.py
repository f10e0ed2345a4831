"""The GGUF format: counts, metadata, descriptions of the tensors, and the numbers.

The `gguf` library knows the kinds of quantisation and turns them into numbers; its reader believes
every count and length of the file, walks off into memory for hours, and is not used. The header is
read here: a length is compared with what is left of the file before anything is read, text with
what a vocabulary needs, and every tensor with the size of the file and with its neighbours.
"""

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from lm.config import UserError
from lm.pretrained.tensors import Entry, layout_problem, numbers, show

LONGEST_HEADER = 128 << 20  # bytes; a vocabulary of 262,144 takes about 20 MB
MOST_TEXTS = 1 << 21  # of one array: a vocabulary or its merges
MOST_KEYS = 1 << 12
MOST_TENSORS = 1 << 16
LONGEST_NAME = 256
_MOST_AXES = 4
_LARGEST = 1 << 48  # numbers of a tensor

# Scalars by their number in the format: struct's letter, NumPy's type.
_SCALARS: dict[int, tuple[str, Any]] = {
    **{0: ("<B", np.uint8), 1: ("<b", np.int8), 2: ("<H", "<u2"), 3: ("<h", "<i2")},
    **{4: ("<I", "<u4"), 5: ("<i", "<i4"), 6: ("<f", "<f4"), 7: ("<?", np.bool_)},
    **{10: ("<Q", "<u8"), 11: ("<q", "<i8"), 12: ("<d", "<f8")},
}
_TEXT, _ARRAY = 8, 9


class Contents(NamedTuple):
    """A file's metadata (numbers, texts, lists of texts, arrays of numbers) and its tensors."""

    metadata: dict[str, Any]
    entries: dict[str, Entry]


class _Header:
    """A place in a file, which never gives more than there is."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self._file, self.left = path, file, min(size, LONGEST_HEADER)
        self.at = 0

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise self.broken(f"at byte {self.at:,} it wants {count:,} more, which are not there")
        self.left -= count
        self.at += count
        return self._file.read(count)

    def scalar(self, kind: int) -> Any:
        letter = _SCALARS[kind][0]
        return struct.unpack(letter, self.take(struct.calcsize(letter)))[0]

    def count(self, most: int, what: str) -> int:
        number = self.scalar(10)
        if number > most:
            raise self.broken(f"it says {number:,} {what}; at most {most:,} are read")
        return int(number)

    def text(self, most: int = LONGEST_HEADER) -> str:
        try:
            return self.take(self.count(most, "bytes of a text")).decode()
        except UnicodeDecodeError as error:
            raise self.broken(f"a text before byte {self.at:,} is not UTF-8") from error

    def broken(self, why: str) -> UserError:
        return UserError(f"{self.path} is no whole GGUF file: {why}; download it again")


def open_gguf(path: Path) -> Contents:
    """What a file says it has, checked; raises `UserError` where it is not whole GGUF."""
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        header = _Header(path, file, size)
        if header.take(4) != b"GGUF":
            raise header.broken("it does not begin with GGUF")
        version = header.scalar(4)
        if version not in (2, 3):
            order = " (or of the other byte order)" if version & 0xFFFF == 0 else ""
            raise header.broken(f"it is of version {version}{order}; 2 and 3 are read")
        tensors = header.count(MOST_TENSORS, "tensors")
        keys = header.count(MOST_KEYS, "keys")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            name = header.text(1 << 16)
            if name in metadata:
                raise header.broken(f"the key {show(name)} stands twice")
            metadata[name] = _value(header, name)
        found = _tensors(header, tensors, _alignment(header, metadata))
    if problem := layout_problem(found.values(), header.at, size):
        raise header.broken(problem)
    return Contents(metadata, found)


def _value(header: _Header, name: str) -> Any:
    kind = header.scalar(4)
    if kind == _TEXT:
        return header.text()
    if kind == _ARRAY:
        return _array(header, name)
    if kind not in _SCALARS:
        raise header.broken(f"{show(name)} is of the unknown type {kind}")
    return header.scalar(kind)


def _array(header: _Header, name: str) -> Any:
    kind = header.scalar(4)
    if kind == _TEXT:
        count = header.count(min(MOST_TEXTS, header.left // 8), f"texts in {show(name)}")
        return [header.text() for _ in range(count)]
    if kind not in _SCALARS:
        raise header.broken(f"{show(name)} is an array of type {kind}, which is not read")
    dtype = np.dtype(_SCALARS[kind][1])
    count = header.count(header.left // dtype.itemsize, f"numbers in {show(name)}")
    return np.frombuffer(header.take(count * dtype.itemsize), dtype)


def _alignment(header: _Header, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", 32)
    if type(value) is not int or not 0 < value <= 1 << 20 or value & (value - 1):
        raise header.broken(f"general.alignment is {show(value)}, no power of two up to 1,048,576")
    return value


def _tensors(header: _Header, count: int, alignment: int) -> dict[str, Entry]:
    raw = [_description(header) for _ in range(count)]
    start = -(-header.at // alignment) * alignment
    found: dict[str, Entry] = {}
    for name, kind, shape, offset, size in raw:
        if name in found:
            raise header.broken(f"the tensor {show(name)} stands twice")
        if offset % alignment:
            raise header.broken(f"{show(name)} begins at {offset:,}, no multiple of {alignment}")
        found[name] = Entry(name, kind, shape, header.path, start + offset, size)
    return found


def _description(header: _Header) -> tuple[str, str, tuple[int, ...], int, int]:
    """Name, kind, shape, offset and bytes of the next tensor."""
    name = header.text(LONGEST_NAME)
    axes = header.scalar(4)
    if not 1 <= axes <= _MOST_AXES:
        raise header.broken(f"{show(name)} has {axes:,} axes; 1 to {_MOST_AXES} are read")
    # The fastest axis comes first in the file.
    shape = tuple(header.scalar(10) for _ in range(axes))[::-1]
    number, offset = header.scalar(4), header.scalar(10)
    if not all(shape) or numbers(shape) > _LARGEST:
        raise header.broken(f"{show(name)} has the shape {list(shape)}")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError as error:
        raise header.broken(f"{show(name)} is of the unknown kind {number}") from error
    width, each = GGML_QUANT_SIZES[kind]
    if shape[-1] % width:
        raise header.broken(f"{show(name)} has rows of {shape[-1]}, no multiple of {width}")
    return name, kind.name, shape, offset, numbers(shape) // width * each
