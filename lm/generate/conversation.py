"""A conversation as a record, and the prompt that it makes: in the model's own chat template, or
plainly where it has none; trimmed to so many tokens, oldest turns first.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.config import UserError

PLAIN_STOP = "\nUser:"  # where a model without a template begins to write the user's part


@dataclasses.dataclass(frozen=True)
class Conversation:
    """What was said in turn, by the user and the model; `system` stands before it, "" is none."""

    system: str = ""
    turns: tuple[str, ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        """As chat templates take them."""
        roles = "user", "assistant"
        said = [{"role": roles[n % 2], "content": text} for n, text in enumerate(self.turns)]
        return ([{"role": "system", "content": self.system}] if self.system else []) + said


def is_plain(loaded: Any) -> bool:
    """Whether the model has no chat template."""
    return loaded.tokenizer.template is None


def stops(loaded: Any) -> tuple[str, ...]:
    """The stop strings of an answer."""
    return (PLAIN_STOP,) if is_plain(loaded) else ()


def encode(loaded: Any, messages: Sequence[dict[str, str]]) -> np.ndarray:
    """The ids of the messages with the beginning of an answer; nothing that was typed becomes a
    control token.
    """
    if not is_plain(loaded):
        ids: np.ndarray = loaded.tokenizer.encode_chat(messages, add_generation_prompt=True)
        return ids
    names = {"user": "User: ", "assistant": "Assistant: ", "system": ""}
    lines = [names[m["role"]] + m["content"] for m in messages]
    plain: np.ndarray = loaded.tokenizer.begin("\n".join([*lines, "Assistant:"]))
    return plain


def fit(loaded: Any, conversation: Conversation, room: int) -> tuple[np.ndarray, int]:
    """The prompt's ids, at most `room` of them, and how many of the oldest turns are left out.

    A turn is the user's and the answer to it. Raises UserError if the last one alone is too long.
    """
    for dropped in range(0, len(conversation.turns), 2):
        kept = dataclasses.replace(conversation, turns=conversation.turns[dropped:])
        ids = encode(loaded, kept.messages)
        if len(ids) <= room:
            return ids, dropped // 2
    raise UserError(
        f"this message with what stands before it has {len(ids):,} tokens, more than the {room:,}"
        " that there is room for; say it in fewer words"
    )
