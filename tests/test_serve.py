"""The server over a socket: OpenAI's protocol, streams, errors, the queue, who may ask, who leaves.

The model is that of tests/fake_server.py; tests/test_serve_abuse.py has the hostile requests and
tests/test_serve_model.py a real model.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fake_server
import pytest

from lm.config import UserError
from lm.serve import cli, listen

httpx = pytest.importorskip("httpx", reason="the extra dev has httpx")
pytest.importorskip("uvicorn", reason="the extra serve has uvicorn")
pytest.importorskip("starlette", reason="the extra serve has starlette")
HERE = Path(__file__).parent


@contextlib.contextmanager
def started(*settings: str) -> Iterator[tuple[str, int]]:
    """A server in a process of its own: its address and process id."""
    command = [sys.executable, str(HERE / "fake_server.py"), *settings]
    where = {"cwd": HERE.parent, "env": os.environ | {"PYTHONPATH": str(HERE.parent)}}
    with subprocess.Popen(command, **where, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            assert "serves fake, context 4,000 tokens" in line, line
            yield line.split("/v1")[0], process.pid
            assert process.poll() is None, "the server died"
        finally:
            process.terminate()
            process.wait(20)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with started() as (address, _):
        yield address


@pytest.fixture
def client(url) -> Iterator["httpx.Client"]:
    with httpx.Client(base_url=url, timeout=30) as client:
        yield client


def body(prompt: str = "hello", **more: object) -> dict:
    return {"model": "fake", "prompt": prompt, "max_tokens": 5, "temperature": 0} | more


def connected(url: str) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)))


def raw(content: dict, more: str = "") -> bytes:
    """A request as bytes."""
    text = json.dumps(content)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}{more}Content-Length: {len(text)}\r\n\r\n{text}".encode()


def events(text: str) -> list:
    """The objects of a stream, which has to end in [DONE]."""
    lines = text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: ") for line in lines[:-1])
    return [json.loads(line[6:]) for line in lines[:-2]]


def test_models_and_health(client):
    models = client.get("/v1/models").json()
    assert [m["id"] for m in models["data"]] == ["fake"] and models["object"] == "list"
    assert client.get("/v1/models/fake").json() == models["data"][0]
    assert client.get("/v1/models/other/one").status_code == 404
    assert client.get("/health").json() == {"status": "ok", "waiting": 0}


def test_a_completion(client):
    found = client.post("/v1/completions", json=body()).json()
    wanted = fake_server.go_on(fake_server.ids("hello"), 5)
    choice = {"index": 0, "text": wanted, "logprobs": None, "finish_reason": "length"}
    assert found["choices"] == [choice] and found["object"] == "text_completion"
    assert found["usage"] == {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
    assert found["model"] == "fake" and found["id"].startswith("cmpl-")


def test_ids_texts_and_several_prompts_are_the_same(client):
    one = [client.post("/v1/completions", json=body(p)).json() for p in ("ab", "xyz")]
    texts = [answer["choices"][0]["text"] for answer in one]
    for prompts in (["ab", "xyz"], [[97, 98], [120, 121, 122]]):
        found = client.post("/v1/completions", json=body(prompts)).json()
        assert [c["text"] for c in found["choices"]] == texts
        assert [c["index"] for c in found["choices"]] == [0, 1]
        assert found["usage"]["prompt_tokens"] == 5 and found["usage"]["completion_tokens"] == 10
    assert (
        client.post("/v1/completions", json=body([97, 98])).json()["choices"] == one[0]["choices"]
    )


def test_seeds_give_what_they_gave_and_choices_differ(client):
    asked = body(temperature=0.7, seed=11, n=3)
    first, second = (client.post("/v1/completions", json=asked).json() for _ in range(2))
    assert first["choices"] == second["choices"]
    texts = [c["text"] for c in first["choices"]]
    assert len(set(texts)) == 3
    assert texts[1] == fake_server.go_on(fake_server.ids("hello"), 5, 12)
    other = client.post("/v1/completions", json=asked | {"seed": -(2**62)}).json()
    assert other["choices"] != first["choices"]


def test_a_chat(client):
    messages = [
        {"role": "developer", "content": "be"},
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
    ]
    asked = {"model": "fake", "messages": messages, "temperature": 0, "max_completion_tokens": 4}
    found = client.post("/v1/chat/completions", json=asked).json()
    wanted = fake_server.go_on(fake_server.ids("<system>be<user>hi"), 4)
    message = found["choices"][0]["message"]
    assert (message["role"], message["content"]) == ("assistant", wanted)
    assert found["object"] == "chat.completion" and found["usage"]["completion_tokens"] == 4
    no_end = asked | {"max_completion_tokens": None}
    assert (
        client.post("/v1/chat/completions", json=no_end).json()["usage"]["completion_tokens"]
        == 1024
    )


@pytest.mark.parametrize("chat", [False, True])
def test_a_stream_says_the_same_in_pieces(client, chat):
    path = "/v1/chat/completions" if chat else "/v1/completions"
    asked = body(n=2, temperature=1, seed=3)
    if chat:
        asked |= {"messages": [{"role": "user", "content": asked.pop("prompt")}]}
    whole = client.post(path, json=asked).json()
    streamed = asked | {"stream": True, "stream_options": {"include_usage": True}}
    response = client.post(path, json=streamed)
    assert response.headers["content-type"].startswith("text/event-stream")
    *pieces, last = events(response.text)
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    for index, choice in enumerate(whole["choices"]):
        own = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == index]
        said = [c["delta"]["content"] if chat else c["text"] for c in own]
        assert "".join(said) == (choice["message"]["content"] if chat else choice["text"])
        assert [c["finish_reason"] for c in own] == [None] * 4 + ["length"]
        if chat:
            assert [c["delta"].get("role") for c in own] == ["assistant"] + [None] * 4
    kind = "chat.completion.chunk" if chat else "text_completion.chunk"
    assert {p["object"] for p in pieces} == {kind if chat else "text_completion"}


def test_pieces_come_as_they_are_made(url):
    with (
        httpx.Client(base_url=url) as client,
        client.stream(
            "POST", "/v1/completions", json=body(max_tokens=1000, stream=True)
        ) as response,
    ):
        began, at = time.monotonic(), []
        for _ in response.iter_lines():
            at.append(time.monotonic() - began)
    assert at[0] < 0.5 * at[-1]


def test_errors_are_openais_objects(client):
    for method, path, content, status in [
        ("GET", "/v1/nothing", None, 404),
        ("GET", "/v1/completions", None, 405),
        ("POST", "/v1/completions", {"model": "other", "prompt": "x"}, 404),
        ("POST", "/v1/completions", body(max_tokens=1025), 400),
        ("POST", "/v1/completions", body("x" * 3999), 400),
        ("POST", "/v1/completions", body(echo=True), 400),
        ("POST", "/v1/completions", body(colour="red"), 400),
        ("POST", "/v1/chat/completions", {"model": "fake", "messages": []}, 400),
    ]:
        response = client.request(method, path, json=content)
        error = response.json()["error"]
        assert response.status_code == status and error["type"] == "invalid_request_error", error
        assert error["message"] and set(error) == {"message", "type", "param", "code"}
    long = client.post("/v1/completions", json=body("x" * 4000)).json()["error"]
    assert long["code"] == "context_length_exceeded" and "4000" in long["message"]


def test_what_changes_nothing_may_be_said(client):
    more = {"echo": False, "logprobs": None, "presence_penalty": 0.0, "frequency_penalty": 0}
    more |= {"logit_bias": {}, "best_of": 1, "suffix": "", "user": "me", "stop": None}
    assert client.post("/v1/completions", json=body(**more)).status_code == 200


def test_a_model_that_fails_is_a_500_and_the_server_goes_on(client):
    response = client.post("/v1/completions", json=body("\x07crash"))
    assert response.status_code == 500 and response.json()["error"]["type"] == "server_error"
    streamed = client.post("/v1/completions", json=body("\x07crash", stream=True))
    assert streamed.status_code == 500
    assert client.post("/v1/completions", json=body()).status_code == 200


def test_two_requests_in_one_packet_are_both_answered(url):
    with connected(url) as connection:
        connection.sendall(raw(body()) + raw(body(), "Connection: close\r\n"))
        connection.settimeout(20)
        got = b"".join(iter(lambda: connection.recv(65536), b""))
    wanted = fake_server.go_on(fake_server.ids("hello"), 5).encode()
    assert got.count(b"HTTP/1.1 200") == 2 and got.count(b'"text":"' + wanted) == 2


def test_a_full_queue_says_so_and_empties():
    slow = body(max_tokens=1000)
    with started("queue=2", "batch=1") as (url, _), httpx.Client(base_url=url) as client:
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                # The status would come with the first piece, and two of the three only wait.
                connection = stack.enter_context(connected(url))
                connection.sendall(raw(slow | {"stream": True}))
                time.sleep(0.1)
            response = client.post("/v1/completions", json=body())
            assert response.status_code == 429 and int(response.headers["retry-after"]) > 0
            assert response.json()["error"]["type"] == "rate_limit_error"
            assert client.get("/health").json()["waiting"] == 2
        # All three went away: nothing of theirs is left to do.
        deadline = time.monotonic() + 0.4  # one alone takes half a second
        while (response := client.post("/v1/completions", json=body())).status_code == 429:
            assert time.monotonic() < deadline + 5
            time.sleep(0.02)
        assert response.status_code == 200


def test_who_goes_away_takes_the_work_with_it():
    """Catches a batch that goes on for nobody: these would take 100 seconds one after another."""
    with started("max_tokens=1000", "batch=1", "queue=300") as (url, _):
        for i in range(200):
            with connected(url) as connection:
                connection.sendall(raw(body(max_tokens=1000, stream=i % 2 == 0)))
                time.sleep(0.01)
        began = time.monotonic()
        assert httpx.post(f"{url}/v1/completions", json=body(), timeout=60).status_code == 200
        assert time.monotonic() - began < 10


def test_a_key_is_asked_for():
    with started("key=correct-horse-battery") as (url, _):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic x"}):
            response = httpx.post(f"{url}/v1/completions", json=body(), headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == "invalid_api_key"
        right = {"Authorization": "Bearer correct-horse-battery"}
        assert httpx.post(f"{url}/v1/completions", json=body(), headers=right).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200
        assert httpx.get(f"{url}/v1/models").status_code == 401


def test_another_hosts_name_is_refused(url):
    """A page of the web may make its own name lead to this machine."""
    for host, status in [("evil.example", 403), ("localhost:1", 200), ("[::1]", 200), ("", 403)]:
        assert httpx.get(f"{url}/v1/models", headers={"Host": host}).status_code == status


def test_who_is_slow_is_cut_off(url):
    for sent in (b"", b"POST /v1/completions HTT", b"GET /health HTTP/1.1\r\nHost: x\r\nA: "):
        with connected(url) as connection:
            connection.sendall(sent)
            began = time.monotonic()
            connection.settimeout(20)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(10) == b""
            assert 0.5 < time.monotonic() - began < 10


BAD = {
    ("x", "--host=0.0.0.0"): "there is no key",
    ("x", "--port=70000"): "--port is 70000",
    ("x", "--queue=0"): "--queue is 0",
    ("x", "--key_file=/nonexistent"): "cannot be read",
    ("x", "--nothing"): "unrecognized",
    ("x", "--host=203.0.113.7", "--key_file=KEY"): "cannot listen",
}


@pytest.mark.parametrize("given", BAD, ids=BAD.values())
def test_mistakes_are_one_sentence(given, tmp_path):
    (tmp_path / "key").write_text("0123456789abcdef\n")
    argv = [word.replace("KEY", str(tmp_path / "key")) for word in given]
    with pytest.raises(UserError, match=BAD[given]):
        cli.main(argv)


def test_a_key_has_to_be_one(tmp_path):
    for text in ("short\n", "é" * 20, ""):
        (tmp_path / "key").write_text(text)
        with pytest.raises(UserError, match="at least 16"):
            cli.main(["x", f"--key_file={tmp_path / 'key'}"])


def test_an_address_that_is_taken_is_said_before_anything_is_loaded():
    with listen("127.0.0.1", 0) as taken, pytest.raises(UserError, match="another --port"):
        cli.main(["/nonexistent", f"--port={taken.getsockname()[1]}"])


def test_without_the_packages_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"needs the package uvicorn; .*\[serve\]"):
        cli.main(["x"])
