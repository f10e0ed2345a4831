"""The Transformer against slower or simpler versions of itself, and what it must not see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm.config import UserError, build, to_dict
from lm.models import (
    Transformer,
    TransformerConfig,
    initialise,
    logical_axes,
    mup_multipliers,
)
from lm.models.transformer import deviation

CONFIG = TransformerConfig(
    vocab_size=24, layers=2, width=16, heads=4, kv_heads=2, mlp_size=20, head="untied"
)
B, T = 2, 12
TOKENS = jnp.arange(B * T).reshape(
    B, T
)  # every position has a token, and so an embedding, of its own
ONE = jnp.ones((B, T), jnp.int32)
POSITIONS = jnp.broadcast_to(jnp.arange(T), (B, T))
PARAMS = nn.unbox(initialise(CONFIG, jax.random.key(0)))


def variant(**changes):
    return dataclasses.replace(CONFIG, **changes)


def apply(config, params, tokens=TOKENS, segments=ONE, positions=POSITIONS, **more):
    return Transformer(config).apply({"params": params}, tokens, segments, positions, **more)


@jax.jit
def jacobian(segments, positions):
    """How much each logit row depends on the embedding of each token: [B*T, V]."""

    def rows(table):
        logits = apply(CONFIG, PARAMS | {"embed": table}, segments=segments, positions=positions)
        return logits.reshape(B * T, -1).sum(-1)

    return abs(jax.jacrev(rows)(PARAMS["embed"])).sum(-1)


def test_causality():
    """Breaks if a token sees a later one, another row, or fails to see an earlier one."""
    sees = np.asarray(jacobian(ONE, POSITIONS)) > 0
    want = np.kron(np.eye(B), np.tril(np.ones((T, T)))) > 0
    np.testing.assert_array_equal(sees, want)


def test_documents_do_not_see_each_other():
    """Breaks if attention crosses a document boundary or touches padding."""
    segments = jnp.array([[1] * 5 + [2] * 4 + [0] * 3, [1] * 12])
    positions = jnp.array([[*range(5), *range(4), 0, 0, 0], [*range(12)]])
    sees = np.asarray(jacobian(segments, positions))[:T, :T] > 0
    want = np.zeros((T, T))
    want[:5, :5], want[5:9, 5:9] = np.tril(np.ones((5, 5))), np.tril(np.ones((4, 4)))
    np.fill_diagonal(want, 1)  # padding keeps its residual stream
    np.testing.assert_array_equal(sees, want > 0)


def test_packed_equals_unpacked():
    """Breaks if positions do not restart, or if a packed document reads its neighbours."""
    first, second = TOKENS[:1, :5], TOKENS[:1, 5:]
    segments = jnp.array([[1] * 5 + [2] * 7])
    positions = jnp.array([[*range(5), *range(7)]])
    packed = apply(CONFIG, PARAMS, TOKENS[:1], segments, positions)
    for tokens, got in ((first, packed[:, :5]), (second, packed[:, 5:])):
        n = tokens.shape[1]
        alone = apply(CONFIG, PARAMS, tokens, ONE[:1, :n], POSITIONS[:1, :n])
        np.testing.assert_allclose(got, alone, atol=1e-5)


def test_positions_are_relative_and_matter():
    """Breaks if rotary positions become absolute, or are not applied to both q and k."""
    want = apply(CONFIG, PARAMS)
    np.testing.assert_allclose(apply(CONFIG, PARAMS, positions=POSITIONS + 7), want, atol=1e-4)
    assert abs(apply(CONFIG, PARAMS, positions=POSITIONS * 2) - want).max() > 1e-2


def loss_and_gradient(config, params=PARAMS, key=None):
    def loss(params):
        rngs = {} if key is None else {"dropout": key}
        y = apply(config, params, deterministic=key is None, rngs=rngs)
        return jnp.sum(jnp.sin(y))

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(
    "changes",
    [{"layer_loop": "unroll"}, {"remat": "full"}, {"remat": "dots"}, {"attention": "blockwise"}],
    ids=lambda changes: next(iter(changes.values())),
)
def test_the_same_function_another_way(changes):
    """Breaks if a way of running changes the parameter tree, the loss, the gradients or dropout."""
    plain, other = variant(dropout=0.2), variant(dropout=0.2, **changes)
    shapes = [
        jax.tree.map(jnp.shape, nn.unbox(initialise(c, jax.random.key(0)))) for c in (plain, other)
    ]
    assert shapes[0] == shapes[1]
    key = jax.random.key(3)
    want, got = loss_and_gradient(plain, key=key), loss_and_gradient(other, key=key)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


def test_vmap_over_replicas():
    """Breaks if the model keeps state or mixes replicas, so that a population is not its
    members.
    """
    stacked = jax.tree.map(lambda a: jnp.stack([a, a * 1.1]), PARAMS)
    got = jax.vmap(lambda p: apply(CONFIG, p))(stacked)
    for i in range(2):
        want = apply(CONFIG, jax.tree.map(lambda a, i=i: a[i], stacked))
        np.testing.assert_allclose(got[i], want, atol=1e-5)


def test_dropout_depends_on_its_key_only():
    """Breaks if dropout is drawn from anything else, is off in training, or is on in evaluation."""
    config = variant(dropout=0.3)
    run = jax.jit(lambda key: apply(config, PARAMS, deterministic=False, rngs={"dropout": key}))
    one, again, other = run(jax.random.key(1)), run(jax.random.key(1)), run(jax.random.key(2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).mean() > 0.9
    np.testing.assert_array_equal(apply(config, PARAMS), apply(CONFIG, PARAMS))


def test_bfloat16_products():
    """Breaks if logits or statistics are kept in bfloat16, or parameters are not cast."""
    got = apply(variant(dtype="bfloat16"), PARAMS)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, apply(CONFIG, PARAMS), atol=0.15)


def test_qk_norm_takes_the_size_of_queries_out():
    """Breaks if q or k is not normalised: a hundredfold projection would sharpen attention."""
    config = variant(qk_norm="rms")
    params = nn.unbox(initialise(config, jax.random.key(0)))
    q_and_k = np.r_[np.ones(3 * 4), np.zeros(4)] > 0  # of a kv head: two queries, key, value
    scale = jnp.asarray(np.where(np.tile(q_and_k, 2), 100.0, 1.0))
    louder = params | {"layers": params["layers"] | {"qkv": params["layers"]["qkv"] * scale}}
    np.testing.assert_allclose(apply(config, louder), apply(config, params), atol=1e-3)


def test_gelu_and_tied_head_have_fewer_weights():
    """Breaks if `activation` or `head` is read nowhere."""
    params = initialise(variant(activation="gelu", head="tied"), jax.random.key(0))
    assert "head" not in params and "gate" not in params["layers"]
    assert "head" in PARAMS and PARAMS["layers"]["gate"].shape == (2, 16, 20)


def test_initialisers_have_the_table_s_deviation():
    """Breaks if a weight is drawn with another deviation than `deviation` tells, or a norm is not
    1.
    """
    config = variant(width=64, mlp_size=96, vocab_size=128, base_width=16)
    params = nn.unbox(initialise(config, jax.random.key(0)))
    weights = params["layers"] | {"embed": params["embed"], "head": params["head"]}
    for name in ("embed", "head", "qkv", "out", "gate", "up", "down"):
        assert np.std(weights[name]) == pytest.approx(deviation(config, name), rel=0.05), name
    assert (params["norm"] == 1).all() and (params["layers"]["norm1"] == 1).all()


def test_mup_multipliers():
    """Breaks if a hidden weight learns at the base rate at another width, or an embedding does
    not.
    """
    rates = mup_multipliers(variant(width=64, base_width=16))
    assert rates["embed"] == rates["head"] == rates["norm"] == rates["layers"]["norm1"] == 1
    assert {rates["layers"][name] for name in ("qkv", "out", "gate", "up", "down")} == {0.25}
    assert set(jax.tree.leaves(mup_multipliers(CONFIG))) == {1.0}


def test_mup_keeps_updates_the_same_size_across_widths():
    """Breaks if a multiplier or a deviation is wrong: a step of Adam would move a wide model
    further.
    """

    def moved(width, base):
        config = variant(width=width, mlp_size=2 * width, base_width=base)
        params = nn.unbox(initialise(config, jax.random.key(0)))

        def wanted(params):
            return jax.nn.log_softmax(apply(config, params))[..., 3].mean()

        value, gradient = jax.jit(jax.value_and_grad(wanted))(params)
        rates = mup_multipliers(config)
        adam = jax.tree.map(lambda p, g, r: p + 1e-4 * r * jnp.sign(g), params, gradient, rates)
        return float(wanted(adam) - value)

    assert 0.5 < moved(128, 16) / moved(16, 16) < 2
    assert moved(128, 0) / moved(16, 0) > 8


def test_logical_axes_fit_the_parameters():
    """Breaks if a parameter has no names, or not one for each axis: a strategy could not cut it."""
    names = logical_axes(CONFIG)
    assert names["layers"]["qkv"] == ("layers", "embed", "heads")
    jax.tree.map(lambda p, n: pytest.fail(f"{n}") if len(n) != p.ndim else None, PARAMS, names)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"heads": 3}, "heads 3 does not divide width 16; use 2 or 4"),
        ({"kv_heads": 3}, "kv_heads 3 does not divide heads 4; use 2 or 4"),
        ({"heads": 16, "kv_heads": 16}, "head size 1 (width 16 / heads 16) is odd"),
        ({"layers": 0}, "layers is 0"),
        ({"width": -16}, "width is -16"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"dropout": 1.0}, "dropout 1 drops everything"),
        ({"dropout": float("nan")}, "dropout is nan"),
        ({"norm_epsilon": 0.0}, "norm_epsilon is 0"),
        ({"attention": "blockwize"}, "did you mean 'blockwise'"),
        ({"base_width": -1}, "base_width is -1"),
    ],
    ids=str,
)
def test_impossible_shapes_are_sentences(changes, words):
    """Breaks if a bad size reaches JAX, whose error names neither the setting nor the remedy."""
    with pytest.raises(UserError) as error:
        variant(**changes)
    assert words in str(error.value)


def test_config_survives_json():
    """Breaks if a field has a type that the strict builder cannot read back."""
    assert build(TransformerConfig, to_dict(CONFIG)) == CONFIG
