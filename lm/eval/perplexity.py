"""Held-out text: nats per token, bits per byte and perplexity, with errors that keep a row's tokens
together.

    nll = Σ nats / Σ tokens    bpb = Σ nats / (ln 2 · Σ bytes of scored tokens)   perplexity = e^nll

Bits per byte does not depend on the tokenizer. A perplexity's error is that of its nll times itself
(delta method).
"""

import math

import numpy as np

from lm.emergence.metrics import Measure, ratio


def text_metrics(
    logprob: np.ndarray, weights: np.ndarray, row_bytes: np.ndarray
) -> dict[str, Measure]:
    """logprob, weights [rows, T], row_bytes [rows] -> nll, bpb, perplexity; n is the number of
    scored tokens.
    """
    scored = weights > 0
    nats = np.where(scored, -logprob.astype(np.float64), 0.0).sum(axis=1)
    tokens = int(scored.sum())
    nll = ratio(nats, scored.sum(axis=1).astype(np.float64))._replace(n=tokens)
    bpb = ratio(nats / math.log(2), row_bytes.astype(np.float64))._replace(n=tokens)
    perplexity = math.exp(min(nll.value, 700.0))  # a diverging model must not overflow
    return {
        "nll": nll,
        "bpb": bpb,
        "perplexity": Measure(perplexity, perplexity * nll.stderr, tokens),
    }
