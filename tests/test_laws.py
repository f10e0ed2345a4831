"""Scaling laws, isoFLOP valleys and downstream laws with planted truth."""

import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize

from lm.config import UserError
from lm.emergence import downstream, isoflop, kaplan, laws

TRUTH = laws.Chinchilla(400.0, 1200.0, 1.8, 0.34, 0.36)
RNG = np.random.default_rng(0)


def planted(noise=0.005, sizes=9, ratios=8, seed=0, truth=TRUTH):
    """Runs of a grid of sizes and tokens per parameter: (params, tokens, loss)."""
    rng = np.random.default_rng(seed)
    params = np.repeat(np.geomspace(3e7, 1e10, sizes), ratios)
    tokens = params * np.tile(np.geomspace(0.5, 300, ratios), sizes)
    return params, tokens, truth.at(params, tokens) * np.exp(rng.normal(0, noise, len(params)))


@pytest.fixture(scope="module")
def fitted():
    """A fit with 300 resamples, shared by what only reads it."""
    runs = planted()
    law = laws.fit_chinchilla(*runs)
    return runs, law, laws.bootstrap(law, *runs, resamples=300)


def test_a_planted_law_is_found(fitted):
    """Catches an optimiser that stops early, and exponents or amplitudes that are swapped."""
    _, law, _ = fitted
    assert law.alpha == pytest.approx(0.34, abs=0.03)
    assert law.beta == pytest.approx(0.36, abs=0.03)
    assert law.e == pytest.approx(1.8, abs=0.05)
    assert law.exponent == pytest.approx(0.36 / 0.70, abs=0.03)


def test_without_noise_the_law_is_exact():
    """Catches a wrong gradient or Hessian: the optimum is then near, and not at, the truth."""
    law = laws.fit_chinchilla(*planted(noise=0.0))
    assert law.a == pytest.approx(400, rel=1e-3)
    assert law.b == pytest.approx(1200, rel=1e-3)
    assert (law.e, law.alpha, law.beta) == pytest.approx((1.8, 0.34, 0.36), abs=1e-4)


def test_gradient_and_hessian_against_differences():
    """Catches a wrong sign in one of the fifteen sums of the Hessian."""
    runs = laws._runs(*planted())
    theta = np.array([[-1.0, -0.8, 0.6, 0.3, 0.4]])
    weight = RNG.random((1, len(runs.y)))
    _, slope, curve = laws._expand(theta, runs, 0.05, weight)
    for i in range(5):
        nudge = np.zeros((1, 5))
        nudge[0, i] = 1e-6
        up, down = (laws._expand(theta + s * nudge, runs, 0.05, weight) for s in (1, -1))
        assert (up[0] - down[0]) / 2e-6 == pytest.approx(slope[:, i], rel=1e-4)
        assert (up[1] - down[1]) / 2e-6 == pytest.approx(curve[:, i], rel=1e-3, abs=1e-3)


def test_resamples_reach_their_own_optimum(fitted):
    """Catches a batched descent that gives up: SciPy from three starts finds nothing lower."""
    runs = laws._runs(*fitted[0])
    start = laws._theta(fitted[1], runs)
    weight = RNG.multinomial(len(runs.y), np.full(len(runs.y), 1 / len(runs.y)), 4).astype(float)
    theta = np.tile(start, (4, 1))
    for delta in (1e-2, 3e-3, 1e-3):
        theta = laws._descend(theta, runs, delta, weight, steps=60)
    values = laws._expand(theta, runs, 1e-3, weight)[0]
    for i in range(4):

        def cost(point, w=weight[i : i + 1]):
            value, slope, _ = laws._expand(point[None], runs, 1e-3, w)
            return 1e6 * value[0], 1e6 * slope[0]

        for shift in (0.0, 0.05, -0.05):
            found = minimize(
                cost, start + shift, jac=True, method="L-BFGS-B", options={"ftol": 1e-15}
            )
            assert values[i] * 1e6 <= found.fun * (1 + 1e-9)


def test_the_intervals_hold_the_truth(fitted):
    """Catches draws in other units than the law, and resamples without their weights."""
    _, law, draws = fitted
    spread = laws.spread(draws)
    for name in ("a", "b", "e", "alpha", "beta", "exponent"):
        low, high = spread.ci95[name]
        assert low < getattr(law, name) < high
        assert low < getattr(TRUTH, name) < high
    assert 0.003 < spread.se["alpha"] < 0.05


def test_the_sandwich_agrees_with_the_bootstrap(fitted):
    """Catches a delta method that forgets that A and alpha move together."""
    runs, law, draws = fitted
    quick, slow = laws.standard_errors(law, *runs), laws.spread(draws).se
    for name, value in quick.items():
        assert 0.4 < value / slow[name] < 2.5


def test_the_likelihood_accepts_the_truth_and_rejects_another():
    """Catches a test that rejects always or never, and a scale that is not refitted."""
    runs = planted()
    fit = laws.fit_likelihood(*runs)
    assert laws.likelihood_ratio(TRUTH, fit, *runs).p > 0.01
    other = laws.Chinchilla(400.0, 1200.0, 1.7, 0.34, 0.36)
    assert laws.likelihood_ratio(other, fit, *runs).p < 1e-6
    assert laws.likelihood_ratio(fit.law, fit, *runs).statistic == pytest.approx(0, abs=1e-3)


def test_an_averaged_loss_traps_a_default_optimiser():
    """Catches the loss of the sum or of its scale: the published trap (see the module of laws).

    From a wrong start the averaged loss stops at once, and our fit finds the truth.
    """
    runs = planted()
    wrong = laws.Chinchilla(406.4, 410.7, 1.693, 0.339, 0.2849)

    def averaged(theta):
        law = laws.Chinchilla(*np.exp(theta[:3]), *theta[3:])
        return laws.huber(law, *runs) / len(runs[2])

    start = [*np.log([wrong.a, wrong.b, wrong.e]), wrong.alpha, wrong.beta]
    stuck = minimize(averaged, start, method="L-BFGS-B").x
    assert abs(stuck[4] - 0.36) > 0.05
    assert laws.fit_chinchilla(*runs).beta == pytest.approx(0.36, abs=0.03)


def test_the_optimum_is_where_the_loss_is_least():
    """Catches a wrong G or exponent: on 6 N D = C no other size has a lower loss."""
    best = TRUTH.optimal(1e21)
    assert 6 * best.params * best.tokens == pytest.approx(1e21)
    assert best.ratio == pytest.approx(best.tokens / best.params)
    around = best.params * np.array([0.9, 1.0, 1.1])
    losses = TRUTH.at(around, 1e21 / 6 / around)
    assert losses.argmin() == 1
    assert np.isnan(laws.Chinchilla(400.0, 1200.0, 1.8, 0.34, -0.01).optimal(1e21)).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda n, d, y: (n[:6], d[:6], y[:6]), "has 6 runs; give 7"),
        (lambda n, d, y: (n * 0 + 1e8, d, y), "same parameters"),
        (lambda n, d, y: (n, d * 0 + 1e9, y), "same tokens"),
        (lambda n, d, y: (n, d, y * 0 + 3), "same loss"),
        (lambda n, d, y: (n, d, np.where(n > 1e9, np.nan, y)), "loss holds nan"),
        (lambda n, d, y: (n, d, y - 5), "loss holds -"),
        (lambda n, d, y: (n, d[:-1], y), "differ in number"),
    ],
)
def test_what_no_law_can_be_fitted_to(change, says):
    """Catches a traceback or a NumPy warning in place of one sentence."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match=says):
            laws.fit_chinchilla(*change(*planted()))


@pytest.mark.parametrize(
    ("form", "constants"),
    [
        ("L(N)", {"xc": 8.8e13, "alpha": 0.076}),
        ("L(D)", {"xc": 5.4e13, "alpha": 0.095}),
        ("L(N,D)", {"nc": 6.4e13, "alpha_n": 0.076, "dc": 1.8e13, "alpha_d": 0.103}),
        ("L(N,S)", {"nc": 6.5e13, "alpha_n": 0.077, "sc": 2.1e3, "alpha_s": 0.76}),
    ],
)
def test_kaplan_forms_are_found(form, constants):
    """Catches a form whose fit and prediction differ, or that finds a local optimum."""
    first = np.repeat(np.geomspace(1e5, 1e9, 7), 5)
    second = np.tile(
        np.geomspace(1e3, 1e5, 5) if form == "L(N,S)" else np.geomspace(1e7, 1e10, 5), 7
    )
    size = (first, second) if "," in form else (first,)
    loss = kaplan.predict(form, constants, *size) * np.exp(RNG.normal(0, 1e-3, len(first)))
    found = kaplan.fit(form, loss, *size)
    for name, value in constants.items():
        tolerance = 0.02 if name.startswith("alpha") else 0.2
        assert found[name] == pytest.approx(value, rel=tolerance)
    with pytest.raises(UserError, match="constants"):
        kaplan.fit(form, loss[:2], *(s[:2] for s in size))
    with pytest.raises(UserError, match="same loss"):
        kaplan.fit(form, 0 * loss + 3, *size)
    with pytest.raises(UserError, match="loss holds 0"):
        kaplan.fit(form, 0 * loss, *size)


def test_kaplan_constants_agree_with_the_printed_scales():
    """Catches a mistyped constant. The D row of the table that prints 20.81 does not follow from
    the paper's own constants, which give 20.16."""
    scale = {name: c**a for name, (c, a) in kaplan.CONSTANTS.items()}
    assert scale["N"] == pytest.approx(11.48, abs=0.01)
    pf_day = 1e15 * 86_400
    assert scale["C"] * pf_day**0.05 == pytest.approx(26.38, abs=0.02)
    assert scale["D"] == pytest.approx(20.16, abs=0.01)


def valleys(noise=0.004, seeds=1, levels=5, seed=0):
    """An isoFLOP study of `TRUTH`; embeddings add a tenth of the smallest size's parameters."""
    rng = np.random.default_rng(seed)
    rows = []
    for flops in np.geomspace(1e18, 1e21, levels):
        for step in np.linspace(-1.2, 1.2, 7):
            params = TRUTH.optimal(flops).params * np.exp(step)
            for _ in range(seeds):
                loss = TRUTH.at(params, flops / 6 / params) * np.exp(rng.normal(0, noise))
                # Token counts are whole batches, so the budget is met to a few per cent.
                budget = flops * np.exp(rng.uniform(-0.02, 0.02))
                rows.append((params, params + 8e7 * (params / 1e8) ** 0.33, budget, loss))
    return pd.DataFrame(rows, columns=["params", "params_total", "flops", "value"])


def test_valleys_give_the_planted_exponent_under_both_counts():
    """Catches swapped counts: with embeddings the small sizes are larger, so a is smaller."""
    found = isoflop.study(valleys())
    plain, total = found["params"], found["params_total"]
    assert plain.value == pytest.approx(TRUTH.exponent, abs=0.03)
    assert plain.ci95.low < TRUTH.exponent < plain.ci95.high
    assert total.value < plain.value
    assert (plain.levels, plain.left_out) == (5, 0)
    assert float(plain.at(1e20)) == pytest.approx(TRUTH.optimal(1e20).params, rel=0.15)


def test_valley_intervals_cover_at_about_their_level():
    """Catches a bootstrap that is too sure of a valley's end points (24 studies of two seeds)."""
    covered = 0
    for seed in range(24):
        ends = isoflop.study(valleys(0.01, 2, 5, seed))["params"].ci95
        covered += ends.low <= TRUTH.exponent <= ends.high
    assert covered >= 20


def test_a_level_without_a_valley_is_left_out():
    """Catches a minimum outside the sizes, or of a parabola that opens downward, in the fit."""
    frame = valleys()
    lowest = frame["flops"] < 2e18
    frame.loc[lowest, "value"] = 3 - 0.1 * np.log(frame.loc[lowest, "params"])
    found = isoflop.study(frame)["params"]
    assert (found.levels, found.left_out) == (4, 1)
    assert [v.inside for v in found.valleys] == [False, True, True, True, True]
    bare = valleys(noise=0.0)
    bare = isoflop.study(bare[np.isin(np.arange(len(bare)) % 7, (2, 3, 4))])["params"]
    assert bare.value == pytest.approx(TRUTH.exponent, abs=0.03)
    assert np.isnan(bare.ci95.low)
    with pytest.raises(UserError, match="valley inside"):
        isoflop.study(frame[frame["flops"] < 1e19])
    with pytest.raises(UserError, match="no column 'params_total'"):
        isoflop.study(frame.drop(columns="params_total"))
    with pytest.raises(UserError, match="without a gap"):
        isoflop.study(frame.assign(flops=np.geomspace(1e18, 1e20, len(frame))))


def test_the_envelope_gives_the_planted_exponent():
    """Catches an envelope that counts budgets where the best size is the smallest or largest."""
    names, params, tokens = [], [], []
    for i, size in enumerate(np.geomspace(1e7, 3e9, 18)):
        names += [i] * 40
        params += [size] * 40
        tokens += list(size * np.geomspace(0.5, 200, 40))
    n, d = np.array(params), np.array(tokens)
    found = isoflop.fit_envelope(np.array(names), n, 6 * n * d, TRUTH.at(n, d))
    assert found.value == pytest.approx(TRUTH.exponent, abs=0.03)
    assert found.ci95.low < TRUTH.exponent < found.ci95.high
    few = n < 2e7
    with pytest.raises(UserError, match="sizes; it takes"):
        isoflop.fit_envelope(np.array(names)[few], n[few], (6 * n * d)[few], d[few])


def test_the_over_training_law_is_found_from_five_runs():
    """Catches a factor 6^(b/2) that is lost, or put on the wrong term."""
    truth = downstream.OverTraining(166.0, 367.0, -0.273, 1.837)
    params = np.array([1e7, 8e7, 1.5e8, 4e8, 1e7])
    ratio = np.array([20.0, 20, 20, 20, 320])
    found = downstream.fit_overtraining(params, ratio, truth.at(params, ratio))
    assert found.exponent == pytest.approx(-0.273, abs=1e-4)
    assert (found.alpha, found.beta, found.e) == pytest.approx((166, 367, 1.837), rel=1e-3)
    assert float(found.at(7e9, 640)) == pytest.approx(float(truth.at(7e9, 640)), rel=1e-4)
    with pytest.raises(UserError, match="same parameters|all runs have"):
        downstream.fit_overtraining(params * 0 + 1e8, ratio, ratio)
    with pytest.raises(UserError, match="3 runs"):
        downstream.fit_overtraining(params[:3], ratio[:3], ratio[:3])


def test_the_error_law_is_found():
    """Catches a decay that grows, and an intercept away from chance."""
    truth = downstream.ErrorLaw(0.857, 2.2, 0.71)
    loss = np.linspace(2.4, 5.5, 12)
    found = downstream.fit_error(loss, truth.at(loss) + RNG.normal(0, 1e-4, 12))
    assert (found.eps, found.gamma) == pytest.approx((0.857, 0.71), rel=0.02)
    assert found.at(loss) == pytest.approx(truth.at(loss), abs=1e-3)
    with pytest.raises(UserError, match="all runs have the loss 3"):
        downstream.fit_error(loss * 0 + 3, loss)
    with pytest.raises(UserError, match="error holds nan"):
        downstream.fit_error(loss, loss * np.nan)
