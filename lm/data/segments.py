"""Files of texts, one a line: what `lm score`, `lm translate` and the pair sources read.

A line ends at a line feed, before which a carriage return is dropped; nothing else ends one, so
that two files of parallel texts stay parallel whatever other separators are in them.
"""

import gzip
import json
import os
import sys
import zlib
from typing import BinaryIO

from lm.config import UserError

MOST_BYTES = 1 << 28  # of a file, unpacked
_GZIP = b"\x1f\x8b"


def read_segments(path: str | os.PathLike[str]) -> list[str]:
    """The texts of a file, or of the standard input if the path is "-".

    A file whose name ends in .jsonl (or .jsonl.gz) has on every line a JSON string, or an object
    with a "text". Raises `UserError` where there is no text, or it is not UTF-8, too large or
    damaged.
    """
    text = read_text(path)
    lines = split_lines(text)
    if not any(line.strip() for line in lines):
        raise UserError(f"{path} has no text; give a file with one text a line")
    if not os.fspath(path).removesuffix(".gz").endswith(".jsonl"):
        return lines
    return [_json_text(line, i, path) for i, line in enumerate(lines, 1)]


def split_lines(text: str) -> list[str]:
    """The lines of a text; a line feed at its end does not begin another."""
    lines = text.removesuffix("\n").split("\n")
    return [line.removesuffix("\r") for line in lines]


def read_text(path: str | os.PathLike[str]) -> str:
    """The UTF-8 text of a file, unpacked if it is gzip; "-" is the standard input."""
    content = read_bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path} is not UTF-8 (line {line}, byte {error.start}); convert it, such as with iconv"
        ) from error


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """The content of a file, unpacked if it is gzip."""
    if os.fspath(path) == "-":
        return _bounded(sys.stdin.buffer, path)
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist; give a file of texts")
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder; give a file of texts")
    with open(path, "rb") as file:
        packed = file.read(2) == _GZIP
        file.seek(0)
        if not packed:
            return _bounded(file, path)
        try:
            with gzip.open(file) as unpacked:
                return _bounded(unpacked, path)  # type: ignore[arg-type]
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path} is damaged gzip ({error}); fetch or pack it anew") from error


def _bounded(file: BinaryIO, path: str | os.PathLike[str]) -> bytes:
    content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise UserError(f"{path} has more than {MOST_BYTES >> 20} MiB of text; cut it into files")
    return content


def _json_text(line: str, number: int, path: str | os.PathLike[str]) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} line {number} is no JSON ({error}); see `lm score`") from error
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise UserError(f"{path} line {number} has no text: it must be a string or have a 'text'")
    return text
