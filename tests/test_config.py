"""Configs: what `build` accepts, what it refuses and in which words, and the ways back."""

import dataclasses
import json
import math
from typing import Literal

import pytest

from lm import config
from lm.config import UserError, build


@dataclasses.dataclass(frozen=True)
class Model:
    width: int
    heads: int = 1
    kind: Literal["gelu", "swiglu"] = "swiglu"

    def __post_init__(self):
        config.positive("width", self.width)
        config.divides("heads", self.heads, "width", self.width)


@dataclasses.dataclass(frozen=True)
class Train:
    tokens: int
    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    seeds: tuple[int, ...] = (0,)
    mixture: dict[str, float] = dataclasses.field(default_factory=dict)
    models: tuple[Model, ...] = ()
    clip: float | None = None
    steps: int | Literal["auto"] = "auto"
    best: Model | None = None
    donate: bool = True


FULL = {
    "tokens": 5e6,
    "rate": 1,
    "betas": [0.9, 1],
    "seeds": [1, 2.0, 3],
    "mixture": {"text": 1, "recall": 0.5},
    "models": [{"width": 8}, {"width": 16, "heads": 4, "kind": "gelu"}],
    "clip": 1,
    "steps": 7,
    "best": {"width": 2},
    "donate": False,
}


def test_build_converts_every_kind_and_to_dict_reads_back():
    train = build(Train, FULL)
    assert train.tokens == 5_000_000 and type(train.tokens) is int
    assert train.rate == 1.0 and type(train.rate) is float
    assert train.betas == (0.9, 1.0) and train.seeds == (1, 2, 3)
    assert all(type(seed) is int for seed in train.seeds)
    assert train.mixture == {"text": 1.0, "recall": 0.5}
    assert train.models[1] == Model(16, 4, "gelu") and train.best == Model(2)
    assert train.steps == 7 and train.clip == 1.0 and train.donate is False
    assert build(Train, json.loads(json.dumps(config.to_dict(train)))) == train


def test_build_takes_defaults_and_instances():
    train = build(Train, {"tokens": 1, "best": Model(4)})
    assert train == Train(tokens=1, best=Model(4)) and train.steps == "auto"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokns": 1}, ["config.tokns", "did you mean 'tokens'?"]),
        ({"zzz": 1}, ["config.zzz", "known:", "tokens"]),
        ({"best": {"width": 2, "haeds": 1}}, ["config.best.haeds", "'heads'"]),
        ({"models": [{"width": 2}, {"width": "2"}]}, ["config.models[1].width", "'2'", "str"]),
        ({"tokens": 1.5}, ["config.tokens", "1.5", "whole number"]),
        ({"tokens": True}, ["config.tokens", "True", "bool"]),
        ({"rate": False}, ["config.rate", "False", "bool"]),
        ({"tokens": math.inf}, ["config.tokens", "inf", "finite"]),
        ({"rate": math.nan}, ["config.rate", "nan", "finite"]),
        ({"rate": 10**400}, ["config.rate", "finite"]),
        ({"clip": math.nan}, ["config.clip", "nan", "finite"]),
        ({"clip": "1"}, ["config.clip", "'1'"]),
        ({"donate": 1}, ["config.donate", "1", "bool"]),
        ({"rate": None}, ["config.rate", "None"]),
        ({"betas": [0.9]}, ["config.betas", "1 entries", "2"]),
        ({"seeds": 3}, ["config.seeds", "3", "list"]),
        ({"seeds": "123"}, ["config.seeds", "'123'", "list"]),
        ({"mixture": {"text": "1"}}, ["config.mixture.text", "'1'"]),
        ({"mixture": [1]}, ["config.mixture", "[1]"]),
        ({"steps": "atuo"}, ["config.steps", "'atuo'", "auto"]),
        ({"best": 3}, ["config.best", "3", "mapping"]),
        ({"best": {"width": 8, "kind": "relu"}}, ["config.best.kind", "'relu'", "'gelu'"]),
        ({"best": {"width": -8}}, ["config.best", "width is -8", "greater than 0"]),
        ({"best": {"width": 8, "heads": 3}}, ["config.best", "heads 3", "width 8", "use 2 or 4"]),
    ],
)
def test_build_refuses_with_path_value_and_remedy(change, words):
    with pytest.raises(UserError) as caught:
        build(Train, {"tokens": 1} | change)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_literal_number_is_no_bool():
    @dataclasses.dataclass(frozen=True)
    class Axes:
        count: Literal[1, 2]

    assert build(Axes, {"count": 1}) == Axes(1)
    with pytest.raises(UserError, match="True; use one of 1, 2"):
        build(Axes, {"count": True})


def test_build_names_what_is_missing():
    with pytest.raises(UserError, match=r"study\.tokens is missing"):
        build(Train, {"rate": 1.0}, where="study")


def test_build_refuses_what_is_no_mapping():
    with pytest.raises(UserError, match="must be a mapping"):
        build(Train, [("tokens", 1)])  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_checks_refuse_nan_and_less(value):
    with pytest.raises(UserError, match="rate is"):
        config.positive("rate", value)
    with pytest.raises(UserError, match="between 1 and 2"):
        config.within("rate", value, 1, 2)
    with pytest.raises(UserError, match="at least 1"):
        config.within("rate", value, 1)


def test_checks_accept_the_limits():
    config.within("rate", 1, 1, 2)
    config.within("rate", 2, 1, 2)
    config.positive("rate", 1e-300)
    config.divides("heads", 4, "width", 32)


def test_diff_says_what_changed_and_nothing_else():
    a = {"train": {"tokens": 5_000_000, "rate": 0.1}, "seeds": (1, 2), "old": 1}
    b = {"train": {"tokens": 6_000_000, "rate": 0.1}, "seeds": [1, 2], "new": {}}
    assert config.diff(a, b) == [
        "new: (absent) -> {}",
        "old: 1 -> (absent)",
        "train.tokens: 5000000 -> 6000000",
    ]


def test_fingerprint_depends_on_values_not_on_order_or_form():
    a = config.fingerprint({"x": 1, "y": (1, 2)})
    assert a == config.fingerprint({"y": [1, 2], "x": 1}) and len(a) == 12
    assert a != config.fingerprint({"x": 2, "y": [1, 2]})
    assert config.fingerprint(Model(8)) == config.fingerprint(config.to_dict(Model(8)))
    assert config.fingerprint(Model(8)) != config.fingerprint(Model(16))


def test_to_dict_refuses_what_json_cannot_say():
    with pytest.raises(TypeError, match="object"):
        config.to_dict({"x": object()})


@dataclasses.dataclass(frozen=True)
class Square:
    side: int
    kind: Literal["square"] = dataclasses.field(default="square", metadata={"omit": True})


@dataclasses.dataclass(frozen=True)
class Circle:
    radius: float
    kind: Literal["circle"] = "circle"


@dataclasses.dataclass(frozen=True)
class Drawing:
    shape: Square | Circle


def test_a_union_of_dataclasses_is_told_apart_by_kind():
    """Breaks if a kind is guessed from the fields that fit, or an old config without one fails."""
    for shape, said in ((Square(2), {"side": 2}), (Circle(1.0), {"radius": 1.0, "kind": "circle"})):
        assert config.to_dict(Drawing(shape)) == {"shape": said}
        assert build(Drawing, {"shape": said}) == Drawing(shape) == build(Drawing, {"shape": shape})
    for said, words in (
        ({"kind": "circel", "radius": 1}, "shape.kind is 'circel'; use one of 'square', 'circle'"),
        ({"kind": "circle", "side": 1}, "shape.side is not a setting"),
        ({"radius": 1}, "shape.radius is not a setting"),
        ("square", "shape is 'square'; it must be a mapping"),
    ):
        with pytest.raises(UserError) as error:
            build(Drawing, {"shape": said})
        assert words in str(error.value)
