"""The figures: Altair charts without data, filled for one task and metric at a time.

A chart is made once for each x-axis as a Vega-Lite specification that refers to its data by name
(seeds, rungs, onset, chance, limits). The page fills it in the browser when the reader changes the
metric or the axis; the PNG files are filled here. So what is printed and what is clicked is the
same drawing.

Every seed is drawn. A ladder point is a circle, a control a diamond; colours are Okabe and Ito's,
which the colour-blind can tell apart, and sizes are steps of viridis, which also print in grey.
"""

import json
from typing import Any

import altair as alt
import pandas as pd

from lm.emergence import seeds
from lm.emergence.onset import final_rows, usable

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
AXES = {
    "params": "non-embedding parameters",
    "flops": "training FLOPs",
    "tokens": "training tokens",
    "text_loss": "held-out text loss, nats per token",
}
METRICS = {
    "exact_match": "exact match",
    "token_accuracy": "token accuracy",
    "nll": "loss, nats per answer token",
    "log_likelihood": "log-likelihood of the answer, nats",
    "brier": "Brier score",
}
LOSSES = {
    "text": "held-out text loss, nats per token",
    "train": "training loss, nats per weighted token",
}
RATES = ("exact_match", "token_accuracy")
KEYS = ["task", "level", "metric"]
MOST_STEPS = 60_000  # evaluations on a page; above that the early ones are thinned
FONT = "sans-serif"  # the page sets its own

type Drawing = alt.LayerChart | alt.FacetChart


def seed_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Every evaluation of every replica with its text loss and whether it is the last one.

    `spread` is the size, moved a little by replica so that equal values stay apart.
    """
    text = frame[(frame["task"] == "text") & (frame["metric"] == "nll")]
    where = ["point", "replica", "step"]
    loss = text.drop_duplicates(where).set_index(where)["value"].rename("text_loss")
    table = frame.join(loss, on=where)
    last = table.groupby(["point", "replica", *KEYS])["step"].transform("max")
    table["final"] = table["step"] == last
    shift = (table["replica"] % 7 + 1) // 2 * (1 - table["replica"] % 2 * 2)
    table["spread"] = table["params"] * 10.0 ** (0.02 * shift)
    steps = sorted(table["step"].unique())
    while len(table) > MOST_STEPS and len(steps) > 2:
        steps = steps[::2]
        table = table[table["step"].isin(steps) | table["final"]]
    names = ["point", "replica", "role", "params", "spread", "step", "tokens", "flops"]
    return table[[*names, "text_loss", *KEYS, "value", "stderr", "n", "status", "final"]]


def rung_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean and 95% interval of each ladder size at the end, for every task, level and metric."""
    rows = usable(final_rows(frame[frame["role"] == "ladder"]))
    parts = [
        pd.DataFrame(seeds.rungs(group)).assign(**dict(zip(KEYS, key, strict=True)))
        for key, group in rows.groupby(KEYS)
    ]
    columns = [*seeds.Rung._fields, *KEYS]
    return pd.concat(parts) if parts else pd.DataFrame(columns=columns)


def templates(width: int = 385, height: int = 240) -> dict[str, dict[str, Any]]:
    """The chart of one task and metric for each of `AXES`, as specifications without data."""
    made = {"params": _by_size(), **{x: _by_path(x) for x in list(AXES)[1:]}}
    return {x: _finish(chart, width, height) for x, chart in made.items()}


def fill(spec: dict[str, Any], title: str, **data: list[dict[str, Any]]) -> dict[str, Any]:
    """A copy of a template with its title and data, and without the layers that have none."""
    spec = json.loads(json.dumps(spec))
    spec["title"]["text"] = title
    spec["datasets"] = data
    # A layer without data has an infinite extent, and Vega complains of it.
    hoisted = spec.get("data")
    kept = [la for la in spec["layer"] if data.get(la.get("data", hoisted)["name"])]
    spec["layer"] = kept
    return spec


def png(spec: dict[str, Any], scale: float = 2.0) -> bytes:
    """The figure as PNG."""
    import vl_convert

    return vl_convert.vegalite_to_png(json.dumps(spec), scale=scale)


def share_chart(width: int = 385, height: int = 160) -> dict[str, Any]:
    """Share of seeds that broke through, against size, with Wilson intervals."""
    base = alt.Chart(alt.NamedData("rungs")).encode(x=_x("params", AXES["params"]))
    share = alt.Y("share:Q", title=None, scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format="%"))
    tip = ["params:Q", "through:Q", "seeds:Q", "share_low:Q", "share_high:Q"]
    bars = base.mark_rule(color=BLUE, strokeWidth=1.5).encode(y="share_low:Q", y2="share_high:Q")
    dots = base.mark_point(color=BLUE, filled=True, size=60, opacity=1)
    names = base.mark_text(dx=9, align="left", fontSize=11, color=GREY).encode(
        y=share, text="label:N"
    )
    return _finish(bars + dots.encode(y=share, tooltip=tip) + names, width, height)


def law_chart(width: int = 385, height: int = 240) -> dict[str, Any]:
    """Text loss against size with the fitted law (dataset `onset`: x, y, low, high)."""
    loss = alt.Y("value:Q", title=None, scale=alt.Scale(type="log", nice=False, padding=12))
    fit = alt.Chart(alt.NamedData("rungs")).mark_line(color=ORANGE, strokeWidth=1.5)
    fit = fit.encode(x=_x("params", AXES["params"]), y=alt.Y("fitted:Q"))
    return _finish(fit + _points("params", loss), width, height)


def _by_size() -> Drawing:
    """The end of training against size: onset, chance, interval, mean, seeds."""
    x = _x("params", AXES["params"])
    onset = alt.Chart(alt.NamedData("onset"))
    rungs = alt.Chart(alt.NamedData("rungs")).encode(x=x)
    label = onset.mark_text(align="left", dx=5, dy=-4, fontSize=11, color=ORANGE, baseline="bottom")
    return alt.layer(
        onset.mark_rect(color=ORANGE, opacity=0.15).encode(x=alt.X("low:Q"), x2="high:Q"),
        onset.mark_rule(color=ORANGE).encode(x="onset:Q"),
        *_chance(),
        rungs.mark_area(color=BLUE, opacity=0.18).encode(y=alt.Y("low:Q"), y2="high:Q"),
        rungs.mark_line(color=BLUE, strokeWidth=1.5).encode(y="mean:Q"),
        _points("spread", _y()),
        label.encode(x="onset:Q", y=alt.value(240), text="label:N"),
    )


def _by_path(x: str) -> Drawing:
    """Every evaluation of every seed as a line, its end as a point, coloured by size."""
    path = alt.Chart(alt.NamedData("seeds")).transform_filter(
        f"isValid(datum.{x}) && datum.{x} > 0"
    )
    lines = path.mark_line(strokeWidth=1, opacity=0.55).encode(
        x=_x(x, AXES[x]),
        y=_y(),
        order="step:Q",
        detail=["point:N", "replica:N"],
        color=_size_colour(),
    )
    ends = path.transform_filter("datum.final").mark_point(filled=True, opacity=0.9, size=38)
    ends = ends.encode(
        x=_x(x, AXES[x]),
        y="value:Q",
        color=_size_colour(),
        shape=_role(),
        tooltip=_tooltip(),
    )
    return alt.layer(*_chance(), lines, ends)


def _points(x: str, y: alt.Y) -> alt.Chart:
    """One mark per seed at the end of training."""
    seeds_ = alt.Chart(alt.NamedData("seeds")).transform_filter("datum.final")
    return seeds_.mark_point(filled=False, size=42, opacity=0.85, strokeWidth=1.6).encode(
        x=_x(x, AXES["params"]),
        y=y,
        shape=_role(),
        color=alt.Color(
            "role:N",
            scale=alt.Scale(domain=["ladder", "control"], range=[BLUE, GREY]),
            legend=None,
        ),
        tooltip=_tooltip(),
    )


def _chance() -> list[alt.Chart]:
    """A dashed line with its name, and marks that nobody sees which hold the axis open."""
    chance = alt.Chart(alt.NamedData("chance"))
    limits = alt.Chart(alt.NamedData("limits")).mark_rule(opacity=0)
    name = chance.mark_text(align="right", dx=-2, dy=-5, fontSize=11, color=GREY, baseline="bottom")
    return [
        limits.encode(y=_y()),
        chance.mark_rule(strokeDash=[4, 3], color=GREY).encode(y="value:Q"),
        name.encode(y="value:Q", x=alt.value("width"), text=alt.value("chance")),
    ]


def _x(field: str, title: str) -> alt.X:
    """Sizes on a log axis; a loss on a linear one that falls to the right, as training does."""
    if field == "text_loss":
        scale = alt.Scale(zero=False, reverse=True, nice=False, padding=10)
        return alt.X(f"{field}:Q", title=title, scale=scale, axis=alt.Axis(grid=False))
    scale = alt.Scale(type="log", nice=False, padding=14)
    return alt.X(
        f"{field}:Q", title=title, scale=scale, axis=alt.Axis(format="~s", tickCount=5, grid=False)
    )


def _y() -> alt.Y:
    return alt.Y("value:Q", title=None, scale=alt.Scale(zero=False))


def _role() -> alt.Shape:
    scale = alt.Scale(domain=["ladder", "control"], range=["circle", "diamond"])
    return alt.Shape("role:N", scale=scale, legend=None)


def _size_colour() -> alt.Color:
    legend = alt.Legend(
        title="parameters",
        orient="bottom",
        columns=6,
        symbolType="circle",
        symbolOpacity=1,
        labelExpr="format(datum.value, '.3~s')",
    )
    scale = alt.Scale(scheme="viridis", reverse=True)
    return alt.Color("params:O", scale=scale, legend=legend)


def _tooltip() -> list[alt.Tooltip]:
    fields = ["point:N", "replica:N", "params:Q", "value:Q", "stderr:Q", "n:Q", "status:N"]
    return [alt.Tooltip(f) for f in [*fields, "tokens:Q", "flops:Q", "text_loss:Q"]]


def _finish(chart: Drawing, width: int, height: int) -> dict[str, Any]:
    """Size, title on the left above the plot instead of a turned y-title, and quiet axes."""
    title = alt.TitleParams(
        "", anchor="start", frame="group", fontSize=13, fontWeight="normal", offset=8
    )
    chart = chart.properties(width=width, height=height, title=title)
    chart = chart.configure_view(stroke=None).configure(font=FONT, background="white")
    chart = chart.configure_axis(
        labelFontSize=12,
        titleFontSize=12,
        titleFontWeight="normal",
        titlePadding=8,
        gridColor="#eeeeee",
        domainColor="#999999",
        tickColor="#999999",
    ).configure_legend(titleFontSize=12, labelFontSize=12, titleFontWeight="normal")
    return chart.to_dict(validate=False)
