"""How many BIG-bench tasks were called emergent (Wei et al. 2022, appendix E)."""

import altair as alt

from lm.emergence.published import draw
from lm.emergence.published.files import read
from lm.emergence.published.numbers import Result, exact

# category in the file -> what it is, and how many there are
CATEGORIES = {
    "emergent_gpt3_lamda": ("emergent with GPT-3 or LaMDA", 25),
    "emergent_palm": ("emergent with PaLM", 42),
    "flat": ("flat", 45),
    "smoothly_increasing": ("smoothly increasing", 58),
}
REST = ("other", 27)


def analyse(folder: str | None) -> Result:
    """The counts and the figure."""
    frame = read("wei2022_bigbench_categories.csv", ("task", "category"), folder)
    counts = frame["category"].value_counts().to_dict()
    ours = {what: counts.pop(name, 0) for name, (what, _) in CATEGORIES.items()}
    ours[REST[0]] = sum(counts.values())
    expected = dict([*CATEGORIES.values(), REST])
    numbers = [exact(what, ours[what], count) for what, count in expected.items()]
    both = [what for what in ours if what.startswith("emergent")]
    numbers.append(exact("emergent in all", sum(ours[what] for what in both), 67))
    share = [what in both for what in ours]
    bars = draw.data(what=list(ours), tasks=list(ours.values()), emergent=share)
    base = alt.Chart(bars).encode(
        y=alt.Y("what:N", sort=None, title=None, axis=alt.Axis(labelLimit=300)),
        x=alt.X("tasks:Q", title="tasks", axis=alt.Axis(grid=False)),
    )
    colour = alt.condition("datum.emergent", alt.value(draw.ORANGE), alt.value(draw.BLUE))
    chart = alt.layer(
        base.mark_bar(height=24).encode(color=colour),
        base.mark_text(align="left", dx=4, color=draw.GREY).encode(text="tasks:Q"),
    )
    return Result(numbers, draw.finish(chart, "Wei et al.: BIG-bench tasks by how they scale"))
