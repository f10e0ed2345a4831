"""What stands before the application: who may ask, how long and how much.

Uvicorn bounds the head of a request and the number of connections, and closes those that are idle.
Here are the rest: a request that does not come, an answer that nobody fetches, a body without end.
"""

import asyncio
import hmac
from collections.abc import Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from lm.serve.protocol import Refusal

READ_S = 20.0  # seconds for a whole request to come
WRITE_S = 30.0  # seconds for which a client may let an answer lie
RETRY_S = 5  # what a client is told to wait where the queue is full


class Impatient(H11Protocol):
    """Uvicorn's protocol, without patience: a request has to come within `READ_S`, whole, and what
    is sent has to be taken within `WRITE_S`.
    """

    _reading: asyncio.TimerHandle | None = None
    _writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begins to wait."""
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Waits on, or no more."""
        super().data_received(data)
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body:
            self._wait()
        elif self._reading:
            self._reading.cancel()
            self._reading = None

    def _wait(self) -> None:
        if self._reading is None and not self.transport.is_closing():
            self._reading = self.loop.call_later(READ_S, self.transport.abort)

    def pause_writing(self) -> None:
        """The client takes nothing any more."""
        super().pause_writing()
        self._writing = self.loop.call_later(WRITE_S, self.transport.abort)

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        if self._writing:
            self._writing.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forgets the connection."""
        super().connection_lost(exc)
        for timer in (self._reading, self._writing):
            if timer:
                timer.cancel()


class Guard:
    """Who may ask for what: the host's name, so that no page of the web reaches a server of this
    machine by a name of its own, and the key.
    """

    def __init__(self, app: ASGIApp, hosts: Sequence[str], key: str | None) -> None:
        self.app, self.hosts, self.key = app, hosts, key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuses, or lets the request through."""
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            if refusal := self._refuse(scope["path"], headers):
                await refused(refusal)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _refuse(self, path: str, headers: dict[bytes, bytes]) -> Refusal | None:
        host = headers.get(b"host", b"").decode("latin-1")
        host = host[1:].split("]")[0] if host.startswith("[") else host.split(":")[0]
        if self.hosts and host not in self.hosts:
            return Refusal(403, "the host of this request is not this server; use its address")
        if self.key is None or path == "/health":
            return None
        given = headers.get(b"authorization", b"")
        wanted = b"Bearer " + self.key.encode()
        if hmac.compare_digest(given, wanted):
            return None
        return Refusal(401, "a key is needed: Authorization: Bearer KEY", code="invalid_api_key")


def refused(refusal: Refusal) -> Response:
    headers = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": str(RETRY_S)}}
    more = headers.get(refusal.status, {})
    if refusal.status in (408, 413):
        more = {"connection": "close"}  # what is left of the body is not waited for
    return JSONResponse(refusal.body(), refusal.status, more)


async def read_body(request: Request, most: int) -> bytes:
    """The body, as far as it is JSON of a bearable size that comes in time; raises Refusal."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal(415, f"the content type is {kind[:100]!r}; it must be 'application/json'")
    large = Refusal(413, f"the body is larger than {most} bytes; send a shorter prompt")
    if int(request.headers.get("content-length", 0)) > most:
        raise large
    pieces, size = [], 0
    try:
        async with asyncio.timeout(READ_S):
            async for piece in request.stream():
                size += len(piece)
                if size > most:
                    raise large
                pieces.append(piece)
    except TimeoutError:
        raise Refusal(408, f"the body did not come within {READ_S:.0f} seconds") from None
    return b"".join(pieces)


async def unless_gone(request: Request, coroutine: Any) -> Any:
    """What a coroutine returns, unless the client goes away first."""
    work = asyncio.ensure_future(coroutine)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        work.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
