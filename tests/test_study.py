"""Study files and sweeps: what is accepted, and one sentence for everything else."""

import doctest
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from experiments import study, sweep
from lm.config import UserError

GOOD = '''"""Where does recall begin?"""
import dataclasses
from ml_collections import ConfigDict
from experiments.sweep import axis, product

@dataclasses.dataclass(frozen=True)
class Size:
    name: str

def get_config():
    config = ConfigDict()
    config.scale = "full"
    config.train = ConfigDict(dict(tokens=5_000_000, rate=0.1, betas=(0.9, 0.95)))
    config.train.update(clip=None, wsd=True)
    config.mixture = ConfigDict(dict(text=1.0, recall=1.0))
    return config

def points(config):
    sizes = [{"name": "a"}, {"name": "b", "role": "control"}]
    rates = [{"name": f"r{r}", "train.rate": config.train.rate * r} for r in (1, 2)]
    return product(sizes, rates)
'''


@pytest.fixture
def write(tmp_path):
    def write(text: str = GOOD, name: str = "where.py") -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


def test_a_study_file_becomes_a_study(write):
    found = study.load(write())
    assert found.name == "where" and found.docstring == "Where does recall begin?"
    assert [point["name"] for point in found.points] == ["a-r1", "a-r2", "b-r1", "b-r2"]
    assert found.points[3]["role"] == "control" and found.points[3]["train.rate"] == 0.2


def test_overrides_come_before_the_points_and_keep_types(write):
    texts = ["train.tokens=5e6", "train.rate=1", "scale=smoke", "train.clip=0.5"]
    texts += ["train.betas=[0.8,0.9]", "train.wsd=false", "mixture.text=0"]
    found = study.load(write(), [f"--config.{text}" for text in texts])
    train = found.config.train
    assert train.tokens == 5_000_000 and type(train.tokens) is int
    assert train.rate == 1.0 and type(train.rate) is float
    assert found.config.scale == "smoke" and train.clip == 0.5 and train.wsd is False
    assert train.betas == (0.8, 0.9) and type(found.config.mixture.text) is float
    assert found.points[1]["train.rate"] == 2.0


def test_a_string_setting_takes_any_text(write):
    assert study.load(write(), ["--config.scale=5"]).config.scale == "5"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train.tokns=1", ["config.train.tokns", "did you mean 'tokens'?"]),
        ("trian.tokens=1", ["config.trian", "did you mean 'train'?"]),
        ("train.tokens.x=1", ["config.train.tokens", "a value and not a group"]),
        ("train=1", ["config.train", "group", "betas, clip, rate"]),
        ("train.tokens=1.5", ["config.train.tokens", "1.5", "int"]),
        ("train.tokens=many", ["config.train.tokens", "'many'", "str"]),
        ("train.tokens=true", ["config.train.tokens", "True", "bool"]),
        ("train.rate=nan", ["config.train.rate", "'nan'"]),
        ("train.rate=1e999", ["config.train.rate", "inf", "finite"]),
        ("train.wsd=1", ["config.train.wsd", "1", "bool"]),
        ("train.betas=1", ["config.train.betas", "1", "tuple"]),
        ("train.tokens", ["--config.train.tokens sets nothing", "=VALUE"]),
        ("=1", ["sets nothing"]),
        ("name=x", ["config.name is not a setting"]),
    ],
)
def test_bad_overrides_are_refused(write, text, words):
    with pytest.raises(UserError) as caught:
        study.load(write(), [f"--config.{text}"])
    for word in words:
        assert word in str(caught.value)


def test_split_overrides_leaves_the_rest():
    argv = ["study.py", "--config.a=1", "--dry_run", "--config.b.c=x=y", "--configure"]
    ours, rest = study.split_overrides(argv)
    assert ours == ["--config.a=1", "--config.b.c=x=y"]
    assert rest == ["study.py", "--dry_run", "--configure"]
    config = ConfigDict({"a": 0, "b": ConfigDict({"c": ""})})
    assert study.with_overrides(config, {"b.c": "x=y"}).b.c == "x=y" and config.b.c == ""


def test_a_point_may_replace_a_group():
    config = ConfigDict({"mixture": {"text": 1.0}})
    changed = study.with_overrides(config, {"name": "p", "mixture": {"recall": 2.0}})
    assert changed.mixture.to_dict() == {"recall": 2.0} and "name" not in changed


BROKEN = {
    "raises on import": (GOOD.replace("@dataclasses", "1 / 0\n\n@dataclasses"), "line 6", "Zero"),
    "syntax": (GOOD.replace("def points(config)", "def points(config"), "line 18", "SyntaxError"),
    "imports nothing": ("import no_such_thing\n", "line 1", "no_such_thing"),
    "exits": ("raise SystemExit(0)\n", "line 1", "SystemExit"),
    "no get_config": (GOOD.replace("def get_config", "def config"), "get_config", "ConfigDict"),
    "no points": (GOOD.replace("def points", "def point"), "points", "points(config)"),
    "config is a dict": (GOOD.replace("return config", "return {}"), "dict", "ConfigDict"),
    "get_config raises": (GOOD.replace("return config", "return confg"), "line 16", "NameError"),
    "points raises": (GOOD.replace("config.train.rate *", "config.trian *"), "line 20", "trian"),
    "no points at all": (GOOD.replace("return product(sizes, rates)", "return []"), "[]", "list"),
    "a nameless point": (GOOD.replace("return product(sizes, rates)", "return [{}]"), "name", "0"),
    "a point twice": (
        GOOD.replace("return product(sizes, rates)", "return sizes + sizes"),
        "'a'",
        "unique",
    ),
    "an unsafe name": (GOOD.replace('"name": "a"', '"name": "../a"'), "../a-r1", "letters"),
    "an unknown key": (GOOD.replace('"train.rate":', '"train.raet":'), "train.raet", "'rate'"),
    "an unknown role": (GOOD.replace('"control"', '"star"'), "b-r1", "'star'"),
    "a key twice": (
        GOOD.replace('"name": "a"', '"name": "a", "train.rate": 1'),
        "line 21",
        "twice",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_study_is_one_sentence_with_its_place(write, case):
    text, *words = BROKEN[case]
    assert text != GOOD
    path = write(text)
    with pytest.raises(UserError) as caught:
        study.load(path)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    for word in words:
        assert word in message


def test_a_study_that_is_not_there_offers_the_nearest(write, tmp_path):
    write(name="desk.py")
    with pytest.raises(UserError, match=r"dsek\.py does not exist; did you mean .*desk\.py"):
        study.load(tmp_path / "dsek.py")
    with pytest.raises(UserError, match="is a folder"):
        study.load(tmp_path)


def test_a_study_with_an_unsafe_name_is_refused(write):
    with pytest.raises(UserError, match="letters"):
        study.load(write(name="-rf x.py"))


def test_sweeps():
    assert doctest.testmod(sweep).attempted >= 5 and doctest.testmod(sweep).failed == 0
    sizes, rates = sweep.axis("size", [1, 2]), sweep.axis("rate", [3, 4, 5])
    assert len(sweep.product(sizes, rates, sweep.axis("x", [0]))) == 6
    with pytest.raises(UserError, match="2, 3 entries"):
        sweep.zip_(sizes, rates)
    chained = sweep.chain(sizes, rates)
    chained[0]["size"] = 9
    assert sizes[0] == {"size": 1}  # a chain is a copy
