"""Tokenizers: nothing is lost, bytes are exact, vocabularies have the stated limits."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.config import UserError
from lm.data import tokenizer
from lm.data.tokenizer import ASCII, BOS, EOS, PAD, UNK, TokenizerConfig

CODE = [
    f"def f{i}(x):\n    if x > {i}:\n\treturn x ** {i}  # große Fälle, №{i}\n    return '–'\n"
    for i in range(60)
]
TRAINED = {
    kind: tokenizer.train(CODE, TokenizerConfig(kind, size), ASCII)
    for kind, size in (("char", 128), ("bpe", 420), ("unigram", 400))
}
WITH_BYTES = ["bpe", "unigram"]
# Beside any text: what SentencePiece itself gives a meaning to.
TRAPS = st.sampled_from(["\n", "\t", " ", "  ", "\u2581", "\u2585", "\0", "\r", "\ufeff", "\ufffd"])
TRAPS |= st.sampled_from(
    ["<bos>", "<unk>", "<0x41>", "⁇", "return", "é", "👩‍🚀", "\ufffe", "ﬁ", "e\u0301"]
)
TEXT = st.lists(st.text(max_size=8) | TRAPS, max_size=12).map("".join)


@pytest.mark.parametrize("kind", WITH_BYTES)
@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_round_trip_of_any_text(kind, text):
    """Catches normalisation, a dummy prefix, lost newlines, and U+2581 read back as a space."""
    trained = TRAINED[kind]
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert not np.isin(ids, [PAD, BOS, EOS, UNK]).any()
    assert trained.token_bytes(ids, text).sum() == len(text.encode())


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_char_has_one_token_a_character(text):
    """Catches unknown characters that are merged or lost, and wrong byte counts of them."""
    trained = TRAINED["char"]
    ids = trained.encode(text)
    known = {piece.decode() for piece in trained.pieces[4:]}
    assert trained.decode(ids) == "".join(c if c in known else "\ufffd" for c in text)
    sizes = trained.token_bytes(ids, text)
    assert sizes.tolist() == [len(c.encode()) for c in text]


@settings(max_examples=300, deadline=None)
@given(text=TEXT)
def test_char_table_equals_sentencepiece(text):
    """Catches a table that differs from the model that is saved (which merges runs of <unk>)."""
    trained = TRAINED["char"]
    ids = trained.encode(text.replace("\u2581", "")).tolist()
    merged = [i for n, i in enumerate(ids) if not (i == UNK and n and ids[n - 1] == UNK)]
    assert merged == trained.processor.encode(text.replace("\u2581", ""))


@pytest.mark.parametrize("kind", TRAINED)
def test_batch_equals_one_by_one(kind):
    """Catches texts that come back in another order when some of them take the slow path."""
    trained = TRAINED[kind]
    texts = [*CODE[:5], "a\u2581b", "", "\u2581", *CODE[5:8]]
    together = trained.encode_batch(texts)
    assert [x.tolist() for x in together] == [trained.encode(t).tolist() for t in texts]
    assert all(x.dtype == np.int32 for x in together)


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("texts", [["xyz xyz"], ["aaa"], ["ß"], ["\t\nx"], [ASCII * 3], ["▅ x"]])
def test_required_characters_are_always_single_tokens(kind, texts):
    """Catches SentencePiece dropping required characters once the training text is covered."""
    trained = tokenizer.train(texts, TokenizerConfig(kind, 512), ASCII)
    pieces = set(trained.pieces)
    assert {c.encode() for c in ASCII} <= pieces
    assert not (trained.encode(ASCII) == UNK).any()


def test_special_ids():
    """Catches ids in another order than <pad> <bos> <eos> <unk>."""
    for trained in TRAINED.values():
        names = [trained.processor.id_to_piece(i) for i in range(4)]
        assert names == ["<pad>", "<bos>", "<eos>", "<unk>"]
        assert trained.vocab_size <= trained.config.vocab_size


def test_char_vocabulary_is_the_commonest_and_bounded():
    """Catches a char vocabulary above its bound, or one that prefers rare characters."""
    texts = ["".join(chr(0x4E00 + i) * (i + 1) for i in range(50)), "ab"]
    small = tokenizer.train(texts, TokenizerConfig("char", 20), "ab")
    assert small.vocab_size == 20
    chosen = {piece.decode() for piece in small.pieces[4:]}
    assert chosen == {"a", "b", *(chr(0x4E00 + i) for i in range(36, 50))}
    large = tokenizer.train(texts, TokenizerConfig("char", 5000), "ab")
    assert large.vocab_size == 4 + 52


def test_small_texts_do_not_fill_a_large_vocabulary():
    """Catches an error where the text has fewer pieces than there may be."""
    for kind in WITH_BYTES:
        assert tokenizer.train(["ab abc"], TokenizerConfig(kind, 4000)).vocab_size < 300


@pytest.mark.parametrize("kind", TRAINED)
def test_training_is_reproducible_and_hashed(kind):
    """Catches a model that depends on threads or set order, and hashes that ignore their input."""
    trained = TRAINED[kind]
    again = tokenizer.train(CODE, trained.config, ASCII)
    assert again.sha256 == trained.sha256 and again.text_sha256 == trained.text_sha256
    other = tokenizer.train([*CODE, "ж" * 500], trained.config, ASCII)
    assert other.sha256 != trained.sha256 and other.text_sha256 != trained.text_sha256
    assert tokenizer.text_sha256(["ab", "c"]) != tokenizer.text_sha256(["a", "bc"])


def test_sample_is_spread_and_bounded():
    """Catches a sample from the beginning only: later texts would have no pieces."""
    texts = [f"{word} {word}\n" * 300 for word in ("alpha", "beta", "gamma")]
    trained = tokenizer.train(texts, TokenizerConfig("bpe", 300, sample_bytes=500))
    assert all(any(w in p for p in trained.pieces) for w in (b"alpha", b"beta", b"gamma"))
    assert len(tokenizer._sample(texts, 500).encode()) <= 600


def test_save_and_load(tmp_path):
    """Catches a tokenizer that changes on disk without anyone noticing."""
    trained = TRAINED["bpe"]
    trained.save(tmp_path / "t")
    assert tokenizer.load(tmp_path / "t") == trained
    model = tmp_path / "t" / "tokenizer.model"
    content = bytearray(model.read_bytes())
    content[len(content) // 2] ^= 1
    model.write_bytes(content)
    with pytest.raises(UserError, match="has changed"):
        tokenizer.load(tmp_path / "t")
    (tmp_path / "t" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        tokenizer.load(tmp_path / "t")
    model.unlink()
    with pytest.raises(UserError, match="has no tokenizer.model"):
        tokenizer.load(tmp_path / "t")


@pytest.mark.parametrize(
    ("kind", "size", "texts", "required", "message"),
    [
        ("char", 50, CODE, ASCII, "use at least 100"),
        ("bpe", 120, CODE, ASCII, "vocab_size 120 .* use at least 3"),
        ("unigram", 120, CODE, ASCII, "vocab_size 120 .* use at least 3"),
        ("char", 128, [], "", "training text is empty"),
        ("bpe", 400, [""], ASCII, "training text is empty"),
        ("unigram", 400, [], ASCII, "training text is empty"),
        ("char", 128, CODE, "a\u2581", "cannot keep"),
    ],
)
def test_bad_input_is_one_sentence(kind, size, texts, required, message):
    """Catches SentencePiece's own errors, which name source lines, reaching the user."""
    with pytest.raises(UserError, match=message):
        tokenizer.train(texts, TokenizerConfig(kind, size), required)


@pytest.mark.parametrize("kind", WITH_BYTES)
def test_the_remedy_works(kind):
    """Catches an error that offers a vocab_size which is refused as well."""
    with pytest.raises(UserError) as error:
        tokenizer.train(CODE, TokenizerConfig(kind, 120), ASCII)
    size = int(str(error.value).rsplit(" ", 1)[1])
    assert tokenizer.train(CODE, TokenizerConfig(kind, size), ASCII).vocab_size <= size


def test_command_line(tmp_path, capsys):
    """Catches a verb that trains on another split than train, or prints what is no JSON."""
    (tmp_path / "in").mkdir()
    for i, text in enumerate(CODE):
        (tmp_path / "in" / f"{i}.py").write_text(text)
    out = str(tmp_path / "out")
    train = ["train", "--input", str(tmp_path / "in"), "--kind", "char", "--out", out]
    assert tokenizer.main(train) == 0
    capsys.readouterr()
    assert tokenizer.main(["show", out, "--text", "if x:", "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert about["kind"] == "char" and about["segmentation"] == ["i", "f", " ", "x", ":"]
    assert about["bytes_per_token"] == 1 and about["text_sha256"] != tokenizer.text_sha256(CODE)
    assert tokenizer.main(["show", out]) == 0
    assert "segmentation" in capsys.readouterr().out
    with pytest.raises(UserError, match="has a tokenizer; give another"):
        tokenizer.main(train)
