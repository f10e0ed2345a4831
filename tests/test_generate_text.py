"""Streaming text: whole characters, no part of a stop string, the same text however it comes."""

import random

import pytest

from lm.generate.text import Typed, add, finish


def decode(ids):
    """A tokenizer of bytes."""
    return bytes(ids).decode("utf-8", "replace")


def type_out(data, stop=(), sizes=(1,)):
    state, pieces, at, n = Typed(), [], 0, 0
    while at < len(data):
        size = sizes[n % len(sizes)]
        state, piece = add(state, data[at : at + size], decode, stop)
        pieces.append(piece)
        at, n = at + size, n + 1
    state, piece = finish(state, decode, stop)
    return [*pieces, piece], state


TEXT = "Grüße, 世界! 🎉 naïve café"


@pytest.mark.parametrize("sizes", [(1,), (2,), (3, 1), (7,)])
def test_pieces_are_whole_characters_and_join_to_the_text(sizes):
    pieces, _ = type_out(TEXT.encode(), sizes=sizes)
    assert "".join(pieces) == TEXT
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_comes_as_soon_as_it_is_whole():
    pieces, _ = type_out("aéb".encode())
    assert pieces == ["a", "", "é", "b", ""]


def test_bytes_that_are_no_character_are_shown_in_the_end():
    pieces, _ = type_out(b"a\xff\xfeb")
    assert "".join(pieces) == "a\ufffd\ufffdb"
    pieces, _ = type_out(b"a\xe4\xb8")
    assert "".join(pieces) == "a\ufffd"


@pytest.mark.parametrize("sizes", [(1,), (2, 3), (100,)])
def test_a_stop_string_ends_the_text_and_no_part_of_it_is_shown(sizes):
    pieces, state = type_out(b"one END two", stop=("END",), sizes=sizes)
    assert "".join(pieces) == "one "
    assert state.stopped
    pieces, _ = type_out(b"the EN is no END", stop=("\nUser:", "END"))
    assert "".join(pieces) == "the EN is no "


def test_what_only_began_like_a_stop_string_is_shown_in_the_end():
    pieces, state = type_out(b"say EN", stop=("END",))
    assert "".join(pieces) == "say EN"
    assert not state.stopped


def test_tokens_after_the_stop_string_do_not_count():
    _, state = type_out(b"a.b.c", stop=(".",), sizes=(5,))
    assert bytes(state.ids) == b"a."


def test_random_texts_against_cutting_the_whole():
    rng = random.Random(0)
    for _ in range(300):
        data = "".join(rng.choices("abé世", k=rng.randint(1, 12))).encode()
        stop = tuple({"".join(rng.choices("abé世", k=rng.randint(1, 3))) for _ in range(2)})
        pieces, _ = type_out(data, stop, sizes=(rng.randint(1, 4), rng.randint(1, 4)))
        text = data.decode()
        # The stop string that is complete first ends it; of several complete at once the earliest.
        done = min((text.find(s) + len(s) for s in stop if s in text), default=len(text))
        begun = [text[:done].find(s) for s in stop if s in text[:done]]
        assert "".join(pieces) == text[: min(begun, default=done)], (text, stop)
