"""The English in Python files: the paragraphs of their docstrings that are prose."""

import ast
import re
import warnings

_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_LEAST_WORDS = 4
_LEAST_LETTERS = 0.75  # of a paragraph's characters, blanks included


def prose(source: str) -> str:
    """The paragraphs of prose of a file's docstrings, each on one line, in the order of the file;
    nothing where the file is no Python.

    Left out is what is indented (code, tables), a doctest, or mostly signs.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in somebody else's strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return ""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, _DOCUMENTED):
            text = ast.get_docstring(node) or ""
            found += [" ".join(p.split()) for p in re.split(r"\n\s*\n", text) if _is_prose(p)]
    return "\n".join(dict.fromkeys(found)) + "\n" if found else ""


def _is_prose(paragraph: str) -> bool:
    lines = paragraph.strip("\n").split("\n")
    if any(line.startswith((" ", "\t", ">>>", "-", "*", "=")) for line in lines):
        return False
    words = paragraph.split()
    letters = sum(c.isalpha() or c.isspace() for c in paragraph)
    return len(words) >= _LEAST_WORDS and letters >= _LEAST_LETTERS * len(paragraph)
