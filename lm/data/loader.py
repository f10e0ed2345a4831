"""Batches as a pure function of (data seed, step): nothing to store for a resume but the step.

The rows of each source are visited in a pseudo-random order that is a function of (seed, source,
epoch): Grain's `index_shuffle` gives the place of any row in a permutation without making the
permutation, so any batch is had at once, and within an epoch no row comes twice. What is left is
gathering: all rows of a chunk of steps are cut out of the memory maps in a few NumPy calls.
"""

import dataclasses
import hashlib
from typing import NamedTuple

import grain
import numpy as np
from grain.experimental import index_shuffle

from lm.config import UserError, positive, within
from lm.data.prepare import Packed
from lm.data.tokenizer import PAD
from lm.data.words import word_places


class Batch(NamedTuple):
    """Rows for a model, each [B, T] (or [n, B, T]).

    tokens and targets int32; weights float32, 0 where there is no target in the same document;
    segments int32, 0 is padding and 1.. the documents of the row; positions int32, from 0 in each
    document, or from where the row enters it.
    """

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    segments: np.ndarray
    positions: np.ndarray


@dataclasses.dataclass(frozen=True)
class MixtureItem:
    """A source of a mixture: how many rows of a batch it fills, and a factor on its weights."""

    name: str
    packed: Packed
    rows_per_batch: int
    weight: float = 1.0

    def __post_init__(self) -> None:
        positive(f"rows_per_batch of {self.name}", self.rows_per_batch)
        within(f"weight of {self.name}", self.weight, 0)


@dataclasses.dataclass(frozen=True)
class Loader:
    """A mixture of sources in an order that `seed` decides; rows of a batch lie item after item.

    With `words`, a table of `lm.data.words`, targets are the places where each token's word begins.
    """

    items: tuple[MixtureItem, ...]
    length: int
    seed: int
    words: np.ndarray | None = None

    def __post_init__(self) -> None:
        names = [item.name for item in self.items]
        if not names or len(set(names)) < len(names):
            raise UserError(f"the mixture is {names}; it needs at least one item, names unlike")
        for item in self.items:
            if item.packed.length != self.length:
                raise UserError(
                    f"{item.name} was packed in rows of {item.packed.length} tokens, the length is"
                    f" {self.length}; prepare it again with this length"
                )

    @property
    def batch_size(self) -> int:
        """Rows of a batch."""
        return sum(item.rows_per_batch for item in self.items)

    def batch(self, step: int) -> Batch:
        """The batch of a step, [B, T]."""
        return Batch(*(array[0] for array in self.chunk(step, 1)))

    def chunk(self, start: int, steps: int, rows: range | None = None) -> Batch:
        """The batches of `steps` steps from `start` on, [steps, B, T], or only `rows` of each
        batch, one after another: nothing is read for the others.
        """
        parts, first = [], 0
        rows = range(self.batch_size) if rows is None else rows
        for item in self.items:
            count = item.rows_per_batch
            own = range(max(rows.start - first, 0), min(rows.stop - first, count))
            first += count
            if not own:
                continue
            if len(own) == count:
                order = row_order(item, self.seed, start * count, steps * count)
            else:
                visits = (step * count + own.start for step in range(start, start + steps))
                order = np.concatenate([row_order(item, self.seed, v, len(own)) for v in visits])
            part = read_rows(item.packed, order.reshape(steps, len(own)))
            parts.append(part._replace(weights=part.weights * np.float32(item.weight)))
        batch = Batch(*(np.concatenate(arrays, 1) for arrays in zip(*parts, strict=True)))
        if self.words is None:
            return batch
        return batch._replace(targets=word_places(batch.tokens, batch.segments, self.words))


def dataset(
    loader: Loader,
    start: int,
    stop: int,
    steps_per_chunk: int,
    prefetch: int = 2,
    rows: range | None = None,
) -> grain.IterDataset[Batch]:
    """The chunks of steps `start` to `stop` in order, made ahead of time by a thread; only `rows`
    of each batch, if they are given.

    The last is shorter where `steps_per_chunk` does not divide the number of steps.
    """
    positive("steps_per_chunk", steps_per_chunk)

    def chunk(first: int) -> Batch:
        return loader.chunk(first, min(steps_per_chunk, stop - first), rows)

    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    return grain.MapDataset.range(start, stop, steps_per_chunk).map(chunk).to_iter_dataset(options)


def row_order(item: MixtureItem, seed: int, first: int, count: int) -> np.ndarray:
    """The rows of an item's visits `first` to `first + count`, int64 [count]."""
    rows, visit, order = item.packed.rows, first, []
    while visit < first + count:
        epoch, place = divmod(visit, rows)
        stop = min(rows, place + first + count - visit)
        key = _epoch_seed(seed, item.name, epoch)
        order += [index_shuffle(i, rows - 1, key, 4) for i in range(place, stop)]
        visit += stop - place
    return np.array(order, np.int64)


def read_rows(packed: Packed, rows: np.ndarray) -> Batch:
    """Cuts rows, int [...], out of packed documents: arrays [..., T]."""
    at, inside = _windows(packed, rows)
    tokens = np.where(inside, packed.tokens[at], PAD).astype(np.int32)
    weights = np.where(inside, packed.weight[at], 0).astype(np.float32)[..., 1:]
    at, inside = at[..., :-1], inside[..., :-1]
    doc = np.searchsorted(packed.doc_start, at, side="right") - 1
    segments = np.where(inside, doc - doc[..., :1] + 1, 0).astype(np.int32)
    start = np.maximum(packed.doc_start[doc], at[..., :1])
    positions = np.where(inside, at - start, 0).astype(np.int32)
    if packed.layout == "pairs":
        segments = (tokens[..., :-1] != PAD).astype(np.int32)
        source = packed.about["source_length"]
        positions = np.where(positions < source, positions, positions - source)
    return Batch(tokens[..., :-1], tokens[..., 1:], weights, segments, positions)


def read_target_bytes(packed: Packed, rows: np.ndarray) -> np.ndarray:
    """Bytes of text under the targets (weight above 0) of each row, int64 [...].

    Bits per byte is the sum of nll (nats) over rows / ln 2 / the sum of these.
    """
    at, inside = _windows(packed, rows)
    counts = np.where(inside & (packed.weight[at] > 0), packed.token_bytes[at], 0)
    return counts[..., 1:].sum(-1, dtype=np.int64)


def _windows(packed: Packed, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the T + 1 tokens of each row are stored, and which of them belong to the row."""
    at = packed.row_start[rows][..., None] + np.arange(packed.length + 1)
    # A row of a stream ends with the token that the next one begins with.
    end = packed.row_start[np.asarray(rows) + 1] + (packed.layout == "stream")
    return np.minimum(at, len(packed.tokens) - 1), at < end[..., None]


def _epoch_seed(seed: int, name: str, epoch: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{epoch}/{name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest)
