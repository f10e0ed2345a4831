"""The page of a study: one HTML file with its data, its charts and the code that draws them.

Each section is a function from the content to HTML. Sixty lines of script fill the chart templates
when the reader changes the metric or the x-axis. Vega is inlined through vl-convert, so the page
works from a disk, offline, in ten years.
"""

import html
import json
from collections.abc import Iterable
from functools import cache
from typing import Any

import pandas as pd

from lm.emergence import plots
from lm.emergence.page_assets import CSS, SCRIPT
from lm.emergence.page_data import Content, browser_data, shares, words
from lm.emergence.words import STYLE, between, si


def render(page: Content) -> str:
    """The page as HTML."""
    name = html.escape(page.analysis["study"])
    sections = [_head(page), _toolbar(page), _curves(page), _verdicts(page), _breakthroughs(page)]
    sections += [_training(page), _scaling(page), _provenance(page), _cost(page)]
    data = json.dumps(browser_data(page), separators=(",", ":"), allow_nan=False)
    return "\n".join(
        [
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{name}: where abilities begin</title><style>{CSS}</style></head><body><main>",
            *sections,
            "</main>",
            f'<script type="application/json" id="data">{data.replace("</", "<\\/")}</script>',
            f"<script>{_vega()}</script><script>{SCRIPT}</script></body></html>",
        ]
    )


def sentence(verdict: dict[str, Any], label: str) -> str:
    """The headline of one ability."""
    name = verdict["verdict"]
    if verdict["onset_params"] is None:
        return f"<b>{label}</b> {_badge(name)} {html.escape(verdict['reason'])}."
    interval = "" if verdict["ci95"] is None else f" (95% interval {between(verdict['ci95'])})"
    begins = f"begins at <b>{si(verdict['onset_params'])}</b> parameters{interval}"
    return f"<b>{label}</b> {_badge(name)} {begins}: {html.escape(verdict['reason'])}."


def _head(page: Content) -> str:
    analysis = page.analysis
    counts = f"{analysis['points']} points, {analysis['replicas']} replicas"
    size = (
        f"{counts}, {analysis['rows']:,} measured values, {_minutes(analysis['seconds']['total'])}"
    )
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in analysis["notes"])
    lines = "".join(
        f"<li>{sentence(v, _label(page, v['task'], v['level']))}</li>" for v in analysis["verdicts"]
    )
    question = html.escape((page.study.get("docstring") or "").strip().split("\n\n")[0])
    return (
        f"<header><h1>{html.escape(analysis['study'])}</h1><p class='lead'>{question}</p>"
        f"<p class='small'>{size}</p>{notes}<ul class='headlines'>{lines}</ul></header>"
    )


def _toolbar(page: Content) -> str:
    here = [m for m in plots.METRICS if (page.seeds["metric"] == m).any()]
    metrics = "".join(f'<option value="{m}">{plots.METRICS[m]}</option>' for m in here)
    axes = "".join(f'<option value="{x}">{title}</option>' for x, title in plots.AXES.items())
    return (
        '<div class="toolbar"><label>metric <select id="metric">'
        f"{metrics}</select></label><label>against <select id='x'>{axes}</select></label></div>"
    )


def _curves(page: Content) -> str:
    plots_ = "".join(
        f'<figure class="curve" data-task="{html.escape(v["task"])}" '
        f'data-level="{html.escape(v["level"])}"><div class="plot"></div></figure>'
        for v in page.analysis["verdicts"]
    )
    return (
        f"<section><h2>Each ability</h2><div class='grid'>{plots_}</div>"
        "<p class='small'>Circles are seeds "
        "of the ladder at the end of training, moved a little sideways where they would "
        "coincide; grey diamonds are controls, drawn and never fitted. The line is the mean of a "
        "size, its band the 95% bootstrap interval over seeds and items; orange is the onset, the "
        "middle of the rise, with its 95% interval. Against FLOPs, tokens or text loss a line is "
        "one seed's training.</p>"
        "</section>"
    )


def _verdicts(page: Content) -> str:
    rows = "".join(_verdict_row(page, v) for v in page.analysis["verdicts"])
    head = ("ability", "verdict", "begins at", "95% interval", "width, decades", "exact match")
    titles = "".join(
        f"<th>{title}</th>" for title in (*head, "continuous", "chance", "sizes", "seeds")
    )
    glosses = "; ".join(f"<b>{name}</b> {look.gloss}" for name, look in STYLE.items())
    return (
        f"<section><h2>Verdicts</h2><div class='wide'><table><tr>{titles}</tr>{rows}</table></div>"
        f"<p class='small'>{glosses}. Shapes are followed by the AICc advantage of the best curve "
        "narrower than one decade over the best wider one; 6 decides.</p></section>"
    )


def _verdict_row(page: Content, v: dict[str, Any]) -> str:
    exact, continuous = v["exact_match"], v["continuous"]
    began = v["onset_params"] is not None
    width = f"{exact['width']:.2f}" if began and exact and exact["width"] else "–"
    cells = [si(v["onset_params"]), between(v["ci95"]), width, _evidence(exact)]
    cells += [_evidence(continuous), f"{v['chance']:.3g}" if v["chance"] is not None else "–"]
    cells += [str(v["sizes"]), str(v["seeds"])]
    row = "".join(f"<td>{cell}</td>" for cell in cells)
    label = _label(page, v["task"], v["level"])
    return f"<tr><th>{label}</th><td>{_badge(v['verdict'])}</td>{row}</tr>"


def _evidence(shape: dict[str, Any] | None) -> str:
    if shape is None:
        return "–"
    number = "" if shape["sharpness"] is None else f" ({shape['sharpness']:+.0f})"
    name = "" if shape["metric"] == "exact_match" else f"{shape['metric']}: "
    return f"{name}{shape['word']}{number}".replace("-", "−")


def _breakthroughs(page: Content) -> str:
    """Seeds that broke through, by ability and size."""
    sizes = sorted({int(n) for n in page.rungs.loc[_rate(page.rungs), "params"]})
    head = "".join(f"<th>{si(n)}</th>" for n in sizes)
    rows = []
    for v in page.analysis["verdicts"]:
        found = {row["params"]: row for row in shares(page, v["task"], v["level"])}
        cells = "".join(_share_cell(found.get(n)) for n in sizes)
        rows.append(f"<tr><th>{_label(page, v['task'], v['level'])}</th>{cells}</tr>")
    return (
        "<section><h2>Seeds that broke through</h2><div class='wide'><table class='shares'>"
        f"<tr><th>parameters</th>{head}</tr>{''.join(rows)}</table></div><p class='small'>A seed "
        "broke through when it ends above the halfway mark between chance and the best size of "
        "the ladder. Below each count, the 95% Wilson interval of the share.</p></section>"
    )


def _share_cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "<td></td>"
    ends = f"{100 * row['share_low']:.0f}–{100 * row['share_high']:.0f}%"
    tint = f"background:rgba(0,114,178,{0.35 * row['share']:.2f})"
    return f'<td style="{tint}">{row["through"]}/{row["seeds"]}<small>{ends}</small></td>'


def _training(page: Content) -> str:
    here = page.seeds[["task", "level", "metric"]].drop_duplicates()
    wanted = [("text", "test", "nll"), ("train", "mixture", "loss")]
    kept = [key for key in wanted if (here == list(key)).all(axis=1).any()]
    figures_ = "".join(
        f'<figure class="path" data-task="{t}" data-level="{lv}" data-metric="{m}">'
        '<div class="plot"></div></figure>'
        for t, lv, m in kept
    )
    grid = f'<div class="grid">{figures_}</div>'
    return f"<section><h2>Loss during training</h2>{grid}</section>" if kept else ""


def _scaling(page: Content) -> str:
    fit = page.analysis["scaling"]
    if fit["alpha"] is None:
        return ""
    flops = page.analysis["scaling_flops"]
    text = f"Against parameters, {_law_words(fit)}."
    if flops["alpha"] is not None:
        text += f" Against training FLOPs, {_law_words(flops)}."
    return (
        "<section><h2>Scaling of the text loss</h2>"
        f'<figure class="law"><div class="plot"></div></figure><p>{text}</p></section>'
    )


def _law_words(fit: dict[str, Any]) -> str:
    ends = "" if fit["ci95"] is None else " (95% {:.3f} to {:.3f})".format(*fit["ci95"])
    floor = f", irreducible loss {fit['E']:.2f}" if fit["E"] else ""
    return f"the exponent is <b>{fit['alpha']:.3f}</b>{ends}{floor}, from {fit['n']} replicas"


def _provenance(page: Content) -> str:
    study, analysis = page.study, page.analysis
    attempts = [a for cell in page.cells.values() for a in cell["environment"]]
    facts = {"study fingerprint": study.get("fingerprint"), "table": analysis["table_sha256"]}
    facts["git commit"] = _distinct(
        f"{a.get('git_commit')}{' (changed)' if a.get('git_dirty') else ''}" for a in attempts
    )
    facts["host"] = _distinct(a.get("host") for a in attempts)
    facts["platform"] = _distinct(a.get("platform") for a in attempts)
    facts["Python"] = _distinct(a.get("python") for a in attempts)
    for name in sorted({n for a in attempts for n in a.get("versions", {})}):
        facts[name] = _distinct(a.get("versions", {}).get(name) for a in attempts)
    rows = "".join(
        f"<tr><th class='key'>{html.escape(str(key))}</th><td>{html.escape(str(value))}</td></tr>"
        for key, value in facts.items()
        if value
    )
    seeds = [f"seed_{axis}" for axis in ("init", "data", "dropout", "eval")]
    columns = ["point", "replica", "role", "params", "learning_rate", *seeds]
    replicas = page.frame[columns].drop_duplicates(["point", "replica"])
    replicas = replicas.sort_values(["params", "point", "replica"])
    config = html.escape(json.dumps(study.get("config", {}), indent=2))
    listing = replicas.to_html(index=False, border=0)
    return (
        f"<section><h2>Provenance</h2><div class='wide'><table class='facts'>{rows}</table></div>"
        f"<details><summary>replicas and their seeds</summary><div class='wide'>{listing}</div>"
        f"</details><details><summary>configuration</summary><pre>{config}</pre></details>"
        f"<details><summary>what the study says of itself</summary><pre>"
        f"{html.escape(study.get('docstring') or '')}</pre></details></section>"
    )


def _cost(page: Content) -> str:
    keys = ("compile", "train", "eval", "total")
    rows = []
    for name, cell in page.cells.items():
        times = "".join(f"<td>{cell['seconds'].get(key) or 0:.1f}</td>" for key in keys)
        first = f"<th>{html.escape(name)}</th><td>{cell['status']}</td>"
        rows.append(f"<tr>{first}<td>{cell['attempts']}</td>{times}</tr>")
    total = "".join(f"<td>{page.analysis['seconds'][key]:.1f}</td>" for key in keys)
    head = "".join(f"<th>{t}</th>" for t in ("cell", "status", "attempts", *keys))
    return (
        "<section><h2>Cost in seconds</h2><div class='wide'><table class='numbers'>"
        f"<tr>{head}</tr>{''.join(rows)}<tr class='sum'><th>all</th><td></td><td></td>{total}</tr>"
        "</table></div></section>"
    )


def _rate(rungs: pd.DataFrame) -> pd.Series:
    return rungs["metric"] == "exact_match"


def _label(page: Content, task: str, level: str) -> str:
    """`words`, escaped for HTML."""
    return html.escape(words(page, task, level))


def _badge(name: str) -> str:
    return f'<span class="badge" style="background:{STYLE[name].colour}">{name}</span>'


def _distinct(values: Iterable[Any]) -> str:
    return ", ".join(sorted({str(v) for v in values if v is not None}))


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s of compute" if seconds < 120 else f"{seconds / 60:.1f} min of compute"


@cache
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, fit to stand inside a script element."""
    import vl_convert

    return vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub lags.replace("</script", "<\\/script")
