"""A loaded model as what the server serves: its rows are answered by `lm.generate.stream`."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lm import generate
from lm.serve.app import Model
from lm.serve.worker import Heard, Row


def serve_model(loaded: Any, name: str) -> Model:
    """What `lm.generate.weights.open_checkpoint` gave, under a name."""

    def chat(messages: Sequence[dict[str, str]]) -> np.ndarray:
        # Control tokens that somebody typed into a message are read as text.
        return loaded.tokenizer.encode_chat(messages)

    def answer(rows: Sequence[Row]) -> Iterator[tuple[int, Heard]]:
        return _answer(loaded, rows)

    return Model(
        name=name,
        context=generate.context(loaded),
        vocabulary=loaded.tokenizer.vocab_size,
        encode=lambda text: generate.encode_prompt(loaded, text),
        chat=chat,
        sampler=_sampler,
        options=lambda tokens, stop, seed: generate.Options(tokens, stop, seed),
        answer=answer,
    )


def _sampler(temperature: float, top_p: float) -> generate.Sampler:
    """Where nothing is drawn, top_p says nothing."""
    return generate.choose_sampler(temperature, top_p=top_p if temperature else 1.0)


def _answer(loaded: Any, rows: Sequence[Row]) -> Iterator[tuple[int, Heard]]:
    """The rows in one batch, filled up to a power of two, so that few programs are compiled."""
    fill = (1 << (len(rows) - 1).bit_length()) - len(rows)
    prompts = [row.ids for row in rows] + [rows[0].ids[:1]] * fill
    options = [row.options for row in rows] + [generate.Options(tokens=1)] * fill
    for piece in generate.stream(loaded, prompts, rows[0].sampler, options):
        if piece.row < len(rows):
            yield piece.row, Heard(piece.text, len(piece.ids), piece.end)
