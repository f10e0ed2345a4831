"""Sources: what becomes a document, in which split, and what is refused."""

import hashlib
import subprocess
import sys

import pytest

from lm.config import UserError
from lm.data import sources
from lm.data.sources import File, SourceConfig


def folder(path, files):
    """Writes {name: text or bytes} below `path` and returns the source of it."""
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return SourceConfig("folder", str(path))


def many(count):
    return {f"{i % 7}/{i}.txt": f"text {i}\n" for i in range(count)}


def test_stdlib_is_large_and_split_by_path():
    """Catches a split by anything but the path, and site-packages taken for the library."""
    corpus = sources.scan(SourceConfig())
    # A distribution may strip the tests, which are half of it.
    assert len(corpus.files) > 400 and sum(f.size for f in corpus.files) > 5_000_000
    assert not any("site-packages" in f.path for f in corpus.files)
    for split, low, high in (("train", 0, 900), ("validation", 900, 950), ("test", 950, 1000)):
        for file in corpus.splits[split]:
            digest = hashlib.blake2b(file.path.encode(), digest_size=8).digest()
            assert low <= int.from_bytes(digest) % 1000 < high


def test_documents_come_back_exactly_and_no_tensorflow(tmp_path):
    """Catches newline translation, a changed order, and a builder that needs TensorFlow."""
    files = {f"{i:02}.txt": f"a\r\nb\t{i} é\u2581\n\n" for i in range(40)}
    source = folder(tmp_path / "in", files)
    seen = {}
    for split in sources.SPLITS:
        stored = sources.documents(source, split, tmp_path / "cache")
        paths = [record["path"].decode() for record in stored]
        assert paths == sorted(paths) and paths
        assert not seen.keys() & set(paths)
        seen |= {r["path"].decode(): r["text"].decode() for r in stored}
    assert seen == files
    code = "import lm.data.sources, sys; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_stored_once_and_again_when_the_source_changes(tmp_path):
    """Catches a cache that is keyed by the place and not by the contents."""
    source = folder(tmp_path / "in", many(30))
    first = sources.scan(source)
    sources.documents(first, "train", tmp_path / "cache")
    assert sources.scan(source).identity == first.identity
    name = first.splits["train"][0].path
    (tmp_path / "in" / name).write_text("other")
    second = sources.scan(source)
    assert second.identity != first.identity
    assert "other" in sources.texts(second, "train", tmp_path / "cache")
    assert "other" not in sources.texts(first, "train", tmp_path / "cache")


def test_what_is_skipped_is_named_and_counted(tmp_path):
    """Catches a file lost in silence, and copies of one text in two splits."""
    bad = {"bin.txt": b"a\0b", "latin.txt": "é".encode("latin-1"), "empty.txt": " \n"}
    copies = {"z/copy1.txt": "text 3\n", "z/copy2.txt": "text 3\n", ".hidden/x.txt": "hidden"}
    corpus = sources.scan(folder(tmp_path, many(20) | bad | copies))
    assert dict(corpus.skipped) == {"bin.txt": "binary", "latin.txt": "not UTF-8"}
    assert "skipped 2 files" in corpus.warning and "latin.txt (not UTF-8)" in corpus.warning
    assert corpus.duplicates == 2 and corpus.empty == 1
    assert sorted(f.path for f in corpus.files) == sorted(many(20))


def test_no_warning_without_skipped_files(tmp_path):
    """Catches a warning about nothing."""
    assert sources.scan(folder(tmp_path, many(5))).warning == ""


@pytest.mark.parametrize("count", [3, 4, 10, 60])
def test_no_split_is_empty(count):
    """Catches a small corpus whose test split is empty, and a file in two splits."""
    for trial in range(20):
        files = [File(f"{trial}/{i}", None, "", 1) for i in range(count)]
        splits = sources.split_files(files)
        assert all(splits.values())
        assert sorted(f.path for s in splits.values() for f in s) == sorted(f.path for f in files)


def test_glob_takes_what_it_names_with_paths_of_its_root(tmp_path):
    """Catches a glob whose paths, and so whose splits, depend on where the folder lies."""
    folder(tmp_path / "a", many(20) | {"0/x.md": "no"})
    folder(tmp_path / "b", many(20))
    a, b = (sources.scan(SourceConfig("folder", f"{tmp_path}/{x}/**/*.txt")) for x in "ab")
    assert a.identity == b.identity and len(a.files) == 20


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no file"),
        ({"a": b"\0", "b": b"\xff"}, "none of the 2 files"),
        ({"a": "", "b": " "}, "has 0 documents"),
        ({"a": "x"}, "has 1 document "),
        ({"a": "x", "b": "y", "c": "x"}, "has 2 documents"),
    ],
)
def test_too_little_is_refused_in_one_sentence(tmp_path, files, message):
    """Catches a traceback, or an empty split, from an empty, binary or tiny corpus."""
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError, match=message) as error:
        sources.scan(folder(tmp_path / "in", files))
    assert "\n" not in str(error.value)


def test_places_that_are_not_there():
    """Catches a missing folder taken for an empty one, and settings that contradict."""
    for path, message in (("/no/such", "does not exist"), ("/no/*.txt", "holds no file")):
        with pytest.raises(UserError, match=message):
            sources.scan(SourceConfig("folder", path))
    with pytest.raises(UserError, match="path is empty"):
        SourceConfig("folder")
    with pytest.raises(UserError, match="takes none"):
        SourceConfig("python_stdlib", "x")


def test_a_damaged_store_is_refused(tmp_path):
    """Catches documents that are lost or changed between storing and tokenising."""
    corpus = sources.scan(folder(tmp_path / "in", many(30)))
    sources.texts(corpus, "train", tmp_path / "cache")
    (stored,) = (tmp_path / "cache").rglob("*train.array_record*")
    for content in (
        b"",
        stored.read_bytes()[:40],
        stored.read_bytes().replace(b"text 5", b"TEXT 5"),
    ):
        stored.write_bytes(content)
        with pytest.raises(UserError, match="damaged"):
            sources.texts(corpus, "train", tmp_path / "cache")


def test_a_file_that_changes_meanwhile_is_refused(tmp_path):
    """Catches stored documents that are not those of the identity they are stored under."""
    corpus = sources.scan(folder(tmp_path / "in", many(30)))
    (tmp_path / "in" / corpus.splits["train"][0].path).write_text("other")
    with pytest.raises(UserError, match="changed while"):
        sources.documents(corpus, "train", tmp_path / "cache")
