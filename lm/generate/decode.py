"""Prefill and cached decoding as compiled functions of arrays; the host decides in between.

Prompts of a batch end in the same column: they are padded on the left, with segment 0, and
positions count from each one's first token. A prompt is prefilled in pieces whose widths are powers
of two, at most `PIECE`, so that prompts of any length share a few programs; only the first piece
holds padding. Decoding is a loop on the device: several tokens for one dispatch, ended early when
all rows are done. The cache is donated from call to call and never copied.

The draw of a row depends on its seed and on how many tokens it has, not on the rows beside it.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lm.generate.sampling import Sampler, penalise
from lm.models import empty_cache
from lm.models.decode import extend
from lm.models.int8 import dequantise

PIECE = 512  # columns of a prefill's piece
LEAST_PIECE = 16
LENGTHS = 128  # caches are multiples of it long, so that other lengths compile nothing
NONE = -1  # in place of a token after a row's end


class State(NamedTuple):
    """What decoding carries: the cache, each row's last token and the position after it, how many
    tokens there are, which rows are done, which tokens were seen (or [B, 0]), and keys.
    """

    cache: Any
    token: Array  # int32 [B]
    position: Array  # int32 [B]
    drawn: Array  # int32 []
    done: Array  # bool [B]
    seen: Array  # bool [B, V]
    keys: Array  # [B]


class Rules(NamedTuple):
    """How the next tokens are chosen: one sampler, each row's penalty of repetition, and the tokens
    that end a text.
    """

    sampler: Sampler
    penalty: Array  # float32 [B]
    eos: Array  # int32 [E]


def pieces(width: int) -> list[int]:
    """The widths of the pieces in which so many columns are prefilled; their sum is at least it."""
    whole, rest = divmod(width, PIECE)
    first = [max(LEAST_PIECE, 1 << (rest - 1).bit_length())] if rest else []
    return first + [PIECE] * whole


def pad_left(prompts: Sequence[np.ndarray], width: int) -> tuple[np.ndarray, ...]:
    """Tokens, segments and positions int32 [B, width] of prompts that end in the last column."""
    tokens, segments, positions = np.zeros((3, len(prompts), width), np.int32)
    for row, ids in enumerate(prompts):
        tokens[row, width - len(ids) :] = ids
        segments[row, width - len(ids) :] = 1
        positions[row, width - len(ids) :] = np.arange(len(ids))
    return tokens, segments, positions


class Filled(NamedTuple):
    """What a prefill leaves: logits [B, V] of each row's next token, the cache, and the position
    int32 [B] of that token.
    """

    logits: Array
    cache: Any
    position: np.ndarray


def encodes(config: Any) -> bool:
    """Whether prompts are the sources of an encoder, and what is written is not their end."""
    return getattr(config, "kind", "") == "encoder_decoder"


def read_prompts(
    model: Any, params: Any, prompts: Sequence[np.ndarray], tokens: int, begin: int = 0
) -> Filled:
    """Reads the prompts into a cache with room for `tokens` more columns; what an encoder-decoder
    writes begins with the token `begin`.
    """
    widths = pieces(max(map(len, prompts)))
    columns = [jnp.asarray(a) for a in pad_left(prompts, sum(widths))]
    if encodes(model.config):
        cache = empty_cache(model.config, len(prompts), _rounded(1 + tokens))
        cache = _encode(model, params, *columns[:2], cache)
        first = np.full((len(prompts), 1), begin, np.int32)
        logits, cache = prefill(model, params, first, np.ones_like(first), 0 * first, cache)
        return Filled(logits, cache, np.ones(len(prompts), np.int32))
    cache, at = empty_cache(model.config, len(prompts), _rounded(sum(widths) + tokens)), 0
    for width in widths:
        logits, cache = prefill(model, params, *(a[:, at : at + width] for a in columns), cache)
        at += width
    return Filled(logits, cache, np.array([len(ids) for ids in prompts], np.int32))


def _rounded(length: int) -> int:
    return -(-length // LENGTHS) * LENGTHS


@functools.partial(jax.jit, static_argnames="model")
def _encode(model: Any, params: Any, source: Array, segments: Array, cache: Any) -> Any:
    plain = {"params": dequantise(params)}
    return model.apply(plain, source, segments, cache, method="start")


def start(
    model: Any,
    params: Any,
    filled: Filled,
    rules: Rules,
    seen: Sequence[np.ndarray],
    seeds: Sequence[int],
) -> State:
    """The state with each row's first token; the tokens `seen` of each row are those to penalise
    at once.
    """
    marks = np.zeros((len(seeds), 0), bool)
    if (np.asarray(rules.penalty) != 1).any():
        marks = np.zeros(filled.logits.shape, bool)
        for row, ids in enumerate(seen):
            marks[row, ids] = True
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    none, position = jnp.zeros(len(seeds), jnp.int32), jnp.asarray(filled.position)
    state = State(filled.cache, none, position, jnp.int32(0), none > 0, jnp.asarray(marks), keys)
    return _first(state, filled.logits, rules)


@functools.partial(jax.jit, static_argnames="model", donate_argnames="cache")
def prefill(
    model: Any, params: Any, tokens: Array, segments: Array, positions: Array, cache: Any
) -> tuple[Array, Any]:
    """The cache with so many columns more, and the logits [B, V] of the last one."""
    logits, cache = extend(model, params, tokens, segments, positions, cache)
    return logits[:, -1], cache


@functools.partial(jax.jit, donate_argnames="state")
def _first(state: State, logits: Array, rules: Rules) -> State:
    return _choose(state, logits, rules)


@functools.partial(jax.jit, static_argnames=("model", "steps"), donate_argnames="state")
def advance(model: Any, params: Any, state: State, rules: Rules, steps: int) -> tuple[State, Array]:
    """The state `steps` tokens on, and those tokens int32 [B, steps], NONE after a row's end.

    Ends early when every row is done.
    """

    def body(carry: tuple[State, Array, Array]) -> tuple[State, Array, Array]:
        state, found, i = carry
        token, position = state.token[:, None], state.position[:, None]
        columns = token, jnp.ones_like(token), position
        logits, cache = extend(model, params, *columns, state.cache)
        before = state._replace(cache=cache, position=state.position + 1)
        after = _choose(before, logits[:, -1], rules)
        tokens = jnp.where(state.done, NONE, after.token)
        return after, lax.dynamic_update_index_in_dim(found, tokens, i, 1), i + 1

    def more(carry: tuple[State, Array, Array]) -> Array:
        state, _, i = carry
        return (i < steps) & ~state.done.all()

    found = jnp.full((len(state.token), steps), NONE, jnp.int32)
    state, found, _ = lax.while_loop(more, body, (state, found, jnp.int32(0)))
    return state, found


def _choose(state: State, logits: Array, rules: Rules) -> State:
    """The state with each row's next token, drawn from logits [B, V]."""
    if state.seen.shape[1]:
        logits = penalise(logits, state.seen, rules.penalty[:, None])
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.drawn)
    token = jax.vmap(rules.sampler)(logits, keys)
    token = jnp.where(state.done, state.token, token)
    done = state.done | (token[:, None] == rules.eos).any(1)
    seen = state.seen
    if seen.shape[1]:
        seen = seen.at[jnp.arange(len(token)), token].set(True)
    return state._replace(token=token, drawn=state.drawn + 1, done=done, seen=seen)
