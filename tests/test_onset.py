"""Verdicts on planted curves and on nulls, and the intervals of planted onsets."""

import numpy as np
import pandas as pd
import pytest
from scipy import special, stats

from lm.emergence import fits, onset

SIZES = [400, 784, 1200, 1568, 6208, 24704, 55000]


def table(task, exact, nll=None, chance=0.25, n=1000):
    """Final rows of a ladder from {params: [one value per seed]}."""
    rows = []
    for params, values in exact.items():
        for replica, value in enumerate(values):
            row = {
                **{"point": f"p{params}", "replica": replica, "role": "ladder", "params": params},
                **{"step": 100, "task": task, "level": "1", "status": "ok", "stderr": 0.01, "n": n},
            }
            rows.append(row | {"metric": "exact_match", "value": value, "chance": chance})
            if nll is not None:
                value = nll[params][replica]
                rows.append(row | {"metric": "nll", "value": value, "chance": np.nan})
    return pd.DataFrame(rows)


def planted(kind, seed, sizes=9, seeds=5, n=1000, chance=0.25, bimodal=False):
    """A synthetic ladder over 3 decades: (rows, true onset in parameters or NaN)."""
    rng = np.random.default_rng(seed)
    x = np.linspace(2.6, 5.6, sizes)
    x50 = rng.uniform(x[3] + 0.1, x[-2] - 0.2)
    share = (x - x[0]) / (x[-1] - x[0])
    step = fits.logistic(np.array([[x50, np.log10(0.4)]]), x)[0]
    loss_step = fits.logistic(np.array([[x50, np.log10(0.4)]]), x)[0]
    p, loss = {
        "emergent": (chance + 0.7 * step, 2 - 1.8 * loss_step),
        "metric-induced": (chance + 0.7 * step, 2.2 - 1.6 * share),
        "smooth": (chance + 0.02 + 0.6 * share, 2 - 1.5 * share),
        "late smooth": (chance + 0.7 * 10 ** (0.9 * (x - x[-1])), 2 * 10 ** (-0.4 * (x - x[0]))),
        "wide": (chance + 0.7 / (1 + 9 ** (-2 * (x - x50) / 2)), 2 - 1.5 * share),
        "flat": (chance + 0 * x, 1.5 - 0.1 * share),
        "inverse": (chance + 0.5 - 0.45 * share, 1.5 + 0.8 * share),
    }[kind]
    exact, nll = {}, {}
    for size, mean, level, part in zip(np.round(10**x).astype(int), p, loss, step, strict=True):
        through = rng.uniform(size=seeds) < part
        if bimodal:
            mean, level = np.where(through, chance + 0.7, chance), np.where(through, 0.2, 2.0)
        scatter = rng.normal(0, 0.01, seeds) if kind != "flat" else 0
        exact[size] = rng.binomial(n, np.clip(mean + scatter, 0.001, 0.999), seeds) / n
        nll[size] = level + rng.normal(0, 0.02, seeds)
    known = kind in ("emergent", "metric-induced")
    return table(kind, exact, nll, chance, n), 10**x50 if known else np.nan


def recall(n=1000):
    """The desk study's recall as it was measured: bimodal over seeds at 1,568 parameters."""
    exact = [[0.20, 0.24, 0.18], [0.20, 0.19, 0.21], [0.22, 0.24, 0.23]]
    exact += [[0.23, 1.0, 0.24, 0.36, 0.23, 0.99], [1.0] * 3, [1.0] * 3, [1.0] * 3]
    floor = dict(zip(SIZES, [2.15, 2.0, 1.95, 1.92, 0, 0, 0], strict=True))
    exact = dict(zip(SIZES, exact, strict=True))
    nll = {
        p: [0.002 if v > 0.9 else floor[p] + 0.01 * i for i, v in enumerate(exact[p])]
        for p in SIZES
    }
    return table("recall", exact, nll, n=n)


def near(levels, seeds=3, scatter=0.01, seed=0, sizes=SIZES):
    """{params: values around a level}."""
    rng = np.random.default_rng(seed)
    pairs = zip(sizes, levels, strict=True)
    return {p: np.round(level + rng.normal(0, scatter, seeds), 3) for p, level in pairs}


def test_recall_with_its_bimodal_size_is_emergent():
    """Fails if one bimodal size breaks the fit, or the onset leaves the gap where it lies."""
    verdict = onset.judge(recall())
    assert verdict.verdict == "emergent"
    assert 800 < verdict.ci95.low < verdict.onset < verdict.ci95.high < 6300
    assert verdict.floor_sizes == 3 and verdict.continuous.word == "sharp"


def test_random_labels_are_flat_while_their_loss_falls():
    """Fails if learning which labels exist is taken for an ability."""
    exact = near([0.23] * 7, scatter=0.015)
    nll = near([1.6, 1.5, 1.45, 1.42, 1.4, 1.4, 1.39])
    assert onset.judge(table("random_labels", exact, nll)).verdict == "flat"


def test_a_small_rise_from_one_size_at_chance_is_smooth_where_the_loss_says_so():
    """The desk study's bigram as it was measured. Catches a verdict that needs exact match alone to
    tell a bend from a curve, and one that takes the loss's word for a rise of any height.
    """
    exact = [[0.184, 0.136, 0.158], [0.229, 0.255, 0.216], [0.224, 0.207, 0.217]]
    exact += [[0.233, 0.210, 0.199, 0.246, 0.234, 0.232, 0.216, 0.226]]
    exact += [[0.255, 0.254, 0.259, 0.259, 0.257], [0.240, 0.256, 0.270, 0.252, 0.267]]
    exact += [[0.249, 0.264, 0.264], [0.248, 0.249, 0.272]]
    loss = [[2.285, 2.316, 2.394], [2.217, 2.127, 2.192], [2.173, 2.186, 2.220]]
    loss += [[2.158, 2.183, 2.152, 2.163, 2.169, 2.182, 2.166, 2.182]]
    loss += [[2.028, 2.042, 2.036, 2.042, 2.044], [2.011, 2.011, 2.022, 2.003, 2.004]]
    loss += [[2.002, 1.994, 1.997], [1.987, 1.994, 1.997]]
    sizes = [404, 792, 894, 1576, 3516, 6224, 24736, 55536]
    rows = table(
        "bigram", dict(zip(sizes, exact, strict=True)), dict(zip(sizes, loss, strict=True)), 0.168
    )
    assert onset.judge(rows).verdict == "smooth"
    without = onset.judge(rows[rows["metric"] == "exact_match"])
    assert without.verdict == "undetermined"


def test_a_bigram_is_smooth_though_its_loss_bends():
    """Fails if a rise from above chance can be an onset."""
    exact = near([0.33, 0.35, 0.36, 0.38, 0.42, 0.43, 0.43])
    nll = near([2.12, 2.10, 2.08, 2.05, 1.90, 1.88, 1.88])
    assert onset.judge(table("bigram", exact, nll, chance=0.15)).verdict == "smooth"


def test_a_rise_in_the_last_step_alone_is_undetermined():
    """Fails if a ladder that ends in the middle of a rise is given a shape."""
    sizes = [*SIZES, 100_000]
    exact = near([0.01, 0.02, 0.03, 0.05, 0.06, 0.2, 0.07, 0.8], scatter=0.005, sizes=sizes)
    exact[24704] = [0.02, 0.52, 0.06]
    nll = near([2.4, 2.3, 2.25, 2.1, 2.0, 1.7, 1.9, 0.3], scatter=0.05, sizes=sizes)
    assert onset.judge(table("addition", exact, nll, chance=0.01)).verdict == "undetermined"


@pytest.mark.parametrize("kind", ["emergent", "metric-induced", "smooth", "flat", "inverse"])
def test_what_was_planted_is_found(kind):
    """Fails if any branch of the definition is lost (3 tables each)."""
    found = [onset.judge(planted(kind, seed, seeds=4)[0]).verdict for seed in range(3)]
    assert found == [kind] * 3


@pytest.mark.parametrize("kind", ["smooth", "late smooth", "wide", "flat"])
def test_nulls_are_not_called_emergent(kind):
    """Fails if sharpness is read off the best curve without its rivals (4 tables each)."""
    found = [onset.judge(planted(kind, seed, sizes=7, seeds=3)[0]).verdict for seed in range(4)]
    assert not {"emergent", "metric-induced"} & set(found)


@pytest.mark.parametrize("bimodal", [False, True])
def test_intervals_cover_planted_onsets(bimodal):
    """Fails if the interval is narrower than its grid, or ignores the gap between sizes."""
    covered = 0
    for seed in range(5):
        rows, truth = planted("emergent", seed, bimodal=bimodal)
        verdict = onset.judge(rows)
        covered += verdict.ci95.low <= truth <= verdict.ci95.high
    assert covered >= 4


def test_controls_and_diverged_replicas_are_not_fitted():
    """Fails if a control, or a replica that diverged after this evaluation, moves the verdict."""
    rows = recall().assign(tokens=0)
    control = rows[rows["params"] == 6208].assign(role="control", point="odd", value=0.2)
    broken = rows[rows["params"] == 55000].assign(replica=9, value=0.2)
    last_word = broken.assign(task="train", metric="loss", value=np.nan, status="diverged")
    (verdict,) = onset.verdicts(pd.concat([rows, control, broken, last_word]))
    (alone,) = onset.verdicts(rows)
    assert verdict.diverged == 3 and alone.diverged == 0
    assert (verdict.onset, verdict.ci95, verdict.seeds) == (alone.onset, alone.ci95, alone.seeds)


def test_only_the_last_evaluation_counts():
    """Fails if earlier steps are fitted as if they were seeds."""
    rows = recall()
    early = rows.assign(step=10, value=0.25)
    assert len(onset.final_rows(pd.concat([early, rows]))) == len(rows)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (table("t", {400: [0.2, 0.3], 6208: [1.0, 1.0]}), "2 sizes finished"),
        (
            table("t", near([0.2, 0.2, 0.2, 0.9, 1], sizes=[1000, 1200, 1500, 1900, 2500])),
            "decades",
        ),
        (
            table("t", near([0.25, 0.25, 0.25, 0.6, 0.95], seeds=1, sizes=SIZES[:3] + SIZES[4:6])),
            "5 replicas finished",
        ),
        (table("t", near([0.25] * 7), chance=np.nan), "chance was not recorded"),
        (table("t", {p: [float(p > 2000)] * 3 for p in SIZES}, n=1), "too few items"),
        (table("t", near([0.25, 0.26, 0.9, 0.25, 0.9, 0.25, 0.26])), "in no order"),
        (table("t", {p: [np.nan] for p in SIZES}), "0 sizes finished"),
    ],
)
def test_too_little_is_undetermined_and_says_why(rows, said):
    """Fails if a few sizes or a single seed are enough for a word, or end in a traceback."""
    verdict = onset.judge(rows)
    assert verdict.verdict == "undetermined" and said in verdict.reason
    assert np.isnan(verdict.onset)


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0])
def test_equal_values_are_flat(value):
    """Fails on a division by a range of zero. All ones is above chance everywhere, and flat."""
    same = table("t", {p: [value] * 3 for p in SIZES}, {p: [1.5] * 3 for p in SIZES})
    assert onset.judge(same).verdict == "flat"


def test_exact_match_alone_cannot_be_emergent():
    """Fails if the demand for a continuous metric is dropped."""
    rows = recall()
    verdict = onset.judge(rows[rows["metric"] == "exact_match"])
    assert verdict.verdict == "undetermined" and "no continuous metric" in verdict.reason


def test_the_verdict_is_a_function_of_the_rows():
    """Fails if the fit or the bootstrap depends on the order of rows or on a global seed."""
    rows = recall()
    assert repr(onset.judge(rows)) == repr(onset.judge(rows.sample(frac=1, random_state=3)))


def test_the_likelihood_of_a_rate_is_scipys():
    """Fails if the beta-binomial's parameters are swapped or its scatter is misplaced."""
    x, y, n = np.log10([10.0, 100.0, 1000.0]), np.array([0.1, 0.5, 0.9]), np.full(3, 50.0)
    curve = fits.Curve("rate", x, y, n)
    u, noise = np.array([[0.0, 0.5, 1.0]]), np.log([[0.02, 0.3]])
    mean = 0.1 + 0.7 * u
    rho = 0.02 + 0.98 * 0.3 * np.array([0.0, 1.0, 0.0])
    a, b = mean[0] * (1 / rho - 1), (1 - mean[0]) * (1 / rho - 1)
    expected = stats.betabinom.logpmf(y * n, 50, a, b) - np.log(special.comb(50, y * n))
    assert fits.loglik_rate(curve, mean, u, noise)[0] == pytest.approx(expected, rel=1e-9)


def test_closed_forms_are_the_best_ends_and_noise():
    """Fails if the weighted squares inside a continuous fit are not its maximum."""
    x, y, n = onset._arrays(planted("smooth", 0)[0].query("metric == 'nll'"))
    curve = fits.Curve("continuous", x, y, n)
    best = fits.fit_all(curve)[0]
    u = {c.name: c for c in fits.candidates(curve)}[best.name].position(best.shape[None], x)

    def total(left, right, s0):
        noise = np.array([[s0, best.noise[1]]])
        return fits.loglik_normal(curve, left + (right - left) * u, u, noise).sum()

    top = total(best.left, best.right, best.noise[0])
    assert top == pytest.approx(best.loglik, rel=1e-9)
    for nudge in (-1e-3, 1e-3):
        assert total(best.left + nudge, best.right, best.noise[0]) < top
        assert total(best.left, best.right + nudge, best.noise[0]) < top
        assert total(best.left, best.right, best.noise[0] * (1 + nudge * 10)) < top
