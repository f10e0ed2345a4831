"""Easy and hard questions of one task scale in opposite ways (Wu & Lo 2025).

Arithmetic questions in ten groups of rising difficulty, scored by the Brier loss over the choices.
Before the printed threshold of 10^22.8 FLOPs the loss of the easiest group bends upward in log
FLOPs and that of the hardest downward: performance is an inverted U and a U, which offset each
other in the mean. Models that the authors hold to be over-trained are left out, as there.
"""

import altair as alt
import numpy as np
import pandas as pd

from lm.emergence.published import draw
from lm.emergence.published.files import read
from lm.emergence.published.numbers import Result, at_least, at_most, exact, share

FLOPS = "FLOPs (1E21)"
EASIEST, HARDEST = "0_1502_brier", "13520_15023_brier"
THRESHOLD = 10**1.8  # in 1e21 FLOPs
OVER_TRAINED = ("microsoft/phi-1_5", "microsoft/phi-2", "Qwen/Qwen1.5-0.5B", "Qwen/Qwen1.5-1.8B",
                "Qwen/Qwen1.5-4B", "stabilityai/stablelm-2-1_6b")  # fmt: skip


def analyse(folder: str | None) -> Result:
    """The numbers and the figure: Brier loss of the easiest and hardest tenth, and of all."""
    columns = ("Model", FLOPS, EASIEST, HARDEST, "acc", "brier")
    frame = read("ushape_arithmetic_instance_brier.csv", columns, folder)
    rates = read("ushape_acc_arithmetic_instance.csv", ("Model", FLOPS, "brier"), folder)
    known = frame.dropna(subset=["brier", FLOPS])
    other = rates.dropna(subset=["brier", FLOPS])
    same = np.allclose(known["brier"].to_numpy(), other["brier"].to_numpy())
    kept = known[~known["Model"].isin(OVER_TRAINED)]
    before = kept[kept[FLOPS] < THRESHOLD]
    after = kept[kept[FLOPS] >= THRESHOLD]
    gain = after["acc"].mean() - before["acc"].mean()
    numbers = [
        exact("models", len(frame), 114),
        at_least("models with FLOPs and scores *", len(known), 63),
        at_most("models with FLOPs and scores, not above *", len(known), 65),
        share("least FLOPs *", 1e21 * known[FLOPS].min(), 1.3e20, 5),
        share("most FLOPs *", 1e21 * known[FLOPS].max(), 7.7e23, 1),
        exact("the two files agree on the Brier loss *", float(same), 1),
        at_least("easiest tenth: curvature before the threshold *", _curvature(before, EASIEST), 0),
        at_most("hardest tenth: curvature before the threshold *", _curvature(before, HARDEST), 0),
        at_least("accuracy gained at the threshold *", gain, 0),
    ]
    return Result(numbers, _figure(kept))


def _curvature(frame: pd.DataFrame, column: str) -> float:
    """The square term of a parabola of the Brier loss in log10 FLOPs."""
    good = frame.dropna(subset=[column])
    return float(np.polyfit(np.log10(good[FLOPS]), good[column], 2)[0])


def _figure(kept: pd.DataFrame) -> dict:
    names = {"easiest tenth": EASIEST, "all questions": "brier", "hardest tenth": HARDEST}
    rows = draw.data(
        flops=np.tile(kept[FLOPS].to_numpy() * 1e21, 3),
        loss=np.concatenate([kept[column].to_numpy() for column in names.values()]),
        which=np.repeat(list(names), len(kept)),
    )
    x = draw.log("flops", "training FLOPs")
    mark = alt.Chart(draw.data(flops=[THRESHOLD * 1e21])).mark_rule(
        strokeDash=[4, 3], color=draw.GREY
    )
    points = alt.Chart(rows).mark_point(filled=True, size=45, opacity=0.8)
    palette = [draw.BLUE, draw.GREY, draw.ORANGE]
    chart = alt.layer(
        mark.encode(x=x),
        points.encode(
            x=x, y=alt.Y("loss:Q", title=None), color=draw.colours("which", list(names), palette)
        ),
    )
    return draw.finish(
        chart, "Arithmetic by difficulty: Brier loss (dashed: the printed threshold)"
    )
