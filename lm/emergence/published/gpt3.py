"""Arithmetic of GPT-3 by size (Brown et al. 2020, table H.1): a jump that eight points can show,
and shapes that eight points cannot decide.

Linearity L and breakthroughness B are BIG-bench's (`lm.emergence.screening`). B swings from 13 to
305 for one task by the number of examples in the prompt: a statistic to screen with, no evidence.
"""

import altair as alt
import numpy as np
import pandas as pd

from lm.emergence.published import curves, draw
from lm.emergence.published.files import read
from lm.emergence.published.numbers import Number, Result, at_least, at_most, within
from lm.emergence.screening import breakthroughness, linearity

# (task, setting in the file) -> what to call it, L, B
SCREENING = {
    ("2D+", "zero-shot"): ("2-digit addition, zero-shot", 3.21, 305.0),
    ("2D+", "one-shot"): ("2-digit addition, one-shot", 4.31, 13.21),
    ("2D+", "few-shot(K=50)"): ("2-digit addition, few-shot", 4.14, 32.67),
    ("symbol insertion", "zero-shot"): ("symbol insertion, zero-shot", 2.95, 82.6),
    ("symbol insertion", "one-shot"): ("symbol insertion, one-shot", 3.08, 74.4),
    ("symbol insertion", "few-shot(K=100)"): ("symbol insertion, few-shot", 4.08, 27.6),
}
ZERO, ONE, FEW = list(SCREENING)[:3]


def analyse(folder: str | None) -> Result:
    """The numbers and the figure: accuracy by size and shots with the best curve of each."""
    frame = read("gpt3_tableH1_subset.csv", ("task", "setting", "params", "acc_pct"), folder)
    tables = {key: group.sort_values("params") for key, group in frame.groupby(["task", "setting"])}
    numbers = []
    for key, (what, linear, breakthrough) in SCREENING.items():
        scores = tables[key]["acc_pct"].to_numpy()
        numbers.append(within(f"{what}: L *", float(linearity(scores)), linear, 0.01))
        ours = float(breakthroughness(scores))
        numbers.append(within(f"{what}: B *", ours, breakthrough, 0.05))
    fits = {key: _fits(tables[key]) for key in (ZERO, ONE, FEW)}
    return Result([*numbers, *_shapes(fits)], _figure(tables, fits))


def _fits(table: pd.DataFrame) -> dict[str, curves.Curve]:
    return curves.fit(np.log10(table["params"].to_numpy()), table["acc_pct"].to_numpy() / 100)


def _shapes(fits: dict[tuple[str, str], dict[str, curves.Curve]]) -> list[Number]:
    """AICc of the shapes; 6 is the least difference that decides."""
    zero, one, few = (fits[key] for key in (ZERO, ONE, FEW))
    gap = abs(few["logistic"].aicc - few["power"].aicc)
    return [
        within("zero-shot: AICc of a logistic *", zero["logistic"].aicc, -69.3, 0.3),
        within("zero-shot: AICc of a hinge *", zero["hinge"].aicc, -61.0, 0.3),
        within("zero-shot: AICc of a power law *", zero["power"].aicc, -48.1, 0.3),
        at_least(
            "zero-shot: power law above logistic *", zero["power"].aicc - zero["logistic"].aicc, 6
        ),
        within("few-shot: AICc of a logistic *", few["logistic"].aicc, -24.6, 0.3),
        within("few-shot: AICc of a power law *", few["power"].aicc, -24.5, 0.3),
        at_most("few-shot: logistic and power apart *", gap, 6),
        at_most(
            "one-shot: power law below logistic *", one["power"].aicc - one["logistic"].aicc, 0
        ),
    ]


def _figure(
    tables: dict[tuple[str, str], pd.DataFrame],
    fits: dict[tuple[str, str], dict[str, curves.Curve]],
) -> dict:
    names = ["zero-shot", "one-shot", "few-shot"]
    keys = dict(zip(names, (ZERO, ONE, FEW), strict=True))
    points = pd.concat([tables[key].assign(which=name) for name, key in keys.items()])
    size = np.geomspace(1e8, 2e11, 80)
    best = {name: next(iter(fits[key].values())) for name, key in keys.items()}
    lines = draw.data(
        params=np.tile(size, 3),
        acc=np.concatenate([100 * best[name].at(np.log10(size)) for name in names]),
        which=np.repeat(names, len(size)),
    )
    dots = draw.data(params=points["params"], acc=points["acc_pct"], which=points["which"])
    x, y = draw.log("params", "parameters"), alt.Y("acc:Q", title=None)
    colour = draw.colours("which", names, [draw.BLUE, draw.ORANGE, draw.GREEN])
    chart = alt.layer(
        alt.Chart(lines).mark_line(strokeWidth=1.2, clip=True).encode(x=x, y=y, color=colour),
        alt.Chart(dots)
        .mark_point(filled=True, size=55, opacity=0.9)
        .encode(x=x, y=y, color=colour),
    )
    return draw.finish(chart, "GPT-3, 2-digit addition: accuracy in %, with the best shape by AICc")
