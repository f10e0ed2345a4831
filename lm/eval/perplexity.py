"""Held-out text: nats per token, bits per byte and perplexity, with errors that keep a row's tokens
together; and how well hidden tokens are restored.

    nll = Σ nats / Σ tokens    bpb = Σ nats / (ln 2 · Σ bytes of scored tokens)   perplexity = e^nll

    masked_nll, masked_accuracy         over the masked tokens of rows masked as in training
    pseudo_perplexity = e^(Σ nats / n)  over rows with one mask each (Salazar et al. 2020, eq. 1)

Bits per byte does not depend on the tokenizer. A perplexity's error is that of its nll times itself
(delta method).
"""

import math

import numpy as np

from lm.data.loader import Batch
from lm.emergence.metrics import Measure, ratio
from lm.eval.score import Scores


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


def restored(text: Scores, rows: Batch) -> dict[str, Measure]:
    """Scores and rows [rows, T] -> nll and accuracy of the tokens with weight."""
    scored = rows.weights > 0
    count = scored.sum(axis=1).astype(np.float64)
    nats = np.where(scored, -np.asarray(text.logprob, np.float64), 0.0).sum(axis=1)
    right = (scored & (np.asarray(text.greedy) == rows.targets)).sum(axis=1).astype(np.float64)
    n = int(count.sum())
    return {
        "nll": ratio(nats, count)._replace(n=n),
        "accuracy": ratio(right, count)._replace(n=n),
    }


def masked_metrics(text: Scores, rows: Batch) -> dict[str, Measure]:
    """The metrics of masked rows [2 n, T]: the first half masked as in training, the second with
    one mask each.
    """
    half = len(rows.tokens) // 2
    parts = [
        restored(Scores(*(a[part] for a in text)), Batch(*(a[part] for a in rows)))
        for part in (slice(half), slice(half, None))
    ]
    single = parts[1]["nll"]
    perplexity = math.exp(min(single.value, 700.0))
    return {
        "masked_nll": parts[0]["nll"],
        "masked_accuracy": parts[0]["accuracy"],
        "pseudo_perplexity": Measure(perplexity, perplexity * single.stderr, single.n),
    }
