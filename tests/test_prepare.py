"""Packed arrays: every token is stored and covered once, and damage is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import rundir
from lm.config import UserError
from lm.data import prepare, sources, tokenizer
from lm.data.prepare import BOS, EOS, document, pack

LENGTHS = st.lists(st.integers(0, 20), min_size=1, max_size=30)


def make(lengths, seed=0):
    """Documents of random ids, weights and byte counts."""
    rng = np.random.default_rng(seed)
    return [
        document(rng.integers(4, 99, n), rng.integers(0, 3, n) / 4, rng.integers(0, 4, n))
        for n in lengths
    ]


def test_document_puts_borders_around():
    """Catches a document whose end is never learnt, or whose <bos> is a target or has bytes."""
    text = document(np.array([7, 8]), 0.5, np.array([1, 3]))
    assert text.tokens.tolist() == [BOS, 7, 8, EOS]
    assert text.weight.tolist() == [0, 0.5, 0.5, 0.5]
    assert text.token_bytes.tolist() == [0, 1, 3, 0]
    example = document(np.array([7, 8]), np.array([0, 1]))
    assert example.weight.tolist() == [0, 0, 1, 1] and example.token_bytes is None


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, layout=st.sampled_from(["stream", "fit"]), length=st.integers(21, 40))
def test_unpacked_equals_packed(lengths, layout, length):
    """Catches tokens, weights or bytes that are lost, moved or given to another document."""
    docs = make(lengths)
    packed = pack(docs, layout, length)
    assert packed.documents == len(docs)
    for i, doc in enumerate(docs):
        part = slice(packed.doc_start[i], packed.doc_start[i + 1])
        assert packed.tokens[part].tolist() == doc.tokens.tolist()
        assert packed.weight[part].tolist() == doc.weight.tolist()
        assert packed.token_bytes[part].tolist() == doc.token_bytes.tolist()


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, length=st.integers(21, 40))
def test_fit_cuts_no_document_and_wastes_no_row(lengths, length):
    """Catches a row that begins inside a document, holds too much, or is closed too early."""
    packed = pack(make(lengths), "fit", length)
    starts, sizes = packed.row_start, np.diff(packed.row_start)
    assert set(starts) <= set(packed.doc_start)
    assert starts[0] == 0 and starts[-1] == len(packed.tokens)
    assert (sizes > 0).all() and (sizes <= length + 1).all()
    following = [packed.doc_start[np.searchsorted(packed.doc_start, s) + 1] for s in starts[1:-1]]
    assert all(after - row > length + 1 for after, row in zip(following, starts, strict=False))


@given(lengths=LENGTHS, length=st.integers(1, 40))
def test_stream_covers_every_token(lengths, length):
    """Catches the last, partial row being dropped: bits per byte would miss bytes."""
    packed = pack(make(lengths), "stream", length)
    assert packed.row_start[:-1].tolist() == [r * length for r in range(packed.rows)]
    assert packed.row_start[-1] == len(packed.tokens) - 1
    assert 0 < np.diff(packed.row_start)[-1] <= length


def test_pairs_are_documents_and_their_first_token_is_no_target():
    """Catches task examples that need bytes, and a first token predicted from nothing."""
    packed = pack([(np.array([9, 5]), np.array([1, 1]))], "fit", 4)
    assert packed.weight.tolist() == [0, 1] and packed.token_bytes.tolist() == [0, 0]


def test_dtype_follows_the_ids():
    """Catches ids above 65,535 that wrap around."""
    assert pack([document(np.array([65_535]))], "fit", 4).tokens.dtype == np.uint16
    assert pack([document(np.array([65_536]))], "fit", 4).tokens[1] == 65_536


def test_what_cannot_be_packed():
    """Catches an example that is cut in silence, and a message without the remedy."""
    pack(make([3]), "fit", 4)
    with pytest.raises(UserError, match="document 1 has 6 tokens .* holds 5: raise the length"):
        pack(make([3, 4]), "fit", 4)
    with pytest.raises(UserError, match="no document"):
        pack([], "stream", 4)
    with pytest.raises(UserError, match="length is 0"):
        pack(make([3]), "stream", 0)
    with pytest.raises(ValueError, match="negative"):
        pack([document(np.array([-1]))], "stream", 4)
    with pytest.raises(ValueError, match="one weight for each"):
        pack([(np.array([1, 2]), np.array([1]))], "stream", 4)


@pytest.fixture
def stored(tmp_path):
    packed = pack(make([5, 6, 7]), "stream", 4)
    object.__setattr__(packed, "about", {"tokenizer_sha256": "aa"})
    prepare.save(tmp_path / "d", packed)
    return tmp_path / "d", packed


def test_save_and_load(stored):
    """Catches arrays that come back in another type, writable, or beside a temporary folder."""
    folder, packed = stored
    back = prepare.load(folder, "aa")
    for name in prepare.ARRAYS:
        np.testing.assert_array_equal(getattr(back, name), getattr(packed, name), strict=True)
    assert (back.layout, back.length) == (packed.layout, packed.length)
    assert not back.tokens.flags.writeable
    assert [p.name for p in folder.parent.iterdir()] == ["d"]
    with pytest.raises(UserError, match="exists"):
        prepare.save(folder, packed)


@pytest.mark.parametrize("name", ["tokens.npy", "weight.npy", "doc_start.npy", "about.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "gone"])
def test_damage_is_refused_and_named(stored, name, damage):
    """Catches NumPy mapping a flipped or truncated array in silence."""
    path = stored[0] / name
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage != "gone":
        content[-2] ^= 4
        path.write_bytes(content if damage == "flip" else content[:-2])
    word = {"flip": "has changed", "cut": "truncated", "gone": "missing"}[damage]
    with pytest.raises(UserError, match=f"{name} .*{word}.* prepare it again"):
        prepare.load(stored[0])


def test_a_manifest_that_lists_too_little_is_refused(stored):
    """Catches an array that nothing vouches for."""
    manifest = rundir.read_json(stored[0] / rundir.MANIFEST)
    del manifest["files"]["tokens.npy"]
    rundir.write_json(stored[0] / rundir.MANIFEST, manifest)
    with pytest.raises(UserError, match="lacks tokens.npy"):
        prepare.load(stored[0])


def test_another_tokenizer_is_refused_with_both_hashes(stored, tmp_path):
    """Catches ids read with a vocabulary that they were not made with."""
    with pytest.raises(UserError, match="tokenizer aa, not with bb"):
        prepare.load(stored[0], "bb")
    with pytest.raises(UserError, match="no prepared data"):
        prepare.load(tmp_path / "nothing")


def test_nothing_stays_when_writing_fails(tmp_path, monkeypatch):
    """Catches a half-written folder that a later run takes for data."""
    packed = pack(make([5]), "stream", 4)
    (tmp_path / ".d.tmp").mkdir()  # what a killed writer left
    (tmp_path / ".d.tmp" / "tokens.npy").write_bytes(b"half")

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(rundir, "make_manifest", full)
        with pytest.raises(OSError, match="No space"):
            prepare.save(tmp_path / "d", packed)
    assert list(tmp_path.iterdir()) == []
    prepare.save(tmp_path / "d", packed)
    assert prepare.load(tmp_path / "d").documents == 1


def test_prepare_text(tmp_path):
    """Catches byte counts that are not those of the files, and reuse of what is something else."""
    (tmp_path / "in").mkdir()
    for i in range(30):
        (tmp_path / "in" / f"{i}.txt").write_text(f"text {i} é漢\n" * (i + 1))
    corpus = sources.scan(sources.SourceConfig("folder", str(tmp_path / "in")))
    texts = sources.texts(corpus, "train", tmp_path / "cache")
    char = tokenizer.train(texts[:1], tokenizer.TokenizerConfig(), "text 0123456789\n")
    args = tmp_path / "train", tmp_path / "cache"
    packed = prepare.prepare_text(corpus, "train", char, 8, *args)
    files = corpus.splits["train"]
    assert packed.about["bytes"] == sum(file.size for file in files)
    assert packed.documents == len(files)
    ends = packed.doc_start[1:]
    assert (packed.tokens[packed.doc_start[:-1]] == BOS).all() and (
        packed.tokens[ends - 1] == EOS
    ).all()
    assert char.decode(packed.tokens[: ends[0]]) == texts[0]
    assert prepare.prepare_text(corpus, "train", char, 8, *args).about == packed.about
    with pytest.raises(UserError, match="made with length 8, not 16"):
        prepare.prepare_text(corpus, "train", char, 16, *args)
    with pytest.raises(UserError, match="made with split train, not test"):
        prepare.prepare_text(corpus, "test", char, 8, *args)
    other = tokenizer.train(texts, tokenizer.TokenizerConfig(vocab_size=40), "")
    with pytest.raises(UserError, match=f"{char.sha256}, not with {other.sha256}"):
        prepare.prepare_text(corpus, "train", other, 8, *args)
