"""Other people's ladders: the table of models, items as text, metrics, and a study of tiny ones."""

import json

import numpy as np
import pytest
from others import tiny

from experiments import external
from experiments.external import read_models
from experiments.own import Record
from experiments.study import load, with_overrides
from lm import tasks
from lm.config import UserError
from lm.eval.continuations import Likelihood
from lm.rundir import read_lines

SETTINGS = external.EvalSettings(("recall/5", "addition/1"), 6, 2, 0, "", 1)


def test_a_table_names_models_and_their_tokens(tmp_path):
    table = tmp_path / "models.tsv"
    table.write_text(
        "# a comment\nsmall 3e11\n\nbig/model.Q4.gguf\t2e12\tbig  # more\nruns/2x8:1\n"
    )
    assert read_models(str(table), "") == [
        (str(tmp_path / "small"), 3e11, "small"),
        (str(tmp_path / "big/model.Q4.gguf"), 2e12, "big"),
        (str(tmp_path / "runs/2x8:1"), 0.0, "2x8-1"),
    ]
    assert read_models("a.gguf, b", "1e9,2e9") == [("a.gguf", 1e9, "a"), ("b", 2e9, "b")]


@pytest.mark.parametrize(
    ("models", "tokens", "says"),
    [
        ("a,b", "1e9", "config.tokens has 1 numbers for 2 models"),
        ("a,b", "1e9,many", "tokens are 'many'; give a number"),
        ("a", "nan", "tokens are 'nan'"),
        ("TABLE", "1e9", "a table has them in its lines"),
    ],
)
def test_a_table_that_cannot_be_read_is_one_sentence(tmp_path, models, tokens, says):
    table = tmp_path / "models.tsv"
    table.write_text("a 1 b c\n")
    with pytest.raises(UserError, match=says):
        read_models(str(table) if models == "TABLE" else models, tokens)
    with pytest.raises(UserError, match="line 1 has 4 words"):
        read_models(str(table), "")


def test_models_of_one_name_are_refused():
    config = external.get_config()
    config.models = "a/model.gguf,b/model.gguf"
    with pytest.raises(UserError, match="has 'model' twice"):
        external.points(config)


def test_items_are_shown_examples_and_end_their_line():
    """Two answered questions, then the item's; a space belongs to the answer."""
    (name, level, chance, items), _ = external.ask(SETTINGS, bare=False)
    assert (name, level, len(items)) == ("recall", "5", 6)
    assert chance == tasks.chance(tasks.task("recall", "5")).value
    test = tasks.items(tasks.task("recall", "5"), "test", 0, 6)
    for item, example in zip(items, test, strict=True):
        assert item.context.count("Q: ") == item.context.count("\nA:") == 3
        assert item.context.endswith(f"\n\nQ: {example.prompt}\nA:")
        assert (item.answer, item.tail) == (" " + example.answer, "\n\nQ: ")
        assert item.choices[0] == item.answer and len(item.choices) == 4
        assert sorted(item.choices) == sorted(" " + choice for choice in example.choices)
    heads = {item.context.rpartition("Q: ")[0] for item in items}
    assert len(heads) == 1  # one trunk
    shown = tasks.items(tasks.task("recall", "5"), "train", 0, 2)
    assert all(e.prompt in heads.copy().pop() for e in shown)


def test_a_cell_of_ours_is_asked_what_it_was_trained_on():
    (_, _, _, items), _ = external.ask(SETTINGS, bare=True)
    example = tasks.items(tasks.task("recall", "5"), "test", 0, 6)[0]
    assert items[0].context == example.prompt and items[0].answer == example.answer
    assert items[0].tail == ""


def test_files_are_asked_beside_the_suite(tmp_path):
    records = [
        {"input": f"Is {n} even?\nOptions:\n- Yes\n- No", "target": "Yes"} for n in (2, 4, 6)
    ]
    (tmp_path / "even.json").write_text(json.dumps({"examples": records}))
    settings = external.EvalSettings((), 9, 0, 0, str(tmp_path), 1)
    ((task, level, chance, items),) = external.ask(settings, bare=False)
    assert (task, level, chance, len(items)) == ("bbh", "even", 1.0, 2)
    assert items[0].context.startswith("Q: Is 2 even?") and items[0].context.endswith("\nA:")
    assert items[0].choices == (" Yes", " No")
    assert not list(external.ask(settings, bare=True))


def test_what_goes_on_begins_where_the_ids_differ():
    """Also where the first token of an answer swallows the last of its context."""
    asked = external._request([1, 2, 3], [1, 2, 3, 4, 5])
    assert (asked.context.tolist(), asked.continuation.tolist()) == ([1, 2, 3], [4, 5])
    merged = external._request([1, 2, 3], [1, 2, 9, 5])
    assert (merged.context.tolist(), merged.continuation.tolist()) == ([1, 2], [9, 5])
    nothing = external._request([1, 2, 3], [1, 2, 3])
    assert (nothing.context.tolist(), nothing.continuation.tolist()) == ([1, 2], [3])


def test_metrics_are_those_of_a_study():
    """Two answers, of one and of two tokens, computed by hand."""
    p = [np.log(np.float32([0.5])), np.log(np.float32([0.25, 0.5]))]
    answers = [
        Likelihood(p[0], np.array([True])),
        Likelihood(p[1], np.array([False, True])),
    ]
    found = external.measures(answers, [[-1.0, -2.0], [-3.0, -1.0, -4.0]])
    assert list(found) == list(external.MEASURED)
    assert found["exact_match"].value == 0.5 and found["token_accuracy"].value == 2 / 3
    assert found["nll"].value == pytest.approx(np.log(16) / 3)
    assert found["answer_probability"].value == pytest.approx((0.5 + 0.125) / 2)
    assert found["choice_accuracy"].value == 0.5
    assert "choice_accuracy" not in external.measures(answers, [[], []])


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("others")
    for width in (8, 16):
        tiny(folder / f"tiny-{width}", width)
    path = folder / "models.tsv"
    path.write_text("tiny-8 1e6\ntiny-16 2e6 second\n")
    return path


ASKED = ["--config.eval.tasks=('recall/5','addition/1')", "--config.eval.items=4"]


def test_a_model_of_others_gives_the_rows_of_a_study(table, tmp_path):
    study = load(external.__file__, [f"--config.models={table}", *ASKED])
    rows = {}
    for point in study.points:
        plan = external.plan(with_overrides(study.config, point), point)
        (tmp_path / point["name"]).mkdir()
        record = Record("external", plan, tmp_path / point["name"])
        record.finish(external.train(with_overrides(study.config, point), plan, record))
        record.close()
        rows[point["name"]] = read_lines(tmp_path / point["name"] / "rows.jsonl")[0]
    assert list(rows) == ["tiny-8", "second"]
    small, large = (rows[name][0] for name in rows)
    # Llama: norms of 8; qkv and out 4 x 8 x 8, gate, up and down 3 x 8 x 16, two norms.
    assert small["params"] == 8 + 4 * 64 + 3 * 128 + 16
    assert small["params_total"] == small["params"] + 257 * 8
    assert (small["tokens"], small["flops"]) == (10**6, 6.0 * small["params"] * 1e6)
    assert large["params"] > small["params"] and large["tokens"] == 2 * 10**6
    found = {(r["task"], r["level"], r["metric"]): r["value"] for r in rows["second"]}
    assert {metric for _, _, metric in found} == set(external.MEASURED)
    assert found["addition", "1", "nll"] > 1 and found["recall", "5", "choice_brier"] > 0


def test_a_worker_reads_the_study_without_models():
    """Its command line has no overrides: the models are in the workdir."""
    study = load(external.__file__)
    with pytest.raises(UserError, match="config.models is empty"):
        external.plan(study.config, study.points[0])


def test_tokens_that_nobody_tells_are_asked_for(table):
    study = load(external.__file__, [f"--config.models={table.parent / 'tiny-8'}", *ASKED])
    with pytest.raises(UserError, match="nothing says on how many tokens .* was trained"):
        external.plan(with_overrides(study.config, study.points[0]), study.points[0])


@pytest.mark.slow
def test_their_curve_lies_in_the_report(table, tmp_path, lm):
    command = ["run", external.__file__, f"--workdir={tmp_path / 'others'}"]
    done = lm(*command, f"--config.models={table}", *ASKED)
    assert done.code == 0, done.err
    analysis = json.loads((tmp_path / "others/analysis.json").read_text())
    assert "recall" in json.dumps(analysis)
    assert (tmp_path / "others/report.html").exists()
