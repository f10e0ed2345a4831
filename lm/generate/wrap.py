"""Lines of a terminal's width from text that comes in pieces: a word is shown when it is whole."""

import dataclasses
import re

from rich.cells import cell_len


@dataclasses.dataclass(frozen=True)
class Line:
    """The line that is being written: how many cells it has, and the word that is not whole."""

    cells: int = 0
    word: str = ""


def wrap(line: Line, piece: str, width: int) -> tuple[Line, str]:
    """The line after a piece of text, and what can be written; words go to the next line whole
    where they fit one. Spaces stay where they are, for code and tables have a meaning in them.
    """
    parts = re.split(r"(\s)", line.word + piece)
    line, shown = Line(line.cells), ""
    for part in parts[:-1]:
        line, more = _write(line, part, width)
        shown += more
    return dataclasses.replace(line, word=parts[-1]), shown


def end(line: Line, width: int) -> str:
    """The word that was held back."""
    return _write(Line(line.cells), line.word, width)[1]


def _write(line: Line, part: str, width: int) -> tuple[Line, str]:
    if part == "\n":
        return Line(), part
    if part.isspace():
        return (Line(), "\n") if line.cells >= width else (Line(line.cells + 1), part)
    cells = cell_len(part)
    if line.cells and line.cells + cells > width:
        # A word that is wider than a line, or text without spaces, is left to the terminal.
        return (
            (Line(cells % width), "\n" + part)
            if cells <= width
            else (
                Line((line.cells + cells) % width),
                part,
            )
        )
    return Line(line.cells + cells), part
