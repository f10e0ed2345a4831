"""Where pairs of texts come from: one reader for each kind of source, each a function from a config
to the pairs that are there, in a fixed order.

    tsv, jsonl    columns or fields of files; "1" is the first column of a file without a heading
    po            gettext catalogues: translated entries, and the plural forms that have a match
    docstrings    the standard library of the running interpreter: body -> first line
    bible         King James Version -> World English Bible, verse by verse (the extra `texts`)
    synopses      apt's lists: the prose of a package's description -> its synopsis
    descriptions  apt's lists: synopsis and paragraphs of a description -> those in another language

A reader drops what is no pair and counts it under a reason. Texts without a line structure of their
own come out on one line.
"""

import ast
import glob
import importlib.util
import json
import os
import re
import subprocess
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lm.config import UserError, nearest, positive, within
from lm.data.segments import MOST_BYTES, read_bytes

Kind = Literal["tsv", "jsonl", "po", "docstrings", "bible", "synopses", "descriptions"]

APT_LISTS = "/var/lib/apt/lists"
APT_HELPER = "/usr/lib/apt/apt-helper"  # unpacks apt's lists, whatever they are packed with
MOST_TOTAL = 1 << 30  # bytes of all files of a source
_NO_DOCUMENTATION = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib"}


@dataclass(frozen=True)
class PairsConfig:
    """Where pairs come from; `path` is a file, folder or glob, or for apt's lists their folder.

    `source` and `target` are columns or fields, for descriptions languages (such as en and de).
    Pairs with a text of more than `longest` characters are left out, and pairs one of whose texts
    is more than `ratio` times as long as the other, if that is not 0.
    """

    kind: Kind = "docstrings"
    path: str = ""
    source: str = ""
    target: str = ""
    longest: int = 1000
    ratio: float = 0.0

    def __post_init__(self) -> None:
        positive("longest", self.longest)
        within("ratio", self.ratio, 0)
        if 0 < self.ratio < 1:
            raise UserError(f"ratio is {self.ratio}; it must be at least 1, or 0 for any")
        if self.kind in ("tsv", "jsonl", "po") and not self.path:
            raise UserError(f"path is empty; give the file, folder or glob of the {self.kind}")
        if self.kind in ("docstrings", "bible") and self.path:
            raise UserError(f"path is {self.path!r}; kind {self.kind!r} takes none, remove it")
        for name in ("source", "target"):
            value = getattr(self, name)
            if value and self.kind not in ("tsv", "jsonl", "descriptions"):
                raise UserError(f"{name} is {value!r}; kind {self.kind!r} takes none, remove it")
            if self.kind == "tsv" and value.isdigit() and int(value) < 1:
                raise UserError(f"{name} is {value}; columns are counted from 1")
        if self.kind == "descriptions":
            for name, language in (("source", self.source or "en"), ("target", self.target)):
                if not re.fullmatch("[a-z]{2,3}(_[A-Z]{2})?", language):
                    raise UserError(
                        f"{name} is {language!r}; it must be a language as apt writes it, such as"
                        " de or zh_CN"
                    )


@dataclass(frozen=True)
class Pair:
    """A source text and its target; `name` says where it is from. Pairs that share one of `keys`
    belong to one family, which is never split.
    """

    source: str
    target: str
    name: str
    keys: tuple[str, ...] = ()


@dataclass
class Found:
    """What a reader found, and how often it left something out for which reason."""

    pairs: list[Pair] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


def read(config: PairsConfig) -> Found:
    """The pairs of a source, as they come; raises `UserError` where there is no such source."""
    found = Found()
    readers: dict[str, Callable[[PairsConfig, Found], None]] = {
        **{"tsv": _read_tsv, "jsonl": _read_jsonl, "po": _read_po},
        **{"docstrings": _read_docstrings, "bible": _read_bible},
        **{"synopses": _read_synopses, "descriptions": _read_descriptions},
    }
    readers[config.kind](config, found)
    return found


def plain(text: str) -> str:
    """The text as far as two near copies of it agree: no case, no digits, no punctuation."""
    words = re.sub(r"\d+", "0", text.casefold())
    return " ".join(re.findall(r"\w+", words)) or text.strip()


def one_line(text: str) -> str:
    """The text with single spaces for all white space."""
    return " ".join(text.split())


def _files(config: PairsConfig, ending: str) -> list[Path]:
    """The files of a path, in order; of a folder those with this ending."""
    path = os.path.expanduser(config.path)
    if os.path.isdir(path):
        pattern = os.path.join(glob.escape(path), "**", f"*{ending}")
        pattern = pattern + "*" if ending != ".po" else pattern  # .tsv.gz
    else:
        pattern = path if glob.has_magic(path) else glob.escape(path)
    places = sorted(p for p in map(Path, set(glob.glob(pattern, recursive=True))) if p.is_file())
    if not places:
        raise UserError(f"{config.path} holds no {ending} file; give a file, a folder or a glob")
    if (total := sum(p.stat().st_size for p in places)) > MOST_TOTAL:
        raise UserError(
            f"{config.path} holds {total >> 20:,} MiB; at most {MOST_TOTAL >> 20:,} MiB of pairs"
            " are read: give fewer files"
        )
    return places


def _lines(place: Path, found: Found) -> Iterator[tuple[int, str]]:
    """The lines of a file that are UTF-8, with their numbers."""
    for number, line in enumerate(read_bytes(place).removesuffix(b"\n").split(b"\n"), 1):
        try:
            yield number, line.removesuffix(b"\r").decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            found.dropped["not UTF-8"] += 1


def _read_tsv(config: PairsConfig, found: Found) -> None:
    wanted = [config.source or "1", config.target or "2"]
    for place in _files(config, ".tsv"):
        columns = [int(w) - 1 for w in wanted if w.isdigit()]
        for number, line in _lines(place, found):
            cells = line.split("\t")
            if number == 1 and len(columns) < 2:
                columns = [_column(w, cells, place) for w in wanted]
                continue
            if len(cells) <= max(columns):
                found.dropped["too few columns"] += 1
                continue
            source, target = (cells[c].strip() for c in columns)
            found.pairs.append(Pair(source, target, f"{place.name}:{number}"))


def _column(name: str, heading: list[str], place: Path) -> int:
    if name.isdigit():
        return int(name) - 1
    if name not in heading:
        raise UserError(f"{place} has no column {name!r}; {nearest(name, heading)}")
    return heading.index(name)


def _read_jsonl(config: PairsConfig, found: Found) -> None:
    wanted = config.source or "source", config.target or "target"
    for place in _files(config, ".jsonl"):
        for number, line in _lines(place, found):
            try:
                record = json.loads(line)
                texts = [record[name] for name in wanted]
            except (ValueError, RecursionError):
                found.dropped["no JSON"] += 1
            except (KeyError, TypeError, IndexError):
                found.dropped[f"no field {wanted[0]!r} or {wanted[1]!r}"] += 1
            else:
                if all(isinstance(text, str) and "\0" not in text for text in texts):
                    source, target = (text.strip() for text in texts)
                    found.pairs.append(Pair(source, target, f"{place.name}:{number}"))
                else:
                    found.dropped["not a text"] += 1


def _read_po(config: PairsConfig, found: Found) -> None:
    import polib

    for place in _files(config, ".po"):
        if place.stat().st_size > MOST_BYTES:
            raise UserError(f"{place} has more than {MOST_BYTES >> 20} MiB; cut it into files")
        try:
            entries = list(polib.pofile(os.fspath(place)))
        except (OSError, UnicodeError, LookupError, ValueError):
            found.dropped["not a catalogue in its encoding"] += 1
            continue
        for entry in entries:
            if entry.obsolete or entry.fuzzy or not entry.translated():
                kind = "obsolete" if entry.obsolete else "fuzzy" if entry.fuzzy else "untranslated"
                found.dropped[kind] += 1
                continue
            for source, target in _entry_texts(entry):
                name = f"{place.name}:{entry.linenum}"
                found.pairs.append(Pair(source.strip(), target.strip(), name))


def _entry_texts(entry: Any) -> list[tuple[str, str]]:
    """The pairs of a translated entry: of plural forms the first is the singular's, and the last
    the plural's; where there is one form only, it is the plural's.
    """
    if not entry.msgid_plural:
        return [(entry.msgid, entry.msgstr)]
    forms = [entry.msgstr_plural[i] for i in sorted(entry.msgstr_plural)]
    plural = (entry.msgid_plural, forms[-1])
    return [(entry.msgid, forms[0]), plural] if len(forms) > 1 else [plural]


def _read_docstrings(config: PairsConfig, found: Found) -> None:
    root = Path(sysconfig.get_path("stdlib"))
    for place in sorted(root.rglob("*.py")):
        path = place.relative_to(root)
        if _NO_DOCUMENTATION & set(path.parts):
            continue
        try:
            tree = ast.parse(place.read_bytes())
        except (OSError, SyntaxError, ValueError):
            found.dropped["not Python"] += 1
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                head, _, body = (ast.get_docstring(node) or "").partition("\n\n")
                if not body.strip():
                    continue
                if "\n" in head.strip():
                    found.dropped["no summary line"] += 1
                    continue
                target, name = one_line(head), f"{path}:{getattr(node, 'lineno', 1)}"
                first = body.strip().split("\n\n")[0]
                keys = plain(first), plain(target)
                found.pairs.append(Pair(one_line(body), target, name, keys))


def _read_bible(config: PairsConfig, found: Found) -> None:
    old, new = (_verses(f"pythonbible_{version}") for version in ("kjv", "web"))
    for verse, text in old.items():
        # KJV's brackets mark words that its translators added.
        source, target = text.replace("[", "").replace("]", ""), new.get(verse, "")
        chapter = f"chapter {verse // 1000}"
        found.pairs.append(Pair(one_line(source), one_line(target), str(verse), (chapter,)))


def _verses(package: str) -> dict[int, str]:
    """The verses of a PyPI Bible by number, read from its source: importing it imports all of
    pythonbible.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise UserError(
            f"{package.replace('_', '-')} is not installed; install the extra 'texts' of onset-lm"
        )
    place = Path(spec.origin).with_name("plain_text_readers_bible.py")
    try:
        tree = ast.parse(place.read_bytes())
        made = next(n.value for n in tree.body if isinstance(n, ast.Assign))
        assert isinstance(made, ast.Call)
        text, starts, ends = (ast.literal_eval(arg) for arg in made.args[1:4])
        return {verse: text[starts[verse] : ends[verse]].strip() for verse in starts}
    except (OSError, SyntaxError, ValueError, StopIteration, AssertionError, KeyError) as error:
        raise UserError(f"{place} is not as version 0.0.2 of {package} has it: {error}") from error


@dataclass(frozen=True)
class Description:
    """A package's description in one language; paragraphs of prose, None for lists and the like."""

    package: str
    synopsis: str
    paragraphs: tuple[str | None, ...]


def _read_synopses(config: PairsConfig, found: Found) -> None:
    for about in _descriptions(config, "en").values():
        prose = [p for p in about.paragraphs if p]
        if not prose:
            found.dropped["no prose"] += 1
            continue
        keys = plain(prose[0]), plain(about.synopsis)
        found.pairs.append(Pair(" ".join(prose), about.synopsis, about.package, keys))


def _read_descriptions(config: PairsConfig, found: Found) -> None:
    old = _descriptions(config, config.source or "en")
    new = _descriptions(config, config.target)
    for digest, about in old.items():
        other = new.get(digest)
        if other is None:
            continue
        first = next((p for p in about.paragraphs if p), about.synopsis)
        keys = (plain(first),)
        found.pairs.append(Pair(about.synopsis, other.synopsis, about.package, keys))
        if len(about.paragraphs) != len(other.paragraphs):
            found.dropped["another number of paragraphs"] += 1
            continue
        for source, target in zip(about.paragraphs, other.paragraphs, strict=True):
            if source and target:
                found.pairs.append(Pair(source, target, about.package, keys))


def _descriptions(config: PairsConfig, language: str) -> dict[str, Description]:
    """The descriptions in a language by the MD5 of the English one, which is theirs as well."""
    folder = Path(os.path.expanduser(config.path or APT_LISTS))
    name = language.replace("_", "%5f")
    places = sorted(folder.glob(f"*_i18n_Translation-{name}*"))
    places += sorted(folder.glob(f"*_i18n_Translation-{language}*")) if name != language else []
    if not places:
        raise UserError(
            f"{folder} has no descriptions in {language}; docs/text.md has the two commands that"
            " make apt fetch them into a folder, then give that as path"
        )
    found: dict[str, Description] = {}
    for place in places:
        for stanza in re.split("\n{2,}", _unpacked(place).decode(errors="replace")):
            if about := _description(stanza, language):
                found.setdefault(*about)
    return found


def _unpacked(place: Path) -> bytes:
    if not place.suffix:
        return read_bytes(place)
    try:
        done = subprocess.run(
            [APT_HELPER, "cat-file", place], capture_output=True, check=True, timeout=120
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"{place} cannot be unpacked by {APT_HELPER}: {error}") from error
    return done.stdout


def _description(stanza: str, language: str) -> tuple[str, Description] | None:
    pattern = rf"Package: (.+)\nDescription-md5: (\w+)\nDescription-{language}: (.*)\n((?: .*\n?)*)"
    match = re.match(pattern, stanza)
    if match is None:
        return None
    package, digest, synopsis, body = match.groups()
    paragraphs: list[str | None] = []
    for block in re.split(r"(?:^|\n) \.(?=\n|$)", body):
        lines = block.strip("\n").split("\n")
        listed = any(re.match(r" ( |[-*+o] )", line) for line in lines)
        paragraphs.append(None if listed else one_line(block))
    return digest, Description(package, synopsis.strip(), tuple(paragraphs))
