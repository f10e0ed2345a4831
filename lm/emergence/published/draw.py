"""What the figures of the published curves share: layers over data in the chart, one style."""

from typing import Any

import altair as alt

from lm.emergence import plots

BLUE, ORANGE, GREY = plots.BLUE, plots.ORANGE, plots.GREY
GREEN, PURPLE = "#009E73", "#CC79A7"  # Okabe and Ito's, as the others


def data(**columns: Any) -> alt.Data:
    """Columns of equal length as the rows of a chart."""
    names, values = list(columns), [_plain(column) for column in columns.values()]
    return alt.Data(
        values=[dict(zip(names, row, strict=True)) for row in zip(*values, strict=True)]
    )


def log(field: str, title: str, *, reverse: bool = False) -> alt.X:
    """A log axis to the right, in powers of ten."""
    scale = alt.Scale(type="log", nice=False, padding=10, reverse=reverse)
    axis = alt.Axis(format="~e", tickCount=6, grid=False)
    return alt.X(f"{field}:Q", title=title, scale=scale, axis=axis)


def colours(field: str, names: list[str], palette: list[str]) -> alt.Color:
    """A legend below the plot."""
    scale = alt.Scale(domain=names, range=palette)
    legend = alt.Legend(title=None, orient="bottom", labelLimit=400, symbolOpacity=1)
    return alt.Color(f"{field}:N", scale=scale, legend=legend)


def finish(chart: plots.Drawing, title: str) -> dict[str, Any]:
    """The specification in the style of every other figure of the project."""
    spec = plots.finish(chart, 480, 300)
    spec["title"]["text"] = title
    return spec


def _plain(column: Any) -> list[Any]:
    """NumPy and pandas values as JSON has them; NaN is None."""
    values = column.tolist() if hasattr(column, "tolist") else list(column)
    return [None if isinstance(v, float) and v != v else v for v in values]
