"""Log-likelihood of continuations given contexts: the choices of a question, the last word of a
passage, a long text window by window.

    log p(continuation | context) = sum_i log p(c_i | context, c_1 .. c_{i-1})

Every token is computed once. What many contexts begin with (a few-shot prompt) is the trunk, from
it each context grows, and from a context its continuations:

    trunk [1, P] -> contexts [B, T] -> branches [R, U]

A branch is a row of the decoding cache: the row of what it continues, repeated, with its own tokens
appended, so that positions go on and branches see nothing of each other. The first token of a
continuation is told by the last state of its context, and its last token is never fed. One packed
row, whose mask shows the context to every branch, would save the copies of the cache, some percent
of a pass, and take a mask of its own in each backend; a recurrent model has none.

Contexts are padded on the left and branches on the right, with segment 0, which nothing sees.
Sizes are rounded up to 1, 2, 3, 4, 6, 8, 12, 16, ..., so that few shapes are compiled.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lm.config import UserError, positive
from lm.models.cache import Cache, empty_cache

LENGTH = 2048  # tokens that a model is given at most, where it names no end itself
PASS = 1024  # tokens of a pass, about
PIECE = 256  # columns of a continuation in one pass
CACHE_BYTES = 1 << 28  # of a pass
LOGITS = 1 << 26  # of a pass
TRUNK = 16  # tokens of a common beginning that is worth a pass of its own
SAVED = 256  # tokens that it must save


class Request(NamedTuple):
    """What is asked: ids int32 [C] and [n], C at least 1."""

    context: np.ndarray
    continuation: np.ndarray


class Likelihood(NamedTuple):
    """What is found, of each token of a continuation: log-probability in nats, float32 [n], and
    whether greedy decoding would have chosen it, bool [n].
    """

    logprob: np.ndarray
    greedy: np.ndarray

    @property
    def total(self) -> float:
        """log p of the whole continuation, in nats."""
        return float(self.logprob.sum(dtype=np.float64))


@dataclasses.dataclass(frozen=True)
class _Job:
    """What is asked of a model, and where what is found is filled in."""

    model: Any
    params: Any
    requests: Sequence[Request]
    found: Sequence[Likelihood]
    limit: int

    def columns(self, n: int, piece: int) -> int:
        """Columns for `n` tokens: whole pieces, if more than one, and never more than a model with
        learned positions has.
        """
        if n > piece:
            return -(-n // piece) * piece
        step = 16 if n <= 256 else 64  # finer than twice as many and half as many
        return min(_up(n) if n <= 64 else -(-n // step) * step, max(n, self.limit))

    def fed(self, request: int) -> int:
        """How many tokens of a continuation the model is given."""
        return len(self.requests[request].continuation) - 1


class _Context(NamedTuple):
    """Tokens int32 [C], and the numbers of the requests that continue them."""

    tokens: np.ndarray
    asked: tuple[int, ...]


class _Branch(NamedTuple):
    """A request, the row of the cache that it continues, and the position where it begins."""

    request: int
    row: int
    position: int


class _Rows(NamedTuple):
    """Columns to be appended to a cache, int32 [B, T] each."""

    tokens: np.ndarray
    segments: np.ndarray
    positions: np.ndarray

    def piece(self, start: int, size: int) -> "_Rows":
        """The columns from `start` on, `size` of them at most."""
        return _Rows(*(a[:, start : start + size] for a in self))


def score(
    model: Any, params: Any, requests: Sequence[Request], limit: int
) -> tuple[list[Likelihood], int]:
    """The likelihood of every request, and how many lost tokens at the left of their context, as a
    model is given at most `limit` tokens.

    Raises UserError on an empty context, and on a continuation above `limit`.
    """
    positive("limit", limit)
    cut = [_cut(request, limit) for request in requests]
    found = [_nothing(len(request.continuation)) for request in cut]
    job = _Job(model, params, cut, found, limit)
    # A window counts columns, and between a trunk and a context there is padding.
    shared = not getattr(model.config, "window", 0)
    for trunk, contexts in _families(cut, shared):
        grown: Cache | None = None
        for batch, length in _batches(job, trunk, contexts):
            if grown is None or grown.segments.shape[1] != length:
                grown = _grow(job, contexts[0].tokens[:trunk], length)
            _score(job, trunk, grown, batch)
    short = sum(len(a.context) < len(b.context) for a, b in zip(cut, requests, strict=True))
    return found, short


def refuse(loaded: Any, name: str) -> None:
    """Raises UserError for a model that cannot go on with a text."""
    if loaded.tokenizer is None:
        raise UserError(f"{name} has no tokenizer, and what is asked is text; add tokenizer.json")
    if loaded.tokenizer.bos_id is None and loaded.tokenizer.eos_id is None:
        raise UserError(
            f"{name} has no token that begins or ends a text; its tokenizer must name one"
        )
    config = loaded.config
    if config.kind == "encoder_decoder" or getattr(config, "direction", "causal") != "causal":
        raise UserError(
            f"{name} does not read from the left to the right, as what is asked here needs;"
            " give a causal model"
        )


def windows(tokens: np.ndarray, prefix: int, limit: int, overlap: int = 1) -> Iterator[Request]:
    """Cuts a text [n] into requests whose continuations are all of its tokens, once each.

    The first window follows `prefix`; every later one takes `limit` tokens, of which the first
    `overlap` were scored before, or more in the last.
    """
    positive("limit", limit)
    if not 1 <= overlap <= limit:
        raise UserError(f"overlap is {overlap}; it must be 1 to {limit}, the limit")
    if len(tokens):
        yield Request(np.array([prefix], np.int32), tokens[:limit])
    for start in range(limit, len(tokens), limit - overlap + 1):
        end = min(start + limit - overlap + 1, len(tokens))
        yield Request(tokens[end - 1 - limit : start], tokens[start:end])


def _cut(request: Request, limit: int) -> Request:
    """The request as far as a model that is given at most `limit` tokens can see it."""
    context, continuation = (np.asarray(a, np.int32) for a in request)
    if not len(context):
        raise UserError("a context is empty; begin it with the token that begins a text")
    if len(continuation) > limit:
        raise UserError(
            f"a continuation of {len(continuation)} tokens is above the limit of {limit};"
            " score it in windows"
        )
    return Request(context[max(0, len(context) + len(continuation) - 1 - limit) :], continuation)


def _nothing(n: int) -> Likelihood:
    return Likelihood(np.zeros(n, np.float32), np.zeros(n, bool))


def _families(requests: Sequence[Request], shared: bool = True) -> list[tuple[int, list[_Context]]]:
    """All contexts, by how many tokens a family of them begins with in common, if it may."""
    groups: dict[bytes, list[int]] = {}
    for i, request in enumerate(requests):
        if len(request.continuation):
            groups.setdefault(request.context.astype(">i4").tobytes(), []).append(i)
    contexts = [  # in the order of their tokens, which is that of big-endian bytes
        _Context(np.frombuffer(key, ">i4").astype(np.int32), tuple(groups[key]))
        for key in sorted(groups)
    ]
    found: list[tuple[int, list[_Context]]] = []
    rest: list[_Context] = []
    for begin, end, trunk in _runs([c.tokens for c in contexts]):
        if shared and trunk * (end - begin - 1) >= SAVED:
            found.append((trunk, contexts[begin:end]))
        else:
            rest += contexts[begin:end]
    return [*found, (0, rest)] if rest else found


def _runs(contexts: Sequence[np.ndarray]) -> Iterator[tuple[int, int, int]]:
    """Neighbours of a sorted list with a beginning in common, as (begin, end, length of it): a run
    goes on while that saves more tokens.
    """
    begin, trunk = 0, 0
    for i in range(1, len(contexts) + 1):
        shared = _common(contexts[i - 1], contexts[i]) if i < len(contexts) else 0
        shared = shared if i - begin == 1 else min(shared, trunk)
        if shared >= TRUNK and shared * (i - begin) > trunk * (i - begin - 1):
            trunk = shared
        else:
            yield begin, i, trunk
            begin, trunk = i, 0


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two contexts begin with, less one where nothing else would be left."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n - 1


def _batches(
    job: _Job, trunk: int, contexts: Sequence[_Context]
) -> Iterator[tuple[list[_Context], int]]:
    """Contexts of about one length, the longest first, and the columns that their cache needs."""

    def longest(context: _Context) -> int:
        return max(map(job.fed, context.asked))

    left = sorted(contexts, key=lambda c: (len(c.tokens), longest(c)), reverse=True)
    while left:
        width = job.columns(len(left[0].tokens) - trunk, PASS)
        most = max(1, PASS // width)
        fed = max(map(longest, left[:most]))
        length = job.columns(trunk, PASS) + width + job.columns(fed, PIECE)
        rows = _down(min(most, CACHE_BYTES // _row_bytes(job.model.config, length)))
        yield left[:rows], length
        left = left[rows:]


def _grow(job: _Job, trunk: np.ndarray, length: int) -> Cache:
    """A cache of one row and `length` columns that holds the trunk."""
    grown = empty_cache(job.model.config, 1, length)
    if not len(trunk):
        return grown
    rows = _pad_left([trunk], 0, job.columns(len(trunk), PASS), 1)
    return _append(job, grown, np.zeros(1, np.int32), rows)[1]


def _score(job: _Job, trunk: int, grown: Cache, batch: Sequence[_Context]) -> None:
    """Fills in what is found of a batch, whose contexts begin with the row of the cache."""
    width = job.columns(max(len(context.tokens) for context in batch) - trunk, PASS)
    rows = _pad_left([c.tokens[trunk:] for c in batch], trunk, width, _up(len(batch)))
    last, grown = _append(job, grown, np.zeros(len(rows.tokens), np.int32), rows)
    likeliest, branches = last.argmax(axis=1), []
    for row, context in enumerate(batch):
        for i in context.asked:
            first = job.requests[i].continuation[0]
            job.found[i].logprob[0] = last[row, first]
            job.found[i].greedy[0] = likeliest[row] == first
            branches.append(_Branch(i, row, len(context.tokens)))
    branches = [b for b in branches if job.fed(b.request)]
    branches.sort(key=lambda b: job.fed(b.request), reverse=True)
    while branches:
        fed = job.columns(job.fed(branches[0].request), PIECE)
        size = min(PASS, LOGITS // last.shape[1]) // min(fed, PIECE)
        each = _row_bytes(job.model.config, grown.segments.shape[1])
        size = _down(min(size, CACHE_BYTES // each))
        _score_branches(job, grown, branches[:size], fed)
        branches = branches[size:]


def _score_branches(job: _Job, grown: Cache, branches: Sequence[_Branch], fed: int) -> None:
    """Fills in all but the first tokens of continuations, at most `fed` of which are fed."""
    size = _up(len(branches))
    tokens, targets, segments, positions = np.zeros((4, size, fed), np.int32)
    for b, branch in enumerate(branches):
        continuation, n = job.requests[branch.request].continuation, job.fed(branch.request)
        tokens[b, :n], targets[b, :n] = continuation[:-1], continuation[1:]
        segments[b, :n], positions[b, :n] = 1, branch.position + np.arange(n)
    rows, found = _Rows(tokens, segments, positions), []
    parents: Any = np.array([b.row for b in branches] + [0] * (size - len(branches)), np.int32)
    for start in range(0, fed, PIECE):
        piece, asked = rows.piece(start, PIECE), targets[:, start : start + PIECE]
        *scores, grown = _all(job.model, job.params, grown, parents, piece, asked)
        found.append(scores)
        parents = None
    logprob, greedy = (
        np.concatenate([np.asarray(a) for a in of], 1) for of in zip(*found, strict=True)
    )
    for b, branch in enumerate(branches):
        n = job.fed(branch.request)
        job.found[branch.request].logprob[1:] = logprob[b, :n]
        job.found[branch.request].greedy[1:] = greedy[b, :n]


def _append(job: _Job, grown: Cache, parents: Any, rows: _Rows) -> tuple[np.ndarray, Cache]:
    """log p [B, V] of what follows rows [B, T], each appended to a row of the cache."""
    for start in range(0, rows.tokens.shape[1], PASS):
        piece = rows.piece(start, PASS)
        last, grown = _last(job.model, job.params, grown, parents, piece)
        parents = None
    return np.asarray(last), grown


def _pad_left(texts: Sequence[np.ndarray], position: int, width: int, rows: int) -> _Rows:
    """Texts padded on the left to [rows, width]; each begins at `position`."""
    tokens, segments, positions = np.zeros((3, rows, width), np.int32)
    for b, text in enumerate(texts):
        at = width - len(text)
        tokens[b, at:], segments[b, at:] = text, 1
        positions[b, at:] = position + np.arange(len(text))
    return _Rows(tokens, segments, positions)


@partial(jax.jit, static_argnums=0)
def _last(
    model: Any, params: Any, grown: Cache, parents: Array | None, rows: _Rows
) -> tuple[Array, Cache]:
    """log p [B, V] of what follows rows [B, T], each appended to a row of the cache."""
    inputs = {"params": params}, *rows, _repeat(grown, parents)
    logits, grown = model.apply(*inputs, keep="last", method="extend")
    return jax.nn.log_softmax(logits[:, 0].astype(jnp.float32)), grown


@partial(jax.jit, static_argnums=0)
def _all(
    model: Any, params: Any, grown: Cache, parents: Array | None, rows: _Rows, targets: Array
) -> tuple[Array, Array, Cache]:
    """log p of targets [R, T] after rows [R, T], each appended to a row of the cache, and whether
    they are the likeliest.
    """
    inputs = {"params": params}, *rows, _repeat(grown, parents)
    logits, grown = model.apply(*inputs, keep="all", method="extend")
    logits = logits.astype(jnp.float32)
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    highest = logits.max(axis=-1, keepdims=True)
    total = jnp.log(jnp.exp(logits - highest).sum(axis=-1))
    chosen = jnp.where(targets[..., None] == ids, logits - highest, 0).sum(axis=-1)
    # Of equals the first is the likeliest, as for argmax, which does not vectorise on a CPU.
    likeliest = jnp.where(logits == highest, ids, ids.size).min(axis=-1)
    return chosen - total, likeliest == targets, grown


def _repeat(grown: Cache, parents: Array | None) -> Cache:
    """The rows `parents` [R] of a cache; all of them, once, without."""
    if parents is None:
        return grown
    layers = jax.tree.map(lambda a: jnp.take(a, parents, axis=1), grown.layers)
    return Cache(layers, jnp.take(grown.segments, parents, axis=0), grown.length)


@cache
def _row_bytes(config: Any, length: int) -> int:
    """Bytes of one row of a cache."""
    shapes = jax.eval_shape(lambda: empty_cache(config, 1, length))
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(shapes))


def _up(n: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... from n on; 0 of 0."""
    if n < 3:
        return n
    power = 1 << (n - 1).bit_length()
    return power * 3 // 4 if n <= power * 3 // 4 else power


def _down(n: int) -> int:
    """The greatest of them up to n, at least 1."""
    power = 1 << (max(n, 1).bit_length() - 1)
    return power * 3 // 2 if power > 1 and n >= power * 3 // 2 else power
