"""Every metric of an ability, from one stored set of per-token answer outputs.

An evaluation keeps, for `n` items of `A` answer tokens (padded), what the model said about the
target under teacher forcing: its log-probability, the argmax token, and Σ_v p_v². All metrics are
functions of these arrays, so adding one never needs the model again, and a jump in one metric
beside a smooth change in another is a fact about the metrics and not about two evaluations
(Schaeffer et al. 2023).

With items i, answer tokens t of item i, hit h_it = [greedy = target]:

    exact_match     mean_i Π_t h_it                   (greedy decoding would give the answer)
    token_accuracy  Σ_it h_it / Σ_i T_i
    nll             -Σ_it ln p_it / Σ_i T_i           nats per answer token
    log_likelihood  mean_i Σ_t ln p_it                nats per answer
    brier           Σ_it (Σ_v p_v² - 2 p_it + 1) / Σ_i T_i      = mean squared distance to one-hot

Standard errors are over items. A ratio of sums r = Σ a_i / Σ b_i has the linearised error
sqrt(Σ (a_i - r b_i)² · n/(n-1)) / Σ b_i (Cochran 1977, section 6.4), which keeps the tokens of one
answer together: they are not independent.
"""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lm.rundir import AnyPath, write_bytes

METRICS = ("exact_match", "token_accuracy", "nll", "log_likelihood", "brier")
PAD = -1


class Measure(NamedTuple):
    """A metric's value, its standard error over items (NaN for one item), and the items."""

    value: float
    stderr: float
    n: int


@dataclass(frozen=True)
class Answers:
    """What a model said about n answers of up to A tokens: [n, A], padding where target is -1.

    Raises `ValueError` if the shapes differ or an item has no token.
    """

    target: np.ndarray
    logprob: np.ndarray
    greedy: np.ndarray
    square: np.ndarray

    def __post_init__(self) -> None:
        shapes = {name: getattr(self, name).shape for name in DTYPES}
        if len(set(shapes.values())) != 1 or len(self.target.shape) != 2:
            raise ValueError(f"answer arrays must all be [n, A]; they are {shapes}")
        if not (self.target >= 0).any(axis=1).all():
            raise ValueError("an item has no answer token: its row of target is all padding")


DTYPES = {"target": np.int32, "logprob": np.float32, "greedy": np.int32, "square": np.float32}


def score(answers: Answers) -> dict[str, Measure]:
    """All of `METRICS`, in that order, computed in float64."""
    real = answers.target != PAD
    tokens = real.sum(1).astype(np.float64)
    logprob = np.where(real, answers.logprob, 0.0).astype(np.float64)
    hits = real & (answers.greedy == answers.target)
    distance = answers.square.astype(np.float64) - 2 * np.exp(logprob) + 1
    totals = logprob.sum(1)
    ones = np.ones(len(tokens))
    with np.errstate(invalid="ignore"):  # a log-probability of -inf is a value, not an accident
        return {
            "exact_match": ratio((hits.sum(1) == tokens).astype(np.float64), ones),
            "token_accuracy": ratio(hits.sum(1).astype(np.float64), tokens),
            "nll": ratio(-totals, tokens),
            "log_likelihood": ratio(totals, ones),
            "brier": ratio(np.where(real, distance, 0.0).sum(1), tokens),
        }


def save(path: AnyPath, answers: Mapping[str, Answers]) -> None:
    """Writes one evaluation, keyed by `TASK.LEVEL`; the same arrays always give the same bytes."""
    arrays = {
        f"{key}.{name}": np.ascontiguousarray(getattr(answers[key], name), dtype)
        for key in sorted(answers)
        for name, dtype in DTYPES.items()
    }
    buffer = io.BytesIO()
    # NumPy opens its members without a time, so zip records its epoch, 1980-01-01.
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_bytes(path, buffer.getvalue())


def load(path: AnyPath) -> dict[str, Answers]:
    """What `save` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        keys = sorted({name.rpartition(".")[0] for name in stored.files})
        return {key: Answers(**{name: stored[f"{key}.{name}"] for name in DTYPES}) for key in keys}


def ratio(a: np.ndarray, b: np.ndarray) -> Measure:
    """Σa/Σb over items with its linearised standard error."""
    n, total = len(a), b.sum()
    value = a.sum() / total
    if n < 2:
        return Measure(float(value), float("nan"), n)
    stderr = np.sqrt(np.sum((a - value * b) ** 2) * n / (n - 1)) / total
    return Measure(float(value), float(stderr), n)
