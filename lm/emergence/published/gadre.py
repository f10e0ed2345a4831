"""Over-trained models predicted from small ones (Gadre et al. 2024).

The loss law is fitted to five RedPajama models of up to 0.4B parameters, the error law to six, and
both predict two runs they have not seen: 1.4B parameters at 640 tokens a parameter, and 6.9B at 20.
"""

import altair as alt
import numpy as np
import pandas as pd

from lm.emergence import downstream
from lm.emergence.published import draw
from lm.emergence.published.files import read
from lm.emergence.published.numbers import Number, Result, share, within

COLUMNS = ("name", "train_dataset", "params", "chinchilla_multiplier", "loss_c4_val", "err_avg17")
FIT = ("rpj-d=96_l=8_h=4-1.0", "rpj-d=512_l=8_h=4-1.0", "rpj-d=576_l=24_h=8-1.0",
       "rpj-d=1024_l=24_h=8-1.0", "rpj-d=96_l=8_h=4-16.0")  # fmt: skip
FIT_ERROR = (*FIT, "rpj-open_lm_1b-1.0")
# name -> what it is, and the relative errors printed for its loss and its error, in per cent
HELD_OUT = {
    "rpj-open_lm_1b-32.0": ("1.4B, M = 640", 0.7103, 3.6365),
    "rpj-open_lm_7b-1.0": ("6.9B, M = 20", 0.7320, 0.0464),
}


def analyse(folder: str | None) -> Result:
    """The numbers and the figure: error against loss, fitted and held out."""
    frame = read("gadre_overtraining.csv", COLUMNS, folder).set_index("name")
    frame = frame.assign(ratio=20 * frame["chinchilla_multiplier"])
    small, six = frame.loc[list(FIT)], frame.loc[list(FIT_ERROR)]
    loss = downstream.fit_overtraining(*(small[c].to_numpy() for c in
                                         ("params", "ratio", "loss_c4_val")))  # fmt: skip
    error = downstream.fit_error(six["loss_c4_val"].to_numpy(), six["err_avg17"].to_numpy())
    numbers = _constants(loss, error)
    for name, (what, of_loss, of_error) in HELD_OUT.items():
        run = frame.loc[name]
        predicted = loss.at(run["params"], run["ratio"])
        ours = _relative(predicted, run["loss_c4_val"])
        numbers.append(within(f"{what}: error of the loss, %", ours, of_loss, 0.01))
        ours = _relative(error.at(predicted), run["err_avg17"])
        numbers.append(within(f"{what}: error of the 17-task error, %", ours, of_error, 0.01))
    return Result(numbers, _figure(frame, loss, error))


def _relative(predicted: np.ndarray, measured: float) -> float:
    return 100 * abs(float(predicted) - measured) / measured


def _constants(loss: downstream.OverTraining, error: downstream.ErrorLaw) -> list[Number]:
    return [
        share("loss law: alpha *", loss.alpha, 166.21, 0.1),
        share("loss law: beta *", loss.beta, 366.69, 0.1),
        within("loss law: b *", loss.exponent, -0.27285, 1e-4),
        within("loss law: E *", loss.e, 1.83665, 1e-4),
        share("error law: k *", error.k, 2.2065, 0.1),
        within("error law: gamma *", error.gamma, 0.71459, 1e-4),
        within("error law: eps *", error.eps, 0.85699, 1e-4),
    ]


def _figure(frame: pd.DataFrame, loss: downstream.OverTraining, error: downstream.ErrorLaw) -> dict:
    runs = frame[frame["train_dataset"] == "rpj"]
    names = ["fitted", "not fitted", "predicted beforehand"]
    which = [names[0] if n in FIT_ERROR else names[2] if n in HELD_OUT else names[1] for n in
             runs.index]  # fmt: skip
    points = draw.data(loss=runs["loss_c4_val"], error=runs["err_avg17"], which=which)
    held = runs.loc[list(HELD_OUT)]
    ahead = loss.at(held["params"].to_numpy(), held["ratio"].to_numpy())
    crosses = draw.data(loss=ahead, error=error.at(ahead))
    at = np.linspace(runs["loss_c4_val"].min(), runs["loss_c4_val"].max(), 100)
    x = alt.X(
        "loss:Q", title="loss on C4, nats per token", scale=alt.Scale(zero=False, reverse=True)
    )
    y = alt.Y("error:Q", title=None, scale=alt.Scale(zero=False))
    colour = draw.colours("which", names, [draw.BLUE, draw.GREY, draw.ORANGE])
    curve = alt.Chart(draw.data(loss=at, error=error.at(at))).mark_line(color=draw.BLUE)
    chart = alt.layer(
        curve.encode(x=x, y=y),
        alt.Chart(points).mark_point(filled=True, size=45, opacity=0.85).encode(
            x=x, y=y, color=colour
        ),
        alt.Chart(crosses).mark_point(shape="cross", size=90, color=draw.ORANGE).encode(x=x, y=y),
    )  # fmt: skip
    return draw.finish(chart, "Gadre et al.: 17-task error against loss; crosses are predictions")
