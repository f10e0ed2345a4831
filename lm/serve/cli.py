"""`lm serve CHECKPOINT`: serves a model by OpenAI's protocol."""

from pathlib import Path

from lm.config import UserError, within
from lm.generate.cli import Parser
from lm.serve import LOOPBACK, listen, serve


def main(argv: list[str]) -> int:
    """`lm serve CHECKPOINT [--host=] [--port=] [--key_file=] [--max_tokens=] [--queue=]`."""
    parser = Parser(
        "lm serve",
        description="Serves a model by OpenAI's protocol: /v1/completions, /v1/chat/completions.",
        epilog="example: lm serve models/SmolLM2-135M-Instruct.Q4_1.gguf --port=8000",
    )
    parser.add_argument("checkpoint", help="what `lm chat` takes")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (8000)")
    parser.add_argument("--key_file", type=Path, help="a file whose first line clients must know")
    parser.add_argument("--name", help="of the model, for clients (the checkpoint's own)")
    parser.add_argument("--weights", default="float32", help="float32, bfloat16 or int8")
    parser.add_argument("--max_tokens", type=int, default=1024, help="of one answer (1024)")
    parser.add_argument("--batch", type=int, default=8, help="answers made at a time (8)")
    parser.add_argument("--queue", type=int, default=256, help="answers that may wait (256)")
    args = parser.parse_args(argv)
    within("--port", args.port, 0, 65535)
    for name in ("max_tokens", "batch", "queue"):
        within(f"--{name}", getattr(args, name), 1)
    key = _key(args.key_file)
    if args.host not in LOOPBACK and key is None:
        raise UserError(
            f"--host is {args.host}, where others can reach it, and there is no key; give"
            " --key_file, or listen on 127.0.0.1"
        )
    _packages()
    listening = listen(args.host, args.port)
    try:
        from lm.generate.weights import open_checkpoint
        from lm.serve.app import Settings
        from lm.serve.model import serve_model

        name = args.name or Path(args.checkpoint).name
        model = serve_model(open_checkpoint(args.checkpoint, args.weights), name)
        hosts = LOOPBACK if args.host in LOOPBACK else ()
        settings = Settings(key, args.max_tokens, args.batch, args.queue, hosts)
        serve(model, settings, listening)
    finally:
        listening.close()
    return 0


def _packages() -> None:
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"lm serve needs the package {error.name}; pip install 'onset-lm[serve]'"
        ) from error


def _key(path: Path | None) -> str | None:
    """The first line of a file: on the command line all users of the machine would see it."""
    if path is None:
        return None
    try:
        with path.open() as file:
            key = file.readline(1000).strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise UserError(f"--key_file {path} cannot be read: {reason}") from error
    if len(key) < 16 or not key.isascii():
        raise UserError(
            f"the first line of --key_file {path} has {len(key)} characters; a key has at least 16,"
            " all of them ASCII"
        )
    return key
