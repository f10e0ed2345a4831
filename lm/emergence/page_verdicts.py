"""The first part of the page: what was found, the table of verdicts, every ability side by side."""

import html
from itertools import groupby
from typing import Any

from lm.emergence import plots
from lm.emergence.page_data import Content, words
from lm.emergence.words import STYLE, between, p_value, si

MOST_HEADLINES = 8
TITLES = {
    "": "",
    "verdict": "",
    "begins at": "the middle of the rise, in non-embedding parameters",
    "95% interval": "profile likelihood and bootstrap over seeds",
    "width": "decades of size from 10% to 90% of the rise",
    "exact match": "the best curve; in brackets AICc(best wide) − AICc(best sharp)",
    "continuous": "the same for the continuous metric",
    "chance": "the strongest baseline that knows only the format",
    "p": "any size above chance, exact test, Holm over all sizes and tasks",
    "detectable": "the least rise above chance that one size can show with power 0.8",
    "L": "linearity (Srivastava et al. 2022)",
    "B": "breakthroughness (Srivastava et al. 2022)",
    "seeds": "replicas fitted, over so many sizes",
    "why": "",
}
NUMERIC = ("begins at", "width", "chance", "p", "detectable", "L", "B", "seeds")


def head(page: Content) -> str:
    """Title, question, size of the study, and the findings in words."""
    analysis = page.analysis
    counts = f"{analysis['points']} points, {analysis['replicas']} replicas"
    size = (
        f"{counts}, {analysis['rows']:,} measured values, {_minutes(analysis['seconds']['total'])}"
    )
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in analysis["notes"])
    question = html.escape((page.study.get("docstring") or "").strip().split("\n\n")[0])
    return (
        f"<header><h1>{html.escape(analysis['study'])}</h1><p class='lead'>{question}</p>"
        f"<p class='small'>{size}</p>{notes}{_findings(page)}</header>"
    )


def sentence(verdict: dict[str, Any], label: str, reason: bool = True) -> str:
    """The headline of one ability, with its reason where there is room."""
    name = verdict["verdict"]
    if verdict["onset_params"] is None:
        return f"<b>{label}</b> {badge(name)} {html.escape(verdict['reason'])}."
    interval = "" if verdict["ci95"] is None else f" (95% interval {between(verdict['ci95'])})"
    begins = f"begins at <b>{si(verdict['onset_params'])}</b> parameters{interval}"
    why = f": {html.escape(verdict['reason'])}" if reason else ""
    return f"<b>{label}</b> {badge(name)} {begins}{why}."


def verdicts(page: Content) -> str:
    """The table of verdicts, by ability."""
    titles = "".join(
        f'<th{_nr(name)} title="{html.escape(title)}">{name}</th>' for name, title in TITLES.items()
    )
    body = []
    for ability, group in groupby(page.analysis["verdicts"], lambda v: v["ability"]):
        body.append(f"<tr class='group'><th colspan='{len(TITLES)}'>{_title(ability)}</th></tr>")
        body += [_row(page, v) for v in group]
    glosses = "; ".join(f"<b>{name}</b> {look.gloss}" for name, look in STYLE.items())
    tests = max((v["tests"] for v in page.analysis["verdicts"]), default=0)
    return (
        "<section><h2>Verdicts</h2><div class='wide'><table class='verdicts'>"
        f"<tr class='titles'>{titles}</tr>{''.join(body)}</table></div>"
        f"<p class='small'>{glosses}. Width is in decades of size. Shapes are followed by the "
        "AICc advantage of the best curve narrower than one decade over the best wider one; 6 "
        f"decides. <b>p</b> says how surely any size is above chance, corrected for all {tests} "
        "sizes × tasks (Holm). <b>detectable</b> is the least rise above chance that one size can "
        "show with power 0.8. <b>L</b>, linearity, and <b>B</b>, breakthroughness, only screen: "
        "B is infinite where most steps are exactly none, and falls as a floor gets noisier. "
        "<b>seeds</b> are replicas / sizes."
        "</p></section>"
    )


def multiples(page: Content) -> str:
    """Every ability as a small chart, with one legend and the choice of metric and axis."""
    measured = set(page.seeds["metric"].unique())
    metrics = "".join(
        f'<option value="{m}">{title}</option>'
        for m, title in plots.METRICS.items()
        if m in measured
    )
    axes = "".join(f'<option value="{x}">{title}</option>' for x, title in plots.AXES.items())
    groups = []
    for ability, group in groupby(page.analysis["verdicts"], lambda v: v["ability"]):
        figures = "".join(_panel(page, v) for v in group)
        groups.append(f"<h3>{_title(ability)}</h3><div class='panels'>{figures}</div>")
    return (
        "<section><h2>Every ability</h2>"
        f'<div class="toolbar"><label>metric <select id="metric">{metrics}</select></label>'
        f"<label>against <select id='x'>{axes}</select></label></div>{_legend(page)}"
        f"{''.join(groups)}</section>"
    )


def breakthroughs(page: Content) -> str:
    """Seeds that broke through, by ability and size."""
    found = {
        (v["task"], v["level"]): {r["params"]: r for r in v["rungs"]}
        for v in page.analysis["verdicts"]
    }
    sizes = sorted({n for rungs in found.values() for n in rungs})
    if not sizes:
        return ""
    head = "".join(f"<th>{si(n)}</th>" for n in sizes)
    rows = []
    for v in page.analysis["verdicts"]:
        own = found[v["task"], v["level"]]
        cells = "".join(_share_cell(own.get(n)) for n in sizes)
        rows.append(f"<tr><th>{label(page, v)}</th>{cells}</tr>")
    return (
        "<section><h2>Seeds that broke through</h2><div class='wide'><table class='shares'>"
        f"<tr class='titles'><th>parameters</th>{head}</tr>{''.join(rows)}</table></div>"
        "<p class='small'>A seed broke through when it ends above the halfway mark between chance "
        "and the best size of the ladder. Below each count, the 95% Wilson interval of the share. "
        "<span class='two'>two groups</span>: the seeds of that size are split, by the mixture."
        "</p></section>"
    )


def label(page: Content, verdict: dict[str, Any]) -> str:
    """The ability in words, escaped."""
    return html.escape(words(page, verdict["task"], verdict["level"]))


def badge(name: str) -> str:
    """A verdict on its colour."""
    return f'<span class="badge" style="background:{STYLE[name].colour}">{name}</span>'


def key(verdict: dict[str, Any]) -> str:
    """TASK/LEVEL, as the script names an ability."""
    return html.escape(f"{verdict['task']}/{verdict['level']}")


def _findings(page: Content) -> str:
    found = page.analysis["verdicts"]
    counts = {name: sum(v["verdict"] == name for v in found) for name in STYLE}
    several = "".join(
        f"<span>{badge(name)} {count}</span>" for name, count in counts.items() if count
    )
    if len(found) <= MOST_HEADLINES:
        told, rest = found, ""
    else:
        begun = [v for v in found if v["onset_params"] is not None]
        told = sorted(begun, key=lambda v: v["onset_params"])[:MOST_HEADLINES]
        more = len(begun) - len(told)
        rest = f"<p class='small'>{more} more begin further up.</p>" if more else ""
    lines = "".join(f"<li>{sentence(v, label(page, v), told is found)}</li>" for v in told)
    return f"<p class='counts'>{several}</p><ul class='headlines'>{lines}</ul>{rest}"


def _row(page: Content, v: dict[str, Any]) -> str:
    exact, continuous, screen = v["exact_match"], v["continuous"], v["screen"] or {}
    began = v["onset_params"] is not None
    width = f"{exact['width']:.2f}" if began and exact and exact["width"] else "–"
    rise = "–" if v["detectable"] is None else f"{v['detectable']:.2g}"
    cells = {
        "verdict": badge(v["verdict"]),
        "begins at": f"<b>{si(v['onset_params'])}</b>" if began else "–",
        "95% interval": between(v["ci95"]),
        "width": width,
        "exact match": _evidence(exact),
        "continuous": _evidence(continuous),
        "chance": f"{v['chance']:.3g}" if v["chance"] is not None else "–",
        "p": html.escape(p_value(v["p_holm"])),
        "detectable": rise,
        "L": _score(screen.get("linearity")),
        "B": _score(screen.get("breakthroughness")),
        "seeds": f"{v['seeds']} / {v['sizes']}",
        "why": html.escape(v["reason"]),
    }
    row = "".join(
        f"<td{' class="why"' if name == 'why' else _nr(name)}>{cell}</td>"
        for name, cell in cells.items()
    )
    link = f'<a href="#closer" data-open="{key(v)}">{label(page, v)}</a>'
    return f"<tr><th>{link}</th>{row}</tr>"


def _nr(name: str) -> str:
    return ' class="nr"' if name in NUMERIC else ""


def _evidence(shape: dict[str, Any] | None) -> str:
    if shape is None:
        return "–"
    number = "" if shape["sharpness"] is None else f" ({shape['sharpness']:+.0f})"
    name = "" if shape["metric"] == "exact_match" else f"{shape['metric']}<br>"
    return f"{name}{shape['word']}{number}".replace("-", "−")


def _score(score: dict[str, Any] | None) -> str:
    if score is None or score["flag"] in ("no change", "one size"):
        return "–"
    if score["flag"] == "infinite":
        return "∞"
    digits = 1 if abs(score["value"]) < 100 else 0
    return f"{score['value']:.{digits}f}".replace("-", "−")


def _panel(page: Content, v: dict[str, Any]) -> str:
    return (
        f'<figure class="curve" data-task="{key(v)}"><figcaption>{label(page, v)} '
        f'{badge(v["verdict"])}</figcaption><div class="plot"></div></figure>'
    )


def _legend(page: Content) -> str:
    """What is drawn in every panel, for both kinds of axis."""
    parts = (
        (12, '<circle cx="6" cy="6.5" r="4" fill="none" stroke="#0072B2" stroke-width="1.5"/>'),
        (12, '<path d="M6 1.5L11 6.5L6 11.5L1 6.5Z" fill="none" stroke="#666"/>'),
        (
            24,
            '<rect y="2" width="24" height="9" fill="#0072B2" opacity=".18"/>'
            '<path d="M0 6.5H24" stroke="#0072B2" stroke-width="1.5"/>',
        ),
        (
            24,
            '<rect width="24" height="13" fill="#D55E00" opacity=".15"/>'
            '<path d="M12 0V13" stroke="#D55E00"/>',
        ),
        (24, '<path d="M0 6.5H24" stroke="#666" stroke-dasharray="4 3"/>'),
    )
    names = ("a seed", "a control, never fitted", "mean, 95% interval", "onset, 95% interval")
    marks = "".join(
        f"<span><svg width='{width}' height='13' aria-hidden='true'>{art}</svg>{name}</span>"
        for (width, art), name in zip(parts, (*names, "chance"), strict=True)
    )
    colours = zip(plots.viridis(len(page.sizes)), page.sizes, strict=True)
    sizes = "".join(f"<span><i style='background:{c}'></i>{si(n)}</span>" for c, n in colours)
    return (
        f"<p class='legend bysize'>{marks}<span id='against'>exact match against "
        f"{plots.AXES['params']}</span></p><p class='legend bypath'>one line is one "
        f"seed’s training; parameters {sizes}</p><p class='small screen'>Click a mark to see "
        "where it comes from.</p>"
    )


def _share_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "<td></td>"
    share = row["through"] / row["seeds"]
    ends = f"{100 * row['share_low']:.0f}–{100 * row['share_high']:.0f}%"
    two = "<small class='two'>two groups</small>" if row["bimodal"] else ""
    tint = f"background:rgba(0,114,178,{0.35 * share:.2f})"
    return f'<td style="{tint}">{row["through"]}/{row["seeds"]}<small>{ends}</small>{two}</td>'


def _title(name: str) -> str:
    return html.escape(name[:1].upper() + name[1:])


def _minutes(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s of compute"
    return f"{seconds / 60:.1f} min of compute" if seconds < 7200 else f"{seconds / 3600:.1f} h"
