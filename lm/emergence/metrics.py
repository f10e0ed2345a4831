"""Every metric of an ability, from one stored set of per-token answer outputs.

An evaluation keeps, for `n` items of `A` answer tokens (padded), what the model said about the
target under teacher forcing: its log-probability, the argmax token and its log-probability, and
Σ_v p_v²; what greedy decoding gives; and, where all choices of the items are single tokens, the
log-probability of each choice. All metrics are functions of these arrays, so adding one never needs
the model again (`rescore`), and a jump in one metric beside a smooth change in another is a fact
about the metrics and not about two evaluations (Schaeffer et al. 2023).

With items i, answer tokens t of item i, T_i of them, hit h_it = [greedy = target], choices c:

    exact_match         mean_i Π_t h_it                 (greedy decoding gives the answer)
    token_accuracy      a = Σ_it h_it / Σ_i T_i
    independent_match   mean_i a^T_i                    exact match if tokens were independent
    edit_similarity     mean_i 1 - Levenshtein(decoded_i, target_i) / T_i
    nll                 -Σ_it ln p_it / Σ_i T_i         nats per answer token
    log_likelihood      mean_i Σ_t ln p_it              nats per answer
    answer_probability  mean_i Π_t p_it                 what sampling would score
    brier               Σ_it (Σ_v p_v² - 2 p_it + 1) / Σ_i T_i      squared distance to one-hot
    choice_accuracy     mean_i [the right choice has the highest probability]
    choice_brier        mean_i Σ_c (q_ic - [c right])², q_i = p_i normalised over the choices
    calibration_error   Σ_b n_b/n |hits_b - confidence_b|  over ten equal bins of the argmax's
                        probability (Guo et al. 2017); biased upwards by about 1/√n

`independent_match` and `edit_similarity` are given where an answer has several tokens, `choice_*`
where choices were stored.

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

METRICS = (
    *("exact_match", "token_accuracy", "independent_match", "edit_similarity"),
    *("nll", "log_likelihood", "answer_probability", "brier"),
    *("choice_accuracy", "choice_brier", "calibration_error"),
)
PAD = -1
BINS = 10  # of the calibration error


class Measure(NamedTuple):
    """A metric's value, its standard error over items (NaN for one item), and the items."""

    value: float
    stderr: float
    n: int


@dataclass(frozen=True)
class Answers:
    """What a model said about n answers of up to A tokens: [n, A], padding where target is -1;
    `choices` [n, C] log-probabilities of the choices, the right one first, padded with -inf.

    Raises `ValueError` if the shapes differ or an item has no token.
    """

    target: np.ndarray
    logprob: np.ndarray
    greedy: np.ndarray
    square: np.ndarray
    highest: np.ndarray
    decoded: np.ndarray
    choices: np.ndarray

    def __post_init__(self) -> None:
        shapes = {name: getattr(self, name).shape for name in DTYPES if name != "choices"}
        if len(set(shapes.values())) != 1 or len(self.target.shape) != 2:
            raise ValueError(f"answer arrays must all be [n, A]; they are {shapes}")
        if self.choices.ndim != 2 or len(self.choices) != len(self.target):
            raise ValueError(f"choices must be [n, C]; they are {self.choices.shape}")
        if not (self.target >= 0).any(axis=1).all():
            raise ValueError("an item has no answer token: its row of target is all padding")


DTYPES = {
    **{"target": np.int32, "logprob": np.float32, "greedy": np.int32, "square": np.float32},
    **{"highest": np.float32, "decoded": np.int32, "choices": np.float32},
}


def answers_file(step: int, point: str, replica: int) -> str:
    """Where the answers of one evaluation lie in the folder of their cell."""
    return f"answers/{step:08d}-{point}-{replica}.npz"


def score(answers: Answers) -> dict[str, Measure]:
    """The metrics that these answers have, in the order of `METRICS`, computed in float64."""
    real = answers.target != PAD
    tokens = real.sum(1).astype(np.float64)
    logprob = np.where(real, answers.logprob, 0.0).astype(np.float64)
    hits = real & (answers.greedy == answers.target)
    distance = answers.square.astype(np.float64) - 2 * np.exp(logprob) + 1
    totals = logprob.sum(1)
    ones = np.ones(len(tokens))
    accuracy = ratio(hits.sum(1).astype(np.float64), tokens)
    found = {"exact_match": ratio((hits.sum(1) == tokens).astype(np.float64), ones)}
    with np.errstate(invalid="ignore"):  # a log-probability of -inf is a value, not an accident
        found |= {
            "token_accuracy": accuracy,
            "nll": ratio(-totals, tokens),
            "log_likelihood": ratio(totals, ones),
            "answer_probability": ratio(np.exp(totals), ones),
            "brier": ratio(np.where(real, distance, 0.0).sum(1), tokens),
            "calibration_error": _calibration(np.exp(answers.highest[real]), hits[real]),
        }
    if real.shape[1] > 1:
        found["independent_match"] = _independent(accuracy, tokens)
        found["edit_similarity"] = ratio(similarity(answers.decoded, answers.target), ones)
    if answers.choices.shape[1] > 1:
        p = np.exp(answers.choices.astype(np.float64) - answers.choices.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        # Equal probabilities share the point: a model that says nothing is at chance.
        best = p == p.max(1, keepdims=True)
        found["choice_accuracy"] = ratio(best[:, 0] / best.sum(1), ones)
        found["choice_brier"] = ratio((p**2).sum(1) - 2 * p[:, 0] + 1, ones)
    return {name: found[name] for name in METRICS if name in found}


def _independent(accuracy: Measure, tokens: np.ndarray) -> Measure:
    """mean_i a^T_i, with the error of `a` carried through (delta method)."""
    a = accuracy.value
    slope = float(np.mean(tokens * a ** (tokens - 1)))
    return Measure(float(np.mean(a**tokens)), slope * accuracy.stderr, accuracy.n)


def similarity(decoded: np.ndarray, target: np.ndarray) -> np.ndarray:
    """1 - edit distance / length of each answer [n]."""
    from rapidfuzz.distance import Levenshtein

    found = np.ones(len(target))
    for i in np.nonzero((decoded != target).any(1))[0]:
        real = target[i] != PAD
        found[i] = Levenshtein.normalized_similarity(
            decoded[i][real].tolist(), target[i][real].tolist()
        )
    return found


def _calibration(confidence: np.ndarray, hits: np.ndarray) -> Measure:
    """The expected calibration error over tokens [m]; its error over items is not given (NaN)."""
    place = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    off = np.bincount(place, hits - confidence.astype(np.float64), minlength=BINS)
    return Measure(float(np.abs(off).sum() / len(hits)), float("nan"), len(hits))


def save(path: AnyPath, answers: Mapping[str, Answers]) -> None:
    """Writes one evaluation, keyed by `TASK.LEVEL.FORMAT`; the same arrays give the same bytes."""
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
