"""A thousand requests, malformed, oversized, slow or sly, and two hundred good ones at once: each
is refused with a reason or answered rightly, and the server's memory stays what it was.

The hostile ones are drawn from a seed; good requests run all the while, and every answer is
compared with the one right one.
"""

import asyncio
import collections
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import fake_server
import pytest
from test_serve import body, started

ROUNDS = 1000
TARGETS = ("/v1/completions", "/v1/chat/completions")
CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}


def head(path: str, length: object, *more: str, method: str = "POST") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [] if length is None else [f"Content-Length: {length}"]
    return "\r\n".join([*lines, *more, "", ""]).encode("latin-1", "replace")


def post(content: object, path: str = TARGETS[0]) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return head(path, len(text)) + text


FIELDS = {
    "model": [None, 1, [], "other", "x" * 5000],
    "prompt": [
        None,
        1,
        {},
        [],
        "",
        ["a", 1],
        [[]],
        [-1],
        [256],
        [10**30],
        [True],
        [0.5],
        [[1], "a"],
    ],
    "max_tokens": ["5", 0, -1, 1025, 1.5, True, 10**400, [], {}],
    "temperature": ["hot", -0.1, 2.01, True, 1e308, [], 10**400],
    "top_p": [0, 1.1, "x", True, -1, {}],
    "n": [0, 65, 1.0, "1", True, -(10**40)],
    "stream": [0, 1, "true", [], {}],
    "stop": [1, {}, [1], ["a"] * 5, [""], "", "x" * 257, [None], [["a"]]],
    "seed": [0.5, "x", True, 10**19, -(10**19), []],
    "stream_options": [1, [], "x", {"include_usage": 1}, {"other": True}],
    "echo": [True, 1, "no"],
    "logprobs": [5, True],
    "logit_bias": [{"5": 100}, [], 1],
    "best_of": [2, True],
    "presence_penalty": [1, -0.5, "x"],
    "__proto__": [1],
    "x" * 3000: [1],
    "tools": [[1], {}, "x"],
}
MESSAGES = [
    None,
    [],
    {},
    "hi",
    [1],
    [[]],
    [{}],
    [{"role": "user"}],
    [{"role": "god", "content": "x"}],
    [{"role": "user", "content": 1}],
    [{"role": "user", "content": [{"type": "image_url"}]}],
    [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": ["user"], "content": "x"}],
    [{"role": "user", "content": "x", "tool_calls": [1]}],
    [{"role": "assistant", "content": "x"}],
    [{"role": "user", "content": "x"}] * 1025,
    [{"role": "user", "content": "x" * 5000}],
]


def wrong_field(r: random.Random) -> bytes:
    name = r.choice(list(FIELDS))
    value = r.choice(FIELDS[name])
    return post(body() | {name: value})


def wrong_chat(r: random.Random) -> bytes:
    if r.random() < 0.3:
        return post(CHAT | {"prompt": "x"}, TARGETS[1])
    return post(CHAT | {"messages": r.choice(MESSAGES)}, TARGETS[1])


def not_json(r: random.Random) -> bytes:
    good = json.dumps(body()).encode()
    return post(
        r.choice(
            [
                b"",
                good[: r.randrange(len(good) - 1)],
                r.randbytes(r.randrange(1, 5000)),
                good.replace(b"hello", b"\xff\xfe\x80"),
                good.replace(b"hello", b"\\ud800"),
                good.replace(b'"hello"', b"NaN"),
                good.replace(b"5", b"Infinity").replace(b"0", b"-Infinity"),
                good.replace(b"5", b"1" * 5000),
                good.replace(b"5", b"1e999"),
                good.decode().encode("utf-16"),
                b"\xef\xbb\xbf" + good,
                good + good,
                b"[" * r.randrange(1, 200_000),
                b'{"a":' * 40_000 + b"1" + b"}" * 40_000,
                b'{"model":' + b"[" * 100 + b"]" * 100 + b"}",
                b'{"model": "fake", "prompt": ' + b"[" * 30 + b"]" * 30 + b"}",
                r.choice([b"null", b"1", b'"x"', b"[]", b"true", b"{}"]),
            ]
        ),
        r.choice(TARGETS),
    )


def too_large(r: random.Random) -> bytes:
    size = r.choice([(1 << 18) + 1, 400_000, 1 << 21])
    kind = r.randrange(4)
    if kind == 0:  # only said
        return head(TARGETS[0], r.choice([size, 10**12, 10**18]))
    if kind == 1:
        return post(b" " * size)
    if kind == 2:  # not said
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        return head(TARGETS[0], None, "Transfer-Encoding: chunked") + chunk * 20
    return post(body("x" * size))


def lies_about_length(r: random.Random) -> bytes:
    good = json.dumps(body()).encode()
    chunked = head(TARGETS[0], None, "Transfer-Encoding: chunked")
    return r.choice(
        [
            head(TARGETS[0], len(good) + r.randrange(1, 1000)) + good,  # the rest never comes
            head(TARGETS[0], r.randrange(1, len(good) - 1)) + good,
            head(TARGETS[0], -1) + good,
            head(TARGETS[0], "1e3") + good,
            head(TARGETS[0], "9" * 5000) + good,
            head(TARGETS[0], len(good), "Content-Length: 3") + good,
            head(TARGETS[0], len(good), "Transfer-Encoding: chunked") + b"zz\r\n" + good,
            head(TARGETS[0], None) + good,
            chunked + b"-5\r\n" + good,
            chunked + b"ffffffffffffffffff\r\n" + good,
            chunked + b"%x\r\n" % (len(good) - 4) + good + b"\r\n0\r\n\r\n",
            chunked + b"%x\r\n" % len(good) + good + b"\r\n",
            chunked + b"5;" + b"x" * 20000 + b"\r\n",
            head(TARGETS[0], None, "Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n",
        ]
    )


def not_http(r: random.Random) -> bytes:
    return r.choice(
        [
            r.randbytes(r.randrange(1, 2000)),
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + r.randbytes(300),  # TLS
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET /v1/models\r\n\r\n",
            b"GET /v1/models HTTP/1.1\r\n\r\n",
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n",
            b"GET /v1/models HTTP/1.1\r\nHost: evil.example\r\n\r\n",
            head("/v1/models", None, "No colon"),
            head("/v1/models", None, "A: \0"),
            head("/v1/models", None, "A: " + "x" * 20000),
            head("/v1/models", None, *(f"A{i}: x" for i in range(3000))),
            head("/v1/models", None, " folded: x"),
            b"\r\n" * r.randrange(1, 3000),
            b"GET /" + b"a" * 30000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
            struct.pack("<Q", r.getrandbits(64)) * 100,
        ]
    )


def nowhere(r: random.Random) -> bytes:
    paths = [
        "/",
        "/v1",
        "/v1/",
        "//v1/completions",
        "/v1/../v1/completions",
        "/v1/%2e%2e/health/x",
        "/etc/passwd",
        "/v1/completions/",
        "/v1/completions%00",
        "/V1/completions",
        "/v1/models/%2e%2e%2fx",
        "/v1/chat",
        "/docs",
        "/v1/models/../../etc/passwd",
        "http://evil.example/x",
        "*",
        "/v1/completions;x",
        "/%ff%fe",
    ]
    paths.append("/" + "a/" * 2000)
    if r.random() < 0.3:
        methods = ["GET", "PUT", "DELETE", "PATCH", "TRACE", "OPTIONS", "CONNECT", "HEAD", "FOO"]
        return head(r.choice(TARGETS), 0, method=r.choice(methods))
    text = json.dumps(body()).encode()
    return head(r.choice(paths), len(text)) + text


def wrong_kind(r: random.Random) -> bytes:
    text = json.dumps(body()).encode()
    kinds = ["text/plain", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded",
             "", "application/jsonp", "x" * 3000, "application/json/json", "image/png"]  # fmt: skip
    request = head(TARGETS[0], len(text)) + text
    return request.replace(b"application/json", r.choice(kinds).encode())


def unfinished(r: random.Random) -> bytes:
    whole = post(body())
    return whole[: r.randrange(1, len(whole) - 1)]


MAKERS: list[Callable[[random.Random], bytes]] = [
    wrong_field, wrong_field, wrong_field, wrong_chat, not_json, not_json, too_large,
    lies_about_length, not_http, nowhere, wrong_kind, unfinished,
]  # fmt: skip


async def talk(port: int, sent: bytes, wait: bool) -> bytes:
    """What the server says until it closes, or until it has said nothing for a while; the client
    says nothing more, or hangs up.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    got = b""
    try:
        writer.write(sent)
        if not wait:
            return b"left"
        # A server that has seen enough closes while we still write.
        asyncio.ensure_future(writer.drain()).add_done_callback(lambda t: t.exception())
        while piece := await asyncio.wait_for(reader.read(65536), 60):
            got += piece
            if whole(got):
                break
    except ConnectionError:
        pass
    finally:
        writer.close()
    return got


def whole(got: bytes) -> bool:
    """Whether a response has all that its length says."""
    top, _, content = got.partition(b"\r\n\r\n")
    for line in top.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return len(content) >= int(line.split(b":")[1])
    return False


def judge(got: bytes) -> str:
    """How a hostile request was met; raises AssertionError where it was not refused."""
    if not got:
        return "closed"
    if got == b"left":
        return "left"
    status = int(got.split(b" ", 2)[1])
    assert 400 <= status < 500, got[:500]
    content = got.partition(b"\r\n\r\n")[2].split(b"HTTP/1.1")[0]
    if b"application/json" in got and content:  # Uvicorn's own refusals are plain text
        error = json.loads(content)["error"]
        assert error["message"] and len(content) < 1500, content
    return str(status)


async def good(port: int, prompt: str, tokens: int) -> None:
    """One right request, streamed or not, whose answer has to be the right one."""
    stream = len(prompt) % 2 == 0
    asked = body(prompt, max_tokens=tokens, stream=stream)
    text = json.dumps(asked).encode()
    got = await talk(port, head(TARGETS[0], len(text), "Connection: close") + text, True)
    assert got.startswith(b"HTTP/1.1 200"), got[:300]
    content = got.partition(b"\r\n\r\n")[2]
    if stream:
        lines = [line[6:] for line in content.split(b"\n") if line.startswith(b"data: {")]
        said = "".join(json.loads(line)["choices"][0]["text"] for line in lines)
        assert b"data: [DONE]" in content
    else:
        said = json.loads(content)["choices"][0]["text"]
    assert said == fake_server.go_on(fake_server.ids(prompt), tokens)


async def abuse(port: int, pid: int) -> tuple[collections.Counter, list[int]]:
    """All hostile requests, 48 at a time; how they were met, and the memory after each tenth."""
    r, met, memory = random.Random(6), collections.Counter(), [resident(pid)]
    gate = asyncio.Semaphore(48)

    async def one(sent: bytes, wait: bool) -> None:
        async with gate:
            met[judge(await talk(port, sent, wait))] += 1

    for tenth in range(10):
        made = [r.choice(MAKERS)(r) for _ in range(ROUNDS // 10)]
        jobs = [one(sent, r.random() < 0.9) for sent in made]
        jobs += [good(port, f"good {tenth} {'x' * i}", 3 + i) for i in range(10)]
        await asyncio.gather(*jobs)
        memory.append(resident(pid))
    return met, memory


def resident(pid: int) -> int:
    """MiB of memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 >> 20


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc to read memory from")
def test_a_thousand_hostile_requests():
    with started("max_tokens=1024", "read_s=2.0") as (url, pid):
        port = int(url.rsplit(":", 1)[1])
        asyncio.run(good(port, "warm", 5))
        met, memory = asyncio.run(abuse(port, pid))
        asyncio.run(good(port, "still there", 5))
    assert sum(met.values()) == ROUNDS
    # Every kind of refusal that there is was needed.
    assert {"400", "404", "405", "413", "415", "403", "closed", "left"} <= set(met), met
    assert max(memory) - memory[0] < 64, memory
    # What grew at first does not go on growing.
    assert memory[-1] - memory[5] < 8, memory


def test_two_hundred_good_requests_at_once():
    """Each answer is the one it has alone; none is lost, none is another's."""
    with started("queue=256") as (url, pid):
        port = int(url.rsplit(":", 1)[1])

        async def all_of_them() -> None:
            await asyncio.gather(
                *(good(port, f"{i}" * (1 + i % 7), 5 + i % 20) for i in range(200))
            )

        asyncio.run(all_of_them())
        before = resident(pid)
        asyncio.run(all_of_them())
        assert resident(pid) - before < 16
