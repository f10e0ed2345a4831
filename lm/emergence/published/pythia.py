"""Pythia's checkpoints: a metric that stays at nothing, a loss that does not (Biderman 2023).

LAMBADA's accuracy is zero for the first 512 steps of every size while its perplexity falls
thirtyfold. Against that perplexity all sizes and steps lie on one curve (the view of Du et al.
2024); against tokens they do not. The perplexity is the task's own, so this is an upper bound on
what a pre-training loss can do. MMLU and WSC are the negative controls: no verdict may call them
emergent.
"""

import altair as alt
import numpy as np
import pandas as pd

from lm.emergence import onset
from lm.emergence.published import curves, draw
from lm.emergence.published.files import read
from lm.emergence.published.numbers import (
    Number,
    Result,
    at_least,
    at_most,
    exact,
    share,
    within,
)

ACC, PPL = "lambada_openai_acc", "lambada_openai_ppl"
# Non-embedding parameters: 12 L d^2 + 13 L d + 2 d.
PARAMS = {
    "70m": 18_915_328, "160m": 85_056_000, "410m": 302_311_424, "1b": 805_736_448,
    "1.4b": 1_208_602_624, "2.8b": 2_517_652_480, "6.9b": 6_444_163_072, "12b": 11_327_027_200,
}  # fmt: skip
LAST = 143_000
CONTROLS = {"MMLU, 5-shot": ("mmlu_acc_mean", 0.25, 14_042), "WSC, 5-shot": ("wsc_acc", 0.5, 104)}


def analyse(folder: str | None) -> Result:
    """The numbers and the figure: accuracy against perplexity at every checkpoint of every size."""
    columns = ("model", "shots", "step", ACC, PPL, "mmlu_acc_mean", "wsc_acc")
    frame = read("pythia_v1_evals.csv", columns, folder)
    zero = frame[frame["shots"] == "zero-shot"].sort_values(["model", "step"])
    numbers = [*_lambada(zero), *_collapse(zero), *_break(zero), *_controls(frame)]
    return Result(numbers, _figure(zero))


def _lambada(zero: pd.DataFrame) -> list[Number]:
    early = zero[(zero["step"] >= 1) & (zero["step"] <= 512)]
    at = zero.set_index(["model", "step"])
    small, large = "pythia-1.4b", "pythia-12b"
    return [
        within("accuracy in steps 1 to 512, highest of all", early[ACC].max(), 0, 5e-4),
        exact("the same, 1.4B", early.loc[early["model"] == small, ACC].max(), 0),
        exact("the same, 12B", early.loc[early["model"] == large, ACC].max(), 0),
        share("perplexity of 1.4B at the start *", at.loc[(small, 1), PPL], 3.6e6, 1),
        share("perplexity of 1.4B at step 512 *", at.loc[(small, 512), PPL], 1.07e5, 1),
        share("perplexity of 12B at the start *", at.loc[(large, 1), PPL], 1.2e7, 3),
        share("perplexity of 12B at step 512 *", at.loc[(large, 512), PPL], 1.7e5, 2),
        within("accuracy of 1.4B at step 1000 *", at.loc[(small, 1000), ACC], 0.067, 5e-4),
        within("accuracy of 1.4B at step 3000 *", at.loc[(small, 3000), ACC], 0.324, 5e-4),
        within("accuracy of 1.4B at the end *", at.loc[(small, LAST), ACC], 0.6161, 1e-4),
        within("accuracy of 12B at the end *", at.loc[(large, LAST), ACC], 0.7046, 1e-4),
        within("accuracy of 70M at the end *", at.loc[("pythia-70m", LAST), ACC], 0.1846, 1e-4),
    ]


def _collapse(zero: pd.DataFrame) -> list[Number]:
    """One monotone curve for all models, in ln perplexity and in tokens."""
    from sklearn.isotonic import IsotonicRegression

    x, y = -np.log(zero[PPL].to_numpy()), zero[ACC].to_numpy()
    rest = y - IsotonicRegression().fit(x, y).predict(x)
    left_out = []
    for model in zero["model"].unique():
        mine = (zero["model"] == model).to_numpy()
        curve = IsotonicRegression(out_of_bounds="clip").fit(x[~mine], y[~mine])
        left_out.append(np.sqrt(np.mean((curve.predict(x[mine]) - y[mine]) ** 2)))
    begun = (zero["step"] > 0).to_numpy()  # step 0 has no place on a log axis
    tokens, after = zero["step"].to_numpy()[begun], y[begun]
    other = after - IsotonicRegression().fit(tokens, after).predict(tokens)
    return [
        exact("models and checkpoints *", len(zero), 432),
        at_least("R2 of accuracy on ln perplexity *", 1 - rest.var() / y.var(), 0.9995),
        within("largest residual *", np.abs(rest).max(), 0.018, 5e-4),
        at_most("leave one model out: mean RMSE *", np.mean(left_out), 0.012),
        at_most("leave one model out: worst RMSE *", np.max(left_out), 0.012),
        within("R2 of accuracy on tokens *", 1 - other.var() / after.var(), 0.841, 0.001),
    ]


def _break(zero: pd.DataFrame) -> list[Number]:
    """Where the accuracy of 1.4B breaks, in log10 steps, and which curve it follows."""
    import piecewise_regression

    mine = zero[(zero["model"] == "pythia-1.4b") & (zero["step"] > 0)]
    x, y = np.log10(mine["step"].to_numpy()), mine[ACC].to_numpy()
    # It draws its bootstrap restarts from NumPy's global state, which is put back.
    state = np.random.get_state()
    np.random.seed(0)
    try:
        found = piecewise_regression.Fit(x, y, n_breakpoints=1)
    finally:
        np.random.set_state(state)
    at = found.get_results()["estimates"]["breakpoint1"]
    fits = curves.fit(x, y)
    aicc = {"logistic": -186.1, "hinge": -167.5, "power": -130.6, "line": -115.7}
    return [
        within("breakpoint of 1.4B, log10 steps *", at["estimate"], 2.469, 0.005),
        within("95% interval, low *", at["confidence_interval"][0], 2.18, 0.01),
        within("95% interval, high *", at["confidence_interval"][1], 2.76, 0.01),
        at_most("p of no break (Davies) *", found.davies, 1e-47),
        *[within(f"AICc of a {name} *", fits[name].aicc, v, 0.3) for name, v in aicc.items()],
    ]


def _controls(frame: pd.DataFrame) -> list[Number]:
    """No verdict of emergence on what stays at chance, by the definition of docs/emergence.md."""
    last = frame[(frame["shots"] == "five-shot") & (frame["step"] == LAST)]
    mmlu = last["mmlu_acc_mean"]
    numbers = [
        within("MMLU 5-shot at the end, lowest *", mmlu.min(), 0.247, 5e-4),
        within("MMLU 5-shot at the end, highest *", mmlu.max(), 0.299, 5e-4),
        within("WSC 5-shot at the end, lowest *", last["wsc_acc"].min(), 0.3654, 1e-4),
        within("WSC 5-shot at the end, highest *", last["wsc_acc"].max(), 0.3654, 1e-4),
    ]
    for what, (column, chance, items) in CONTROLS.items():
        verdict = onset.judge(_rows(last, what, column, chance, items))
        numbers.append(exact(f"{what}: called flat *", float(verdict.verdict == "flat"), 1))
    return numbers


def _rows(last: pd.DataFrame, task: str, column: str, chance: float, items: int) -> pd.DataFrame:
    """The end of every model as the rows of a study; the two data sets count as seeds."""
    params = [PARAMS[name.split("-")[1]] for name in last["model"]]
    rows = pd.DataFrame({"params": params, "value": last[column].to_numpy()})
    rows["replica"] = rows.groupby("params").cumcount()
    rows["point"] = rows["params"].astype(str)
    fixed = {"task": task, "level": "", "format": 0, "metric": "exact_match", "status": "ok"}
    fixed |= {"role": "ladder", "study": "pythia"}
    return rows.assign(**fixed, chance=chance, n=items, stderr=np.nan, step=LAST)


def _figure(zero: pd.DataFrame) -> dict:
    sizes = list(PARAMS)
    rows = draw.data(
        ppl=zero[PPL], acc=zero[ACC], size=[name.split("-")[1] for name in zero["model"]]
    )
    legend = alt.Legend(title="parameters", orient="bottom", columns=8, symbolOpacity=1)
    scale = alt.Scale(scheme="viridis", reverse=True, domain=sizes)
    points = alt.Chart(rows).mark_point(filled=True, size=40, opacity=0.8)
    chart = alt.layer(
        points.encode(
            x=draw.log("ppl", "perplexity of the same answers (falls to the right)", reverse=True),
            y=alt.Y("acc:Q", title=None),
            color=alt.Color("size:O", scale=scale, sort=sizes, legend=legend),
        )
    )
    return draw.finish(chart, "Pythia, LAMBADA: accuracy of 16 models at 27 checkpoints each")
