"""The chat and the command line: what is typed, what is kept, what is refused."""

import io
import json
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import linen as nn
from rich.console import Console

from lm.config import UserError
from lm.generate import Options, Piece, chat, cli
from lm.generate.conversation import Conversation, fit, is_plain, stops
from lm.generate.wrap import Line, end, wrap
from lm.models import LSTMConfig, build, initialise


def tokenizer(template=None):
    """Characters are tokens; a chat is its messages between brackets."""
    encode = lambda text: np.array([ord(c) % 128 for c in text], np.int32)  # noqa: E731

    def encode_chat(messages, add_generation_prompt):
        return encode("".join(f"<{m['role'][0]}{m['content']}>" for m in messages) + "<a")

    return SimpleNamespace(
        **{"encode": encode, "begin": encode, "encode_chat": encode_chat, "template": template},
        **{"decode": lambda ids: "".join(map(chr, ids)), "eos_id": None},
    )


def model(template=None, context=0):
    config = SimpleNamespace(context=context)
    return SimpleNamespace(tokenizer=tokenizer(template), config=config, params={})


def text(ids):
    return "".join(map(chr, ids))


def test_a_model_without_a_template_sees_plain_lines():
    talk = Conversation("Be kind.", ("Hi", "Hello", "Bye"))
    ids, dropped = fit(model(), talk, 1000)
    assert text(ids) == "Be kind.\nUser: Hi\nAssistant: Hello\nUser: Bye\nAssistant:"
    assert dropped == 0 and is_plain(model()) and stops(model()) == ("\nUser:",)


def test_the_oldest_turns_go_first_and_the_system_prompt_stays():
    talk = Conversation("S", ("1" * 10, "2" * 10, "3" * 10, "4" * 10, "5" * 10))
    whole, dropped = fit(model("t"), talk, 71)
    assert dropped == 0 and not stops(model("t"))
    ids, dropped = fit(model("t"), talk, len(whole) - 1)
    assert dropped == 1
    assert text(ids) == f"<sS><u{'3' * 10}><a{'4' * 10}><u{'5' * 10}><a"
    ids, dropped = fit(model("t"), talk, 20)
    assert dropped == 2 and text(ids) == f"<sS><u{'5' * 10}><a"
    with pytest.raises(UserError, match="has 19 tokens, more than the 18"):
        fit(model("t"), talk, 18)


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_lines_break_between_words_however_the_text_comes(size):
    told = "the quick brown fox\njumps  over\n\n    indented lazy 狗狗狗 and supercalifragilistic"
    line, shown = Line(), ""
    for at in range(0, len(told), size):
        line, more = wrap(line, told[at : at + size], 12)
        shown += more
    shown += end(line, 12)
    lines = shown.split("\n")
    words = [word for part in lines for word in part.split()]
    assert words == told.split()
    assert all(len(part.rstrip()) <= 12 for part in lines if "super" not in part)
    assert "    indented" in lines


def answering(monkeypatch, pieces, template="t", context=0):
    """A chat whose model says these pieces, and what it writes."""
    asked = []

    def stream(loaded, prompts, sampler, options):
        asked.append((text(prompts[0]), options.seed))
        for piece in pieces:
            if piece is KeyboardInterrupt:
                raise KeyboardInterrupt
            yield Piece(0, piece, (1,))

    monkeypatch.setattr(chat, "stream", stream)
    options = Options(tokens=16, seed=5)
    console = Console(file=io.StringIO(), width=40)
    return chat._Chat(console, model(template, context), None, options), asked


def test_a_turn_is_shown_as_it_comes_and_kept(monkeypatch, capsys):
    talk, asked = answering(monkeypatch, [" Par", "is, of", " course\x1b[2J."])
    talk.answer("Capital?")
    talk.answer("Sure?")
    assert "Paris, of course[2J.\n" in capsys.readouterr().out  # control characters are left out
    assert talk.conversation.turns[:2] == ("Capital?", "Paris, of course\x1b[2J.")
    assert asked[1][0].startswith("<uCapital?><aParis")
    assert [seed for _, seed in asked] == [5, 6]


def test_an_interrupted_answer_ends_the_answer_alone(monkeypatch, capsys):
    talk, _ = answering(monkeypatch, ["One two", KeyboardInterrupt])
    talk.answer("Count")
    assert talk.conversation.turns == ("Count", "One two")
    assert "interrupted" in talk.console.file.getvalue()
    assert "One two" in capsys.readouterr().out


def test_a_long_conversation_is_trimmed_with_a_notice(monkeypatch, capsys):
    talk, asked = answering(monkeypatch, ["x" * 10], context=64)
    for _ in range(4):
        talk.answer("y" * 10)
    said = talk.console.file.getvalue()
    assert "the oldest turn is left out" in said and "over 48 tokens" in said
    assert len(asked[-1][0]) <= 48


def test_commands(monkeypatch, tmp_path):
    talk, _ = answering(monkeypatch, ["A"])
    talk.command("/system Be brief.")
    talk.answer("Q")
    talk.command(f"/save {tmp_path / 'talk.json'}")
    assert json.loads((tmp_path / "talk.json").read_text())["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": "A"},
    ]
    for line, words in (
        (f"/save {tmp_path / 'talk.json'}", "is there already"),
        ("/save", "needs the name"),
        (f"/save {tmp_path}/no/talk.json", "no folder"),
        ("/rest", "did you mean '/reset'"),
    ):
        with pytest.raises(UserError, match=words):
            talk.command(line)
    talk.command("/reset")
    assert talk.conversation == Conversation("Be brief.")
    talk.command("/help")
    assert all(name in talk.console.file.getvalue() for name in chat.COMMANDS)


def test_what_is_typed(monkeypatch):
    console = Console(file=io.StringIO())
    monkeypatch.setattr(sys, "stdin", io.StringIO('one\n"""two\nthree"""\n//four\n'))
    assert [chat.read_message(console) for _ in range(3)] == ["one", "two\nthree", "//four"]
    with pytest.raises(EOFError):
        chat.read_message(console)


@pytest.fixture
def checkpoint(monkeypatch):
    config = LSTMConfig(128, 1, 8)
    params = nn.unbox(initialise(config, jax.random.key(0)))
    made = SimpleNamespace(model=build(config), params=params, config=config, tokenizer=tokenizer())
    monkeypatch.setattr(cli, "open_checkpoint", lambda path, weights: made)


def test_answers_for_machines(checkpoint, capsys):
    """The same seed gives the same text, alone and among others."""
    args = ["x", "Hello", "--tokens=6", "--temperature=1", "--json"]
    assert cli.main([*args, "--n=2", "--seed=3"]) == 0
    both = json.loads(capsys.readouterr().out)
    assert [row["seed"] for row in both] == [3, 4] and both[0]["ids"] != both[1]["ids"]
    assert both[0]["prompt_tokens"] == 5 and both[0]["end"] == "length"
    cli.main([*args, "--seed=4"])
    assert json.loads(capsys.readouterr().out) == both[1:]


def test_the_prompt_of_stdin(checkpoint, monkeypatch, capsys):
    def run(data, *more):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
        return cli.main(["x", "-", "--tokens=3", *more])

    assert run(b"ab\n", "--json") == 0
    assert json.loads(capsys.readouterr().out)[0]["prompt_tokens"] == 2
    for data, words in ((b"a\xff", "not UTF-8 at byte 1"), (b"\n", "the prompt is empty")):
        with pytest.raises(UserError, match=words):
            run(data)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--top_k=3"], "top_k says nothing at temperature 0"),
        (["--stream", "--json"], "--stream shows one text"),
        (["--beams=4", "--n=2"], "--beams finds one text"),
        (["--n=0"], "--n is 0"),
        (["--tokens=x"], "invalid int value"),
        (["--stop="], "a stop string is empty"),
    ],
)
def test_arguments_that_do_not_fit(more, words):
    with pytest.raises(UserError, match=words):
        cli.main(["nowhere", "Hello", *more])
