"""A server whose model needs no arithmetic: `python tests/fake_server.py [SETTING=VALUE ...]`.

Its tokens are bytes. What follows a text is a letter computed from all of it, so that any request
that is mixed up with another one shows. It prints its address; READ_S and WRITE_S are short.
"""

import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np

from lm import serve
from lm.config import UserError
from lm.serve import guard
from lm.serve.app import Model, Settings
from lm.serve.worker import Heard, Row

VOCABULARY, CONTEXT = 256, 4000
PACE = 0.0005  # seconds a token of a batch


def ids(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def go_on(prompt: np.ndarray, tokens: int, seed: int = 0) -> str:
    """The one right answer."""
    state, letters = seed, []
    for i in prompt.tolist():
        state = (state * 31 + i + 7) % 1_000_003
    for _ in range(tokens):
        state = (state * 75 + 74) % 65_537
        letters.append("abcdefghijklmnopqrstuvwxyz"[state % 26])
    return "".join(letters)


def answer(rows: Sequence[Row]) -> Iterator[tuple[int, Heard]]:
    sampled = rows[0].sampler[0] > 0
    texts = [go_on(r.ids, r.options[0], r.options[2] if sampled else 0) for r in rows]
    for place in range(max(map(len, texts))):
        time.sleep(PACE)
        for index, text in enumerate(texts):
            if place < len(text):
                if b"\x07crash" in bytes(rows[index].ids.tolist()):
                    raise RuntimeError("the model crashed")
                end = "length" if place + 1 == len(text) else ""
                yield index, Heard(text[place], 1, end)


def chat(messages: Sequence[dict[str, str]]) -> np.ndarray:
    if messages[-1]["role"] == "assistant":
        raise UserError("the last message must be the user's")
    return ids("".join(f"<{m['role']}>{m['content']}" for m in messages))


MODEL = Model(
    name="fake",
    context=CONTEXT,
    vocabulary=VOCABULARY,
    encode=ids,
    chat=chat,
    sampler=lambda temperature, top_p: (temperature, top_p),
    options=lambda tokens, stop, seed: (tokens, stop, seed),
    answer=answer,
)


def main(argv: list[str]) -> None:
    given = dict(word.split("=") for word in argv)
    guard.READ_S = float(given.pop("read_s", 1.0))
    guard.WRITE_S = float(given.pop("write_s", 1.0))
    listening = serve.listen("127.0.0.1", 0)
    numbers = {name: int(value) for name, value in given.items() if name != "key"}
    settings = Settings(given.get("key"), hosts=serve.LOOPBACK, **numbers)
    serve.serve(MODEL, settings, listening)


if __name__ == "__main__":
    main(sys.argv[1:])
