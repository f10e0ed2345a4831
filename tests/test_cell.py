"""Points and cells: what a study may say, what shares a program, and when it is measured."""

import copy
import math

import pytest

from lm.config import UserError, build, to_dict
from lm.train.cell import Cell, SeedConfig, build_point, cells, replicas

SETTINGS = {
    "name": "2x16",
    "model": {"size": "2x16", "vocab_size": 128, "heads": 2, "kv_heads": 2},
    "optim": {"learning_rate": 1e-2, "warmup_tokens": 100},
    "data": {
        "length": 32,
        "mixture": {
            "text": {"task": "text", "rows": 6},
            "recall": {"task": "recall", "level": "5", "rows": 2},
        },
    },
    "train": {"tokens": 100_000, "chunk": 10},
    "eval": {"first": 20},
    "seeds": {"replicas": 2},
}


def point(**changes):
    """The settings with some changed: `train__tokens=5` sets train.tokens."""
    settings = copy.deepcopy(SETTINGS)
    for path, value in changes.items():
        *parents, last = path.split("__")
        where = settings
        for name in parents:
            where = where[name]
        where[last] = value
    return build_point(settings, "config")


def cell(**changes):
    (found,) = cells("study", [point(**changes)])
    return found


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modle": {}}, "config.modle is not a setting; did you mean 'model'?"),
        ({"train__token": 5}, "config.train.token is not a setting; did you mean 'tokens'?"),
        ({"model__laeyrs": 2}, "config.model.laeyrs is not a setting; did you mean 'layers'?"),
        ({"data__mixture__text__row": 2}, "row is not a setting; did you mean 'rows'?"),
        ({"train__tokens": "many"}, "config.train.tokens is 'many' (str); it must be a whole"),
        ({"model__heads": "two"}, "config.model.heads is 'two' (str); it must be a whole"),
        ({"model__heads": 1.5}, "heads 1.5 does not divide width 16; use 1 or 2"),
        ({"model__activation": "silu"}, "model.activation is 'silu'; use one of 'swiglu', 'gelu'"),
        ({"model__size": 216}, "config.model.size is 216; it must be"),
        ({"model__size": None}, "config.model.size is None; it must be"),
        ({"model__size": ["2x16"]}, "config.model.size is ['2x16']; it must be"),
        ({"model": "2x16"}, "config.model is '2x16'; it must be a mapping"),
        ({"model__size": "2by16"}, "no size '2by16'; use LAYERSxWIDTH such as 2x16"),
        ({"model__size": "0x16"}, "size '0x16' cannot be built; use 1 layer or more"),
        ({"model__size": "-2x16"}, "no size '-2x16'"),
        ({"model__size": "2x15"}, "an even width of 4 or more"),
        ({"train__tokens": 0}, "config.train: tokens is 0; it must be greater than 0"),
        ({"train__tokens": -5}, "tokens is -5"),
        ({"train__tokens": math.nan}, "config.train.tokens is nan; it must be a finite number"),
        ({"model__mlp_size": 0}, "mlp_size is 0; it must be greater than 0"),
        ({"model__mlp_size": math.nan}, "config.model: mlp_size is nan; it must be"),
        ({"model__rope_base": math.inf}, "rope_base is inf; it must be a finite number"),
        ({"optim__learning_rate": -1}, "config.optim: learning_rate is -1.0"),
        ({"data__length": 0}, "config.data: length is 0"),
        ({"data__mixture": {}}, "mixture is empty; give it at least one source"),
        ({"data__mixture__recall__rows": 0}, "rows is 0; it must be greater than 0"),
        ({"data__mixture__recall__level": "7"}, "task recall/7 is not known; choose one of"),
        ({"data__mixture__more": {"task": "text", "rows": 1}}, "mixture names ('text', '') twice"),
        ({"seeds__replicas": 0}, "replicas is 0"),
        ({"seeds__first": -1}, "first is -1; it must be between 0 and"),
        ({"seeds__vary": ["init", "shuffle"]}, "vary[1] is 'shuffle'; use one of 'init', 'data'"),
        ({"model__heads": 3}, "heads 3 does not divide width 16; use 2 or 4"),
        ({"model__kv_heads": 3}, "kv_heads 3 does not divide heads 2; use 2"),
        (
            {"model__vocab_size": 64},
            "tokenizer.vocab_size 128 is larger than the model's embedding",
        ),
        ({"name": "a/b"}, "name 'a/b' is not fit for a folder"),
        ({"name": "../x"}, "is not fit for a folder"),
        ({"name": ".."}, "begins with - or a dot"),
        ({"name": "data"}, "name 'data' is taken"),
        ({"name": ""}, "name '' is not fit for a folder"),
        ({"name": 5}, "config.name is 5 (int); it must be str"),
        ({"role": "both"}, "config.role is 'both'; use one of 'ladder', 'control'"),
    ],
    ids=lambda value: (
        "-".join(f"{k}={v}"[:40] for k, v in value.items()) if isinstance(value, dict) else ""
    ),
)
def test_bad_settings_are_sentences(change, words):
    """Catches a setting that is dropped, guessed at, or found out after minutes of work."""
    with pytest.raises(UserError) as error:
        point(**change)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_size_is_resolved_and_settings_win():
    """Catches a dial whose derived sizes override what the study says."""
    found = point(model__heads=1, model__kv_heads=1, model__head="untied").model
    assert (found.layers, found.width, found.heads, found.kv_heads) == (2, 16, 1, 1)
    assert found.mlp_size == 64 and found.head == "untied" and found.vocab_size == 128
    explicit = point(model=to_dict(found)).model
    assert explicit == found


def test_points_that_differ_in_name_and_rate_share_a_cell():
    """Catches a program compiled anew for each learning rate, and one that is shared too widely."""
    rates = [1e-3, 3e-3, 1e-2]
    points = [point(name=f"lr{r}", optim__learning_rate=r) for r in rates]
    other = point(name="wide", model__size="2x32")
    found = cells("study", [points[0], other, *points[1:]])
    assert [c.name for c in found] == ["lr0.001+2", "wide"]
    assert [(r.point, r.index, r.learning_rate) for r in found[0].replicas] == [
        (f"lr{rate}", i, rate) for rate in rates for i in (0, 1)
    ]
    assert len(found[1].replicas) == 2
    for change in (
        {"optim__weight_decay": 0.2},
        {"train__tokens": 200_000},
        {"data__length": 16},
        {"eval__items": 10},
        {"seeds__eval": 1},
        {"optim__warmup_tokens": 50},
    ):
        assert len(cells("study", [points[0], point(name="b", **change)])) == 2, change
    more = point(name="b", seeds__replicas=5, seeds__first=9, role="control")
    (shared,) = cells("study", [points[0], more])
    assert [r.role for r in shared.replicas] == ["ladder"] * 2 + ["control"] * 5


def test_two_points_of_one_name_are_refused():
    """Catches two points that would write into one folder."""
    with pytest.raises(UserError, match="two points are called '2x16'; names must differ"):
        cells("study", [point(), point(optim__learning_rate=1.0)])


def test_steps_are_whole_dispatches():
    """Catches a budget that is cut short, and a last dispatch of another length."""
    found = cell(train__tokens=256 * 95)
    assert found.tokens_per_step == 8 * 32 and found.steps == 100
    assert cell(train__tokens=256 * 100).steps == 100
    assert cell(train__tokens=256 * 100 + 1).steps == 110
    assert cell(train__tokens=1).steps == 10


def test_evaluations_are_log_spaced_and_end_at_the_end():
    """Catches steps inside a dispatch, a missing end, and steps beyond it."""
    assert cell(train__tokens=256 * 1000).eval_steps == (20, 40, 80, 160, 320, 640, 1000)
    assert cell(train__tokens=256 * 160).eval_steps == (20, 40, 80, 160)
    assert cell(train__tokens=256 * 100, eval__first=7).eval_steps == (10, 20, 30, 60, 100)
    assert cell(train__tokens=1).eval_steps == (10,)
    assert cell(eval__first=10**6).eval_steps == (cell().steps,)


@pytest.mark.parametrize("axis", ["init", "data", "dropout"])
def test_only_the_axes_that_vary_vary(axis):
    """Catches a seed that moves with another: the spread would have two causes."""
    found = replicas(point(seeds={"replicas": 3, "first": 5, "vary": [axis], "eval": 9}))
    for name in ("init", "data", "dropout"):
        expected = [5, 6, 7] if name == axis else [5, 5, 5]
        assert [getattr(r, name) for r in found] == expected
    assert [r.eval for r in found] == [9, 9, 9] and [r.index for r in found] == [0, 1, 2]


def test_all_axes_vary_unless_told_otherwise():
    """Catches replicas that share their data order without being asked to."""
    assert SeedConfig().vary == ("init", "data", "dropout")
    first, second = replicas(point())
    assert {first.init, first.data, first.dropout} == {0}
    assert {second.init, second.data, second.dropout} == {1}
    still = replicas(point(seeds__vary=[]))
    assert [(r.init, r.data, r.dropout) for r in still] == [(0, 0, 0)] * 2


def test_a_cell_is_read_back_as_it_was():
    """Catches a field that JSON loses: a resume would see another config."""
    found = cell()
    assert build(Cell, to_dict(found)) == found


def test_a_setting_that_is_newer_than_a_workdir_does_not_change_its_config():
    """Catches a new default that refuses every study begun before it."""
    assert "keep_every" not in to_dict(cell())["train"]
    assert to_dict(cell(train__keep_every=9))["train"]["keep_every"] == 9
    assert build(Cell, to_dict(cell(train__keep_every=9))).train.keep_every == 9


def test_a_warm_up_that_fills_the_budget_is_refused_before_anything_is_written():
    """Catches a warm-up that only the worker refuses, when the run directory is there already."""
    cell(train__tokens=2_560, optim__warmup_tokens=2_559)
    with pytest.raises(UserError, match="warmup_tokens 2560 is not below the budget, 2560 tokens"):
        cell(train__tokens=2_560, optim__warmup_tokens=2_560)
