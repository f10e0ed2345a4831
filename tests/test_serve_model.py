"""The server with a real model: what it answers to many at once is what the model says alone."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen as nn

from lm.config import UserError
from lm.generate import Options, choose_sampler, generate
from lm.models import LSTMConfig, build, initialise

httpx = pytest.importorskip("httpx", reason="the extra dev has httpx")
pytest.importorskip("uvicorn", reason="the extra serve has uvicorn")
pytest.importorskip("starlette", reason="the extra serve has starlette")

from lm.serve.app import Settings, make_app  # noqa: E402 - needs what may be missing
from lm.serve.model import serve_model  # noqa: E402
from lm.serve.worker import Worker  # noqa: E402

V = 40


def encode(text: str, special: bool = False) -> np.ndarray:
    return np.array([ord(c) % V for c in text], np.int32)


def encode_chat(messages, add_generation_prompt=True) -> np.ndarray:
    if messages[0]["role"] == "assistant":
        raise UserError("the first message must be the user's")
    return encode("".join(f"{m['role'][0]}{m['content']}" for m in messages) + "a")


def load() -> Any:
    config = LSTMConfig(V, 1, 16)
    params = nn.unbox(initialise(config, jax.random.key(1)))
    # Larger weights, so that tokens differ and the past matters.
    params = jax.tree.map(lambda a: a * 4 if a.ndim > 1 else a, params)
    tokenizer = SimpleNamespace(
        vocab_size=V,
        eos_id=0,
        template="",
        encode=encode,
        begin=encode,
        encode_chat=encode_chat,
        decode=lambda ids, special=False: "".join(chr(0x41 + i) for i in ids),
    )
    return SimpleNamespace(model=build(config), params=params, config=config, tokenizer=tokenizer)


LOADED = load()
PROMPTS = ["".join(chr(97 + (i * j) % 26) for j in range(1 + i % 11)) for i in range(40)]


def alone(prompt: str, tokens: int, seed: int | None = None, temperature: float = 0.0) -> Any:
    options = Options(tokens) if seed is None else Options(tokens, seed=seed)
    return generate(LOADED, [prompt], choose_sampler(temperature), options)[0]


@pytest.fixture(scope="module")
def app():
    model = serve_model(LOADED, "tiny")
    settings = Settings(batch=8, max_tokens=64)
    worker = Worker(model.answer, settings.batch, settings.queue)
    yield make_app(model, settings, worker)
    worker.close()


def ask(app: Any, requests: list[tuple[str, dict]]) -> list["httpx.Response"]:
    """All at once."""

    async def all_of_them() -> list["httpx.Response"]:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://x", timeout=120
        ) as client:
            return await asyncio.gather(*(client.post(p, json=b) for p, b in requests))

    return asyncio.run(all_of_them())


def completion(prompt: str, **more: Any) -> tuple[str, dict]:
    return "/v1/completions", {"model": "tiny", "prompt": prompt, "temperature": 0} | more


def test_two_hundred_at_once_are_answered_as_each_is_alone(app):
    """Of unequal prompts and lengths: catches padding that a row sees, and rows mixed up."""
    wanted = {p: alone(p, 4 + len(p) % 5) for p in PROMPTS}
    assert len({w.ids for w in wanted.values()}) > 20
    asked = [completion(p, max_tokens=4 + len(p) % 5) for p in PROMPTS * 5]
    for prompt, response in zip(PROMPTS * 5, ask(app, asked), strict=True):
        assert response.status_code == 200, response.text
        found, right = response.json(), wanted[prompt]
        [choice] = found["choices"]
        assert (choice["text"], choice["finish_reason"]) == (right.text, right.end)
        assert found["usage"]["prompt_tokens"] == len(prompt)
        assert found["usage"]["completion_tokens"] == len(right.ids)


def test_a_seed_gives_what_it_gives_alone_streamed_or_not(app):
    more = {"max_tokens": 8, "seed": 5, "n": 2, "temperature": 1.0}
    wanted = [alone("hello", 8, 5 + i, 1.0).text for i in range(2)]
    whole, stream = ask(
        app, [completion("hello", **more), completion("hello", stream=True, **more)]
    )
    assert [c["text"] for c in whole.json()["choices"]] == wanted
    pieces = [json.loads(e[6:])["choices"][0] for e in stream.text.split("\n\n") if "{" in e]
    for index in range(2):
        assert "".join(p["text"] for p in pieces if p["index"] == index) == wanted[index]


def test_a_chat_ids_and_a_stop_string(app):
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    ids = encode("uhia").tolist()
    right = alone("uhia", 6).text
    found = ask(
        app,
        [
            ("/v1/chat/completions", chat | {"max_tokens": 6}),
            completion(ids, max_tokens=6),
            completion("uhia", max_tokens=6, stop=[right[2]]),
            ("/v1/chat/completions", chat | {"messages": [{"role": "assistant", "content": "x"}]}),
            completion([V], max_tokens=6),
        ],
    )
    assert found[0].json()["choices"][0]["message"]["content"] == right
    assert found[1].json()["choices"][0]["text"] == right
    assert found[2].json()["choices"][0]["text"] == right[: right.index(right[2])]
    assert [r.status_code for r in found[3:]] == [400, 400]


def test_no_top_p_at_temperature_0_is_refused(app):
    [found] = ask(app, [completion("hello", top_p=0.5, max_tokens=3)])
    assert found.json()["choices"][0]["text"] == alone("hello", 3).text
