"""The second part of the page: one ability closer, chosen by the reader.

Its outputs under several metrics, its seeds, its time to emergence, what was predicted of it, its
collapse on loss and where its variance comes from. The charts are filled by the script; what is
said in words is written here for every ability, and the script shows that of the one chosen.
"""

import html
from typing import Any

from lm.emergence import plots
from lm.emergence.page_data import Content
from lm.emergence.page_facts import MIRAGE
from lm.emergence.page_verdicts import key, label
from lm.emergence.words import listed, p_value, si

OUTCOMES = {
    "emerged": "all emerged",
    "split": "some have",
    "not yet": "not yet",
    "cannot": "cannot",
}
PANELS = ("exact_match", *MIRAGE)


def closer(page: Content) -> str:
    """All panels of the chosen ability."""
    found = page.analysis["verdicts"]
    if not found:
        return ""
    first = _first(found)
    choice = "".join(
        f'<option value="{key(v)}"{" selected" if v is first else ""}>{html.escape(v["ability"])}: '
        f"{label(page, v)}</option>"
        for v in found
    )
    named = _each(found, first, lambda v: f"<p class='lead paper'>{label(page, v)}</p>")
    parts = [_mirage(found, first), _strips(found, first), _survival(found, first)]
    parts += [_predictions(page), _collapse(found, first), _variance(found, first)]
    return (
        "<section id='closer'><h2>One ability closer</h2><div class='toolbar'>"
        f"<label>ability <select id='ability'>{choice}</select></label></div>{named}"
        f"{''.join(parts)}</section>"
    )


def mirage_words(verdict: dict[str, Any]) -> str:
    """Which metrics of the same answers jump, which are smooth, and what that says."""
    metrics = dict(verdict["metrics"])
    if metrics.pop("tokens", "several") == "one":
        kept = [m for m in ("log_likelihood", "answer_probability", "brier") if metrics.get(m)]
        one = (
            "Its answers are one token: exact match, token accuracy and edit similarity are the "
            "same number, so the metric cannot make a jump out of several tokens."
        )
        metrics = {m: metrics[m] for m in ("exact_match", *kept)}
    else:
        one = ""
    if not metrics.get("exact_match"):
        return f"{one} Too few sizes or seeds to say which metrics jump.".strip()
    sharp = [m for m, s in metrics.items() if s["word"] == "sharp"]
    smooth = [m for m, s in metrics.items() if s["word"] == "smooth"]
    rest = {m: s["word"] for m, s in metrics.items() if m not in (*sharp, *smooth)}
    flat = [m for m, word in rest.items() if word == "flat"]
    unsure = [m for m, word in rest.items() if word != "flat"]
    said = [
        f"<b>{_capital(listed([plots.METRICS[m].partition(',')[0] for m in names]))}</b> {verb}."
        for names, verb in (
            (sharp, "jump" + "s" * (len(sharp) == 1)),
            (smooth, "change" + "s" * (len(smooth) == 1) + " smoothly"),
            (flat, "do not change" if len(flat) > 1 else "does not change"),
            (unsure, "cannot be decided"),
        )
        if names
    ]
    text = " ".join(said)
    if "exact_match" in sharp and smooth:
        text += " Where a metric of the same answers is smooth, the jump is in the metric."
    elif sharp and len(sharp) == len(metrics):
        text += " Every metric jumps: it is the answers that change."
    return f"{one} {text}".strip()


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _first(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The ability shown first: one whose metrics may disagree, then one that begins."""

    def worth(v: dict[str, Any]) -> tuple[bool, bool, bool]:
        several = v["metrics"].get("tokens") == "several"
        return (v["verdict"] == "metric-induced", v["onset_params"] is not None, several)

    return max(found, key=worth)


def _each(found: list[dict[str, Any]], first: dict[str, Any], say: Any) -> str:
    """What is said of each ability; the script shows one."""
    return "".join(
        f'<div class="of" data-task="{key(v)}"{"" if v is first else " hidden"}>{say(v)}</div>'
        for v in found
    )


def _mirage(found: list[dict[str, Any]], first: dict[str, Any]) -> str:
    figures = "".join(
        f'<figure class="closer mirage" data-chart="mirage" data-metric="{m}"><figcaption>'
        f"{plots.METRICS[m].partition(',')[0]}</figcaption><div class='plot'></div></figure>"
        for m in PANELS
    )
    words = _each(found, first, lambda v: f"<p>{mirage_words(v)}</p>")
    return (
        "<h3>One set of answers under six metrics</h3>"
        f"{words}<div class='panels mirages'>{figures}</div>"
        "<p class='small'>All six are computed from the same stored answers against the same "
        "sizes, so what differs between panels is the metric alone (Schaeffer et al. 2023). The "
        "dotted line is exact match if the tokens of an answer were independent; of the Brier "
        "score less is better.</p>"
    )


def _strips(found: list[dict[str, Any]], first: dict[str, Any]) -> str:
    return (
        "<h3>Every seed of every size</h3><div class='pair'>"
        "<figure class='closer' data-chart='strip'><div class='plot'></div></figure>"
        "<figure class='closer' data-chart='share'><div class='plot'></div></figure></div>"
        f"{_each(found, first, _groups)}<p class='small'>Blue broke through: above the dashed "
        "line, halfway from chance to the best size. Orange ticks are the means of the two groups, "
        "where a mixture of two beta-binomials beats one by 6 in BIC and they lie apart. The dip "
        "asks nothing of the shape, and needs some 15 seeds.</p>"
    )


def _groups(v: dict[str, Any]) -> str:
    rows = []
    for r in v["rungs"]:
        ends = f"{100 * r['share_low']:.0f}–{100 * r['share_high']:.0f}%"
        gain = "–" if r["gain"] is None else f"{r['gain']:+.0f}".replace("-", "−")
        word = "two groups" if r["bimodal"] else "one group"
        word = "too few seeds" if r["dip_p"] is None else word
        won = "–" if r["success"] is None else f"{r['success']:.2f}"
        cells = [si(r["params"]), f"{r['through']}/{r['seeds']}", ends, f"{r['mean']:.2f}", won]
        cells += [html.escape(p_value(r["dip_p"])), gain]
        row = "".join(f"<td class='nr'>{cell}</td>" for cell in cells)
        rows.append(f"<tr>{row}<td>{word}</td></tr>")
    titles = ("parameters", "through", "95%", "mean", "mean of those", "dip p", "ΔBIC")
    head = "".join(f"<th class='nr'>{t}</th>" for t in titles) + "<th>mixture</th>"
    return f"<div class='wide'><table><tr class='titles'>{head}</tr>{''.join(rows)}</table></div>"


def _survival(found: list[dict[str, Any]], first: dict[str, Any]) -> str:
    return (
        "<h3>Time to emergence</h3><div class='pair'>"
        "<figure class='closer' data-chart='survival'><div class='plot'></div></figure>"
        f"<div>{_each(found, first, _times)}</div></div><p class='small'>Kaplan and Meier’s "
        "estimate of the share of replicas that has crossed the halfway mark, size by size. A bar "
        "across a line is a replica that had not when its training ended.</p>"
    )


def _times(v: dict[str, Any]) -> str:
    found = v["survival"]
    if found is None:
        return "<p class='small'>No time to emergence: no chance, or no finite score.</p>"
    rows = []
    for size in found["sizes"]:
        low, high = size["median_ci"]
        band = f"{si(low)} to {'∞' if high is None else si(high)}" if low is not None else "–"
        cells = (si(size["params"]), f"{size['emerged']}/{size['replicas']}", si(size["median"]))
        row = "".join(f"<td class='nr'>{cell}</td>" for cell in cells)
        outcome = OUTCOMES[size["outcome"]]
        rows.append(f"<tr>{row}<td class='nw'>{band}</td><td class='nw'>{outcome}</td></tr>")
    head = "".join(f"<th class='nr'>{t}</th>" for t in ("parameters", "emerged", "median tokens"))
    test, word = found["log_rank"], ""
    if test["p"] is not None:
        word = (
            f"<p>Sizes differ in their time to emergence: log-rank χ² = {test['chi2']:.1f}, "
            f"{test['freedom']} degrees of freedom, p = {html.escape(p_value(test['p']))} by "
            "permutation.</p>"
            if test["p"] < 0.05
            else f"<p>The log-rank test sees no difference in time between sizes, p = "
            f"{p_value(test['p'])}.</p>"
        )
    return (
        f"{word}<div class='wide'><table><tr class='titles'>{head}<th>95%</th><th></th></tr>"
        f"{''.join(rows)}</table></div>{_waiting(found['sizes'])}"
    )


def _waiting(sizes: list[dict[str, Any]]) -> str:
    """What is said of sizes of which no replica emerged: `cannot` against `not yet`."""
    said = []
    for outcome, why in (
        ("not yet", "were not watched long enough to say: longer training may decide"),
        (
            "cannot",
            "were watched at least four times the median of the next larger size that has "
            "one: if it were a matter of waiting, it would have begun",
        ),
    ):
        names = [si(size["params"]) for size in sizes if size["outcome"] == outcome]
        if names:
            said.append(f"<p class='small'><b>{outcome}</b>: {listed(names)} {why}.</p>")
    return "".join(said)


def _predictions(page: Content) -> str:
    found = page.analysis["predictions"]
    problems = "".join(f"<p class='note'>{html.escape(p)}</p>" for p in found["problems"])
    if not found["files"]:
        how = f"lm predict {html.escape(page.folder)} --up_to=SIZE"
        return (
            f"<h3>Predictions</h3>{problems}<p class='small'>Nothing was predicted. <code>{how}"
            "</code> freezes what larger sizes will do, before they are run; they are scored here "
            "when they have finished.</p>"
        )
    files = "".join(_frozen(file) for file in found["files"])
    figure = "<figure class='closer' data-chart='prediction'><div class='plot'></div></figure>"
    head = "".join(
        f"<th>{t}</th>" for t in ("prediction", "frozen", "up to", "sizes predicted", "SHA-256")
    )
    return (
        f"<h3>Predictions</h3>{problems}<div class='wide'><table><tr class='titles'>{head}</tr>"
        f"{files}</table></div><div class='pair'>{figure}<div>{_scores(found['scores'])}"
        "</div></div>"
        "<p class='small'>Grey seeds were known to the prediction. Green: median, central 80% "
        "(wide) and 95% of what a new seed was predicted to score; the last file frozen is shown. "
        "Blue came: circles after the prediction was frozen, diamonds (post hoc) had begun before. "
        "<b>onset</b> is our model; <b>last</b> repeats the largest size seen, <b>line</b> is a "
        "regression on log size. CRPS is in units of the metric, less is better; skill is 1 − "
        "CRPS/CRPS(line). Tables are of all abilities.</p>"
    )


def _frozen(file: dict[str, Any]) -> str:
    sizes = [f"{si(t['params'])}{' (post hoc)' if t['begun'] else ''}" for t in file["targets"]]
    given = f"{html.escape(str(file['up_to']['given']))} ({si(file['up_to']['params'])})"
    frozen = html.escape(file["time"][:19].replace("T", " "))
    cells = (html.escape(file["name"]), frozen, given, ", ".join(sizes))
    row = "".join(f"<td>{cell}</td>" for cell in cells)
    return f"<tr>{row}<td><code>{html.escape(file['sha256'][:12])}</code></td></tr>"


def _scores(scores: list[dict[str, Any]]) -> str:
    rows = []
    for s in scores:
        if s["task"] != "all" or s["beyond"] != "all":
            continue
        skill = "–" if s["skill"] is None else f"{s['skill']:+.2f}".replace("-", "−")
        kind = "pre-registered" if s["registered"] else "post hoc"
        metric = plots.METRICS.get(s["metric"], s["metric"]).partition(",")[0]
        cells = (str(s["n"]), f"{s['in80']:.0%}", f"{s['in95']:.0%}", f"{s['crps']:.3g}", skill)
        row = "".join(f"<td class='nr'>{cell}</td>" for cell in cells)
        rows.append(f"<tr><td>{kind}</td><td>{metric}</td><td>{s['model']}</td>{row}</tr>")
    if not rows:
        return "<p>Nothing that was predicted has finished yet.</p>"
    head = "<th></th><th>metric</th><th>model</th>" + "".join(
        f"<th class='nr'>{t}</th>" for t in ("seeds", "in 80%", "in 95%", "CRPS", "skill")
    )
    return f"<div class='wide'><table><tr class='titles'>{head}</tr>{''.join(rows)}</table></div>"


def _collapse(found: list[dict[str, Any]], first: dict[str, Any]) -> str:
    if not any(v["collapse"] for v in found):
        return ""
    figures = "".join(
        f'<figure class="closer" data-chart="collapse" data-x="{x}"><div class="plot"></div>'
        "</figure>"
        for x in ("text_loss", "flops")
    )
    return (
        "<h3>Collapse on loss</h3>"
        f"{_each(found, first, _collapse_words)}<div class='pair'>{figures}</div>"
        "<p class='small'>If the loss alone decides what a model can do, all sizes lie on one "
        "curve against it (Du et al. 2024). RMSE is that of a size predicted from all others by a "
        "monotone fit.</p>"
    )


def _collapse_words(v: dict[str, Any]) -> str:
    if not v["collapse"]:
        return "<p class='small'>Too few sizes, or a score that never changes.</p>"
    names = {"loss": "text loss", "flops": "FLOPs", "params": "parameters"}
    loss, *others = v["collapse"]
    parts = []
    for c in others:
        low, high = c["excess_ci"]
        word = "worse" if low > 0 else "better" if high < 0 else "no different"
        parts.append(
            f"{word} against {names[c['axis']]} ({c['rmse']:.3f}; difference {c['excess']:+.3f}, "
            f"95% {low:+.3f} to {high:+.3f})"
        )
    text = f"A size left out is predicted from the others with RMSE <b>{loss['rmse']:.3f}</b> "
    return f"<p>{text}against text loss; {'; '.join(parts)}.</p>".replace("-0.", "−0.")


def _variance(found: list[dict[str, Any]], first: dict[str, Any]) -> str:
    if not any(v["variance"] for v in found):
        return ""
    return (
        "<h3>Where the variance comes from</h3>"
        f"{_each(found, first, _components)}<p class='small'>Variance components of exact match at "
        "the end of training, by the method of moments; 95% generalised intervals. Seeds belong to "
        "their size; the rest holds what no other part does.</p>"
    )


def _components(v: dict[str, Any]) -> str:
    found = v["variance"]
    if found is None:
        return "<p class='small'>Tested in one format only.</p>"
    rows = []
    for c in sorted(found["components"], key=lambda c: -c["variance"]):
        share = c["share"] or 0.0
        bar = f"<span class='bar' style='width:{6 * share:.2f}rem'></span> {share:.0%}"
        low, high = c["ci"]
        sign = " (estimate below 0)" if c["negative"] else ""
        rows.append(
            f"<tr><th>{html.escape(c['effect'].replace(':', ' × '))}</th><td>{bar}</td>"
            f"<td class='nr'>{c['variance']:.2g}</td><td>{low:.2g} to {high:.2g}{sign}</td></tr>"
        )
    means = ", ".join(f"{f}: {m:.2f}" for f, m in found["formats"].items())
    head = "<th></th><th>share</th><th class='nr'>variance</th><th>95%</th>"
    return (
        f"<p>Mean exact match by format {means}.</p><div class='wide'><table>"
        f"<tr class='titles'>{head}</tr>{''.join(rows)}</table></div>"
    )
