"""The one thread that owns the model: rows wait in a bounded queue and are answered in batches.

A batch is the first row that waits and those after it that are sampled alike. Rows are independent,
so that a request of several is not held up by its own size. What asks for rows is the event loop;
pieces go back to it by `call_soon_threadsafe`, so nothing of a request is shared between threads
but a flag that says that nobody wants the answer any more.
"""

import collections
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm.config import UserError

log = logging.getLogger("onset.serve")


class Heard(NamedTuple):
    """More of a row's answer: text, the number of its tokens, and why it is the last, or ""."""

    text: str
    tokens: int
    end: str


@dataclasses.dataclass
class Row:
    """A prompt (ids) with how it is sampled and how its answer ends; `hear` is called with each
    Heard, or with the exception that ends it, from the worker's thread.
    """

    ids: np.ndarray
    sampler: Any
    options: Any
    hear: Callable[[Heard | Exception], None]
    unwanted: bool = False


# Rows sampled alike -> (which of them, what is heard), until each has heard an end.
Answer = Callable[[Sequence[Row]], Iterator[tuple[int, Heard]]]


class Full(Exception):
    """No more rows can wait."""


class Worker:
    """Answers rows in a thread of its own, `batch` at a time at most; at most `queue` wait."""

    def __init__(self, answer: Answer, batch: int, queue: int) -> None:
        self._answer, self._batch, self._queue = answer, batch, queue
        self._waiting: collections.deque[Row] = collections.deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def submit(self, rows: Sequence[Row]) -> None:
        """Lets rows wait, all or none; raises Full."""
        with self._changed:
            if self._closed or len(self._waiting) + len(rows) > self._queue:
                raise Full
            self._waiting.extend(rows)
            self._changed.notify()

    def cancel(self, rows: Sequence[Row]) -> None:
        """Forgets rows: what waits is never begun, a batch that nobody wants is ended."""
        with self._changed:
            for row in rows:
                row.unwanted = True
            self._waiting = collections.deque(r for r in self._waiting if not r.unwanted)

    def waiting(self) -> int:
        """Rows that wait."""
        with self._changed:
            return len(self._waiting)

    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def close(self, seconds: float = 30.0) -> None:
        """Ends the thread after the piece that it is at; rows that wait hear an error."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)

    def _run(self) -> None:
        while batch := self._take():
            self._serve(batch)
        for row in self._waiting:
            row.hear(RuntimeError("the server is going down"))

    def _take(self) -> list[Row]:
        """The next batch; none when closed."""
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return []
            first = self._waiting[0].sampler
            alike = [row for row in self._waiting if row.sampler == first][: self._batch]
            chosen = set(map(id, alike))
            self._waiting = collections.deque(r for r in self._waiting if id(r) not in chosen)
            return alike

    def _serve(self, batch: list[Row]) -> None:
        left = dict(enumerate(batch))
        pieces = self._answer(batch)
        try:
            for index, heard in pieces:
                row = left[index]
                if not row.unwanted:
                    row.hear(heard)
                if heard.end:
                    del left[index]
                if self._closed or all(row.unwanted for row in left.values()):
                    break
        except Exception as error:
            if not isinstance(error, UserError):
                log.exception("a batch of %d rows failed", len(batch))
            for row in left.values():
                row.hear(error)
            return
        finally:
            if hasattr(pieces, "close"):
                pieces.close()  # the work ends here, and not whenever it is collected
        for row in left.values():
            if not row.unwanted:
                row.hear(RuntimeError("the server is going down"))
