"""Meshes have the axes of their strategy, arrays lie where the tables say, and misfits are
sentences. That every strategy computes what one device does is in tests/test_strategies.py.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lm import sharding
from lm.config import UserError
from lm.models import TransformerConfig, abstract
from lm.sharding import (
    batch_sharding,
    constrain,
    devices_along,
    make_mesh,
    replica_axis,
    sequence_devices,
    shardings,
)

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 (simulated) devices")

CONFIG = TransformerConfig(
    vocab_size=32, layers=2, width=16, heads=4, kv_heads=2, mlp_size=24, head="untied"
)
B, T = 8, 8
STRATEGIES = ("replicated", "fsdp", "fsdp_tp", "sequence")


@pytest.mark.parametrize(
    "strategy, sizes, shape",
    [
        ("replicated", {}, {"data": 8}),
        ("fsdp", {}, {"data": 8}),
        ("fsdp_tp", {}, {"data": 4, "tensor": 2}),
        ("sequence", {}, {"data": 4, "sequence": 2}),
        ("sequence", {"sequence": 1}, {"data": 8, "sequence": 1}),
        ("replicated", {"sequence": 4}, {"data": 2, "sequence": 4}),
        (
            *("fsdp_tp", {"replicas": 2, "sequence": 2, "tensor": 2}),
            {"replica": 2, "data": 1, "sequence": 2, "tensor": 2},
        ),
    ],
)
def test_axes_of_a_mesh(strategy, sizes, shape):
    """Catches axes in another order: what speaks most would lie across hosts."""
    mesh = make_mesh(strategy, **sizes)
    assert tuple(mesh.shape.items()) == tuple(shape.items())
    assert list(mesh.devices.flat) == jax.devices()
    with jax.set_mesh(mesh):
        assert sequence_devices() == shape.get("sequence", 1)
        assert devices_along("batch") == shape["data"] * shape.get("sequence", 1)
        assert devices_along("mlp") == shape.get("tensor", 1)
        assert devices_along("embed") == 1


def sliced(slices, each):
    """Devices of several slices, in an order that mixes them."""
    return [
        SimpleNamespace(platform="gpu", device_kind="", slice_index=i % slices, id=i)
        for i in range(slices * each)
    ]


def test_slices_lie_across_the_outermost_axis():
    """Catches tensor or sequence devices in different slices, whose links are slow."""
    for sizes, axis in (
        ({"data": 4, "tensor": 2}, 0),
        ({"replica": 2, "data": 2, "sequence": 2}, 0),
        ({"replica": 3, "data": 2, "tensor": 2}, 1),
    ):
        grid = sharding._grid(sliced(2, int(np.prod(list(sizes.values()))) // 2), sizes)
        assert grid.shape == tuple(sizes.values())
        parts = np.split(np.vectorize(lambda d: d.slice_index)(grid), 2, axis=axis)
        assert [np.unique(part).tolist() for part in parts] == [[0], [1]]
    with pytest.raises(UserError, match=r"4 slices divide neither .* 'data' of 2; use fewer"):
        sharding._grid(sliced(4, 2), {"data": 2, "tensor": 4})


def test_parameters_rest_where_the_table_says():
    """Breaks if `embed` or `heads` is no longer cut: the strategy would hold every weight on every
    device.
    """
    specs = {
        name: jax.tree.map(lambda s: s.spec, shardings(abstract(CONFIG), make_mesh(name), name))
        for name in STRATEGIES
    }
    whole = PartitionSpec(None, None, None)
    assert specs["replicated"]["layers"]["qkv"] == whole
    assert specs["fsdp"]["layers"]["qkv"] == PartitionSpec(None, "data", None)
    assert specs["fsdp_tp"]["layers"]["qkv"] == PartitionSpec(None, "data", "tensor")
    assert specs["fsdp_tp"]["layers"]["down"] == PartitionSpec(None, "tensor", "data")
    assert specs["fsdp_tp"]["embed"] == PartitionSpec("tensor", "data")
    both = ("data", "sequence")
    assert specs["sequence"]["layers"]["qkv"] == PartitionSpec(None, both, None)
    mesh = make_mesh("fsdp_tp", sequence=2)
    product = shardings(abstract(CONFIG), mesh, "fsdp_tp")
    assert product["embed"].spec == PartitionSpec("tensor", both)
    assert batch_sharding(mesh, B).spec == PartitionSpec("data")


@pytest.mark.parametrize(
    "act, words",
    [
        (
            lambda: batch_sharding(make_mesh("fsdp"), 12),
            "batch 12 is not divisible by the 8 devices of mesh axis 'data'; use 8 or 16",
        ),
        (lambda: batch_sharding(make_mesh("fsdp"), 3), "use 8"),
        (lambda: make_mesh("zero"), "no strategy 'zero'"),
        (lambda: make_mesh("fsdp", replicas=3), "'replica' of 3 does not divide 8 devices"),
        (lambda: make_mesh("fsdp", replicas=0), "'replica' of 0"),
        (lambda: make_mesh("fsdp_tp", replicas=8), "8 replica x 2 tensor do not divide 8 devices"),
        (lambda: make_mesh("fsdp_tp", sequence=8), "8 sequence x 2 tensor do not divide 8 devices"),
        (lambda: make_mesh("sequence", sequence=3), "'sequence' of 3 does not divide 8 devices"),
        (lambda: make_mesh("fsdp_tp", tensor=0), "'tensor' of 0"),
        (lambda: make_mesh("sequence", tensor=2), "no mesh axis 'tensor'; use fsdp_tp"),
        (lambda: make_mesh("fsdp", tensor=2), "no mesh axis 'tensor'"),
        (
            lambda: shardings(
                abstract(TransformerConfig(32, 1, 12, 2, 2, 24)), make_mesh("fsdp"), "fsdp"
            ),
            "embed (of state['embed']) 12 is not divisible by the 8 devices",
        ),
    ],
)
def test_misfits_are_sentences(act, words):
    """Breaks if a misfit reaches XLA, whose error names neither the setting nor the remedy."""
    with pytest.raises(UserError) as error:
        act()
    assert words in str(error.value)


def test_rows_are_cut_over_two_axes_in_compute():
    """Catches a sentence that names one of the two axes, whose devices divide the rows."""
    rows = jax.ShapeDtypeStruct((12, T), jnp.float32)
    with (
        jax.set_mesh(make_mesh("sequence")),
        pytest.raises(UserError, match="batch 12 .* 8 devices of mesh axes 'data' x 'sequence'"),
    ):
        jax.eval_shape(lambda x: constrain(x, ("batch", None)), rows)


def test_names_that_cannot_be_are_sentences():
    """Catches an error of JAX that knows neither the logical names nor the table."""
    x = jax.ShapeDtypeStruct((B, T), jnp.float32)
    with jax.set_mesh(make_mesh("fsdp_tp")):
        with pytest.raises(ValueError, match=r"axis names \('batch', 'depth'\); use 2 of"):
            jax.eval_shape(lambda x: constrain(x, ("batch", "depth")), x)
        with pytest.raises(ValueError, match="'tensor' along 'heads' and along 'mlp'; name one"):
            jax.eval_shape(lambda x: constrain(x, ("heads", "mlp")), x)


def test_heads_that_do_not_fit_are_named():
    """Breaks if two kv heads over four tensor devices are cut inside a head."""
    mesh = make_mesh("fsdp_tp", tensor=4)
    k = jax.ShapeDtypeStruct((B, T, 2, 4), jnp.float32)
    names = ("batch", "seq", "kv_heads", "head")
    with jax.set_mesh(mesh), pytest.raises(UserError, match="kv_heads 2 .* 'tensor'; use 4"):
        jax.eval_shape(lambda x: constrain(x, names), k)


def test_without_a_mesh_nothing_happens():
    """Breaks if models need a mesh to run."""
    x = jnp.ones((3, 5))
    assert constrain(x, ("batch", "vocab")) is x
    assert replica_axis(None) is None
