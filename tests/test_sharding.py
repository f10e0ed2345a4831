"""Every strategy gives the single-device loss and gradients on eight devices, and misfits are
sentences.
"""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from lm.config import UserError
from lm.models import Transformer, TransformerConfig, abstract, initialise
from lm.sharding import (
    batch_sharding,
    constrain,
    make_mesh,
    replica_axis,
    shardings,
)

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 (simulated) devices")

CONFIG = TransformerConfig(
    vocab_size=32, layers=2, width=16, heads=4, kv_heads=2, mlp_size=24, head="untied"
)
R, B, T = 2, 8, 8
STRATEGIES = ("replicated", "fsdp", "fsdp_tp")


def loss(params, tokens):
    ones = jnp.ones_like(tokens)
    positions = jnp.broadcast_to(jnp.arange(T), tokens.shape)
    logits = Transformer(CONFIG).apply({"params": params}, tokens, ones, positions)
    return -jnp.mean(jax.nn.log_softmax(logits)[..., 3])


@pytest.fixture(scope="module")
def operands():
    """Parameters and batches of R replicas."""
    keys = jax.random.split(jax.random.key(0), R)
    params = jax.vmap(lambda key: nn.unbox(initialise(CONFIG, key)))(keys)
    return params, jax.random.randint(jax.random.key(1), (R, B, T), 0, CONFIG.vocab_size)


@pytest.fixture(scope="module")
def single(operands):
    """Losses and gradients of the replicas on one device."""
    return jax.jit(jax.vmap(jax.value_and_grad(loss)))(*operands)


def assert_close(got, want):
    for path, leaf in jax.tree_util.tree_leaves_with_path(got):
        other = dict(jax.tree_util.tree_leaves_with_path(want))[path]
        np.testing.assert_allclose(leaf, other, rtol=2e-4, atol=2e-6, err_msg=str(path))


@pytest.mark.parametrize("strategy, gathers", [("replicated", 0), ("fsdp", 7), ("fsdp_tp", 7)])
def test_strategy_equals_one_device(strategy, gathers, operands, single):
    """Breaks if a table cuts an axis that the model mixes wrongly, or if more than the weights
    is gathered.
    """
    mesh = make_mesh(strategy)
    params, tokens = jax.tree.map(lambda x: x[0], operands)
    at_rest = shardings(abstract(CONFIG), mesh, strategy)
    rows = batch_sharding(mesh, B)
    step = jax.jit(
        jax.value_and_grad(loss), in_shardings=(at_rest, rows), out_shardings=(None, at_rest)
    )
    with jax.set_mesh(mesh):
        params, tokens = jax.device_put((params, tokens), (at_rest, rows))
        compiled = step.lower(params, tokens).compile()
        value, gradient = compiled(params, tokens)
    want_value, want_gradient = jax.tree.map(lambda x: x[0], single)
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    assert_close(gradient, want_gradient)
    assert len(re.findall(r" all-gather\(", compiled.as_text())) == gathers
    assert " all-to-all(" not in compiled.as_text()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_replicas_on_a_mesh_axis_equal_one_device(strategy, operands, single):
    """Breaks if a constraint inside the vmap gathers the replica axis, or mixes replicas."""
    mesh = make_mesh(strategy, replicas=R)
    stacked = jax.eval_shape(
        jax.vmap(partial(initialise, CONFIG)),
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), R)),
    )
    at_rest = shardings(stacked, mesh, strategy, replicas=True)
    rows = batch_sharding(mesh, B, replicas=R)
    with jax.set_mesh(mesh):
        step = jax.jit(
            jax.vmap(jax.value_and_grad(loss), spmd_axis_name=replica_axis(mesh)),
            in_shardings=(at_rest, rows),
            out_shardings=(None, at_rest),
        )
        params, tokens = jax.device_put(operands, (at_rest, rows))
        value, gradient = step(params, tokens)
    assert all(s.spec[0] == "replica" for s in jax.tree.leaves(at_rest))
    np.testing.assert_allclose(value, single[0], rtol=1e-5)
    assert_close(gradient, single[1])


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
        (lambda: make_mesh("fsdp_tp", replicas=8), "8 replicas x 2 tensor"),
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
