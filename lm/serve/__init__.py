"""A model behind OpenAI's protocol, for completions and chats: `lm serve`.

It listens on this machine only unless told otherwise. docs/serving.md says what it speaks, what it
refuses and what it is bounded by.
"""

import socket
from typing import TYPE_CHECKING, Any

from lm.config import UserError

if TYPE_CHECKING:
    from lm.serve.app import Model, Settings

LOOPBACK = ("localhost", "127.0.0.1", "::1")
CONNECTIONS = 512
HEAD = 1 << 14  # bytes of a request's head


def serve(model: "Model", settings: "Settings", listening: socket.socket) -> None:
    """Serves until it is interrupted."""
    import uvicorn

    from lm.serve.app import make_app
    from lm.serve.guard import Impatient
    from lm.serve.worker import Worker

    worker = Worker(model.answer, settings.batch, settings.queue)
    config: Any = uvicorn.Config(
        make_app(model, settings, worker),
        http=Impatient,
        ws="none",
        loop="asyncio",
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        h11_max_incomplete_event_size=HEAD,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=5,
    )
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    limit = f", context {model.context:,} tokens" if model.context else ""
    print(f"http://{shown}:{port}/v1 serves {model.name}{limit}; Ctrl-C ends it", flush=True)
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        print("ended")
    finally:
        worker.close()


def listen(host: str, port: int) -> socket.socket:
    """The address, taken before the model is loaded, which may take minutes; clients are refused
    until somebody listens.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        taken = socket.socket(family, kind)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        # Somebody who listens there already is only noticed so.
        taken.listen(CONNECTIONS)
        return taken
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port or"
            " --host"
        ) from error
