"""The LSTM against torch.nn.LSTM, against a loop of plain steps, and what it must not see."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from test_sizes import products

from lm.config import UserError, build, to_dict
from lm.models import LSTM, LSTMConfig, abstract, logical_axes, mup_multipliers
from lm.models.lstm import deviation, fresh_state
from lm.sizes import flops_forward, ladder, parameters

TORCH = np.load(Path(__file__).parent / "data" / "lstm.npz")
CONFIG = LSTMConfig(vocab_size=24, layers=2, width=6, cells=8, head="untied", base_width=3)
B, T = 2, 12
TOKENS = jnp.arange(B * T).reshape(B, T)  # every place has a token of its own
ONE = jnp.ones((B, T), jnp.int32)
POSITIONS = jnp.array([[*range(5), *range(7)], [*range(9), *range(3)]])  # two documents a row


class Stub(NamedTuple):
    layers: Any
    segments: Any
    length: Any


def initial(config, seed=0):
    row = jnp.zeros((1, 1), jnp.int32)
    return nn.unbox(LSTM(config).init(jax.random.key(seed), row, row, row)["params"])


PARAMS = initial(CONFIG)


def apply(config, params, tokens=TOKENS, segments=ONE, positions=POSITIONS, **more):
    return LSTM(config).apply({"params": params}, tokens, segments, positions, **more)


def from_torch(name, suffix=""):
    """The layers' weights (or their gradients) in our names and layout."""

    def stacked(kind):
        return np.stack([TORCH[f"{name}.{kind}_l{layer}{suffix}"] for layer in (0, 1)])

    biases = [stacked("bias_ih"), stacked("bias_hh")]
    layers = {
        "input": stacked("weight_ih").swapaxes(1, 2),
        "recurrent": stacked("weight_hh").swapaxes(1, 2),
        "bias": biases[0] if suffix else biases[0] + biases[1],
    }
    if name == "projected":
        layers["project"] = stacked("weight_hr").swapaxes(1, 2)
    return layers


@pytest.mark.parametrize("name, cells", [("plain", 0), ("projected", 10)])
def test_equals_torch(name, cells):
    """Breaks if gates are taken in another order, a bias or the projection is lost, or a gradient
    is not that of torch.nn.LSTM with the same weights.
    """
    x, by = TORCH[f"{name}.x"], TORCH[f"{name}.by"]
    rows, length, width = x.shape
    config = LSTMConfig(rows * length, 2, width, cells)
    tokens = jnp.arange(rows * length).reshape(rows, length)
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    scale = deviation(config, "embed")
    params = {"embed": x.reshape(-1, width) * scale, "layers": from_torch(name)}

    def run(params):
        state = fresh_state(config, rows)
        inputs = {"params": params}, tokens, positions, state, None, True
        y, _, state = LSTM(config).apply(*inputs, method="states")
        return (y * by).sum(), (y, *state)

    (_, found), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    for ours, theirs in zip(found, ("y", "h", "c"), strict=True):
        np.testing.assert_allclose(ours, TORCH[f"{name}.{theirs}"], atol=2e-6)
    of_x = gradient["embed"].reshape(x.shape) * scale
    np.testing.assert_allclose(of_x, TORCH[f"{name}.x.grad"], atol=2e-5)
    for key, value in from_torch(name, ".grad").items():
        np.testing.assert_allclose(gradient["layers"][key], value, atol=5e-5, err_msg=key)


def plain(config, params, tokens, positions):
    """The same model by loops over layers, steps and gates."""
    x = params["embed"][tokens] / deviation(config, "embed")
    C = config.memory
    for layer in range(config.layers):
        w = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["layers"])
        h, c, seen = jnp.zeros((len(tokens), config.width)), jnp.zeros((len(tokens), C)), []
        for t in range(tokens.shape[1]):
            begun = np.asarray(positions[:, t, None] > 0)
            h, c = h * begun, c * begun
            i, f, g, o = (
                x[:, t] @ w["input"][:, k : k + C]
                + h @ w["recurrent"][:, k : k + C]
                + w["bias"][k : k + C]
                for k in range(0, 4 * C, C)
            )
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            h = h @ w["project"] if config.projected else h
            seen.append(h)
        x = jnp.stack(seen, 1)
    table = params["embed"] if config.head == "tied" else params["head"]
    return x @ table.T / config.width_ratio


def test_equals_the_loop():
    """Breaks if values or gradients differ from the plain loop's, documents included."""
    by = jax.random.normal(jax.random.key(1), (B, T, CONFIG.vocab_size))
    cut = slice(3, 8)  # a document begins within; a loop of more steps takes seconds
    inputs = TOKENS[:, cut], ONE[:, cut], POSITIONS[:, cut]
    ours = jax.jit(jax.value_and_grad(lambda p: (apply(CONFIG, p, *inputs) * by[:, cut]).sum()))
    with jax.disable_jit():
        loop = jax.value_and_grad(
            lambda p: (plain(CONFIG, p, inputs[0], inputs[2]) * by[:, cut]).sum()
        )(PARAMS)
    value, gradient = ours(PARAMS)
    np.testing.assert_allclose(value, loop[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), gradient, loop[1])


def test_what_is_seen():
    """Breaks if a token sees a later one, another row or the document before its own."""

    def rows(table):
        return apply(CONFIG, PARAMS | {"embed": table}).reshape(B * T, -1).sum(-1)

    sees = abs(jax.jit(jax.jacrev(rows))(PARAMS["embed"])).sum(-1) > 0
    document = np.cumsum(np.asarray(POSITIONS).ravel() == 0)
    want = np.tril(document[:, None] == document)
    np.testing.assert_array_equal(np.asarray(sees), want)


@pytest.mark.parametrize("cut", [1, 5])
def test_extending_equals_the_whole(cut):
    """Breaks if the state is not carried on, padding enters it, or a cache is cut in the wrong
    place.
    """
    whole = apply(CONFIG, PARAMS)
    # The second row's prompt is two tokens shorter: padded on the left.
    pad = jnp.array([0, 2])
    index = jnp.arange(T + 2) - pad[:, None]
    real = (index >= 0) & (index < T)
    at = jnp.clip(index, 0, T - 1)
    tokens, positions = (jnp.take_along_axis(a, at, 1) for a in (TOKENS, POSITIONS))
    segments, positions = real.astype(jnp.int32), jnp.where(real, positions, 0)
    cache = Stub(fresh_state(CONFIG, B), jnp.zeros((B, T + 2), jnp.int32), jnp.zeros((), jnp.int32))
    extend = jax.jit(
        lambda *a, keep: LSTM(CONFIG).apply({"params": PARAMS}, *a, keep=keep, method="extend"),
        static_argnames="keep",
    )
    found = []
    for first in range(0, T + 1, cut):
        columns = [a[:, first : first + cut] for a in (tokens, segments, positions)]
        last, _ = extend(*columns, cache, keep="last")
        y, cache = extend(*columns, cache, keep="all")
        np.testing.assert_array_equal(last, y[:, -1:])
        found.append(y)
    y, filled = jnp.concatenate(found, 1), cache.segments[:, : cache.length]
    assert cache.length == len(y[0])
    np.testing.assert_array_equal(filled, segments[:, : cache.length])
    for row in range(B):
        seen = np.asarray(filled[row]) > 0
        np.testing.assert_allclose(y[row][seen], whole[row, : seen.sum()], atol=1e-5)


def test_initialisers_have_the_table_s_deviation():
    """Breaks if a weight is drawn with another deviation than `deviation` tells, or a fresh cell
    forgets.
    """
    config = LSTMConfig(128, 2, 32, 64, head="untied", base_width=16)
    params = initial(config)
    layers = params["layers"]
    for name in ("input", "recurrent", "project"):
        assert np.std(layers[name]) == pytest.approx(deviation(config, name), rel=0.05), name
    for name in ("embed", "head"):
        assert np.std(params[name]) == pytest.approx(16**-0.5, rel=0.05), name
    want = np.zeros((4, 64))
    want[1] = 1
    np.testing.assert_array_equal(layers["bias"], np.stack([want.ravel()] * 2))


def test_dropout_falls_between_layers_only():
    """Breaks if dropout is on without being asked for, or the state between steps is dropped:
    then a single layer with nothing of its input left would still differ.
    """
    config = dataclasses.replace(CONFIG, dropout=0.5)
    np.testing.assert_array_equal(apply(config, PARAMS), apply(CONFIG, PARAMS))

    def run(seed):
        return apply(config, PARAMS, deterministic=False, rngs={"dropout": jax.random.key(seed)})

    a, b, again = run(1), run(2), run(1)
    assert (a != b).any()
    np.testing.assert_array_equal(a, again)
    blind = PARAMS | {"layers": PARAMS["layers"] | {"input": 0 * PARAMS["layers"]["input"]}}
    keys = jax.random.split(jax.random.key(0), 2)
    states = [
        LSTM(config).apply(
            {"params": blind},
            TOKENS,
            POSITIONS,
            fresh_state(config, B),
            None,
            False,
            method="states",
            rngs={"dropout": key},
        )[2]
        for key in keys
    ]
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_bfloat16_keeps_its_memory_in_float32():
    """Breaks if the memory cells are rounded at every step, or the logits are not float32."""
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    state = fresh_state(config, 1)
    assert (state[0].dtype, state[1].dtype) == (jnp.bfloat16, jnp.float32)
    found = apply(config, PARAMS)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, apply(CONFIG, PARAMS), atol=0.05)


@pytest.mark.parametrize("settings", [{}, {"cells": 24, "head": "untied"}], ids=str)
def test_sizes_are_exact(settings):
    """Breaks if a weight or a product is added to the model and not to the count."""
    config = ladder("3x16", kind="lstm", vocab_size=40, **settings)
    tree = nn.unbox(abstract(config))
    counts = parameters(config)
    assert counts.total == sum(leaf.size for leaf in jax.tree.leaves(tree))
    assert counts.embedding == sum(tree[n].size for n in ("embed", "head") if n in tree)
    row = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    traced = jax.make_jaxpr(lambda p, t: LSTM(config).apply({"params": p}, t, t, t))
    assert products(traced(tree, row).jaxpr) == 2 * flops_forward(config, 16)


def test_mup_is_of_the_three_products():
    """Breaks if a hidden weight learns at the base rate at another width, or a bias does not."""
    rates = mup_multipliers(CONFIG)
    assert {n: r for n, r in rates["layers"].items() if r != 1} == {
        **{"input": 0.5, "recurrent": 0.5, "project": 0.5}
    }
    assert rates["embed"] == rates["head"] == rates["layers"]["bias"] == 1
    names = logical_axes(CONFIG)
    jax.tree.map(lambda p, n: pytest.fail(f"{n}") if len(n) != p.ndim else None, PARAMS, names)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"cells": 4}, "cells 4 are fewer than the width 6"),
        ({"layers": 0}, "layers is 0"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"dropout": 1.0}, "dropout 1 drops everything"),
        ({"z_loss": 2.0}, "z_loss is 2"),
    ],
    ids=str,
)
def test_impossible_shapes_are_sentences(changes, words):
    """Breaks if a bad size reaches JAX, whose error names neither the setting nor the remedy."""
    with pytest.raises(UserError, match=words):
        dataclasses.replace(CONFIG, **changes)


def test_config_survives_json():
    """Breaks if a field has a type that the strict builder cannot read back, or the kind is lost:
    a run directory would not say what it trained.
    """
    assert build(LSTMConfig, to_dict(CONFIG)) == CONFIG
    assert to_dict(CONFIG)["kind"] == "lstm"
