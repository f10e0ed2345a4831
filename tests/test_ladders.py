"""The two large ladders: what they train, that it divides the devices, and that it runs small."""

import json
import os

import pytest
import tiny

from experiments import runner
from experiments.study import load
from lm.plan import compile as compiler
from lm.plan import topology
from lm.rundir import read_json
from lm.sizes import parameters
from lm.train.cell import cells

LADDERS = {"ladder_7b": ("125m", "7b", 6.84e9), "ladder_70b": ("1b", "70b", 69.0e9)}
PLACES = ("v5e:16x16", "v5p:8x8x8", "h100:32x8")


def todo(name, *overrides):
    """The cells of a ladder."""
    study = load(tiny.ROOT / "experiments" / f"{name}.py", overrides)
    return cells(study.name, runner.points_of(study))


@pytest.mark.parametrize("name", LADDERS)
def test_every_size_sees_twenty_tokens_per_parameter(name):
    """Catches a budget that is not that of the size, and a width that muP does not start from."""
    found = todo(name)
    first, last, params = LADDERS[name]
    assert (found[0].name, found[-1].name) == (first, last)
    assert parameters(found[-1].model).total == pytest.approx(params, rel=0.01)
    for cell in found:
        assert cell.train.tokens == 20 * parameters(cell.model).total
        assert cell.model.base_width == found[0].model.width
    assert len({r.learning_rate for c in found for r in c.replicas}) == 1


@pytest.mark.parametrize("name", LADDERS)
@pytest.mark.parametrize("place", PLACES)
def test_smallest_and_largest_divide_the_devices(name, place):
    """Catches rows or a width that a slice does not divide, which would end the study there."""
    found = todo(name)
    for cell in (found[0], found[-1]):
        compiler.check(cell, topology.parse(place))


@pytest.mark.parametrize("name", LADDERS)
def test_smoke_is_the_same_program(name):
    """Catches a smoke scale that shows nothing of the full one: all but sizes must be equal."""
    whole, smoke = todo(name), todo(name, "--config.scale=smoke")
    for small, large in ((smoke[0], whole[0]), (smoke[-1], whole[-1])):
        for field in ("activation", "head", "dtype", "remat", "attention", "loss", "layer_loop"):
            assert getattr(small.model, field) == getattr(large.model, field), field
        assert small.train.strategy == large.train.strategy
        assert list(small.data.mixture) == list(large.data.mixture)
    assert smoke[-1].train.strategy == "fsdp"
    with pytest.raises(Exception, match="use 'full' or 'smoke'"):
        todo(name, "--config.scale=tiny")


@pytest.mark.slow
@pytest.mark.parametrize("name", LADDERS)
def test_smoke_runs_on_eight_simulated_devices(name, tmp_path):
    """Catches a study that plans and does not run."""
    command = ["run", f"experiments/{name}.py", f"--workdir={tmp_path / 'run'}"]
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    with tiny.start(*command, "--config.scale=smoke", **flags) as process:
        try:
            out, err = process.communicate(timeout=900)
        finally:
            process.kill()
    assert process.returncode == 0, out + err
    for cell in ("2x16", "2x32"):
        result = read_json(tmp_path / "run" / cell / "result.json")
        assert {r["status"] for r in result["replicas"]} == {"ok"}, json.dumps(result)
        used = read_json(tmp_path / "run" / cell / "environment.json")[-1]
        assert "device_count=8" in json.dumps(used) or os.environ.get("XLA_FLAGS")
