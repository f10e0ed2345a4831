"""Where the fused kernel is taken, and that a population trained by it is one trained by XLA."""

from functools import partial

import jax
import numpy as np
import pytest
from test_fused import QUICK, SMALL, make_batch, make_config, make_params

from lm import objectives
from lm.config import UserError
from lm.models import Transformer, fused, mup_multipliers
from lm.sharding import make_mesh
from lm.train import optim
from lm.train.cell import build_point, cells
from lm.train.population import make_population
from lm.train.program import is_fused
from lm.train.step import make_chunk, make_step

POINT = {
    "name": "p",
    "model": {"size": "1x8", "vocab_size": 128, "heads": 1, "kv_heads": 1},
    "optim": {},
    "data": {"length": 16, "mixture": {"a": {"task": "recall", "level": "3", "rows": 8}}},
    "train": {"tokens": 1000},
}


def make_cell(mode, **changes):
    """A cell in a mode; `model__dropout=0.1` sets model.dropout."""
    point = {key: dict(value) if key != "name" else value for key, value in POINT.items()}
    point["train"]["replicas"] = mode
    for path, value in changes.items():
        group, name = path.split("__")
        point[group][name] = value
    (cell,) = cells("s", [build_point(point)])
    return cell


def one_device():
    return make_mesh("replicated", jax.devices()[:1])


def test_it_is_taken_where_it_runs():
    """Breaks if studies on a CPU go the slow way, or one that says how is not heeded."""
    taken = {mode: is_fused(make_cell(mode), one_device()) for mode in ("auto", "fused", "vmap")}
    assert taken == {"auto": True, "fused": True, "vmap": False}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model__size": "1x72"}, "width 72 is above 64"),
        ({"data__length": 129}, "rows of 129 tokens are longer than 128"),
        ({"model__vocab_size": 8192}, "vocabulary of 8192 is above 4096"),
        ({"model__dropout": 0.1}, "dropout is 0.1, not 0"),
        ({"model__dtype": "bfloat16"}, "dtype is bfloat16"),
        ({"model__z_loss": 1e-4}, "z_loss is 0.0001, not 0"),
        ({"model__qk_norm": "rms"}, "qk_norm is 'rms'"),
        ({"model__norm_epsilon": 1e-50}, "norm_epsilon is 1e-50, which is 0 in float32"),
    ],
)
def test_what_it_cannot_run_goes_by_xla(change, words):
    """Breaks if `auto` fails on a model, a setting is ignored, or the reason is not told."""
    assert not is_fused(make_cell("auto", **change), one_device())
    with pytest.raises(UserError, match=f"'fused' cannot run this cell: .*{words}"):
        is_fused(make_cell("fused", **change), one_device())


def test_a_mesh_goes_by_xla():
    """Breaks if a kernel without a rule for cutting is put on several devices."""
    mesh = make_mesh("replicated", jax.devices()[:8])
    assert not is_fused(make_cell("auto"), mesh)
    with pytest.raises(UserError, match="needs one CPU device, the mesh has 8 of cpu"):
        is_fused(make_cell("fused"), mesh)


def test_no_compiler_goes_by_xla(monkeypatch):
    """Breaks if a machine without a C++ compiler cannot train."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(fused, "TARGET", "onset_fused_without_a_compiler")
    assert not is_fused(make_cell("auto"), one_device())
    with pytest.raises(UserError, match=r"no C\+\+ compiler"):
        is_fused(make_cell("fused"), one_device())
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        fused.loss(make_config(SMALL), make_params(make_config(SMALL)), make_batch(SMALL))


def at_rest(made):
    return jax.tree.map(lambda leaf: leaf.sharding, made.states)


def test_a_fused_population_is_a_sequential_one():
    """Breaks if a replica gets another's gradient, rate or batch, over several steps."""
    config, mesh = make_config(SMALL), one_device()
    batches = [[make_batch(SMALL, 10 * i + n) for n in range(3)] for i in range(2)]
    batches = jax.tree.map(lambda *a: np.stack(a).reshape(2, 3, *a[0].shape), *sum(batches, []))
    settings = optim.OptimConfig("adamw", warmup_tokens=100, epsilon=1e-6)
    tx, rate = optim.direction(settings, mup_multipliers(config)), optim.schedule(settings, 2000)
    states, results = None, {}
    for mode, objective in (("fused", objectives.fused), ("sequential", objectives.causal)):
        step = make_step(Transformer(config), objective, tx, rate, tokens_per_step=96)
        shape = {"replicas": 2, "rows": SMALL.B, "mesh": mesh}
        made = make_population(config, make_chunk(step), tx, **shape, mode=mode)
        with jax.set_mesh(mesh):
            if states is None:
                numbers = np.uint32([0, 1]), np.float32([1e-2, 3e-3]), np.uint32([0, 0])
                first = made.init.lower(*numbers).compile(QUICK)(*numbers)
                states = jax.tree.map(np.array, first)  # `run` takes its argument for itself
            given = jax.device_put((states, batches), (at_rest(made), made.batches))
            results[mode] = made.run.lower(*given).compile(QUICK)(*given)
    (got, losses), (wanted, wanted_losses) = results["fused"], results["sequential"]
    np.testing.assert_allclose(losses, wanted_losses, rtol=2e-5)
    # Adam magnifies the last bits where a gradient is near 0.
    close = partial(np.testing.assert_allclose, rtol=1e-3, atol=2e-5)
    jax.tree.map(close, got.params, wanted.params)
    assert len(set(np.asarray(losses).ravel().tolist())) == 6
