"""Text from a model: prompts in, pieces of text out, for every kind of model that has a cache.

    for piece in stream(loaded, ["Once upon a time"], choose_sampler(0.8, top_p=0.95)):
        print(piece.text, end="", flush=True)

`loaded` is what `lm.pretrained.load` gives. A row's text depends on its prompt, its options and the
sampler, not on the rows beside it, but for the rounding of products of other shapes.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from lm.config import UserError, within
from lm.generate.decode import NONE, Rules, advance, encodes, read_prompts, start
from lm.generate.sampling import Greedy, Sampler, choose_sampler
from lm.generate.text import Typed, add, finish

__all__ = ["Answer", "Options", "Piece", "choose_sampler", "context", "generate", "stream"]

PER_DISPATCH = 8  # tokens of a dispatch, and so between two pieces of a stream
LONGEST = 1 << 20  # tokens of a row where the model names no context


@dataclasses.dataclass(frozen=True)
class Options:
    """How one answer ends (after `tokens`, at a stop string), its seed, and the penalty of tokens
    that its prompt or itself has (1: none).
    """

    tokens: int = 128
    stop: tuple[str, ...] = ()
    seed: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        within("tokens", self.tokens, 1, LONGEST)
        within("seed", self.seed, 0, 2**32 - 1)
        within("repetition_penalty", self.repetition_penalty, 0.01, 100)
        if "" in self.stop:
            raise UserError("a stop string is empty; leave it out")


@dataclasses.dataclass(frozen=True)
class Piece:
    """More text of a row, and the tokens since its last piece. `end` says why it is the last:
    "stop" (the model's end, or a stop string) or "length"; "" if it is not.
    """

    row: int
    text: str
    ids: tuple[int, ...]
    end: Literal["", "stop", "length"] = ""


@dataclasses.dataclass(frozen=True)
class Answer:
    """The text of a row without its prompt and stop string, all its tokens, and why it ended."""

    text: str
    ids: tuple[int, ...]
    end: Literal["", "stop", "length"]
    prompt_tokens: int


def generate(
    loaded: Any,
    prompts: Sequence[str | np.ndarray],
    sampler: Sampler | None = None,
    options: Options | Sequence[Options] = Options(),
) -> list[Answer]:
    """One answer for each prompt, a text or ids; the arguments and errors are those of `stream`."""
    rows = [encode_prompt(loaded, prompt) for prompt in prompts]
    found = list(stream(loaded, rows, sampler, options))
    answers = []
    for row, ids in enumerate(rows):
        own = [piece for piece in found if piece.row == row]
        tokens = tuple(i for piece in own for i in piece.ids)
        text = "".join(piece.text for piece in own)
        answers.append(Answer(text, tokens, own[-1].end, len(ids)))
    return answers


def stream(
    loaded: Any,
    prompts: Sequence[str | np.ndarray],
    sampler: Sampler | None = None,
    options: Options | Sequence[Options] = Options(),
    *,
    per_dispatch: int = PER_DISPATCH,
) -> Iterator[Piece]:
    """Pieces of text of all rows as they come; every row's last piece says why it ended.

    Without a sampler the likeliest token is taken. Raises UserError before the first piece for a
    prompt that is empty or longer than the model's context. Closing the iterator ends the work.
    """
    each = [options] * len(prompts) if isinstance(options, Options) else list(options)
    if len(each) != len(prompts) or not prompts:
        raise UserError(f"{len(prompts)} prompts with {len(each)} options; give one of each")
    rows = [encode_prompt(loaded, prompt) for prompt in prompts]
    limits = [limit(loaded, len(ids), o) for ids, o in zip(rows, each, strict=True)]
    return _stream(loaded, rows, sampler or Greedy(), each, limits, per_dispatch)


def _stream(
    loaded: Any,
    rows: list[np.ndarray],
    sampler: Sampler,
    each: list[Options],
    limits: list[int],
    per_dispatch: int,
) -> Iterator[Piece]:
    penalty = jnp.array([o.repetition_penalty for o in each], jnp.float32)
    rules = Rules(sampler, penalty, jnp.array(ends(loaded), jnp.int32))
    seeds, most = [o.seed for o in each], max(limits)
    room = -(-most // per_dispatch) * per_dispatch
    filled = read_prompts(loaded.model, loaded.params, rows, room, begins(loaded))
    seen = [rows[i][:0] if encodes(loaded.config) else rows[i] for i in range(len(rows))]
    state = start(loaded.model, loaded.params, filled, rules, seen, seeds)
    typed = [Typed() for _ in rows]
    ended = [False] * len(rows)
    found = np.asarray(state.token)[:, None]
    while True:
        for row, tokens in enumerate(found):
            if not ended[row]:
                typed[row], piece = _piece(loaded, row, typed[row], tokens, limits[row], each[row])
                ended[row] = piece.end != ""
                if piece.text or piece.ids or piece.end:
                    yield piece
        if all(ended):
            return
        state = state._replace(done=jnp.asarray(ended))
        state, fresh = advance(loaded.model, loaded.params, state, rules, per_dispatch)
        found = np.asarray(fresh)


def _piece(
    loaded: Any, row: int, before: Typed, tokens: np.ndarray, limit: int, options: Options
) -> tuple[Typed, Piece]:
    """A row's state and piece after the tokens of a dispatch; the model's end is not a token of
    the answer.
    """
    room = limit - len(before.ids)
    kept = [int(i) for i in tokens if i != NONE][:room]
    over = next((n for n, i in enumerate(kept) if i in ends(loaded)), None)
    state, text = add(before, kept[:over], loaded.tokenizer.decode, options.stop)
    end: Literal["", "stop", "length"] = ""
    if state.stopped or over is not None:
        end = "stop"
    elif len(state.ids) == limit:
        end = "length"
    if end:
        state, rest = finish(state, loaded.tokenizer.decode, options.stop)
        text += rest
    return state, Piece(row, text, state.ids[len(before.ids) :], end)


def encode_prompt(loaded: Any, prompt: str | np.ndarray) -> np.ndarray:
    """The ids of a prompt, int32 [T]: ids as they are, or those of a text, after the token that
    begins a text where the model was trained with one.

    Raises UserError for an empty one, and for a text where the model has no tokenizer.
    """
    if isinstance(prompt, str):
        if loaded.tokenizer is None:
            raise UserError("the model has no tokenizer; put its tokenizer.json beside its weights")
        prompt = loaded.tokenizer.begin(prompt) if prompt else np.zeros(0, np.int32)
    ids = np.asarray(prompt, np.int32)
    if not ids.size:
        raise UserError("the prompt is empty; give at least one character to go on from")
    return ids


def ends(loaded: Any) -> tuple[int, ...]:
    """The tokens at which the model ends a text."""
    eos = None if loaded.tokenizer is None else loaded.tokenizer.eos_id
    return () if eos is None else (int(eos),)


def begins(loaded: Any) -> int:
    """The token with which what an encoder-decoder writes begins; T5 takes its padding."""
    own = loaded.tokenizer if encodes(loaded.config) else None
    known = [] if own is None else [own.bos_id, own.pad_id]
    return next((int(i) for i in known if i is not None), 0)


def context(loaded: Any) -> int:
    """The most tokens of a prompt with its answer, or of each with an encoder-decoder; 0 where the
    model has no limit.
    """
    return int(getattr(loaded.config, "context", 0))


def limit(loaded: Any, prompt: int, options: Options) -> int:
    """How many tokens an answer may have, within the context."""
    most = context(loaded) or LONGEST
    apart = encodes(loaded.config)  # the prompt takes no room from the answer
    if prompt > most or (prompt == most and not apart):
        both = "" if apart else " with the answer"
        raise UserError(
            f"the prompt has {prompt:,} tokens; the model's context is {most:,}{both},"
            " give a shorter one"
        )
    return min(options.tokens, most - (1 if apart else prompt))
