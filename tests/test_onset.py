"""Verdicts on planted curves and on nulls, and the intervals of planted onsets."""

import numpy as np
import pandas as pd
import pytest
from scipy import special, stats

from lm.config import UserError
from lm.emergence import fits, locate, onset, planted, shapes

SIZES = [400, 784, 1200, 1568, 6208, 24704, 55000]


def table(task, exact, nll=None, chance=0.25, n=1000):
    """Final rows of a ladder from {params: [one value per seed]}."""
    metrics = {"exact_match": exact} | ({"nll": nll} if nll is not None else {})
    return planted.table(metrics, chance=chance, n=n, task=task)


def small(kind, seed, **more):
    """A planted ladder of the least size that still carries a verdict."""
    return planted.plant(kind, seed, **({"sizes": 9, "seeds": 4} | more))


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


def test_a_floor_that_only_thousands_of_items_tell_from_chance_is_a_floor():
    """Three-digit sums as they were measured. Catches a floor that counts what is significant and
    does not matter.
    """
    exact = near([0.008, 0.009, 0.009, 0.008, 0.9, 0.99, 0.99], scatter=0.001)
    rows = table("sums", exact, near([2.0] * 4 + [0.2] * 3), chance=0.0016, n=2000)
    assert onset.judge(rows).verdict == "emergent" and onset.judge(rows).floor_sizes == 4


def test_a_sharp_and_a_wide_curve_meet_at_one_decade():
    """Look-up in a program as it was measured: a lucky seed far below, an unlucky one far above.
    Catches a search that misses, on its side of one decade, what the other has found there: it was
    17 in log-likelihood, and made the curve wide.
    """
    rates = {204: [0.124, 0.131, 0.132, 0.146, 0.172], 404: [0.139, 0.140, 0.145, 0.152, 0.185]}
    rates |= {450: [0.152, 0.160, 0.179, 0.189, 0.192], 792: [0.171, 0.173, 0.184, 0.191, 0.194]}
    rates |= {894: [0.179, 0.182, 0.186, 0.218, 0.857], 1576: [0.166, 0.175, 0.187, 0.193, 0.201]}
    rates |= {3516: [0.175, 0.999, 0.999, 1, 1], 6224: [0.999, 1, 1, 1, 1], 13944: [1.0] * 4}
    rates |= {24736: [1.0] * 4, 37088: [1.0] * 3, 49440: [1.0] * 3}
    curve = onset.rate_curve(table("t", rates, chance=0.2), 0.2)
    found = {(f.name, f.sharp): f for f in fits.fit_all(curve)}
    wide, sharp = found["hinge", False], found["hinge", True]
    assert abs(wide.shape[1]) < 1e-3 and sharp.loglik > wide.loglik - 0.01
    assert all(
        f.shape[1] >= 0 for (_, s), f in found.items() if not s and f.name in shapes.TRANSITIONS
    )


def test_a_rise_in_the_last_step_alone_is_undetermined():
    """Fails if a ladder that ends in the middle of a rise is given a shape."""
    sizes = [*SIZES, 100_000]
    exact = near([0.01, 0.02, 0.03, 0.05, 0.06, 0.2, 0.07, 0.8], scatter=0.005, sizes=sizes)
    exact[24704] = [0.02, 0.52, 0.06]
    nll = near([2.4, 2.3, 2.25, 2.1, 2.0, 1.7, 1.9, 0.3], scatter=0.05, sizes=sizes)
    assert onset.judge(table("addition", exact, nll, chance=0.01)).verdict == "undetermined"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        *[("sharp", "emergent"), ("mirage", "metric-induced"), ("induced", "metric-induced")],
        *[("line", "smooth"), ("flat", "flat"), ("inverse", "inverse")],
    ],
)
def test_what_was_planted_is_found(kind, expected):
    """Catches the loss of any branch of the definition (2 tables each)."""
    assert [onset.judge(small(kind, seed).rows).verdict for seed in (3, 4)] == [expected] * 2


@pytest.mark.parametrize("kind", ["smooth", "line", "power", "flat"])
def test_nulls_are_not_called_emergent(kind):
    """Catches sharpness that is read off the best curve without its rivals (2 tables each)."""
    found = [onset.judge(small(kind, seed, sizes=7, seeds=3).rows).verdict for seed in range(2)]
    assert not {"emergent", "metric-induced"} & set(found)


@pytest.mark.parametrize("split", [False, True])
def test_intervals_cover_planted_onsets(split):
    """Catches an interval that is narrower than its grid, or ignores the gap between sizes."""
    covered = 0
    for seed in range(3):
        plant = small("sharp", seed, split=split)
        shape = onset.describe(onset.rate_curve(exact(plant), 0.25), "exact_match", 1)
        covered += shape.onset_ci.low <= plant.onset <= shape.onset_ci.high
    assert covered >= 2


def exact(plant):
    return plant.rows[plant.rows["metric"] == "exact_match"]


def test_a_step_is_found_and_its_onset_fills_the_gap():
    """Catches a step that is not a candidate, and an interval that is sure of a place in a gap
    where nothing was measured.
    """
    levels = [0.25] * 4 + [0.9] * 3
    shape = onset.judge(table("t", near(levels), near([2.0] * 4 + [0.2] * 3))).exact
    assert shape.best == "step" and shape.word == "sharp"
    assert shape.onset_ci.low < 1568.1 and shape.onset_ci.high > 6207.9
    assert shape.onset_ci.low > 1300 and shape.onset_ci.high < 7500
    assert shape.onset == pytest.approx((1568 * 6208) ** 0.5, rel=1e-6)


def test_a_broken_power_law_is_a_wide_curve():
    """Catches a wide set without it: growth from chance that slows down, which logistics and hinges
    of a decade fit badly.
    """
    x = np.linspace(2.6, 5.6, 10)
    climb = np.where(x < 4.0, 0.9 * (x - 4.0), 0.05 * (x - 4.0))
    p = 0.02 + 0.7 * 10 ** (climb - climb[-1])
    rng = np.random.default_rng(0)
    rate = {round(10**at): rng.binomial(1000, m, 6) / 1000 for at, m in zip(x, p, strict=True)}
    curve = onset.rate_curve(table("t", rate, chance=0.02), 0.02)
    best = fits.fit_all(curve)[0]
    assert (best.name, best.sharp) == ("broken power", False)
    assert fits.mean_at(curve, best, x) == pytest.approx(p, abs=0.02)


def test_every_parameter_is_paid_for():
    """Catches an AICc that counts a fixed end or noise, or forgets the gap of a step."""
    rows = table("t", near([0.25, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7]))
    rate = onset.rate_curve(rows, 0.25)
    loss = fits.Curve("continuous", *onset._arrays(rows))
    paid = [{f.name: f.k for f in fits.fit_all(curve)} for curve in (rate, loss)]
    names = ["constant", "line", "power", "logistic", "hinge", "step", "broken power"]
    assert [paid[0][name] for name in names] == [2, 4, 4, 5, 5, 3, 6]
    assert [paid[1][name] for name in names] == [2, 4, 5, 6, 6, 4, 7]


@pytest.mark.parametrize("kind", ["rate", "continuous"])
def test_wide_power_laws_take_a_decade(kind):
    """Catches a power law, broken or not, that can be as steep as a sharp curve."""
    sizes = np.linspace(2.6, 5.6, 8)
    curve = fits.Curve(kind, sizes, sizes, sizes)
    x = np.linspace(2.6, 5.6, 3001)
    for candidate in shapes.candidates(curve):
        if candidate.name not in ("power", "broken power"):
            continue
        low, high = np.array(candidate.box).T
        steepest = np.where(high < 1, high, 0.5 * (low + high))
        u = candidate.position(steepest[None], x)[0]
        assert u[-1] == pytest.approx(1) and (np.diff(u) >= 0).all()
        width = x[np.searchsorted(u, 0.9)] - x[np.searchsorted(u, 0.1)]
        assert width > 0.95, candidate.name


@pytest.mark.parametrize("kind", ["rate", "continuous"])
def test_resampled_likelihoods_are_those_of_the_seeds(kind):
    """Catches moments of a size, or a shortcut past the hopeless, that give another sum."""
    rng = np.random.default_rng(0)
    x = np.repeat(np.linspace(3, 5, 5), 4)
    curve = fits.Curve(kind, x, rng.integers(0, 51, 20) / 50, np.full(20, 50.0))
    mean, u = rng.uniform(0.1, 0.9, (7, 5)), rng.uniform(0, 1, (7, 5))
    noise = np.array([[-3.0, -1.0]]) if kind == "rate" else np.array([[0.3, 0.5]])
    counts = np.vstack([np.ones(20), locate.resample(x, 6, 0)])
    each = fits.loglik_rate if kind == "rate" else fits.loglik_normal
    wanted = each(curve, mean, u, noise) @ counts.T
    got = fits.resampled(curve, mean, u, noise, counts)
    near_best = wanted[:, 0] > wanted[:, 0].max() - 5
    assert near_best.any()
    assert got[near_best] == pytest.approx(wanted[near_best], rel=1e-9)
    left_off = ~np.isfinite(got)
    assert (wanted[left_off] < wanted.max(0)[np.nonzero(left_off)[1]] - 20).all()


def test_a_left_out_size_is_predicted_from_the_others():
    """Catches a log score that has seen the size it predicts: a constant's is known exactly."""
    rows = small("flat", 0, sizes=6).rows.query("metric == 'nll'")
    x, y, n = onset._arrays(rows)
    curve = fits.Curve("continuous", x, y, n)
    constant = [fit for fit in fits.fit_all(curve) if fit.name == "constant"]
    (score,) = fits.leave_one_size_out(curve, constant).values()
    wanted = sum(
        stats.norm.logpdf(y[x == s], y[x != s].mean(), y[x != s].std()).sum() for s in curve.sizes
    )
    assert score == pytest.approx(wanted, rel=1e-9)


def test_the_true_curve_predicts_best():
    """Catches scores that are mixed up between candidates, or refits that wander off."""
    curve = onset.rate_curve(exact(small("line", 1)), 0.25)
    scores = fits.leave_one_size_out(curve, best=9)
    assert list(scores)[0] == "line" and scores["line"] > max(scores.values()) - 2
    assert scores["line"] > scores["logistic"] + 10 > scores["step"] + 20


def test_controls_and_diverged_replicas_are_not_fitted():
    """Fails if a control, or a replica that diverged after this evaluation, moves the verdict."""
    rows = recall().assign(tokens=0)
    control = rows[rows["params"] == 6208].assign(role="control", point="odd", value=0.2)
    broken = rows[rows["params"] == 55000].assign(value=0.2)
    broken["replica"] += 9
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
        (table("t", near([0.25] * 7)).assign(value=np.nan), "0 sizes finished"),
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


@pytest.mark.parametrize(
    ("chance", "verdict", "said"),
    [(0.0, "emergent", "within a decade"), (1.0, "undetermined", "already scores 1")],
)
def test_a_chance_of_0_or_1_is_defined(chance, verdict, said):
    """Catches a logarithm of 0, and a test that no score could pass taken for a null."""
    rate = near([0.0, 0.0, 0.0, 0.0, 0.9, 1.0, 1.0], scatter=0.0)
    found = onset.judge(table("t", rate, near([2.0] * 4 + [0.2] * 3), chance))
    assert found.verdict == verdict and said in found.reason


def test_rows_that_are_there_twice_count_once():
    """Catches duplicated rows taken for seeds, which would narrow every interval."""
    rows = recall().query("params < 2000")  # too few sizes for a verdict: p and counts are asked
    (twice,), (once,) = onset.verdicts(pd.concat([rows, rows])), onset.verdicts(rows)
    assert repr(twice) == repr(once)


def test_other_prompt_formats_have_no_say():
    """Catches a second format of the prompt taken for more seeds of the first."""
    rows = recall().query("params < 2000")
    (both,) = onset.verdicts(pd.concat([rows, rows.assign(format=1, value=0.2)]))
    assert repr(both) == repr(onset.verdicts(rows)[0])


def test_p_is_corrected_for_every_size_of_every_task():
    """Catches a p of one task alone: an unlucky one of many flat tasks is no ability."""
    short = [400, 1568, 24704, 55000]  # too few for a verdict: only p is asked for
    lucky = table("lucky", {p: [0.26] * 3 for p in short} | {24704: [0.282, 0.28, 0.282]})
    flat = [table(f"flat{i}", {p: [0.25] * 3 for p in short}) for i in range(5)]
    sure = table("sure", {p: [0.25 + 0.7 * (p > 2000)] * 3 for p in short})
    alone = onset.verdicts(lucky)[0]
    found = {v.task: v for v in onset.verdicts(pd.concat([lucky, sure, *flat]))}
    assert alone.p_holm < 0.001 and found["lucky"].p_holm > 5 * alone.p_holm
    assert found["sure"].p_holm < 1e-12 and found["flat0"].p_holm == 1
    assert found["lucky"].p_bh < 0.05 < found["flat0"].p_bh < 1


def test_rows_without_exact_match_are_the_users_mistake():
    """Catches a traceback where a sentence is due."""
    with pytest.raises(UserError, match="evaluate the task first"):
        onset.judge(recall().query("metric == 'nll'"))


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
    x, y, n = onset._arrays(small("line", 0, seeds=5).rows.query("metric == 'nll'"))
    curve = fits.Curve("continuous", x, y, n)
    best = fits.fit_all(curve)[0]
    named = {(c.name, c.sharp): c for c in shapes.candidates(curve)}
    u = named[best.name, best.sharp].position(best.shape[None], curve.sizes)

    def total(left, right, s0):
        noise = np.array([[s0, best.noise[1]]])
        return fits.loglik_normal(curve, left + (right - left) * u, u, noise).sum()

    top = total(best.left, best.right, best.noise[0])
    assert top == pytest.approx(best.loglik, rel=1e-9)
    for nudge in (-1e-3, 1e-3):
        assert total(best.left + nudge, best.right, best.noise[0]) < top
        assert total(best.left, best.right + nudge, best.noise[0]) < top
        assert total(best.left, best.right, best.noise[0] * (1 + nudge * 10)) < top
