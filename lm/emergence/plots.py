"""The figures: Altair charts without data, filled for one task and metric at a time.

A chart is made once for each x-axis as a Vega-Lite specification that refers to its data by name
(seeds, rungs, onset, chance, limits). The page fills it in the browser when the reader changes the
metric or the axis; the PNG files are filled here. So what is printed and what is clicked is the
same drawing. `page_charts` has the charts that look at one ability closer.

Every seed is drawn. A ladder point is a circle, a control a diamond; colours are Okabe and Ito's,
which the colour-blind can tell apart, and sizes are steps of viridis, which also print in grey.
"""

import json
from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
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
    "independent_match": "exact match if tokens were independent",
    "edit_similarity": "edit similarity",
    "answer_probability": "probability of the answer",
    "log_likelihood": "log-likelihood of the answer, nats",
    "nll": "loss, nats per answer token",
    "brier": "Brier score",
    "choice_accuracy": "accuracy among the choices",
    "choice_brier": "Brier score among the choices",
    "calibration_error": "calibration error",
}
# No verdict rests on these; they are drawn against size beside a baseline of the same items.
SCORES = {
    "masked_accuracy": "accuracy of masked tokens",
    "pseudo_perplexity": "pseudo-perplexity",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
}
LOSSES = {
    "text": "held-out text loss, nats per token",
    "train": "training loss, nats per weighted token",
}
RATES = (
    *("exact_match", "token_accuracy", "independent_match", "edit_similarity"),
    *("answer_probability", "choice_accuracy"),
)
KEYS = ["task", "level", "metric"]
VIRIDIS = (
    *("#addc30", "#5ec962", "#28ae80", "#21918c"),
    *("#2c728e", "#3b528b", "#472d7b", "#440154"),
)
FONT = "sans-serif"  # the page sets its own

type Drawing = alt.LayerChart | alt.FacetChart


def seed_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Every evaluation of every replica with its text loss and whether it is the last one.

    `spread` is the size, moved a little by replica so that equal values stay apart.
    """
    frame = frame[(frame["format"] == 0) & frame["metric"].isin([*METRICS, *SCORES, "loss"])]
    text = frame[(frame["task"] == "text") & (frame["metric"] == "nll")]
    where = ["point", "replica", "step"]
    loss = text.drop_duplicates(where).set_index(where)["value"].rename("text_loss")
    table = frame.join(loss, on=where)
    # A replica evaluates everything at its last step, but its training loss has steps of its own.
    last = table.groupby(["point", "replica", *KEYS], observed=True)["step"].transform("max")
    table["final"] = table["step"] == last
    shift = (table["replica"] % 7 + 1) // 2 * (1 - table["replica"] % 2 * 2)
    table["spread"] = table["params"] * 10.0 ** (0.02 * shift)
    names = ["cell", "point", "replica", "role", "params", "spread", "step", "tokens", "flops"]
    names += ["text_loss", *KEYS, "value", "stderr", "n", "status", "attempt", "final"]
    return table[names]


def rung_table(frame: pd.DataFrame) -> pd.DataFrame:
    """Mean and 95% interval of each ladder size at the end, for every task, level and metric."""
    frame = frame[(frame["role"] == "ladder") & (frame["format"] == 0)]
    rows = usable(final_rows(frame))
    made = []
    for key, group in rows.groupby([*KEYS, "params"], observed=True):
        value, n = group["value"].to_numpy(), group["n"].to_numpy()
        rate = np.isfinite(group["chance"].iloc[0])
        draws = seeds.bootstrap_rung(value, n, None if rate else group["stderr"].to_numpy())
        made.append((*key, len(value), float(value.mean()), *seeds.interval(draws)))
    return pd.DataFrame(made, columns=[*KEYS, "params", "seeds", "mean", "low", "high"])


def templates(
    width: int = 385, height: int = 240, sizes: Sequence[int] = (), compact: bool = False
) -> dict[str, dict[str, Any]]:
    """The chart of one task and metric for each of `AXES`, as specifications without data.

    `compact` is for many side by side: no titles and no legends, which they share.
    """
    made = {"params": _by_size(height), **{x: _by_path(x, sizes) for x in list(AXES)[1:]}}
    return {x: finish(chart, width, height, compact, sizes) for x, chart in made.items()}


def viridis(count: int) -> list[str]:
    """Colours of `count` sizes, light to dark, as `#rrggbb`."""
    anchors = [[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in VIRIDIS]
    found = []
    for i in range(count):
        place = i * (len(anchors) - 1) / max(count - 1, 1)
        low = min(int(place), len(anchors) - 2)
        pairs = zip(anchors[low], anchors[low + 1], strict=True)
        found.append("#" + "".join(f"{round(a + (b - a) * (place - low)):02x}" for a, b in pairs))
    return found


def nice(sizes: Sequence[int]) -> list[float]:
    """Three to seven round numbers within the range of sizes, for a log axis; none for none."""
    if not sizes:
        return []
    powers = range(int(np.log10(min(sizes))), int(np.log10(max(sizes))) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7)):
        found = [s * 10.0**p for p in powers for s in steps]
        found = [n for n in found if min(sizes) <= n <= max(sizes)]
        if len(found) >= 3:
            break
    return found


def fill(spec: dict[str, Any], title: str, **data: list[dict[str, Any]]) -> dict[str, Any]:
    """A copy of a template with its title and data, and without the layers that have none."""
    spec = json.loads(json.dumps(spec))
    spec["title"] = {**spec.get("title", {}), "text": title}
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


def law_chart(width: int = 385, height: int = 240) -> dict[str, Any]:
    """Text loss against size with the fitted law (dataset `onset`: x, y, low, high)."""
    loss = alt.Y("value:Q", title=None, scale=alt.Scale(type="log", nice=False, padding=12))
    fit = alt.Chart(alt.NamedData("rungs")).mark_line(color=ORANGE, strokeWidth=1.5)
    fit = fit.encode(x=_x("params", AXES["params"]), y=alt.Y("fitted:Q"))
    return finish(fit + _points("params", loss), width, height)


def _by_size(height: int) -> Drawing:
    """The end of training against size: onset, chance, interval, mean, seeds, and the mean that
    `independent` tokens would give.
    """
    x = _x("params", AXES["params"])
    onset = alt.Chart(alt.NamedData("onset"))
    rungs = alt.Chart(alt.NamedData("rungs")).encode(x=x)
    independent = alt.Chart(alt.NamedData("independent")).encode(x=x)
    label = onset.mark_text(align="left", dx=5, dy=-4, fontSize=11, color=ORANGE, baseline="bottom")
    return alt.layer(
        onset.mark_rect(color=ORANGE, opacity=0.15).encode(x=alt.X("low:Q"), x2="high:Q"),
        onset.mark_rule(color=ORANGE).encode(x="onset:Q"),
        *_chance(),
        rungs.mark_area(color=BLUE, opacity=0.18).encode(y=alt.Y("low:Q"), y2="high:Q"),
        rungs.mark_line(color=BLUE, strokeWidth=1.5).encode(y="mean:Q"),
        independent.mark_line(color=BLUE, strokeWidth=1.2, strokeDash=[2, 3]).encode(y="mean:Q"),
        _points("spread", _y()),
        label.encode(x="onset:Q", y=alt.value(height), text="label:N"),
    )


def _by_path(x: str, sizes: Sequence[int]) -> Drawing:
    """Every evaluation of every seed as a line, its end as a point, coloured by size."""
    path = alt.Chart(alt.NamedData("seeds")).transform_filter(
        f"isValid(datum.{x}) && datum.{x} > 0"
    )
    lines = path.mark_line(strokeWidth=1, opacity=0.55).encode(
        x=_x(x, AXES[x]),
        y=_y(),
        order="step:Q",
        detail=["point:N", "replica:N"],
        color=size_colour(sizes),
    )
    ends = path.transform_filter("datum.final").mark_point(filled=True, opacity=0.9, size=38)
    ends = ends.encode(
        x=_x(x, AXES[x]),
        y="value:Q",
        color=size_colour(sizes),
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
        name.encode(y="value:Q", x=alt.value("width"), text="label:N"),
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


def size_colour(sizes: Sequence[int] = ()) -> alt.Color:
    """Sizes as steps of viridis; those of `sizes` keep their colour in every chart."""
    legend = alt.Legend(
        title="parameters",
        orient="bottom",
        columns=6,
        symbolType="circle",
        symbolOpacity=1,
        labelExpr="format(datum.value, '.3~s')",
    )
    scale = alt.Scale(scheme="viridis", reverse=True)
    if sizes:
        scale = alt.Scale(domain=list(sizes), range=viridis(len(sizes)))
    return alt.Color("params:O", scale=scale, legend=legend)


def _tooltip() -> list[alt.Tooltip]:
    fields = ["point:N", "replica:N", "params:Q", "value:Q", "stderr:Q", "n:Q"]
    return [alt.Tooltip(f) for f in [*fields, "tokens:Q", "flops:Q", "text_loss:Q"]]


def finish(
    chart: Drawing,
    width: int,
    height: int,
    compact: bool = False,
    sizes: Sequence[int] = (),
) -> dict[str, Any]:
    """Size, title on the left above the plot instead of a turned y-title, and quiet axes."""
    small = 10 if compact else 12
    title = alt.TitleParams(
        "", anchor="start", frame="group", fontSize=13, fontWeight="normal", offset=8
    )
    chart = chart.properties(width=width, height=height, title=title)
    chart = chart.configure_view(stroke=None).configure(font=FONT, background="white")
    chart = chart.configure_axis(
        labelFontSize=small,
        titleFontSize=12,
        titleFontWeight="normal",
        titlePadding=8,
        gridColor="#eeeeee",
        domainColor="#999999",
        tickColor="#999999",
        labelColor="#333333",
    ).configure_legend(titleFontSize=12, labelFontSize=12, titleFontWeight="normal")
    spec = chart.to_dict(validate=False)
    return _compact(spec, nice(sizes)) if compact else spec


def _compact(spec: dict[str, Any], labelled: Sequence[float]) -> dict[str, Any]:
    """A chart for many side by side: no titles, no legend, few ticks, small points."""
    del spec["title"]
    spec["config"] |= {"legend": {"disable": True}, "padding": 3}
    chance = [la for la in spec["layer"] if la["data"]["name"] == "chance"]
    spec["layer"] = [la for la in spec["layer"] if la not in chance or la["mark"]["type"] == "rule"]
    for layer in spec["layer"]:
        if layer["mark"]["type"] == "point":
            layer["mark"] |= {"size": 20, "strokeWidth": 1.3}
        if layer["mark"]["type"] == "text":
            layer["mark"]["fontSize"] = 10
        for axis, ticks in (("x", 3), ("y", 4)):
            channel = layer["encoding"].get(axis, {})
            if "scale" in channel:
                channel["title"] = None
                channel["axis"] = {**channel.get("axis", {}), "tickCount": ticks}
            if channel.get("field") in ("params", "spread") and labelled:
                channel["axis"] |= {"values": list(labelled), "labelOverlap": False}
    return spec
