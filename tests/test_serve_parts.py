"""The parts of the server alone: what a request may say, and who is answered with whom."""

import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.config import UserError
from lm.serve import protocol
from lm.serve.protocol import Asked, Refusal
from lm.serve.worker import Full, Heard, Row, Worker

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
FIELDS = sorted(set().union(*protocol.FIELDS.values()) | set(protocol.NEUTRAL))
REQUESTS = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6)


@given(REQUESTS, st.booleans(), st.sampled_from(["completions", "chat"]))
def test_whatever_is_asked_is_understood_or_refused(fields, valid, endpoint):
    """Catches any other exception, and a request that is taken with values out of range."""
    if valid:
        start = {"model": "m", "prompt": "x"}
        if endpoint == "chat":
            start = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
        fields = fields | start
    try:
        found = protocol.read(json.dumps(fields).encode(), endpoint, "m")
    except Refusal as refusal:
        assert refusal.status in (400, 404)
        assert len(json.dumps(refusal.body())) < 2000
        return
    assert isinstance(found, Asked)
    assert 0 <= found.temperature <= 2 and 0 < found.top_p <= 1 and 1 <= found.n <= 64
    assert found.tokens is None or found.tokens >= 1
    assert bool(found.prompts) != bool(found.messages)


@given(st.binary(max_size=200))
def test_bytes_are_understood_or_refused(body):
    with pytest.raises(Refusal):
        protocol.read(body, "completions", "m")


def test_a_refusal_does_not_repeat_what_is_large():
    huge = {"model": "m", "prompt": "x", "max_tokens": 10**4000}
    with pytest.raises(Refusal, match="about 10.4000"):
        protocol.read(json.dumps(huge).encode(), "completions", "m")


class Machine:
    """Answers rows with their own ids, a piece at a time, when it is let."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.go = threading.Semaphore(0)
        self.ended = 0

    def __call__(self, rows):
        self.batches.append([int(row.ids[0]) for row in rows])
        try:
            for step in range(3):
                self.go.acquire()
                for index, row in enumerate(rows):
                    if row.ids[0] < 0:
                        raise RuntimeError("negative")
                    if row.ids[0] == 13:
                        raise UserError("an unlucky number")
                    yield index, Heard(str(row.ids[0]), 1, "stop" if step == 2 else "")
        finally:
            self.ended += 1


@pytest.fixture
def machine():
    return Machine()


@pytest.fixture
def worker(machine):
    worker = Worker(machine, batch=3, queue=8)
    yield worker
    machine.go.release(1000)
    worker.close(5)
    assert not worker.alive()


def row(number: int, sampler: str = "greedy"):
    heard: list = []
    made = Row(np.array([number]), sampler, SimpleNamespace(), heard.append)
    return made, heard


def until(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_rows_that_are_sampled_alike_are_answered_together(machine, worker):
    first, _ = row(0)
    worker.submit([first])
    until(lambda: machine.batches)  # the others wait behind it
    rest = [row(n, "hot" if n in (2, 5) else "greedy") for n in range(1, 8)]
    worker.submit([r for r, _ in rest])
    machine.go.release(1000)
    until(lambda: all(len(heard) == 3 for _, heard in rest))
    # In order of arrival, at most three, and never two kinds.
    assert machine.batches == [[0], [1, 3, 4], [2, 5], [6, 7]]
    for made, heard in rest:
        assert [h.text for h in heard] == [str(made.ids[0])] * 3 and heard[-1].end == "stop"


def test_the_queue_takes_all_rows_of_a_request_or_none(machine, worker):
    worker.submit([row(0)[0]])
    until(lambda: machine.batches)
    worker.submit([row(n)[0] for n in range(6)])
    with pytest.raises(Full):
        worker.submit([row(n)[0] for n in range(3)])
    assert worker.waiting() == 6
    worker.submit([row(n)[0] for n in range(2)])


def test_who_is_not_wanted_is_not_begun_and_a_batch_for_nobody_ends(machine, worker):
    (a, heard_a), (b, heard_b), (c, heard_c) = row(1), row(2), row(3, "hot")
    worker.submit([a, b, c])
    until(lambda: machine.batches)
    worker.cancel([c])
    assert worker.waiting() == 0
    machine.go.release()
    until(lambda: heard_b)
    worker.cancel([a])
    machine.go.release()
    until(lambda: len(heard_b) == 2)
    assert len(heard_a) == 1 and heard_c == []
    worker.cancel([b])
    machine.go.release()
    until(lambda: machine.ended == 1)
    assert machine.batches == [[1, 2]] and len(heard_b) == 2


def test_a_batch_that_fails_is_told_and_the_next_is_answered(machine, worker):
    (bad, told), (good, heard) = row(-1), row(5, "hot")
    worker.submit([bad, good])
    machine.go.release(1000)
    until(lambda: len(heard) == 3)
    assert isinstance(told[0], RuntimeError) and worker.alive()
    unlucky, told = row(13)
    worker.submit([unlucky])
    until(lambda: told)
    assert isinstance(told[0], UserError)


def test_closing_tells_those_who_wait(machine):
    worker = Worker(machine, batch=1, queue=8)
    (a, heard_a), (b, heard_b) = row(1), row(2)
    worker.submit([a, b])
    until(lambda: machine.batches)
    closing = threading.Thread(target=worker.close)
    closing.start()
    time.sleep(0.05)
    machine.go.release(3)
    closing.join(10)
    assert isinstance(heard_a[-1], RuntimeError) and isinstance(heard_b[-1], RuntimeError)
    with pytest.raises(Full):
        worker.submit([row(1)[0]])
