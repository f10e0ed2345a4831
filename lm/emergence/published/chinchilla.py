"""Chinchilla from the points of its figure 4 (Besiroglu et al. 2024; Hoffmann et al. 2022).

245 runs read off a vector graphic by Epoch; the five of highest loss are left out, as there. The
fit by summed Huber loss, the likelihood, the test of Hoffmann's parameters, the trap that made
them, and what three ways of counting parameters change (Schaeffer et al. 2026).
"""

import altair as alt
import numpy as np
import pandas as pd
from scipy.optimize import minimize

from lm.emergence import laws
from lm.emergence.laws import Chinchilla
from lm.emergence.published import draw
from lm.emergence.published.files import read
from lm.emergence.published.numbers import Number, Result, at_least, at_most, share, within

# Hoffmann's fit as it stands in their source, from which the printed one was rounded.
HOFFMANN = Chinchilla(float(np.exp(6.0073404)), float(np.exp(6.0179186)), float(np.exp(0.5267228)),
                      0.33917084, 0.2849083)  # fmt: skip
ALL_POINTS = Chinchilla(float(np.exp(6.28204169)), float(np.exp(9.51269708)),
                        float(np.exp(0.63748901)), 0.35286066, 0.45596155)  # fmt: skip
BUDGET = 5.88e23  # FLOPs of Chinchilla itself
OUTLIERS = 5
RESAMPLES = 10_000  # the standard error of B has a heavy tail: 4000 leave 5% of chance in it
NAMES = ("a", "b", "e", "alpha", "beta")
LABELS = {"a": "A", "b": "B", "e": "E", "alpha": "alpha", "beta": "beta"}
CONVENTIONS = {
    "reported": ("Reported Parameters (M)", 0.34405, 0.36413),
    "best formula": (
        "Tied (Un)Embed, No Gating, Best Fit Attn Params Prefactor",
        0.34186,
        0.35869,
    ),
    "standard formula": ("Tied (Un)Embed, No Gating", 0.35026, 0.35820),
}


def analyse(folder: str | None, resamples: int = RESAMPLES) -> Result:
    """The numbers and the figure: tokens per parameter against the budget."""
    frame = read("chinchilla_epoch_svg.csv", ("Model Size", "Training FLOP", "loss"), folder)
    counts = [column for column, _, _ in CONVENTIONS.values()]
    sizes = read("chinchilla_model_parameters.csv", tuple(counts), folder)
    frame = frame.sort_values("loss").reset_index(drop=True)
    runs, every = columns(frame[:-OUTLIERS]), columns(frame)
    law, likely = laws.fit_chinchilla(*runs), laws.fit_likelihood(*runs)
    draws = laws.bootstrap(law, *runs, resamples=resamples)
    numbers = [
        *_point(law, runs),
        *_likelihood(likely, runs),
        *_spread(laws.spread(draws)),
        *_outliers(law, every),
        within("tokens per parameter at 5.88e23 FLOP *", law.optimal(BUDGET).ratio, 17.9, 0.5),
        within("the same, Hoffmann unrounded *", HOFFMANN.optimal(BUDGET).ratio, 59, 1),
        within("the same, Hoffmann's G and a = 0.4545", _shares(0.4545), 72.87, 1),
        *_conventions(frame[:-OUTLIERS], sizes),
        *trap(runs),
    ]
    return Result(numbers, _figure(law, draws))


def columns(frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parameters, tokens (C = 6 N D) and losses of the runs."""
    params = frame["Model Size"].to_numpy()
    return params, frame["Training FLOP"].to_numpy() / 6 / params, frame["loss"].to_numpy()


def trap(runs: tuple[np.ndarray, np.ndarray, np.ndarray]) -> list[Number]:
    """The averaged Huber loss under a default L-BFGS-B, from Hoffmann's fit: it stays there."""
    params, tokens, loss = runs

    def averaged(theta: np.ndarray) -> float:
        law = Chinchilla(*np.exp(theta[:3]), *theta[3:])
        return laws.huber(law, params, tokens, loss) / len(loss)

    start = [*np.log([HOFFMANN.a, HOFFMANN.b, HOFFMANN.e]), HOFFMANN.alpha, HOFFMANN.beta]
    found = minimize(averaged, start, method="L-BFGS-B")
    return [
        at_most("averaged loss, default optimiser: iterations *", found.nit, 2),
        within("averaged loss: alpha where it stops *", found.x[3], 0.3390, 5e-4),
        within("averaged loss: beta where it stops *", found.x[4], 0.2847, 5e-4),
    ]


def _point(law: Chinchilla, runs: tuple[np.ndarray, np.ndarray, np.ndarray]) -> list[Number]:
    return [
        at_most("summed Huber loss", laws.huber(law, *runs), 0.00101828),
        share("A", law.a, 477.84, 1),
        share("B", law.b, 2143.86, 1),
        within("E", law.e, 1.8172, 5e-4),
        within("alpha", law.alpha, 0.34731, 5e-4),
        within("beta", law.beta, 0.36718, 5e-4),
        within("a = beta/(alpha+beta)", law.exponent, 0.512, 0.003),
    ]


def _likelihood(
    fit: laws.LikelihoodFit, runs: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> list[Number]:
    test = laws.likelihood_ratio(HOFFMANN, fit, *runs)
    return [
        share("likelihood: A", fit.law.a, 482.01, 0.5),
        share("likelihood: B", fit.law.b, 2085.43, 0.5),
        within("likelihood: E", fit.law.e, 1.8169, 5e-4),
        within("likelihood: alpha", fit.law.alpha, 0.3478, 5e-4),
        within("likelihood: beta", fit.law.beta, 0.3659, 5e-4),
        within("log-likelihood", fit.loglik, 879.77, 0.01),
        within("log-likelihood of Hoffmann's", fit.loglik - test.statistic / 2, 837.78, 0.01),
        within("likelihood ratio of Hoffmann's, chi2(5)", test.statistic, 84.00, 0.01),
        share("p of Hoffmann's", test.p, 1.22e-16, 1),
    ]


def _spread(spread: laws.Spread) -> list[Number]:
    errors = {"a": 124.52, "b": 1293.28, "e": 0.02566, "alpha": 0.01540, "beta": 0.02060}
    numbers = [share(f"standard error of {LABELS[k]}", spread.se[k], v, 10)
               for k, v in errors.items()]  # fmt: skip
    numbers.append(share("standard error of a", spread.se["exponent"], 0.020, 10))
    ends = {
        "a": (285.214, 743.626), "b": (1042.357, 5810.344), "e": (1.769, 1.871),
        "alpha": (0.317, 0.373), "beta": (0.331, 0.415),
    }  # fmt: skip
    for name, pair in ends.items():
        for side, ours, published in zip(("low", "high"), spread.ci95[name], pair, strict=True):
            what = f"95% interval of {LABELS[name]}, {side}"
            if name in "ab":
                numbers.append(share(what, ours, published, 8))
            else:
                numbers.append(within(what, ours, published, 0.003 if name == "e" else 0.006))
    low, high = spread.ci95["exponent"]
    return [
        *numbers,
        within("95% interval of a, low *", low, 0.481, 0.006),
        within("95% interval of a, high *", high, 0.557, 0.006),
    ]


def _shares(exponent: float) -> float:
    """D*/N* at `BUDGET` with Hoffmann's G and an exponent of its own, as Epoch computes it."""
    g = HOFFMANN.optimal(6.0).params  # N* at C = 6 is G
    params = g * (BUDGET / 6) ** exponent
    return BUDGET / 6 / params**2


def _outliers(law: Chinchilla, every: tuple[np.ndarray, np.ndarray, np.ndarray]) -> list[Number]:
    """All 245 runs. The fit printed for them is no optimum: ours has the lower loss."""
    whole = laws.fit_chinchilla(*every)
    ratio = laws.huber(ALL_POINTS, *every) / laws.huber(whole, *every)
    return [
        within("245 runs: alpha *", whole.alpha, 0.3493, 5e-4),
        within("245 runs: beta *", whole.beta, 0.4530, 5e-4),
        within("245 runs: E *", whole.e, 1.891, 5e-4),
        share("245 runs: B *", whole.b, 12_800, 1),
        within("245 runs: change of beta *", whole.beta - law.beta, 0.087, 0.003),
        at_least("245 runs: printed fit's loss over ours *", ratio, 1),
    ]


def _conventions(frame: pd.DataFrame, sizes: pd.DataFrame) -> list[Number]:
    """The likelihood fit with the parameters counted in three ways, the tokens as read."""
    frame = frame.assign(rounded=(frame["Model Size"] / 1e6).round())
    joined = frame.merge(sizes, left_on="rounded", right_on="Reported Parameters (M)")
    tokens = joined["Training FLOP"] / 6 / joined["Model Size"]
    numbers = []
    for name, (column, alpha, beta) in CONVENTIONS.items():
        params = 1e6 * joined[column].to_numpy(np.float64)
        law = laws.fit_likelihood(params, tokens.to_numpy(), joined["loss"].to_numpy()).law
        numbers += [
            within(f"parameters as {name}: alpha", law.alpha, alpha, 5e-4),
            within(f"parameters as {name}: beta", law.beta, beta, 5e-4),
        ]
    return numbers


def _figure(law: Chinchilla, draws: np.ndarray) -> dict:
    flops = np.geomspace(1e18, 1e26, 60)
    ratios = [np.array([Chinchilla(*d).optimal(c).ratio for d in draws[:1000]]) for c in flops]
    band = np.array([np.quantile(r, [0.025, 0.975]) for r in ratios])
    names = ["this fit, 95% interval", "Hoffmann et al., unrounded", "20 tokens per parameter"]
    lines = [law.optimal(c).ratio for c in flops], [HOFFMANN.optimal(c).ratio for c in flops]
    y = alt.Scale(type="log", nice=False)
    x = draw.log("flops", "training FLOPs")
    area = alt.Chart(draw.data(flops=flops, low=band[:, 0], high=band[:, 1]))
    curves = draw.data(
        flops=np.tile(flops, 3),
        ratio=[*lines[0], *lines[1], *np.full(len(flops), 20.0)],
        which=np.repeat(names, len(flops)),
    )
    colour = draw.colours("which", names, [draw.BLUE, draw.ORANGE, draw.GREY])
    chart = alt.layer(
        area.mark_area(color=draw.BLUE, opacity=0.18).encode(
            x=x, y=alt.Y("low:Q", scale=y, title=None), y2="high:Q"
        ),
        alt.Chart(curves)
        .mark_line(strokeWidth=1.5)
        .encode(x=x, y=alt.Y("ratio:Q", scale=y, title=None), color=colour),
    )
    return draw.finish(chart, "Chinchilla: compute-optimal tokens per parameter")
