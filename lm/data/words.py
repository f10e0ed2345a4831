"""Which tokens make up a word: for masks that fall on whole words."""

import numpy as np

from lm.data.tokenizer import Tokenizer

STARTS, ENDS = 1, 2  # a token that starts, that ends with a letter, a digit, _ or part of a UTF-8


def word_table(tokenizer: Tokenizer) -> np.ndarray:
    """What each id does to words, uint8 [V]: a sum of `STARTS` and `ENDS`."""
    return np.array(
        [STARTS * _is_word(piece[:1]) + ENDS * _is_word(piece[-1:]) for piece in tokenizer.pieces],
        np.uint8,
    )


def word_places(tokens: np.ndarray, segments: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The place, in its row, of the first token of each token's word: int32 [..., T].

    A token goes on with the word of the one before if that ends and it starts with a letter, in one
    document; anything else is a word of its own.
    """
    kind = table[tokens]
    joined = (kind[..., 1:] & STARTS > 0) & (kind[..., :-1] & ENDS > 0)
    joined &= segments[..., 1:] == segments[..., :-1]
    begins = np.pad(~joined, [(0, 0)] * (tokens.ndim - 1) + [(1, 0)], constant_values=True)
    places = np.where(begins, np.arange(tokens.shape[-1], dtype=np.int32), 0)
    return np.maximum.accumulate(places, axis=-1)


def _is_word(end: bytes) -> bool:
    return end.isalnum() or end == b"_" or end >= b"\x80"
