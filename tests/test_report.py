"""The report of a run directory written as a study writes it, and its page in a real browser."""

import dataclasses
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from desk import CONTROL, LADDER, STEPS, TASKS, run_directory

from lm.config import UserError
from lm.emergence import (
    metrics,
    page_closer,
    page_data,
    page_facts,
    planted,
    plots,
    predict,
    report,
    table,
)
from lm.rundir import read_json, read_lines, write_json


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A reported study."""
    path = run_directory(tmp_path_factory.mktemp("runs") / "desk")
    report.write(path)
    return path


def test_the_analysis_says_what_was_planted(study):
    """Fails if the keys of the contract change, controls are fitted, or seconds are not summed."""
    analysis = read_json(study / "analysis.json")
    assert (analysis["study"], analysis["points"], analysis["replicas"]) == ("desk", 8, 30)
    assert analysis["rows"] == 30 * len(STEPS) * (6 * len(TASKS) + 3)
    found = {v["task"]: v for v in analysis["verdicts"]}
    words = {task: verdict["verdict"] for task, verdict in found.items()}
    assert words == {"recall": "emergent", "random_labels": "flat", "bigram": "smooth"}
    low, high = found["recall"]["ci95"]
    assert 1100 < low <= found["recall"]["onset_params"] <= high < 6300
    assert found["bigram"]["onset_params"] is None and found["bigram"]["ci95"] is None
    contract = ("task", "level", "metric", "verdict", "onset_params", "ci95", "chance")
    assert all(set(contract) <= set(verdict) for verdict in found.values())
    assert (found["recall"]["seeds"], found["recall"]["sizes"]) == (27, 7)
    assert analysis["scaling"]["alpha"] > 0 and analysis["scaling"]["n"] == 27
    assert analysis["seconds"]["compile"] == pytest.approx(8 * 5.0)
    assert analysis["table_sha256"] == table.table_sha256(table.load(study))
    assert analysis["notes"] == []


def test_the_analysis_has_the_statistics_of_every_ability(study):
    """Catches a statistic that is left out, tested on the wrong rows, or given for another task."""
    verdicts = read_json(study / "analysis.json")["verdicts"]
    assert [v["task"] for v in verdicts] == ["recall", "bigram", "random_labels"]  # by ability
    recall, bigram, labels = verdicts
    assert recall["ability"] == "in-context" and labels["ability"] == "control"
    assert recall["p_holm"] < 1e-6 and labels["p_holm"] == 1 and recall["tests"] == 7 * 3
    assert 0 < labels["detectable"] < 0.1
    assert recall["screen"]["breakthroughness"]["value"] > bigram["screen"]["linearity"]["value"]
    words = {m: s["word"] for m, s in recall["metrics"].items() if m != "tokens"}
    assert words == dict.fromkeys(words, "sharp") and "log_likelihood" in words
    assert recall["metrics"]["tokens"] == "one"  # no independent match: answers of one token
    shares = {r["params"]: (r["through"], r["seeds"], r["bimodal"]) for r in recall["rungs"]}
    assert shares[1568] == (2, 6, True) and shares[24704] == (3, 3, False)
    split = next(r for r in recall["rungs"] if r["params"] == 1568)
    assert split["groups"] == pytest.approx([0.22, 0.99], abs=0.03)
    sizes = {s["params"]: s for s in recall["survival"]["sizes"]}
    assert (sizes[1568]["outcome"], sizes[1568]["emerged"]) == ("split", 2)
    assert sizes[400]["outcome"] == "not yet" and sizes[24704]["median"] == 1000 * 2048
    assert recall["survival"]["log_rank"]["p"] < 0.05
    assert [c["axis"] for c in recall["collapse"]] == ["loss", "flops", "params"]
    assert recall["variance"] is None


@pytest.mark.parametrize("change", ["nothing", "no page", "a row", "a result"])
def test_the_report_is_written_again_when_something_changed(study, tmp_path, monkeypatch, change):
    """Fails if a finished report is computed twice, or a changed study keeps its old report."""
    copy = tmp_path / "desk"
    shutil.copytree(study, copy)
    if change == "no page":
        (copy / "report.html").unlink()
    if change == "a row":
        row = table.load(copy).iloc[0].to_dict() | {"step": 2001}
        with table.RowWriter(copy / row["cell"] / "rows.jsonl") as writer:
            writer.append([row])
    if change == "a result":
        (copy / "n784" / "result.json").unlink()
    monkeypatch.setattr(report, "_analyse", lambda *_: pytest.fail("computed again"))
    if change == "nothing":
        assert report.write(copy) == copy / "report.html"
        return
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        report.write(copy)


def test_an_up_to_date_report_needs_no_heavy_library(study):
    """Fails if `lm report` on a finished study imports pandas, SciPy or Altair."""
    code = "import sys; from lm.emergence import report; report.main(sys.argv[1:2] + ['--json']); "
    code += "assert not {'pandas', 'scipy', 'altair', 'jax'} & set(sys.modules), 'heavy'"
    done = subprocess.run([sys.executable, "-c", code, str(study)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["study"] == "desk"


def test_the_page_needs_nothing_but_itself(study):
    """Fails if the page loads anything, or text of a study can end its script."""
    page = (study / "report.html").read_text()
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(?:src|href)\s*=\s*["']?\s*(?:https?:)?//""", own)
    assert not re.search(r"""<(?:script|link|img|iframe)[^>]*(?:src|href)=""", own)
    assert page.count("<script") == page.count("</script") == 3  # data, Vega, ours
    assert "More &lt;/script&gt; text" in own
    assert len(page) < 2_500_000


def test_the_figures_are_pictures(study):
    """Fails if a figure is missing; that text is drawn is seen by the bytes of its ink."""
    names = {path.stem for path in (study / "figures").glob("*.png")}
    assert {"recall-1-exact_match", "recall-1-nll", "recall-1-share", "text-law"} <= names
    for path in (study / "figures").glob("*.png"):
        data = path.read_bytes()
        assert data[:4] == b"\x89PNG" and 5_000 < len(data) < 200_000, path


def test_the_words_say_which_metrics_jump():
    """Catches an answer of one token told as a mirage, and a mirage that is not told."""
    shape = {name: {"word": name} for name in ("sharp", "smooth", "flat", "undecided")}
    induced = {"exact_match": shape["sharp"], "token_accuracy": shape["smooth"]}
    told = page_closer.mirage_words({"metrics": {**induced, "tokens": "several"}})
    assert "<b>Exact match</b> jumps" in told and "the jump is in the metric" in told
    both = {"exact_match": shape["sharp"], "brier": shape["sharp"], "tokens": "one"}
    told = page_closer.mirage_words({"metrics": both})
    assert "are the same number" in told and "it is the answers that change" in told
    unsure = {"exact_match": shape["flat"], "brier": shape["undecided"], "tokens": "several"}
    told = page_closer.mirage_words({"metrics": unsure})
    assert "does not change" in told and "cannot be decided" in told and "jump" not in told
    told = page_closer.mirage_words({"metrics": {"exact_match": None}})
    assert told == "Too few sizes or seeds to say which metrics jump."


@pytest.fixture(scope="module")
def made(study):
    """What the page of the reported study is made of."""
    about = read_json(study / "analysis.json"), report._study(study), report._cells(study)
    return page_data.content(table.load(study), *about, study.name)


def test_the_browser_gets_every_value_once(study, made, monkeypatch):
    """Catches values joined with another evaluation, and a last evaluation lost by thinning."""
    frame = table.load(study)
    at, values = page_data._values(made)
    row = frame[(frame["point"] == "n6208") & (frame["replica"] == 1) & (frame["step"] == 64)]
    wanted = row[(row["task"] == "bigram") & (row["metric"] == "nll")]["value"].item()
    replicas = list(made.replicas[["point", "replica"]].itertuples(index=False, name=None))
    replica = replicas.index(("n6208", 1))
    e = list(zip(at["replica"], at["step"], strict=True)).index((replica, 64))
    found = values["bigram/1/nll"]
    assert found["v"][at["grids"][found["grid"]].index(e)] == pytest.approx(wanted, rel=1e-3)
    assert len(found["v"]) == 30 * len(STEPS) and len(found["last"]) == len(found["se"]) == 30
    monkeypatch.setattr(page_data, "MOST_VALUES", 2000)
    thin = page_data._values(made)[1]["bigram/1/nll"]
    assert len(thin["v"]) < len(found["v"]) and len(thin["last"]) == 30


def test_scores_without_a_verdict_stand_beside_their_baseline(study):
    """Catches a baseline of another metric or level, one drawn as a score, and a lost chance."""
    frame = table.load(study)
    rows = frame[(frame["task"] == "text") & (frame["metric"] == "nll")]

    def as_if(task, level, metric, value, chance=np.nan):
        new = {"task": task, "level": level, "metric": metric, "value": value, "chance": chance}
        return rows.assign(**new)

    frame = pd.concat(
        [
            frame,
            *(as_if("pairs", "de", *score) for score in (("chrf", 40.0), ("copy_chrf", 30.0))),
            *(as_if("pairs", "zh", *score) for score in (("bleu", 9.0), ("copy_chrf", 8.0))),
            as_if("text", "test", "masked_accuracy", 0.5, 0.25),
        ]
    )
    found = page_data.scores(frame, plots.rung_table(frame))
    assert [(s["title"], s["chance"]) for s in found] == [
        ("pairs de: chrF", [{"value": 30.0, "label": "copy"}]),
        ("pairs zh: BLEU", []),
        ("text test: accuracy of masked tokens", [{"value": 0.25, "label": "baseline"}]),
    ]


def test_predictions_are_shown_as_what_they_were(study, made, tmp_path):
    """Catches a post hoc prediction shown as registered, and a changed file that is scored."""
    assert "lm predict desk --up_to=SIZE" in page_closer.closer(made)
    path = tmp_path / "desk"
    shutil.copytree(study, path)
    entry = {
        **{"task": "recall", "level": "1", "metric": "exact_match", "params": 55296.0},
        **{"median": 0.99, "i80": [0.9, 1.0], "i95": [0.8, 1.0]},
        "quantiles": {m: np.linspace(0.8, 1.0, 100).tolist() for m in ("onset", "last", "line")},
    }
    frozen = {
        **{"study": "desk", "up_to": {"given": "24704", "params": 24704.0}, "rows": 1},
        **{"time": "2026-01-01T00:00:00.000+00:00", "sizes": [400, 24704], "git_commit": "abc"},
        "targets": [{"params": 55296.0, "points": ["n55296"], "begun": ["n55296"]}],
        **{"predictions": [entry], "version": "0.1.0"},
    }
    digest = predict.sha256(frozen)
    (path / "predictions").mkdir()
    file = path / "predictions" / f"24704-{digest[:12]}.json"
    write_json(file, {"sha256": digest, "content": frozen})
    assert not report._fresh(path)
    found = report._predictions(path, predict.finished(path))
    assert [c["registered"] for c in found["came"]] == [False] * 3
    analysis = made.analysis | {"predictions": found}
    shown = page_closer.closer(dataclasses.replace(made, analysis=analysis))
    assert "55.3k (post hoc)" in shown and digest[:12] in shown and "pre-registered" not in shown
    recall, bigram, _ = analysis["verdicts"]
    page = dataclasses.replace(made, analysis=analysis)
    (bands,) = page_data._task(page, recall)["predictions"]
    assert bands["bands"][0]["low95"] == 0.8 and bands["late"] == [55296.0]
    assert page_data._task(page, bigram)["predictions"] == []
    write_json(file, {"sha256": digest, "content": frozen | {"rows": 2}})
    found = report._predictions(path, predict.finished(path))
    assert not found["files"] and "has changed" in found["problems"][0]


def test_variance_is_taken_from_the_stored_answers(tmp_path):
    """Catches items of one format paired with another's, seeds beyond the fewest, a lost file."""
    values = {784: [0.5, 0.5, 0.5], 6208: [0.5, 0.5]}
    rows = planted.table({"exact_match": values}, task="hop")
    rows["level"], rows["cell"] = "2", "one"
    both = pd.concat([rows, rows.assign(format=1)], ignore_index=True)
    hard = np.arange(8) < 4  # the items that format 1 gets wrong
    folder = tmp_path / "one" / "answers"
    folder.mkdir(parents=True)
    for row in rows.itertuples():
        stored = {}
        for form in (0, 1):
            target = np.full((8, 2), 5, np.int32)
            target[:, 1] = -1
            greedy = np.where((hard & (form == 1))[:, None], 6, 5).astype(np.int32)
            stored |= {f"hop.2.{form}.target": target, f"hop.2.{form}.greedy": greedy}
        path = "one/" + metrics.answers_file(row.step, row.point, row.replica)
        np.savez(tmp_path / path, **stored)
    hits = page_facts._hits(both, {("hop", "2")}, tmp_path)[("hop", "2")]
    assert hits.shape == (2, 2, 2, 8)
    assert (hits[:, :, 0] == 1).all() and (hits[:, :, 1] == ~hard).all()
    ability = page_facts.Ability("hop", "2", both, both, hits)
    found = page_facts._variance(pickle.loads(pickle.dumps(ability)))
    parts = {c["effect"]: c["share"] for c in found["components"]}
    assert parts["format:item"] > 0.3 and parts["size"] < 0.01
    next(folder.iterdir()).unlink()
    assert page_facts._hits(both, {("hop", "2")}, tmp_path) == {}


def test_the_terminal_fits_many_abilities(capsys):
    """Catches a table that is wider than 100 columns, or cuts a name or a number."""
    row = {
        **{"task": "reversed_addition", "level": "97", "verdict": "metric-induced"},
        **{"onset_params": 1.234e6, "ci95": [1.111e6, 2.345e6], "p_holm": 1e-9},
        "reason": "exact match jumps; whether nll does AICc cannot decide",
    }
    rows = [row | {"ability": ability} for ability in ("in-context", "logic") for _ in range(12)]
    analysis = {"verdicts": rows, "scaling": {"alpha": None}, "notes": []}
    report.show(analysis, Path("report.html"))
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    line = next(line for line in out.splitlines() if "reversed_addition" in line)
    assert re.search(r"97\s+metric-induced\s+1.23M\s+1.11M to 2.35M\s+1e-9", line)
    assert out.count("logic") == 1 and "decide" in out


def test_the_terminal_has_the_verdicts_and_the_path(study, capsys):
    """Fails if a line is wider than 100 columns or the path is wrapped."""
    assert report.main([str(study)]) == 0
    out = capsys.readouterr().out
    assert f"page: {study / 'report.html'}" in out
    assert re.search(r"recall\s+1\s+emergent\s+1\.\d+k", out)
    assert max(len(line) for line in out.splitlines() if not line.startswith("page:")) <= 100


def test_an_unfinished_study_is_reported_as_far_as_it_is(tmp_path):
    """Fails if a half-trained cell is fitted as if it had ended, or is not mentioned."""
    path = run_directory(tmp_path / "desk", steps=(0, 16, 250), unfinished=("n6208", "n55296"))
    analysis = report.analyse(path)
    assert "6 of 8 cells are done" in analysis["notes"][0]
    assert all(verdict["sizes"] == 5 for verdict in analysis["verdicts"])
    for name in LADDER:
        (path / f"n{name}" / "result.json").unlink(missing_ok=True)
    (path / f"n{CONTROL}" / "result.json").unlink()
    page = report.write(path)
    assert read_json(path / "analysis.json")["verdicts"] == []
    assert "0 of 8 cells are done" in page.read_text()


def test_a_diverged_replica_is_counted_and_not_fitted(tmp_path, monkeypatch):
    """Fails if NaN reaches a fit, the page's JSON, or goes without a word."""
    path = run_directory(tmp_path / "desk", steps=(0, 2000))
    rows = table.load(path)
    row = rows[(rows["cell"] == "n24704") & (rows["metric"] == "loss")].iloc[0].to_dict()
    row |= {"step": 1500, "value": None, "stderr": None, "chance": None, "status": "diverged"}
    with table.RowWriter(path / "n24704" / "rows.jsonl") as writer:
        writer.append([row])
    monkeypatch.setattr(page_data, "figures", lambda *_: {})
    page = report.write(path)
    analysis = read_json(path / "analysis.json")
    assert "Diverged replicas: 1;" in analysis["notes"][0]
    assert {verdict["diverged"] for verdict in analysis["verdicts"]} == {1}
    assert "NaN" not in re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1]


def test_what_cannot_be_reported_is_the_users_mistake(tmp_path):
    """Fails with a traceback where there is no study, no row, or no folder."""
    with pytest.raises(UserError, match="is not a folder|has no study.json"):
        report.write(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no study.json"):
        report.write(tmp_path)
    write_json(tmp_path / "study.json", {"name": "empty"})
    with pytest.raises(UserError, match="has no rows yet"):
        report.write(tmp_path)
    assert not (tmp_path / "analysis.json").exists()


BROWSER = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
WATCH = """<script>
window.addEventListener("error", e => document.body.dataset.error = e.message);
window.addEventListener("unhandledrejection", e => document.body.dataset.error = e.reason);
</script>"""
CHANGE = """<script>
const wait = setInterval(() => {
  if (document.body.dataset.ready !== "yes") return;
  clearInterval(wait);
  const mark = document.querySelector("figure.curve .mark-symbol path");
  mark.dispatchEvent(new MouseEvent("click", {bubbles: true}));
  const choose = (id, value) => {
    document.getElementById(id).value = value;
    document.getElementById(id).dispatchEvent(new Event("change"));
  };
  choose("ability", "bigram/1");
  document.getElementById("metric").value = "nll";
  choose("x", "text_loss");
}, 50);
</script>"""


def browse(page, folder):
    """The DOM of a page once its script has run; fails with what the console or the script says."""
    copy = folder / "page.html"
    copy.write_text(page)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    options += ["--disable-component-update", "--disable-sync", "--no-first-run", "--dump-dom"]
    options += [f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=30000"]
    options += ["--enable-logging=stderr", copy.as_uri()]
    done = subprocess.run([BROWSER, *options], capture_output=True, text=True, timeout=120)
    errors = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    said = re.findall("data-error=[^>]*", done.stdout)
    assert not errors and not said, (errors, said)
    return done.stdout


@pytest.mark.skipif(not BROWSER, reason="no Chromium: apt-get install chromium")
def test_the_page_draws_and_its_switches_work(study, tmp_path):
    """Fails if a chart is empty, the script raises, changing metric, axis or ability draws nothing,
    or a mark does not say where it comes from.
    """
    page = (study / "report.html").read_text()
    head, _, tail = page.rpartition("</body>")
    dom = browse(f"{WATCH}{head}{CHANGE}</body>{tail}", tmp_path)
    assert 'data-drawn="nll text_loss"' in dom
    charts = re.findall(r"<figure.*?</figure>", dom, re.DOTALL)
    drawn = {name: [c for c in charts if f'"{name}"' in c and "<svg" in c] for name in KINDS}
    assert {name: len(found) for name, found in drawn.items()} == KINDS
    recall = next(c for c in drawn["curve"] if 'data-task="recall/1"' in c)
    assert len(re.findall(r'aria-roledescription="point"', recall)) >= 27  # every seed
    assert 'data-closer="bigram/1"' in dom
    origin = re.search(r'<aside id="origin".*?</aside>', dom, re.DOTALL)[0]
    assert "hidden" not in origin.partition(">")[0]
    assert "n400/answers/00002000-n400-0.npz" in origin and "abc123" in origin
    assert re.search(r"lm explain \S+ n400<", origin)


# Figures with a drawing: abilities, metrics of a one-token answer, closer looks, losses, the law.
KINDS = {"curve": 3, "closer mirage": 5, "closer": 5, "path": 2, "law": 1}


@pytest.mark.skipif(not BROWSER, reason="no Chromium: apt-get install chromium")
def test_a_study_of_texts_alone_is_drawn(tmp_path, capsys):
    """Breaks if a study without exact match has a page whose script stops at the verdicts that are
    not there, a figure without its baseline, or an empty table in the terminal.
    """
    path = run_directory(tmp_path / "texts", steps=(0, 250))
    study = read_json(path / "study.json")
    write_json(path / "study.json", study | {"tasks": []})
    for cell in path.glob("n*"):
        rows, _ = read_lines(cell / "rows.jsonl")
        (cell / "rows.jsonl").unlink()
        kept = [row for row in rows if row["metric"] == "bpb"]
        scored = {"task": "translation", "level": "de"}
        with table.RowWriter(cell / "rows.jsonl") as writer:
            for metric in ("bleu", "copy_bleu"):
                writer.append([row | scored | {"metric": metric} for row in kept])
    assert report.main([str(path)]) == 0
    assert "begins at" not in capsys.readouterr().out
    assert [p.stem for p in (path / "figures").glob("*.png")] == ["translation-de-bleu"]
    page = (path / "report.html").read_text()
    dom = browse(page.replace("<head>", f"<head>{WATCH}", 1), tmp_path)
    assert 'data-ready="yes"' in dom
    figure = re.search('<figure class="score".*?</figure>', dom, re.DOTALL)[0]
    assert "translation de: BLEU" in figure and ">copy<" in figure
    assert len(re.findall(r'aria-roledescription="point"', figure)) == 30
