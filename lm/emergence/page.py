"""The page of a study: one HTML file with its data, its charts and the code that draws them.

Each section is a function from the content to HTML. A script fills the chart templates when the
reader changes the metric, the x-axis or the ability. Vega is inlined through vl-convert, so the
page works from a disk, offline, in ten years.
"""

import html
import json
from collections.abc import Iterable
from functools import cache
from typing import Any

from lm.emergence.page_assets import CSS
from lm.emergence.page_closer import closer
from lm.emergence.page_data import Content, browser_data
from lm.emergence.page_script import SCRIPT
from lm.emergence.page_verdicts import breakthroughs, head, multiples, verdicts

ORIGIN = """<aside id="origin" role="dialog" aria-label="where a mark comes from" hidden>
<header><b>Where it comes from</b><button aria-label="close">×</button></header><dl></dl>
<code></code></aside>"""


def render(page: Content) -> str:
    """The page as HTML."""
    name = html.escape(page.analysis["study"])
    sections = [head(page)]
    if page.analysis["verdicts"]:  # a study of texts has none
        sections += [verdicts(page), multiples(page), breakthroughs(page), closer(page)]
    sections += [_scores(page), _training(page), _scaling(page), _provenance(page), _cost(page)]
    data = json.dumps(browser_data(page), separators=(",", ":"), allow_nan=False)
    return "\n".join(
        [
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{name}: where abilities begin</title><style>{CSS}</style></head><body><main>",
            *sections,
            f"</main>{ORIGIN}",
            f'<script type="application/json" id="data">{data.replace("</", "<\\/")}</script>',
            f"<script>{_vega()}</script><script>{SCRIPT}</script></body></html>",
        ]
    )


def _scores(page: Content) -> str:
    figures = "".join(
        f'<figure class="score" data-index="{i}"><div class="plot"></div></figure>'
        for i in range(len(page.scores))
    )
    if not figures:
        return ""
    return f"<section><h2>Scores against size</h2><div class='pair'>{figures}</div></section>"


def _training(page: Content) -> str:
    here = {tuple(key) for key in page.rungs[["task", "level", "metric"]].drop_duplicates().values}
    wanted = [("text", "test", "nll"), ("train", "mixture", "loss")]
    figures = "".join(
        f'<figure class="path" data-task="{task}/{level}" data-metric="{metric}">'
        '<div class="plot"></div></figure>'
        for task, level, metric in wanted
        if (task, level, metric) in here
    )
    if not figures:
        return ""
    return f"<section><h2>Loss during training</h2><div class='pair'>{figures}</div></section>"


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
    config = html.escape(json.dumps(study.get("config", {}), indent=2))
    listing = page.replicas[columns].to_html(index=False, border=0)
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
        "<section><h2>Cost in seconds</h2><div class='wide cost'><table class='numbers'>"
        f"<tr>{head}</tr>{''.join(rows)}<tr class='sum'><th>all</th><td></td><td></td>{total}</tr>"
        "</table></div></section>"
    )


def _distinct(values: Iterable[Any]) -> str:
    return ", ".join(sorted({str(v) for v in values if v is not None}))


@cache
def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script, fit to stand inside a script element."""
    import vl_convert

    return vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub lags.replace("</script", "<\\/script")
