"""The English of a Python file."""

from lm.data import sources
from lm.data.prose import prose
from lm.data.sources import SourceConfig

FILE = '''"""A module about reading files.

It has a second paragraph,
which goes over two lines.

>>> this is not read at all here

    nor is this indented paragraph of code

x = {1: 2, 3: 4} -> [5, 6, 7] + (8, 9) * 10
"""


class A:
    """A module about reading files."""

    def f(self):
        """Too short."""
        return "a string is not documentation at all"

    async def g(self):
        """Return the number of words in a text."""
'''


def test_only_prose_of_docstrings_is_kept_and_once():
    """Breaks if code, doctests, tables or strings get in, or a paragraph comes twice."""
    assert prose(FILE).split("\n") == [
        "A module about reading files.",
        "It has a second paragraph, which goes over two lines.",
        "Return the number of words in a text.",
        "",
    ]
    assert prose("def f(:") == prose("x = 1") == ""


def test_the_source_is_the_library_s_english(tmp_path, monkeypatch):
    """Breaks if files without prose are documents, or what is stored is the file and not its
    English.
    """
    for name in "abcd":
        (tmp_path / f"{name}.py").write_text(FILE.replace("files", f"files {name * 3}"))
    (tmp_path / "e.py").write_text("x = 1\n")
    monkeypatch.setattr(sources, "_stdlib_files", lambda: (tmp_path, sorted(tmp_path.iterdir())))
    corpus = sources.scan(SourceConfig("docstrings"))
    assert len(corpus.files) == 4 and corpus.empty == 1
    (text,) = sources.texts(corpus, "test", tmp_path.parent / "tfds")
    assert text.startswith("A module about reading files ") and ">>>" not in text
