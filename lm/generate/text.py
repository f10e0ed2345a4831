"""Text from tokens as they come: whole characters only, and nothing of a stop string.

A token may end inside a character, and a character may change the ones before it (tokenizers join
and strip spaces), so text is decoded from a window that begins a few tokens before what was shown.
Text is held back while it ends in an incomplete character, or in what may become a stop string.
"""

import dataclasses
from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
INCOMPLETE = "\ufffd"  # what tokenizers make of a part of a character
CONTEXT = 4  # tokens before the window's new ones
LONGEST_CHARACTER = 4  # bytes of UTF-8, and so tokens that one character can take


@dataclasses.dataclass(frozen=True)
class Typed:
    """The state of one row: all its tokens, how many of them have become text, the text that is
    held back, and whether a stop string came.
    """

    ids: tuple[int, ...] = ()
    decoded: int = 0
    held: str = ""
    stopped: bool = False


def add(state: Typed, ids: Sequence[int], decode: Decode, stop: Sequence[str]) -> tuple[Typed, str]:
    """The state after more tokens, and the text that can be shown; after a stop string "".

    Tokens are taken one by one, so that none after the one which completes a stop string counts.
    """
    shown = ""
    for token in ids:
        if state.stopped:
            break
        state = dataclasses.replace(state, ids=(*state.ids, int(token)))
        text = _window(state, decode)
        fresh = len(state.ids) - state.decoded
        if text.endswith(INCOMPLETE) and fresh < LONGEST_CHARACTER:
            continue
        state, piece = _show(dataclasses.replace(state, decoded=len(state.ids)), text, stop)
        shown += piece
    return state, shown


def finish(state: Typed, decode: Decode, stop: Sequence[str]) -> tuple[Typed, str]:
    """The state and the text that was held back, when no more tokens come."""
    if state.stopped:
        return state, ""
    text = _window(state, decode)
    state, piece = _show(dataclasses.replace(state, decoded=len(state.ids)), text, stop)
    return dataclasses.replace(state, held=""), piece + state.held


def _window(state: Typed, decode: Decode) -> str:
    """The text of the tokens that have not become text."""
    start = max(0, state.decoded - CONTEXT)
    before, whole = decode(state.ids[start : state.decoded]), decode(state.ids[start:])
    return whole[len(before) :]


def _show(state: Typed, text: str, stop: Sequence[str]) -> tuple[Typed, str]:
    """The state with what must be held back of its text and the new one, and the rest."""
    text = state.held + text
    ends = [at for word in stop if (at := text.find(word)) >= 0]
    if ends:
        return dataclasses.replace(state, held="", stopped=True), text[: min(ends)]
    held = max((_begun(text, word) for word in stop), default=0)
    cut = len(text) - held
    return dataclasses.replace(state, held=text[cut:]), text[:cut]


def _begun(text: str, word: str) -> int:
    """The length of the longest end of `text` that begins `word`."""
    longest = min(len(text), len(word) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(word[:n])), 0)
