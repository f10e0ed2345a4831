"""The HTTP side of `lm serve`: routes, who may ask, how much, and streams.

Everything that comes from outside is bounded before it is kept: the body is read piece by piece up
to a size and for a time, the queue up to a number of rows. Every error is OpenAI's JSON object with
a status that says whose fault it is. A client that goes away takes its rows with it.
"""

import asyncio
import dataclasses
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from lm.config import UserError
from lm.serve import protocol
from lm.serve.guard import Guard, read_body, refused, unless_gone
from lm.serve.protocol import Asked, Counts, Endpoint, Head, Refusal
from lm.serve.worker import Answer, Full, Heard, Row, Worker


@dataclasses.dataclass(frozen=True)
class Model:
    """What is served: its name, the most tokens of a prompt with its answer (0: no limit), and
    functions: a text, or messages, to ids; a temperature and top_p to a sampler; tokens, stop
    strings and a seed to options; rows to what is heard of them.
    """

    name: str
    context: int
    vocabulary: int
    encode: Callable[[str], np.ndarray]
    chat: Callable[[Sequence[dict[str, str]]], np.ndarray]
    sampler: Callable[[float, float], Any]
    options: Callable[[int, tuple[str, ...], int], Any]
    answer: Answer


@dataclasses.dataclass(frozen=True)
class Settings:
    """Limits and the key; `hosts` are the names that a request may ask for (empty: any)."""

    key: str | None = None
    max_tokens: int = 1024
    batch: int = 8
    queue: int = 256
    hosts: tuple[str, ...] = ()

    def body(self, model: Model) -> int:
        """The most bytes of a request: a context's worth of ids, each with its comma."""
        return min(max(1 << 18, 8 * model.context), 1 << 22)


def make_app(model: Model, settings: Settings, worker: Worker) -> Starlette:
    """The application; the worker is the caller's to close."""
    server = _Server(model, settings, worker)
    routes = [
        Route("/health", server.health),
        Route("/v1/models", server.models),
        Route("/v1/models/{name:path}", server.one_model),
        Route("/v1/completions", server.completions, methods=["POST"]),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
    ]
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Guard, hosts=settings.hosts, key=settings.key)],
        exception_handlers={
            Refusal: _on_refusal,
            HTTPException: _on_http,
            ClientDisconnect: _on_gone,
            Exception: _on_bug,
        },
    )
    app.router.redirect_slashes = False
    return app


async def _on_refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return refused(error)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    about = f"{request.method} {request.url.path[:100]}: {error.detail}"
    response = refused(Refusal(error.status_code, about))
    response.headers.update(error.headers or {})
    return response


async def _on_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)  # to nobody


async def _on_bug(_: Request, __: Exception) -> Response:
    return refused(Refusal(500, "the server failed; its log says why"))


class _Server:
    """The handlers, with what they share."""

    def __init__(self, model: Model, settings: Settings, worker: Worker) -> None:
        self.model, self.settings, self.worker = model, settings, worker
        self.began = int(time.time())
        # One thread, so that long texts neither hold up the event loop nor come all at once.
        self.encoder = ThreadPoolExecutor(1, "encoder")

    async def health(self, _: Request) -> Response:
        """Whether the model's thread runs, and how many rows wait."""
        alive = self.worker.alive()
        about = {"status": "ok" if alive else "down", "waiting": self.worker.waiting()}
        return JSONResponse(about, 200 if alive else 503)

    async def models(self, _: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._about()]})

    async def one_model(self, request: Request) -> Response:
        """The model of a name."""
        name = request.path_params["name"]
        if name != self.model.name:
            raise Refusal(404, f"the model {name[:100]!r} is not served", code="model_not_found")
        return JSONResponse(self._about())

    def _about(self) -> dict[str, Any]:
        about = {"id": self.model.name, "object": "model", "created": self.began}
        return about | {"owned_by": "onset", "context_window": self.model.context or None}

    async def completions(self, request: Request) -> Response:
        """Goes on from prompts."""
        return await self._answer(request, "completions")

    async def chat(self, request: Request) -> Response:
        """Goes on with a conversation."""
        return await self._answer(request, "chat")

    async def _answer(self, request: Request, endpoint: Endpoint) -> Response:
        body = await read_body(request, self.settings.body(self.model))
        loop = asyncio.get_running_loop()
        asked = protocol.read(body, endpoint, self.model.name)
        prompts = await loop.run_in_executor(self.encoder, self._encode, asked)
        heard: asyncio.Queue[tuple[int, Heard | Exception]] = asyncio.Queue()
        rows = self._rows(asked, prompts, loop, heard)
        head = Head(endpoint, f"cmpl-{uuid.uuid4().hex}", int(time.time()), self.model.name)
        prompt_tokens = sum(len(ids) for ids in prompts)
        try:
            self.worker.submit(rows)
        except Full:
            raise Refusal(
                429, f"{self.settings.queue} rows wait already; ask again later"
            ) from None
        answer = _Hearing(heard, len(rows), prompt_tokens)
        try:
            if asked.stream:
                # The status is not sent before there is something to say.
                first = await unless_gone(request, answer.next())
                pieces = self._stream(rows, answer, first, head, asked.usage)
                rows = []  # the stream's to cancel
                return StreamingResponse(pieces, media_type="text/event-stream",
                                         headers={"cache-control": "no-cache"})  # fmt: skip
            texts = await unless_gone(request, answer.all())
            return JSONResponse(head.whole(texts, answer.counts()))
        finally:
            self.worker.cancel(rows)

    def _encode(self, asked: Asked) -> list[np.ndarray]:
        """The ids of every prompt; raises Refusal."""
        try:
            if asked.endpoint == "chat":
                found = [self.model.chat(asked.messages)]
            else:
                found = [
                    self.model.encode(p) if isinstance(p, str) else self._ids(p)
                    for p in asked.prompts
                ]
        except UserError as error:
            raise Refusal(400, str(error), "prompt") from error
        for ids in found:
            self._fits(len(ids), asked.tokens)
        return found

    def _ids(self, prompt: tuple[int, ...]) -> np.ndarray:
        if not 0 <= min(prompt) <= max(prompt) < self.model.vocabulary:
            raise Refusal(
                400, f"token ids must be between 0 and {self.model.vocabulary - 1}", "prompt"
            )
        return np.array(prompt, np.int32)

    def _fits(self, length: int, tokens: int | None) -> None:
        """Refuses what is longer than the context, or than this server answers."""
        most, context = self.settings.max_tokens, self.model.context
        if length == 0:
            raise Refusal(400, "the prompt has no tokens; send at least one", "prompt")
        if tokens is not None and tokens > most:
            raise Refusal(400, f"max_tokens is {tokens}; at most {most} are answered", "max_tokens")
        if context and length + (tokens or 1) > context:
            raise Refusal(
                400,
                f"the prompt has {length} tokens and the answer may have {tokens or 1}; the"
                f" model's context is {context} for both",
                "prompt",
                "context_length_exceeded",
            )

    def _rows(
        self,
        asked: Asked,
        prompts: Sequence[np.ndarray],
        loop: asyncio.AbstractEventLoop,
        heard: "asyncio.Queue[tuple[int, Heard | Exception]]",
    ) -> list[Row]:
        """n rows for every prompt, in order; row i has seed + i."""
        seed = secrets.randbits(32) if asked.seed is None else asked.seed
        sampler = self.model.sampler(asked.temperature, asked.top_p)
        rows: list[Row] = []
        for ids in prompts:
            left = self.model.context - len(ids) if self.model.context else 1 << 30
            tokens = min(asked.tokens or self.settings.max_tokens, left)
            for _ in range(asked.n):
                index = len(rows)
                options = self.model.options(tokens, asked.stop, (seed + index) % 2**32)
                hear = _hear(loop, heard, index)
                rows.append(Row(ids, sampler, options, hear))
        return rows

    async def _stream(
        self, rows: Sequence[Row], answer: "_Hearing", first: Any, head: Head, usage: bool
    ) -> AsyncIterator[str]:
        """Server-sent events, until all rows ended or the client went away."""
        begun: set[int] = set()
        item: tuple[int, Heard] | None = first
        try:
            while item is not None:
                index, heard = item
                yield _event(head.piece(index, heard.text, heard.end, index not in begun))
                begun.add(index)
                item = await answer.next()
            if usage:
                yield _event(head.last(answer.counts()))
            yield "data: [DONE]\n\n"
        except Refusal as error:
            yield _event(error.body())
        finally:
            self.worker.cancel(rows)


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _hear(
    loop: asyncio.AbstractEventLoop, heard: "asyncio.Queue[tuple[int, Any]]", index: int
) -> Callable[[Heard | Exception], None]:
    def hear(what: Heard | Exception) -> None:
        # A loop that was closed has nobody who listens.
        if not loop.is_closed():
            loop.call_soon_threadsafe(heard.put_nowait, (index, what))

    return hear


class _Hearing:
    """What comes of the rows of one request."""

    def __init__(self, heard: "asyncio.Queue[tuple[int, Any]]", rows: int, prompt: int) -> None:
        self._heard, self._left, self._rows, self._prompt = heard, rows, rows, prompt
        self._tokens = 0

    async def next(self) -> tuple[int, Heard] | None:
        """The next piece of any row; None after the last. Raises Refusal where a row failed."""
        if not self._left:
            return None
        index, what = await self._heard.get()
        if isinstance(what, UserError):
            raise Refusal(400, str(what))
        if isinstance(what, Exception):
            raise Refusal(500, "the model failed on this request; the server's log says why")
        self._left -= bool(what.end)
        self._tokens += what.tokens
        return index, what

    async def all(self) -> list[tuple[str, str]]:
        """The whole texts with why each ended."""
        texts: list[list[str]] = [[] for _ in range(self._rows)]
        ends = [""] * self._rows
        while item := await self.next():
            index, what = item
            texts[index].append(what.text)
            ends[index] = what.end
        return [("".join(text), end) for text, end in zip(texts, ends, strict=True)]

    def counts(self) -> Counts:
        """The tokens so far."""
        return Counts(self._prompt, self._tokens)
