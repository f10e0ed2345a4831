"""Loaders: hand-made files, every kind of damage, and real BIG-Bench-Hard where it is at hand."""

import json
import os
from pathlib import Path

import pytest

from lm.config import UserError
from lm.tasks import files

BBH = Path(os.environ.get("ONSET_BBH", Path(__file__).parents[2] / "shared/data/eval/bbh"))
RECORDS = [
    {"input": "1 + 1 is", "target": "2"},
    {"input": "Pick.\nOptions:\n(A) red\n(B) blue", "target": "(B)"},
    {"input": "Pick.\nOptions:\n- Yes\n- No", "target": "No"},
    {"input": "1 + 2 is", "target": "3"},
]
SCORE = {
    "subtask_description": "two digits",
    "number_of_shots": 2,
    "preferred_score": "multiple_choice_grade",
    "score_dict": {"multiple_choice_grade": 0.7, "bleu": 12},
    "low_score": 0.25,
    "high_score": 1.0,
}
MODEL = {
    "model_family": "F",
    "model_name": "F-1b",
    "non_embedding_params": 10,
    "flop_matched_non_embedding_params": 11,
    "total_params": 12,
}


def write(folder, text, name="sums.json"):
    path = folder / name
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"canary": "x", "examples": RECORDS}),
        json.dumps(RECORDS, indent=1),
        "\n".join(map(json.dumps, RECORDS)) + "\n\n",
    ],
    ids=["BIG-Bench-Hard", "list", "lines"],
)
def test_three_layouts_hold_the_same_items(tmp_path, text):
    """Catches a layout that is not understood, choices that are lost or invented, repeated keys."""
    found = files.read(write(tmp_path, text))
    assert [e.prompt for e in found] == [f"Q: {r['input']}\nA: " for r in RECORDS]
    assert [e.answer for e in found] == ["2", "(B)", "No", "3"]
    assert [e.choices for e in found] == [(), ("(A)", "(B)"), ("Yes", "No"), ()]
    assert [e.key for e in found] == [f"sums:{i}" for i in range(4)]


@pytest.mark.parametrize("format", range(5))
def test_shots_are_shown_and_never_asked(tmp_path, format):
    """Catches an item among its own shots, and formats that ask other items."""
    path = write(tmp_path, RECORDS)
    bare, found = files.read(path, format), files.read(path, format, shots=2)
    assert [(e.key, e.answer) for e in found] == [(e.key, e.answer) for e in bare[2:]]
    for e, alone in zip(found, bare[2:], strict=True):
        assert e.prompt.startswith(bare[0].prompt + "2") and e.prompt.endswith(alone.prompt)
        assert e.prompt.count(bare[1].prompt + "(B)") == 1
    assert len({files.read(path, f)[0].prompt for f in range(5)}) == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "sums.json is empty"),
        (" \n", "sums.json is empty"),
        ("[1,", "is not JSON: .*line 1"),
        (json.dumps(RECORDS[0]) + "\n{", "is not JSON: .* of line 2"),
        ("[" * 200_000, "is not JSON: .*"),
        ("3", "holds a number; it must hold a list"),
        ('{"examples": null}', "holds null; it must hold a list"),
        ("[]", "holds no records"),
        ('{"canary": "x"}', "record 0 has no 'input'"),
        ('[{"input": "a", "target": "b"}, 3]', "record 1 is a number; it must be an object"),
        ('[{"input": "a"}]', "record 0 has no 'target'"),
        ('[{"input": "a", "target": 3}]', "record 0: target is a number; it must be a string"),
        ('[{"input": "a", "target": ""}]', "record 0: target is empty"),
    ],
)
def test_damaged_records_are_named(tmp_path, text, message):
    """Catches a traceback, and a sentence that does not say which file and which record."""
    with pytest.raises(UserError, match=f"sums.json.*{message}|{message}"):
        files.read(write(tmp_path, text))


def test_what_cannot_be_asked_is_a_sentence(tmp_path):
    """Catches shots that leave no item, a sixth format, and folders without files."""
    path = write(tmp_path, RECORDS)
    for shots in (-1, 4):
        with pytest.raises(UserError, match=f"4 records, so shots cannot be {shots}; give 0 to 3"):
            files.read(path, shots=shots)
    with pytest.raises(UserError, match="format of .* is 5; it must be 0 to 4"):
        files.read(path, format=5)
    with pytest.raises(UserError, match="absent.json cannot be read: No such file"):
        files.read(tmp_path / "absent.json")
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="binary.json cannot be read: it is not UTF-8"):
        files.read(binary)
    binary.unlink()
    write(tmp_path, RECORDS[:1], "b.jsonl")
    assert {k: len(v) for k, v in files.read_folder(tmp_path).items()} == {"b": 1, "sums": 4}
    write(tmp_path, RECORDS, "b.json")
    with pytest.raises(UserError, match="holds b twice"):
        files.read_folder(tmp_path)
    with pytest.raises(UserError, match="sums.json is not a folder"):
        files.read_folder(path)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no .json or .jsonl file"):
        files.read_folder(tmp_path / "none")


def test_chance_of_a_file(tmp_path):
    """Catches a majority that votes for itself: targets that occur once would look guessed."""

    def chance(*targets):
        records = [{"input": "x", "target": t} for t in targets]
        return files.file_chance(files.read(write(tmp_path, records))).value

    assert chance("a", "b", "c", "d") == 0.0
    assert chance("a") == 0.0
    assert chance(*"aaab") == pytest.approx(3 / 4)
    assert chance(*"aab") == pytest.approx(2 / 3 / 2)  # without an a, a and b have one vote each
    listed = files.file_chance(files.read(write(tmp_path, RECORDS[1:3])))
    assert listed.value == listed.baselines["choices"] == 0.5
    with pytest.raises(UserError, match="no items"):
        files.file_chance([])


def results(folder, score=None, model=None, **content):
    where = folder / "arithmetic" / "results"
    where.mkdir(parents=True, exist_ok=True)
    whole = {"model": MODEL | (model or {}), "scores": [SCORE, SCORE | (score or {})]} | content
    return write(where, whole, "scores_F_1b.json")


def test_result_files_become_tidy_records(tmp_path):
    """Catches a normalisation by the wrong end, and low and high applied to another metric."""
    found = files.read_results(results(tmp_path))
    assert [(r["metric"], r["preferred"], r["raw"]) for r in found[:2]] == [
        ("multiple_choice_grade", True, 0.7),
        ("bleu", False, 12.0),
    ]
    assert found[0]["normalised"] == pytest.approx(60) and found[0]["chance"] == 0.25
    assert found[1]["normalised"] is found[1]["chance"] is found[1]["low"] is None
    assert found[0]["task"] == "arithmetic" and found[0]["subtask"] == "two digits"
    assert (found[0]["shots"], found[0]["total_params"]) == (2, 12.0)
    only = files.read_results(results(tmp_path), "bleu")
    assert [r["metric"] for r in only] == ["bleu", "bleu"]
    percent = {"low_score": 25, "high_score": 100, "score_dict": {"multiple_choice_grade": 25}}
    last = files.read_results(results(tmp_path, percent, task={"task_name": "named"}))[-1]
    assert (last["task"], last["normalised"], last["chance"]) == ("named", 0.0, 0.25)
    other = {"preferred_score": "bleu", "low_score": 0}
    assert files.read_results(results(tmp_path, other))[-1]["chance"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"score": {"low_score": 1.0}},
            "score 1: low_score is 1.0 and high_score 1.0; low must be",
        ),
        (
            {"score": {"high_score": float("nan")}},
            "score 1: high_score is nan; it must be a finite",
        ),
        ({"score": {"low_score": 10**400}}, "score 1: low_score is a number; it must be a finite"),
        ({"score": {"low_score": True}}, "score 1: low_score is a Boolean"),
        ({"score": {"preferred_score": "blue"}}, "score 1: metric 'blue' .*did you mean 'bleu'"),
        ({"score": {"score_dict": [1]}}, "score 1: score_dict is a list; it must be an object"),
        ({"score": {"number_of_shots": 1.5}}, "score 1: number_of_shots is 1.5; it must be an int"),
        ({"score": {"subtask_description": None}}, "score 1: subtask_description is null"),
        (
            {"score": {"score_dict": {"multiple_choice_grade": "x"}}},
            "score 1: score_dict: multiple",
        ),
        ({"model": {"total_params": "12"}}, "model: total_params is a string"),
        ({"model": {"model_name": 3}}, "model: model_name is a number; it must be a string"),
        ({"scores": []}, "holds no scores"),
        ({"scores": {}}, "scores is an object; it must be a list"),
        ({"scores": [3]}, "score 0 is a number; it must be an object"),
    ],
)
def test_damaged_results_are_named(tmp_path, change, message):
    """Catches a traceback, and scores that no normalisation is defined for."""
    with pytest.raises(UserError, match=f"scores_F_1b.json.*{message}"):
        files.read_results(results(tmp_path, **change))


def test_results_without_their_parts_are_sentences(tmp_path):
    """Catches a KeyError for an absent key, an absent metric, and text that is no JSON."""
    for missing in ("low_score", "score_dict", "preferred_score"):
        score = {k: v for k, v in SCORE.items() if k != missing}
        path = results(tmp_path, scores=[score])
        with pytest.raises(UserError, match=f"score 0 has no '{missing}'"):
            files.read_results(path)
    with pytest.raises(UserError, match="metric 'rouge' is not in score_dict"):
        files.read_results(results(tmp_path), "rouge")
    with pytest.raises(UserError, match="r.json is not JSON"):
        files.read_results(write(tmp_path, "nope", "r.json"))
    with pytest.raises(UserError, match="r.json has no 'model'"):
        files.read_results(write(tmp_path, {"scores": []}, "r.json"))
    with pytest.raises(UserError, match="r.json is a list; it must be an object"):
        files.read_results(write(tmp_path, [], "r.json"))


@pytest.mark.skipif(not BBH.is_dir(), reason="no BIG-Bench-Hard; set ONSET_BBH to its folder")
def test_big_bench_hard_is_read():
    """Catches real files that the hand-made ones do not stand for."""
    found = files.read_folder(BBH, shots=3)
    assert {"boolean_expressions", "navigate", "word_sorting"} <= set(found)
    assert {len(items) for items in found.values()} == {247}
    shown = {name: items[0].choices for name, items in found.items()}
    assert shown["navigate"] == ("Yes", "No")
    assert shown["logical_deduction_three_objects"] == ("(A)", "(B)", "(C)")
    assert shown["word_sorting"] == shown["object_counting"] == ()
    navigate = files.file_chance(found["navigate"])
    assert navigate.baselines["choices"] == 0.5 <= navigate.value < 0.65
    assert files.file_chance(found["word_sorting"]).value < 0.02
