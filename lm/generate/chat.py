"""`lm chat CHECKPOINT`: a conversation in the terminal."""

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.text import Text

from lm.config import UserError, nearest
from lm.generate import Options, choose_sampler, context, stream
from lm.generate.cli import Parser, add_sampling
from lm.generate.conversation import Conversation, fit, is_plain, stops
from lm.generate.weights import open_checkpoint
from lm.generate.wrap import Line, end, wrap
from lm.rundir import write_bytes

MOST = 4096  # tokens of a conversation with a model that names no context
COMMANDS = {
    "/help": "this list",
    "/reset": "forget what was said; the system prompt stays",
    "/system": "/system TEXT sets the system prompt, /system alone shows it",
    "/save": "/save FILE writes the conversation as JSON",
}
KEYS = (
    ("ctrl-C", "ends an answer, not the program"),
    ("ctrl-D", "leaves"),
    ('"""', "begins and ends a message of several lines"),
    ("//", "begins a message that begins with /"),
)


def main(argv: list[str]) -> int:
    """`lm chat CHECKPOINT [--system=TEXT] [--temperature=] ...`."""
    parser = Parser(
        "lm chat",
        description="A conversation with a model; /help, once it runs, says what can be typed.",
        epilog="example: lm chat SmolLM2-135M-Instruct.Q4_1.gguf --system='Answer in one line.'",
    )
    add_sampling(parser, temperature=0.7, tokens=512)
    parser.add_argument("--system", default="", help="what the model is told before all else")
    args = parser.parse_args(argv)
    console = Console(highlight=False)
    sampler = choose_sampler(args.temperature, args.top_k, args.top_p, args.min_p)
    options = Options(args.tokens, (), args.seed, args.repetition_penalty)
    with _waiting(console, f"reading {args.checkpoint}"):
        loaded = open_checkpoint(args.checkpoint, args.weights)
    chat = _Chat(console, loaded, sampler, replace(options, stop=stops(loaded)))
    chat.conversation = Conversation(args.system)
    _greet(console, args.checkpoint, loaded)
    return chat.run()


class _Chat:
    """What a session changes: the conversation, and how many turns are left out of the prompt."""

    def __init__(self, console: Console, loaded: Any, sampler: Any, options: Any) -> None:
        self.console, self.loaded, self.sampler, self.options = console, loaded, sampler, options
        self.conversation, self.left_out = Conversation(), 0

    def run(self) -> int:
        """Reads and answers until stdin ends."""
        while True:
            try:
                said = read_message(self.console)
            except KeyboardInterrupt:
                self.note("\nctrl-D leaves")
                continue
            except EOFError:
                if self.console.is_terminal:
                    self.console.print()
                return 0
            try:
                if said.startswith("/") and not said.startswith("//"):
                    self.command(said)
                elif said.strip():
                    self.answer(said[1:] if said.startswith("//") else said)
            except UserError as error:
                self.note(str(error))

    def answer(self, said: str) -> None:
        """One turn; what was shown of an interrupted answer is kept."""
        asked = replace(self.conversation, turns=(*self.conversation.turns, said))
        most = context(self.loaded) or MOST
        room = most - min(self.options.tokens, most // 2)
        ids, left_out = fit(self.loaded, asked, room)
        if left_out > self.left_out:
            turns = "turn is" if left_out == 1 else f"{left_out} turns are"
            self.note(f"the oldest {turns} left out: the conversation is over {room:,} tokens")
        self.left_out = left_out
        text = self.show(ids)
        self.conversation = replace(asked, turns=(*asked.turns, text))

    def show(self, ids: Any) -> str:
        """Streams the answer to a prompt and returns it."""
        text, line, width = "", Line(), self.console.width
        seed = self.options.seed + len(self.conversation.turns) // 2  # each turn draws anew
        pieces = stream(self.loaded, [ids], self.sampler, replace(self.options, seed=seed))
        try:
            for piece in pieces:
                fresh = piece.text if text else piece.text.lstrip()
                text += fresh
                line, shown = wrap(line, fresh, width)
                self.write(shown)
            self.write(end(line, width))
        except KeyboardInterrupt:
            self.write(end(line, width))
            self.write(" ")
            self.note("interrupted", newline=False)
        self.write("\n\n" if self.console.is_terminal else "\n")
        return text.strip()

    def write(self, text: str) -> None:
        """Text of the model, as it is; control characters could change the terminal."""
        print("".join(c for c in text if c in "\n\t" or c.isprintable()), end="", flush=True)

    def command(self, said: str) -> None:
        """Carries out a line that begins with /."""
        name, _, rest = said.strip().partition(" ")
        if name not in COMMANDS:
            raise UserError(f"{name} is no command; {nearest(name, list(COMMANDS))}")
        if name == "/help":
            rows = [*COMMANDS.items(), *KEYS]
            self.note("\n".join(f"{key:<8} {text}" for key, text in rows))
        elif name == "/reset":
            self.conversation, self.left_out = Conversation(self.conversation.system), 0
            self.note("forgotten")
        elif name == "/system" and not rest.strip():
            self.note(self.conversation.system or "no system prompt of yours")
        elif name == "/system":
            self.conversation = replace(self.conversation, system=rest.strip())
            self.note("the system prompt is set")
        else:
            self.note(f"written to {save(rest.strip(), self.conversation)}")

    def note(self, text: str, newline: bool = True) -> None:
        """A remark of ours."""
        self.console.print(Text(text, "dim"), end="\n" if newline else "", soft_wrap=False)


def save(name: str, conversation: Conversation) -> Path:
    """Writes a conversation; raises UserError without a name, or where there is such a file."""
    if not name:
        raise UserError("/save needs the name of a file, such as /save talk.json")
    path = Path(name).expanduser()
    if path.exists():
        raise UserError(f"{path} is there already; give another name")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}; make it first")
    text = json.dumps({"messages": conversation.messages}, ensure_ascii=False, indent=1)
    try:
        write_bytes(path, (text + "\n").encode())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return path


def read_message(console: Console) -> str:
    """One message from stdin: a line, or several between lines of three quotes."""
    line = _read_line("> " if console.is_terminal else "")
    if not line.startswith('"""'):
        return line
    lines = [line[3:]]
    while not lines[-1].rstrip().endswith('"""'):
        lines.append(_read_line(". " if console.is_terminal else ""))
    return "\n".join([*lines[:-1], lines[-1].rstrip().removesuffix('"""')]).strip("\n")


def _read_line(prompt: str) -> str:
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\n")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (editing and history of what was typed)
    return input(prompt)


@contextlib.contextmanager
def _waiting(console: Console, text: str) -> Iterator[None]:
    """Something that moves while the weights are read, on a terminal."""
    if not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


def _greet(console: Console, name: str, loaded: Any) -> None:
    if not console.is_terminal:
        return
    size = sum(a.size for a in jax.tree.leaves(loaded.params))
    most = context(loaded) or MOST
    console.print(Text(Path(name).name, "bold"), f" {size / 1e6:,.0f}M parameters, {most:,} tokens")
    if is_plain(loaded):
        console.print("[dim]no chat template: the model sees plain User: and Assistant: lines[/]")
    console.print("[dim]/help says what can be typed, ctrl-D leaves[/]\n")
