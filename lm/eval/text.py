"""`lm score HYP REF`: BLEU, chrF, ROUGE and exact match of a system's texts, with intervals.

Every metric is a function of sums over segments (n-gram counts and matches, lengths, or a score
and a one), so what is measured of a corpus once is resampled as often as one likes without looking
at a text again: with counts c_ri of how often draw r has segment i, and statistics s_i,

    value = f(Σ_i s_i)      draw_r = f(Σ_i c_ri s_i)

The statistics of BLEU and chrF and their signatures are sacrebleu's (Post 2018), those of ROUGE
are rouge-score's; f is written here for many draws at once and held against theirs by the tests.
Intervals are 95% percentiles of 1,000 draws. Two systems are compared on the same draws (Koehn
2004): the interval of the difference, and p, the share of draws whose difference, centred, is at
least as large as the one that was found (Riezler & Maxwell 2005).

All scores are on the scale of 0 to 100.
"""

import argparse
import functools
import importlib.util
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from lm.config import UserError, nearest
from lm.data.segments import read_segments
from lm.emergence.seeds import Interval

METRICS = ("bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact")
RESAMPLES = 1000
SEED = 12345  # sacrebleu's
WORDS = 4000  # of a segment for ROUGE-L, whose table of two such segments takes 130 MB
_DRAWS_AT_ONCE = 1 << 22  # indices

# Characters that are words of their own: Han, kana.
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"

Score = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Statistics:
    """What one metric needs of a system: `parts` [n, k] of each segment, `score` [..., k] -> [...]
    of their sums, and the `signature` that says how they were taken.
    """

    parts: np.ndarray
    score: Score
    signature: str

    @property
    def value(self) -> float:
        """The metric of the whole corpus."""
        return float(self.score(self.parts.sum(axis=0)))


@dataclass(frozen=True)
class Estimate:
    """A value between 0 and 100, or a difference of two, its 95% interval and standard error."""

    value: float
    ci: Interval
    stderr: float


@dataclass(frozen=True)
class Comparison:
    """Another system on the same segments: its score, ours minus its, and p of no difference."""

    other: Estimate
    difference: Estimate
    p: float


@dataclass(frozen=True)
class Result:
    """One metric of one system, and how it compares with another, if there is one."""

    metric: str
    signature: str
    score: Estimate
    against: Comparison | None = None


def statistics(
    hypotheses: Sequence[str],
    references: Sequence[str],
    metrics: Sequence[str] = METRICS,
    lang: str = "",
) -> dict[str, Statistics]:
    """The statistics of each metric; `lang` is that of the texts, such as "en" or "zh-CN", and
    chooses how they are cut into words.

    Raises `UserError` for an unknown metric, unequal numbers of texts, an empty reference, or texts
    that need a `lang`.
    """
    _check(hypotheses, references, metrics, lang)
    found: dict[str, Statistics] = {}
    if "bleu" in metrics:
        found["bleu"] = _sacrebleu("BLEU", _bleu_metric(lang), bleu, hypotheses, references)
    if "chrf" in metrics:
        from sacrebleu.metrics import CHRF

        found["chrf"] = _sacrebleu("chrF2", CHRF(), chrf, hypotheses, references)
    if rouge := [name for name in metrics if name.startswith("rouge")]:
        found |= _rouge(rouge, hypotheses, references, lang)
    if "exact" in metrics:
        pairs = zip(hypotheses, references, strict=True)
        equal = np.array([100.0 * (hyp.strip() == ref.strip()) for hyp, ref in pairs])
        found["exact"] = Statistics(_with_ones(equal), mean, "exact|case:mixed|space:stripped")
    return {name: found[name] for name in metrics}


def bleu(sums: np.ndarray) -> np.ndarray:
    """BLEU-4 of sums [..., 10]: lengths of hypotheses and references, n-grams that match, n-grams;
    without matches of an order the k-th such precision is 2^-k of one match (NIST, "exp").
    """
    size, reference = sums[..., 0], sums[..., 1]
    correct, total = sums[..., 2:6], sums[..., 6:10]
    halved = 0.5 ** np.cumsum(correct == 0, axis=-1)
    some = (total > 0).all(axis=-1) & (correct > 0).any(axis=-1)
    precision = np.where(correct > 0, correct, halved) / np.maximum(total, 1)
    brevity = np.exp(np.minimum(0, 1 - reference / np.maximum(size, 1)))
    return np.where(some, 100 * brevity * np.exp(np.log(precision).mean(axis=-1)), 0.0)


def chrf(sums: np.ndarray) -> np.ndarray:
    """chrF2 of sums [..., 18]: for each length of 1 to 6 characters the n-grams of hypotheses, of
    references, and those that match. Precision and recall are averaged over the lengths there are.
    """
    by_order = sums.reshape(*sums.shape[:-1], -1, 3)
    hyp, ref, match = (by_order[..., i] for i in range(3))
    there = (hyp > 0) & (ref > 0)
    orders = np.maximum(there.sum(axis=-1), 1)
    precision = (there * match / np.maximum(hyp, 1)).sum(axis=-1) / orders
    recall = (there * match / np.maximum(ref, 1)).sum(axis=-1) / orders
    both = 4 * precision + recall
    return np.where(both > 0, 100 * 5 * precision * recall / np.where(both > 0, both, 1), 0.0)


def mean(sums: np.ndarray) -> np.ndarray:
    """The mean of sums [..., 2] of scores and ones."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def compare(
    ours: Mapping[str, Statistics],
    other: Mapping[str, Statistics] | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> list[Result]:
    """Every metric with its interval, and with the other system's on the same draws."""
    results = []
    for name, mine in ours.items():
        systems = [mine] if other is None else [mine, other[name]]
        parts = np.concatenate([s.parts for s in systems], axis=1)
        sums = resample(parts, resamples, seed)
        cuts = np.split(sums, len(systems), axis=1)
        draws = [s.score(cut) for s, cut in zip(systems, cuts, strict=True)]
        score = _estimate(mine.value, draws[0])
        against = None
        if other is not None:
            found, difference = mine.value - other[name].value, draws[0] - draws[1]
            extreme = np.abs(difference - difference.mean()) >= abs(found)
            against = Comparison(
                _estimate(other[name].value, draws[1]),
                _estimate(found, difference),
                float((extreme.sum() + 1) / (resamples + 1)),
            )
        results.append(Result(name, mine.signature, score, against))
    return results


def resample(parts: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sums [resamples, k] of segments [n, k] drawn with replacement; equal for equal seed and n."""
    n, rng, sums = len(parts), np.random.default_rng(seed), []
    each = max(1, _DRAWS_AT_ONCE // n)
    for first in range(0, resamples, each):
        drawn = rng.integers(n, size=(min(each, resamples - first), n))
        counts = [np.bincount(row, minlength=n) for row in drawn]
        sums.append(np.array(counts, np.float64) @ parts)
    return np.concatenate(sums)


def _estimate(value: float, draws: np.ndarray) -> Estimate:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(value, Interval(float(low), float(high)), float(draws.std(ddof=1)))


def _check(
    hypotheses: Sequence[str], references: Sequence[str], metrics: Sequence[str], lang: str
) -> None:
    for name in metrics:
        if name not in METRICS:
            raise UserError(f"{name!r} is not a metric; {nearest(name, METRICS)}")
    if len(hypotheses) != len(references):
        raise UserError(
            f"there are {len(hypotheses)} hypotheses and {len(references)} references; give one"
            " hypothesis for each reference, in the same order"
        )
    if not references:
        raise UserError("there is no segment to score; give at least one")
    if empty := [i for i, text in enumerate(references, 1) if not text.strip()]:
        raise UserError(
            f"reference {empty[0]} is empty, so nothing can be right there; take that segment out"
            " of hypotheses and references"
        )
    if lang and not re.fullmatch("[a-z]{2,3}([-_][A-Za-z0-9]+)*", lang):
        raise UserError(f"lang is {lang!r}; it must be a code such as en, de, zh or zh_CN")
    if not lang and set(metrics) - {"chrf", "exact"}:
        text = "".join(references)
        if 2 * len(re.findall(f"[{_IDEOGRAPHS}]", text)) > sum(map(str.isalpha, text)):
            raise UserError(
                "the references are mostly Chinese or Japanese characters, which have no spaces"
                " between words; say which language it is, with lang zh or ja"
            )


def _sacrebleu(
    name: str, metric: Any, score: Score, hypotheses: Sequence[str], references: Sequence[str]
) -> Statistics:
    # The only names of sacrebleu that give statistics of segments begin with an underscore.
    parts = metric._extract_corpus_statistics(hypotheses, [references])
    signature = f"{name}|{metric.get_signature().format()}"
    return Statistics(np.array(parts, np.float64), score, signature)


def _bleu_metric(lang: str) -> Any:
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize=bleu_tokenizer(lang), force=True)  # force: without its advice on stderr


def bleu_tokenizer(lang: str) -> str:
    """sacrebleu's tokenizer for a language; single characters where its MeCab is not installed."""
    base = re.split("[-_]", lang)[0]
    if base == "zh":
        return "zh"
    for code, module in (("ja", "MeCab"), ("ko", "mecab_ko")):
        if base == code:
            return f"{code}-mecab" if importlib.util.find_spec(module) else "char"
    return "13a"


class _Words:
    """Words of any script for rouge-score, which by itself keeps a-z and 0-9 only."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(f"[{_IDEOGRAPHS}]|[^\\W{_IDEOGRAPHS}]+", text.lower())


def _rouge(
    names: Sequence[str], hypotheses: Sequence[str], references: Sequence[str], lang: str
) -> dict[str, Statistics]:
    from rouge_score.rouge_scorer import RougeScorer

    english = re.split("[-_]", lang)[0] in ("", "en")
    scorer = RougeScorer(names, use_stemmer=english, tokenizer=None if english else _Words())
    if "rougeL" in names:
        for i, text in enumerate([*hypotheses, *references]):
            if len(text) > WORDS and len(scorer._tokenizer.tokenize(text)) > WORDS:
                what = "hypothesis" if i < len(hypotheses) else "reference"
                raise UserError(
                    f"{what} {i % len(hypotheses) + 1} has more than {WORDS:,} words, too many for"
                    " ROUGE-L; cut it into segments, or leave out rougeL"
                )
    found = [scorer.score(r, h) for h, r in zip(hypotheses, references, strict=True)]
    how = "tok:a-z0-9|stem:porter" if english else "tok:unicode|stem:no"
    signature = f"{how}|measure:f1|mean:segments|version:rouge-score-{_version('rouge-score')}"
    return {
        name: Statistics(
            _with_ones(np.array([100 * scores[name].fmeasure for scores in found])),
            mean,
            f"{name}|{signature}",
        )
        for name in names
    }


@functools.cache
def _version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package)


def _with_ones(values: np.ndarray) -> np.ndarray:
    return np.stack([values, np.ones(len(values))], axis=1)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `lm score --help` shows what there is")


def main(argv: list[str]) -> int:
    """`lm score HYP REF [--against=HYP2] [--metrics=] [--lang=] [--json]`."""
    parser = _Parser(
        "lm score",
        description="BLEU, chrF, ROUGE-1/2/L and exact match of texts against references, with 95%"
        " intervals. Files have a text a line; a .jsonl file a JSON string or an object with a"
        " 'text' on each; .gz is unpacked; - is the standard input.",
        epilog="example: lm score output.txt reference.txt --against=baseline.txt --lang=de",
    )
    parser.add_argument("hyp", help="what the system gave")
    parser.add_argument("ref", help="what is right, line by line")
    parser.add_argument("--against", metavar="HYP2", help="another system, compared in pairs")
    parser.add_argument("--metrics", default=",".join(METRICS), help="default: all of %(default)s")
    parser.add_argument("--lang", default="", help="of the texts: zh and ja need it, such as zh_CN")
    parser.add_argument("--json", action="store_true", help="one JSON object, for machines")
    args = parser.parse_args(argv)
    names = tuple(dict.fromkeys(args.metrics.split(",")))
    if [args.hyp, args.ref, args.against].count("-") > 1:
        raise UserError("- is given twice, and there is one standard input; name the other files")
    references = read_segments(args.ref)
    systems = [path for path in (args.hyp, args.against) if path is not None]
    measured = []
    for path in systems:
        texts = read_segments(path)
        if len(texts) != len(references):
            raise UserError(
                f"{path} has {len(texts):,} segments and {args.ref} has {len(references):,}; they"
                " must be the same texts in the same order, one a line"
            )
        measured.append(statistics(texts, references, names, args.lang))
    results = compare(measured[0], measured[1] if args.against is not None else None)
    if args.json:
        about = {"segments": len(references), "resamples": RESAMPLES, "seed": SEED}
        print(json.dumps(about | {"systems": systems, "scores": [_plain(r) for r in results]}))
    else:
        _print(results, systems, len(references))
    return 0


def _plain(result: Result) -> dict[str, Any]:
    def estimate(e: Estimate) -> dict[str, float]:
        return {"value": e.value, "low": e.ci.low, "high": e.ci.high}

    plain = {"metric": result.metric, "signature": result.signature, **estimate(result.score)}
    if result.against is not None:
        plain["against"] = estimate(result.against.other)
        plain["difference"] = estimate(result.against.difference) | {"p": result.against.p}
    return plain


def _print(results: Sequence[Result], systems: Sequence[str], segments: int) -> None:
    def shown(e: Estimate, sign: str = "") -> str:
        return f"{e.value:{sign}.2f} [{e.ci.low:{sign}.2f}, {e.ci.high:{sign}.2f}]"

    headings = ["", *systems, *["difference", "p"] * (len(systems) - 1)]
    rows = []
    for r in results:
        row = [r.metric, shown(r.score)]
        if r.against is not None:
            row += [shown(r.against.other), shown(r.against.difference, "+"), f"{r.against.p:.3f}"]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for row in (headings, *rows):
        print("  ".join(f"{cell:{n}}" for cell, n in zip(row, widths, strict=True)).rstrip())
    print(
        f"\n{segments:,} segments; 95% intervals"
        + (" and p" if len(systems) > 1 else "")
        + f" of {RESAMPLES:,} bootstrap resamples of them, seed {SEED}\n"
    )
    for r in results:
        print(r.signature)
