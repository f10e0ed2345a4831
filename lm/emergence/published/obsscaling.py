"""One capability behind eight benchmarks, and exact match beside BLEU (Ruan et al. 2024).

Missing scores are imputed from the first principal component until they do not change, then the
components are taken of the scores as they are (not standardised). Within a family of models the
first component is a straight line in log FLOPs.

The transliteration task shows one set of outputs under two metrics: exact match stays at 0 while
BLEU, which gives part marks, rises.
"""

import altair as alt
import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from lm.emergence.published import draw
from lm.emergence.published.files import read
from lm.emergence.published.numbers import Number, Result, at_least, at_most, exact, within

BENCHMARKS = ("MMLU", "ARC-C", "HellaSwag", "Winograd", "TruthfulQA", "GSM8K", "XWinograd",
              "HumanEval")  # fmt: skip
FLOPS = "FLOPs (1E21)"
EXACT, BLEU = "ipa_transliterate_2_exact_match", "ipa_transliterate_2_bleu"
FAMILIES = {"Llama-2": 1.000, "Llama": 0.978, "Pythia": 0.984, "Qwen1.5": 0.970, "OPT": 0.985,
            "BLOOM": 0.984, "Falcon": 0.934}  # fmt: skip


def analyse(folder: str | None) -> Result:
    """The numbers and the figure: exact match and BLEU against training FLOPs."""
    columns = ("Model", "Model Family", FLOPS, *BENCHMARKS)
    frame = read("obsscaling_base_llm_benchmark_eval.csv", columns, folder)
    tasks = read("obsscaling_base_llm_emergent_capability_eval.csv", ("Model", EXACT, BLEU), folder)
    scores, share = components(impute(frame[list(BENCHMARKS)].to_numpy(np.float64)))
    numbers = [
        exact("base models", len(frame), 148),
        within("variance of the first component *", share[0], 0.853, 0.01),
        within("variance of the first three *", share[:3].sum(), 0.974, 0.01),
        within("the same, printed for 77 earlier models", share[:3].sum(), 0.97, 0.01),
    ]
    flops = np.log10(frame[FLOPS].to_numpy(np.float64))
    for family, r2 in FAMILIES.items():
        mine = (frame["Model Family"] == family).to_numpy() & np.isfinite(flops)
        ours = np.corrcoef(flops[mine], scores[mine, 0])[0, 1] ** 2
        numbers.append(within(f"{family}: R2 of PC1 on log FLOPs *", ours, r2, 0.005))
    both = tasks.merge(frame[["Model", FLOPS]], on="Model").dropna(subset=[EXACT, BLEU, FLOPS])
    return Result([*numbers, *_mirage(both)], _figure(both))


def impute(table: np.ndarray) -> np.ndarray:
    """Missing entries of [models, benchmarks] from the first component (rank 1)."""
    missing = np.isnan(table)
    filled = np.where(missing, np.nanmean(table, 0), table)
    for _ in range(1000):
        middle = filled.mean(0)
        u, s, v = np.linalg.svd(filled - middle, full_matrices=False)
        new = np.where(missing, middle + s[0] * np.outer(u[:, 0], v[0]), table)
        change = np.abs(new - filled).max()
        filled = new
        if change < 1e-10:
            break
    return filled


def components(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores [models, components] and the share of the variance of each."""
    u, s, _ = np.linalg.svd(table - table.mean(0), full_matrices=False)
    return u * s, s**2 / (s**2).sum()


def _mirage(both: pd.DataFrame) -> list[Number]:
    """Among models with exact match 0, BLEU is above 0 and still follows compute."""
    zero = both[both[EXACT] == 0]
    rank = spearmanr(zero[FLOPS], zero[BLEU])
    return [
        exact("models with exact match 0: BLEU above 0 in all *", float((zero[BLEU] > 0).all()), 1),
        at_least("the same: rank correlation of BLEU with FLOPs *", rank.statistic, 0),
        at_most("the same: p of that correlation *", rank.pvalue, 0.05),
    ]


def _figure(both: pd.DataFrame) -> dict:
    names = ["exact match, %", "BLEU"]
    rows = draw.data(
        flops=np.tile(both[FLOPS].to_numpy() * 1e21, 2),
        score=[*(100 * both[EXACT]), *both[BLEU]],
        which=np.repeat(names, len(both)),
    )
    points = alt.Chart(rows).mark_point(filled=True, size=45, opacity=0.8)
    chart = alt.layer(
        points.encode(
            x=draw.log("flops", "training FLOPs"),
            y=alt.Y("score:Q", title=None, scale=alt.Scale(type="symlog", constant=0.1)),
            color=draw.colours("which", names, [draw.BLUE, draw.ORANGE]),
        )
    )
    return draw.finish(chart, "Transliteration: the same outputs under two metrics")
