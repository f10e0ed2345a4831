"""The charts that look at one ability closer: its seeds, its times, its predictions, its metrics.

Like those of `plots` they are specifications that refer to their data by name; the browser fills
them when the reader chooses an ability, the PNG files are filled in `page_data`.
"""

from collections.abc import Sequence
from typing import Any

import altair as alt

from lm.emergence.plots import AXES, BLUE, GREY, ORANGE, Drawing, finish, size_colour

GREEN = "#009E73"


def closer(sizes: Sequence[int], width: int = 400, height: int = 250) -> dict[str, Any]:
    """Every chart of one ability by name."""
    return {
        "strip": finish(_strip(sizes), width, height),
        "share": finish(_share(sizes), width, height),
        "survival": finish(_survival(sizes), width, height),
        "prediction": finish(_prediction(), width, height),
    }


def _strip(sizes: Sequence[int]) -> Drawing:
    """Every seed of every size: datasets `strip` (params, value, shift, through), `groups`
    (params, value, shift) and `mark` (value).
    """
    x = _band(sizes)
    y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False))
    seeds = alt.Chart(alt.NamedData("strip")).mark_point(size=34, opacity=0.8, strokeWidth=1.5)
    groups = alt.Chart(alt.NamedData("groups")).mark_tick(color=ORANGE, thickness=2.5, bandSize=26)
    mark = alt.Chart(alt.NamedData("mark"))
    limits = alt.Chart(alt.NamedData("limits")).mark_rule(opacity=0)
    colour = alt.Color(
        "through:N", scale=alt.Scale(domain=[True, False], range=[BLUE, GREY]), legend=None
    )
    shift = alt.XOffset("shift:Q", scale=alt.Scale(domain=[-1, 1]))
    tip = [alt.Tooltip(f) for f in ("point:N", "replica:N", "params:Q", "value:Q", "stderr:Q")]
    return alt.layer(
        limits.encode(y=y),
        mark.mark_rule(strokeDash=[4, 3], color=GREY).encode(y="value:Q"),
        groups.encode(x=x, y="value:Q", xOffset=shift),
        seeds.encode(x=x, y=y, xOffset=shift, color=colour, tooltip=tip),
    )


def _share(sizes: Sequence[int]) -> Drawing:
    """P(breakthrough | size) with Wilson's interval: dataset `rungs`."""
    base = alt.Chart(alt.NamedData("rungs")).encode(x=_band(sizes))
    y = alt.Y(
        "share:Q",
        title=None,
        scale=alt.Scale(domain=[0, 1.08]),
        axis=alt.Axis(format="%", values=[0, 0.25, 0.5, 0.75, 1]),
    )
    tip = [alt.Tooltip(f) for f in ("params:Q", "through:Q", "seeds:Q", "dip_p:Q", "gain:Q")]
    bars = base.mark_rule(color=BLUE, strokeWidth=1.5).encode(y="share_low:Q", y2="share_high:Q")
    dots = base.mark_point(color=BLUE, filled=True, size=60, opacity=1)
    names = base.mark_text(dy=-10, fontSize=11, color=GREY, align="center")
    return alt.layer(
        bars, dots.encode(y=y, tooltip=tip), names.encode(y="share_high:Q", text="count:N")
    )


def _survival(sizes: Sequence[int]) -> Drawing:
    """The share that has emerged by then, 1 - S(t): datasets `curves` (params, time, emerged) and
    `censored` (params, time, emerged, point, replica).
    """
    x = alt.X(
        "time:Q",
        title=AXES["tokens"],
        scale=alt.Scale(type="log", nice=False, padding=6),
        axis=alt.Axis(format="~s", tickCount=5, grid=False),
    )
    y = alt.Y(
        "emerged:Q",
        title=None,
        scale=alt.Scale(domain=[0, 1]),
        axis=alt.Axis(format="%", tickCount=5),
    )
    steps = alt.Chart(alt.NamedData("curves")).mark_line(interpolate="step-after", strokeWidth=2)
    ends = alt.Chart(alt.NamedData("censored")).mark_point(
        shape="stroke", angle=90, size=90, strokeWidth=1.6, opacity=0.9
    )
    tip = [alt.Tooltip(f) for f in ("point:N", "replica:N", "params:Q", "time:Q")]
    return alt.layer(
        steps.encode(x=x, y=y, color=size_colour(sizes)),
        ends.encode(x=x, y=y, color=size_colour(sizes), tooltip=tip),
    )


def _prediction() -> Drawing:
    """Bands of what was predicted and what came: datasets `seen` (params, spread, value), `bands`
    (params, median, low80, high80, low95, high95) and `came` (params, spread, value, registered).
    """
    scale = alt.Scale(type="log", nice=False, padding=16)
    axis = alt.Axis(format="~s", tickCount=5, grid=False)
    x = alt.X("params:Q", title=AXES["params"], scale=scale, axis=axis)
    spread = alt.X("spread:Q", title=AXES["params"], scale=scale, axis=axis)
    y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=False))
    bands = alt.Chart(alt.NamedData("bands")).encode(x=x)
    limits = alt.Chart(alt.NamedData("limits")).mark_rule(opacity=0)
    tip = [alt.Tooltip(f) for f in ("point:N", "replica:N", "params:Q", "value:Q")]
    seen = alt.Chart(alt.NamedData("seen")).mark_point(color=GREY, size=30, opacity=0.7)
    came = alt.Chart(alt.NamedData("came")).mark_point(size=46, opacity=0.95, strokeWidth=1.8)
    shape = alt.Shape(
        "registered:N",
        scale=alt.Scale(domain=[True, False], range=["circle", "diamond"]),
        legend=None,
    )
    return alt.layer(
        limits.encode(y=y),
        bands.mark_rule(color=GREEN, strokeWidth=5, opacity=0.3).encode(y="low95:Q", y2="high95:Q"),
        bands.mark_rule(color=GREEN, strokeWidth=9, opacity=0.5).encode(y="low80:Q", y2="high80:Q"),
        bands.mark_tick(color="#00573f", thickness=2, bandSize=18).encode(y="median:Q"),
        seen.encode(x=spread, y=y, tooltip=tip),
        came.encode(x=spread, y=y, shape=shape, color=alt.value(BLUE), tooltip=tip),
    )


def _band(sizes: Sequence[int]) -> alt.X:
    """Sizes side by side, whatever their distance."""
    return alt.X(
        "params:O",
        title=AXES["params"],
        scale=alt.Scale(domain=list(sizes), paddingInner=0.15),
        axis=alt.Axis(
            labelExpr="format(datum.value, '.3~s')", labelAngle=0, labelOverlap=True, grid=False
        ),
    )
