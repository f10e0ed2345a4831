"""A hierarchical bootstrap from stored answers: seeds first, items second, all metrics at once.

A metric of a size is the mean over its seeds s of Σ_i a_si / Σ_i b_si over items i. Two sources of
chance stand behind it, other seeds and other test items, and both are resampled.

    crossed   all seeds answer the same items: one draw of items serves all seeds. An item that is
              hard is hard for every seed, so its chance does not shrink with more seeds
    nested    every seed has items of its own (the `eval` seed is an axis): they are drawn anew
              within each drawn seed

`curve` takes the first where the targets of all seeds are equal. Every draw is made once for all
metrics, so a difference or a ratio of two metrics is a statistic of paired draws with an interval
of its own (`Resampled.estimate` of a function).

Below 20 seeds S - 1 of S are drawn (McCarthy & Snowden 1985): drawing S underestimates the variance
of their mean by (S - 1)/S, a third at three seeds. Where every level has at least 20 units the
interval is BCa (Efron 1987) with the acceleration of several samples; below, percentiles. With few
seeds no bootstrap reaches its level: the hull of three seeds holds their median in 75% of cases,
and where seeds are most of the variance intervals of three seeds cover 81%, of five 87%.
The crossed bootstrap overstates the seed-by-item part of the variance, up to three times (Owen
2007), which errs on the safe side.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import special, stats

from lm.config import UserError
from lm.emergence import metrics
from lm.emergence.metrics import PAD, Answers
from lm.emergence.seeds import Interval, wilson

LEAST_BCA = 20  # units of a level, below which the acceleration is noise
RATES = ("exact_match", "token_accuracy", "choice_accuracy")
RESAMPLES = 2000

Sums = Mapping[str, tuple[np.ndarray, np.ndarray]]
Values = Mapping[str, np.ndarray]
Method = Literal["bca", "percentile", "wilson", "none"]


@dataclass(frozen=True)
class Estimate:
    """A value with its interval. `stderr` is the draws' standard deviation; `undefined` is the
    share of draws where the statistic is no finite number, and those are left out.
    """

    value: float
    ci: Interval
    stderr: float
    method: Method
    undefined: float


@dataclass(frozen=True)
class Resampled:
    """One size. `value` holds scalars, `draws` arrays [resamples], and `jackknife` arrays [units]
    for each level that has several units, seeds first.
    """

    seeds: int
    items: int
    crossed: bool
    value: Values
    draws: Values
    jackknife: tuple[Values, ...]

    def estimate(self, what: str | Callable[[Values], np.ndarray], level: float = 0.95) -> Estimate:
        """A metric, or a function of the metrics, with its interval.

        The function gets arrays of any one shape by name and works on them elementwise, as in
        `lambda m: m["exact_match"] - m["token_accuracy"]`. A rate of 0 or 1 in every draw has
        Wilson's interval of its items, since 1000 of 1000 is not certainty.
        """
        if isinstance(what, str) and what not in self.value:
            raise UserError(f"{what} is not among the metrics {', '.join(self.value)}")
        name = what if isinstance(what, str) else ""
        function = (lambda m: m[name]) if isinstance(what, str) else what
        with np.errstate(all="ignore"):
            value = float(function(self.value))
            draws = np.asarray(function(self.draws), np.float64)
            leave_out = [np.asarray(function(units), np.float64) for units in self.jackknife]
        finite = draws[np.isfinite(draws)]
        undefined = 1 - len(finite) / len(draws)
        if not np.isfinite(value) or len(finite) == 0:
            return Estimate(value, Interval(np.nan, np.nan), np.nan, "none", undefined)
        if name in RATES and value in (0, 1) and np.ptp(finite) == 0:
            ends = wilson(round(value * self.items), self.items, level)
            return Estimate(value, ends, 0.0, "wilson", undefined)
        stderr = float(finite.std())
        if leave_out and min(map(len, leave_out)) >= LEAST_BCA:
            ends = bca(value, finite, leave_out, level)
            return Estimate(value, ends, stderr, "bca", undefined)
        ends = Interval(*np.quantile(finite, [0.5 - level / 2, 0.5 + level / 2]).tolist())
        method: Method = "percentile" if leave_out else "none"
        return Estimate(value, ends, stderr, method, undefined)


def sums(answers: Answers) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Numerator and denominator [n] of every metric that is a ratio of sums over items.

    `length T` is the share of answers of T tokens, from which `independent_match` is made.
    """
    real = answers.target != PAD
    tokens = real.sum(1).astype(np.float64)
    ones = np.ones(len(tokens))
    logprob = np.where(real, answers.logprob, 0.0).astype(np.float64)
    hits = (real & (answers.greedy == answers.target)).sum(1).astype(np.float64)
    distance = answers.square.astype(np.float64) - 2 * np.exp(logprob) + 1
    total = logprob.sum(1)
    found = {
        "exact_match": ((hits == tokens).astype(np.float64), ones),
        "token_accuracy": (hits, tokens),
        "nll": (-total, tokens),
        "log_likelihood": (total, ones),
        "answer_probability": (np.exp(total), ones),
        "brier": (np.where(real, distance, 0.0).sum(1), tokens),
    }
    if real.shape[1] > 1:
        similarity = metrics.similarity(answers.decoded, answers.target)
        found["edit_similarity"] = (similarity, ones)
    if answers.choices.shape[1] > 1:
        p = special.softmax(answers.choices.astype(np.float64), axis=1)
        best = p == p.max(1, keepdims=True)
        found["choice_accuracy"] = (best[:, 0] / best.sum(1), ones)
        found["choice_brier"] = ((p**2).sum(1) - 2 * p[:, 0] + 1, ones)
    for length in np.unique(tokens).astype(int):
        found[f"length {length}"] = ((tokens == length).astype(np.float64), ones)
    return found


def independent_match(seed: Values) -> dict[str, np.ndarray]:
    """`independent_match` of each seed from its token accuracy a: Σ_T share_T a^T."""
    lengths = {name: int(name.split()[1]) for name in seed if name.startswith("length ")}
    terms = [seed[name] * seed["token_accuracy"] ** length for name, length in lengths.items()]
    return {"independent_match": np.sum(terms, axis=0)}


def curve(
    answers: Mapping[int, Sequence[Answers]], resamples: int = RESAMPLES, seed: int = 0
) -> dict[int, Resampled]:
    """Every size of a curve from its answers, {parameters: one `Answers` per seed}.

    Sizes are drawn with independent seeds and, where their items are the same, with the same draws
    of items: `draws` of two sizes may be subtracted. Raises `UserError` if a size has no answers or
    its seeds answered different numbers of items.
    """
    targets = [one.target for several in answers.values() for one in several]
    crossed = all(np.array_equal(targets[0], target) for target in targets)
    found = {}
    for rank, (params, several) in enumerate(sorted(answers.items())):
        if len({len(one.target) for one in several}) != 1:
            counts = [len(one.target) for one in several]
            raise UserError(
                f"the seeds of size {params} answered {counts} items; give every seed as many"
            )
        each = [sums(one) for one in several]
        stacked = {name: _stack([_of(one, name) for one in each]) for name in _names(each)}
        found[params] = resample(stacked, crossed, resamples, seed, rank, independent_match)
    return found


def resample(
    sums: Sums,
    crossed: bool = True,
    resamples: int = RESAMPLES,
    seed: int = 0,
    stream: int = 0,
    derive: Callable[[Values], Values] | None = None,
) -> Resampled:
    """The draws of one size from `sums`, {metric: (a, b)}, each [seeds, items].

    Equal `seed` means equal draws of items, another `stream` other draws of seeds. `derive` makes
    further metrics of each seed from its metrics [..., seeds]. Raises `UserError` on arrays that
    are empty, differ in shape, hold NaN, or on a denominator that is not positive.
    """
    a, b = _checked(sums)
    names = list(sums)
    s, n = a.shape[1:]
    drawn = s if s >= LEAST_BCA else max(s - 1, 1)
    of_seeds = np.random.default_rng([seed, 1, stream])
    chosen = of_seeds.integers(s, size=(resamples, drawn))
    of_items = np.random.default_rng([seed, 0])

    def per_seed(top: np.ndarray, bottom: np.ndarray) -> dict[str, np.ndarray]:
        with np.errstate(invalid="ignore"):
            found = dict(zip(names, top / bottom, strict=True))
            return found | dict(derive(found)) if derive else found

    if crossed:
        counts = of_items.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
        each = per_seed(_weighted(a, counts), _weighted(b, counts))  # [resamples, S]
        draws = {m: np.take_along_axis(v, chosen, 1).mean(1) for m, v in each.items()}
    else:
        top, bottom = (np.empty((len(names), resamples, drawn)) for _ in range(2))
        for place in range(drawn):
            counts = of_items.multinomial(n, np.full(n, 1 / n), size=resamples).astype(np.float64)
            for one in range(s):
                rows = chosen[:, place] == one
                top[:, rows, place] = _weighted(a[:, [one]], counts[rows])[..., 0]
                bottom[:, rows, place] = _weighted(b[:, [one]], counts[rows])[..., 0]
        draws = {m: v.mean(1) for m, v in per_seed(top, bottom).items()}

    full = per_seed(a.sum(2), b.sum(2))  # [S]
    leave_out = []
    if s > 1:
        leave_out.append({m: (v.sum() - v) / (s - 1) for m, v in full.items()})
    if n > 1 and (crossed or s == 1):  # nested items are part of their seed's own scatter
        with np.errstate(invalid="ignore"):
            a_less, b_less = (x.sum(2)[:, None] - x.transpose(0, 2, 1) for x in (a, b))
        leave_out.append({m: v.mean(1) for m, v in per_seed(a_less, b_less).items()})
    value = {m: np.asarray(v.mean()) for m, v in full.items()}
    return Resampled(s, n, crossed, value, draws, tuple(leave_out))


def bca(
    value: float, draws: np.ndarray, leave_out: Sequence[np.ndarray], level: float = 0.95
) -> Interval:
    """The bias-corrected and accelerated interval (Efron 1987) from draws [B] and leave-one-out
    values, one array for each level; percentiles where it is not defined.
    """
    tail = 0.5 - level / 2
    below = (np.mean(draws < value) + np.mean(draws <= value)) / 2
    bias = stats.norm.ppf(below)
    influence = [(len(u) - 1) / len(u) * (u.mean() - u) for u in leave_out]
    square = sum(float((u**2).sum()) for u in influence)
    if not np.isfinite(bias) or not square > 0:
        return Interval(*np.quantile(draws, [tail, 1 - tail]).tolist())
    acceleration = sum(float((u**3).sum()) for u in influence) / (6 * square**1.5)
    z = bias + stats.norm.ppf([tail, 1 - tail])
    return Interval(*np.quantile(draws, stats.norm.cdf(bias + z / (1 - acceleration * z))).tolist())


def interquartile_mean(scores: np.ndarray, axis: int | None = None) -> np.ndarray:
    """The mean of the middle half (Agarwal et al. 2021): steadier than the mean, and unlike the
    median it uses more than two of the scores.
    """
    return stats.trim_mean(scores, 0.25, axis=axis)


def aggregate(
    scores: np.ndarray, resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> Estimate:
    """The interquartile mean of scores [seeds, tasks]; seeds are resampled within each task.

    Tasks are fixed: the interval speaks of these tasks. It is BCa from 20 seeds on. One seed has no
    interval. Raises `UserError` on NaN.
    """
    scores = np.asarray(scores, np.float64)
    if scores.ndim != 2 or scores.size == 0 or not np.isfinite(scores).all():
        raise UserError("scores must be a full table [seeds, tasks] of finite numbers")
    value = float(interquartile_mean(scores))
    if len(scores) < 2 or np.ptp(scores, axis=0).max() == 0:
        return Estimate(value, Interval(np.nan, np.nan), np.nan, "none", 0.0)

    def statistic(*tasks: np.ndarray, axis: int) -> np.ndarray:
        return interquartile_mean(np.concatenate(tasks, axis=axis), axis=axis)

    many = len(scores) >= LEAST_BCA
    found = stats.bootstrap(
        tuple(scores.T),
        statistic,
        **{"n_resamples": resamples, "confidence_level": level, "vectorized": True},
        **{"method": "BCa" if many else "percentile", "rng": np.random.default_rng(seed)},
    )
    ends = Interval(*map(float, found.confidence_interval))
    method: Method = "bca" if many else "percentile"
    return Estimate(value, ends, float(found.standard_error), method, 0.0)


def _checked(sums: Sums) -> tuple[np.ndarray, np.ndarray]:
    """Numerators and denominators [metrics, seeds, items]."""
    shapes = {np.shape(array) for pair in sums.values() for array in pair}
    if len(shapes) != 1 or len(shape := next(iter(shapes))) != 2 or 0 in shape:
        raise UserError(f"sums must all be [seeds, items] with one of each; they are {shapes}")
    a, b = (np.stack([pair[i] for pair in sums.values()]).astype(np.float64) for i in (0, 1))
    if np.isnan(a).any() or not (b > 0).all():
        raise UserError("an item has no outcome (NaN) or no weight; leave it out for every seed")
    return a, b


def _names(each: Sequence[Sums]) -> list[str]:
    """The metrics that all seeds have, and every length that any seed's answers have."""
    names = dict.fromkeys(name for one in each for name in one)
    return [n for n in names if n.startswith("length ") or all(n in one for one in each)]


def _of(one: Sums, name: str) -> tuple[np.ndarray, np.ndarray]:
    if name in one:
        return one[name]
    ones = one["exact_match"][1]
    return np.zeros_like(ones), ones  # a length that only another seed's items have


def _stack(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.stack([a for a, _ in pairs]), np.stack([b for _, b in pairs])


def _weighted(x: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Σ_i counts[r, i] x[m, s, i] -> [m, r, s], in one product."""
    m, s, n = x.shape
    with np.errstate(invalid="ignore"):  # 0 times the infinity of an impossible answer
        product = counts @ x.reshape(m * s, n).T
    return product.reshape(len(counts), m, s).transpose(1, 0, 2)
