"""Counts against the real tree and against the products that the traced model holds."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, PAIRS, family, pair
from flax import linen as nn

from lm.config import UserError
from lm.models import abstract, build
from lm.sizes import (
    NAMED,
    flops_forward,
    flops_per_sequence,
    flops_per_token,
    ladder,
    parameters,
    six_n,
)

CONFIGS = [
    *(ladder(size) for size in ("1x4", "1x8", "2x8", "2x12", "2x16", "1x32", "3x40", "8x256")),
    ladder("2x16", activation="swiglu", head="untied", qk_norm="rms", kv_heads=1),
    ladder("3x24", heads=6, kv_heads=3, vocab_size=77, mlp_size=31, qk_norm="rms"),
    *(ladder(name) for name in NAMED),
    ladder("70b", head="tied", qk_norm="rms", vocab_size=128_256),
]


OTHERS = [family(name) for name in FAMILIES] + [pair(name) for name in PAIRS]
TABLES = ("embed", "head", "position_embed", "type_embed")


@pytest.mark.parametrize("config", CONFIGS + OTHERS, ids=lambda c: f"{c.layers}x{c.width}")
def test_parameters_equal_the_tree(config):
    """Breaks if a weight is added to the model and not to the count, at any size."""
    tree = nn.unbox(abstract(config))
    total = sum(leaf.size for leaf in jax.tree.leaves(tree))
    parts = tree, tree.get("encoder", {}), tree.get("decoder", {})
    tables = sum(part[name].size for part in parts for name in TABLES if name in part)
    counts = parameters(config)
    assert (counts.total, counts.embedding) == (total, tables)
    assert counts.non_embedding == total - tables


def products(jaxpr):
    """FLOPs of all dot_generals of a jaxpr, loops counted as often as they run."""
    flops = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            depth = np.prod([eqn.invars[0].aval.shape[i] for i in contract])
            flops += 2 * int(depth) * eqn.outvars[0].aval.size
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        inner = [getattr(value, "jaxpr", value) for value in eqn.params.values()]
        flops += times * sum(products(j) for j in inner if hasattr(j, "eqns"))
    return flops


@pytest.mark.parametrize(
    "config", CONFIGS[4:10:2] + CONFIGS[-1:] + OTHERS, ids=lambda c: f"{c.layers}x{c.width}"
)
def test_forward_flops_equal_the_products_of_the_model(config):
    """Breaks if a product is added to the model and not to the count, or counted in another
    size.
    """
    config = dataclasses.replace(config, attention="reference")
    rows, length = 2, 16
    row = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    traced = jax.make_jaxpr(lambda p, t: build(config).apply({"params": p}, t, t, t))
    jaxpr = traced(nn.unbox(abstract(config)), row).jaxpr
    assert products(jaxpr) == rows * flops_forward(config, length, causal=False)


def test_causal_count_leaves_out_the_unseen_pairs():
    """Breaks if the causal count is half of T^2 instead of T (T + 1) / 2, or if backward is
    forgotten.
    """
    config, T = ladder("2x16"), 32
    unseen = T * (T - 1) // 2
    assert flops_forward(config, T, causal=False) - flops_forward(config, T) == 4 * 2 * 16 * unseen
    assert flops_per_sequence(config, T) == 3 * flops_forward(config, T)
    assert flops_per_token(config, T) == flops_per_sequence(config, T) / T


def test_six_n_is_what_remains_for_large_models():
    """Breaks if the convention counts embeddings, or forgets that backward is twice forward."""
    config = ladder("70b")
    assert six_n(config) == 6 * parameters(config).non_embedding
    assert 1 < flops_per_token(config, 2048) / six_n(config) < 1.03


@pytest.mark.parametrize("name", NAMED)
def test_names_tell_the_size(name):
    """Breaks if a named size is far from its name, or has heads of another size than 128."""
    config = ladder(name)
    number = float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
    assert parameters(config).total == pytest.approx(number, rel=0.12)
    assert config.head_size == 128


def test_the_dial():
    """Breaks if a ladder size gets other heads, and with them another onset, than those
    measured.
    """
    heads = {size: ladder(size).heads for size in ("2x4", "2x8", "2x16", "1x32", "4x64", "8x128")}
    assert heads == {"2x4": 1, "2x8": 1, "2x16": 1, "1x32": 2, "4x64": 4, "8x128": 8}
    assert parameters(ladder("2x16")).non_embedding == 12 * 2 * 16**2 + 5 * 16
    assert ladder("2x16", activation="swiglu").mlp_size == 42
    assert ladder("2x16", heads=4, dropout=0.1).kv_heads == 4
    two = ladder("2x16", kind="encoder_decoder", source_length=8)
    assert (two.layers, two.decoder.layers, two.mlp_size, two.heads) == (2, 2, 64, 1)


@pytest.mark.parametrize(
    "size", ["2y16", "x16", "2x", "0x16", "2x7", "2x2", "8b", "", "-1x16", "²x4"]
)
def test_sizes_that_do_not_exist_are_sentences(size):
    """Breaks if a misspelt size is guessed or raises something the command line does not catch."""
    with pytest.raises(UserError, match="use "):
        ladder(size)
