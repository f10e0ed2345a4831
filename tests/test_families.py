"""Every setting of a Transformer against the model written down in NumPy (tests/families.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, SHAPE, family, make_params, plain
from flax import linen as nn
from jax.sharding import PartitionSpec

from lm.config import UserError, build, fingerprint, to_dict
from lm.models import (
    Transformer,
    TransformerConfig,
    abstract,
    fused,
    initialise,
    logical_axes,
    mup_multipliers,
)
from lm.sharding import make_mesh, shardings
from lm.sizes import flops_forward

QUICK = {"xla_backend_optimization_level": 0}
SEGMENTS = np.array([[1] * 5 + [2] * 4 + [0] * 2, [1] * 11])
POSITIONS = np.array([[*range(5), *range(4), 0, 0], [*range(11)]])
TOKENS = np.random.default_rng(0).integers(0, 29, SEGMENTS.shape)
TYPES = np.array([[0] * 3 + [1] * 8, [1] * 6 + [0] * 5])


def apply(config, params, *rows):
    return Transformer(config).apply({"params": params}, *rows)


def compiled(config):
    return jax.jit(lambda *a: apply(config, *a), compiler_options=QUICK)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_its_formula(name):
    """Breaks if a setting is read nowhere, at the wrong place, or changes the tree of another.

    The states and table of `hidden` have to give the same logits, biases of the head included.
    """
    config = family(name, attention="reference")
    params = make_params(config)
    types = TYPES if config.token_types else None
    rows = [jnp.asarray(a) for a in (TOKENS, SEGMENTS, POSITIONS)]

    def run(params, tokens, segments, positions):
        given = {"params": params}, tokens, segments, positions, types
        x, table = Transformer(config).apply(*given, method="hidden")
        return Transformer(config).apply(*given), x @ table.T / config.width_ratio

    logits, product = jax.jit(run, compiler_options=QUICK)(params, *rows)
    real = SEGMENTS > 0
    want = plain(config, params, TOKENS, SEGMENTS, POSITIONS, types)
    np.testing.assert_allclose(np.asarray(logits)[real], want[real], atol=2e-4)
    np.testing.assert_allclose(product, logits, atol=1e-4)


def test_token_types_default_to_zero():
    """Breaks if a model with types cannot be run as every other one, by what trains and scores."""
    config = family("bert", attention="reference")
    run = compiled(config)
    params, rows = make_params(config), (TOKENS, SEGMENTS, POSITIONS)
    zeros = run(params, *rows, np.zeros_like(TYPES))
    np.testing.assert_allclose(run(params, *rows), zeros, atol=1e-5)
    assert abs(run(params, *rows, TYPES) - zeros).max() > 0.1


def test_every_parameter_has_axes_a_rate_and_a_place_to_rest():
    """Breaks if a bias or a table cannot be cut, starts off zero, or learns as a hidden weight."""
    config = family("bert", kv_heads=2, vocab_size=32, base_width=8)
    fresh = jax.jit(lambda key: nn.unbox(initialise(config, key)), compiler_options=QUICK)
    params, names = fresh(jax.random.key(0)), logical_axes(config)
    jax.tree.map(lambda p, n: pytest.fail(f"{n}") if len(n) != p.ndim else None, params, names)
    assert names["layers"]["qkv_bias"] == ("layers", "heads") and names["head_bias"] == ("vocab",)
    assert names["layers"]["up_bias"] == ("layers", "mlp") and names["type_embed"][1] == "embed"
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        assert (leaf == 0).all() == path[-1].key.endswith("_bias"), path
    rates = mup_multipliers(config)
    hidden = {name for name, rate in (rates | rates["layers"]).items() if rate == 1 / 3}
    assert hidden == {"qkv", "out", "up", "down", "transform"}
    rest = shardings(abstract(config), make_mesh("fsdp_tp"), "fsdp_tp")
    assert rest["layers"]["down_bias"].is_fully_replicated
    assert rest["layers"]["qkv_bias"].spec == PartitionSpec(None, "tensor")


def test_devices_that_share_a_model_compute_it():
    """Breaks if a bias is cut otherwise than the product it is added to."""
    config = family("bert", kv_heads=2, vocab_size=32, attention="reference")
    params = make_params(config)
    rows = [jnp.concatenate([jnp.asarray(a)] * 2) for a in (TOKENS, SEGMENTS, POSITIONS)]
    run = compiled(config)
    want = run(params, *rows)
    mesh = make_mesh("fsdp_tp", jax.devices()[:4])
    given = jax.device_put(params, shardings(abstract(config), mesh, "fsdp_tp"))
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(run(given, *rows), want, atol=1e-4)


def test_a_window_costs_what_it_sees():
    """Breaks if a window, or both directions, are counted as plain causal attention."""
    T, each = 11, 4 * SHAPE["layers"] * SHAPE["width"]
    pairs = {name: np.zeros((T, T), bool) for name in ("ours", "mistral", "bert", "relu")}
    for name, seen in pairs.items():
        config, (t, s) = family(name), np.indices((T, T))
        seen |= (s <= t) | (config.direction == "both")
        seen &= (abs(t - s) < config.window) | (config.window == 0)
        every = flops_forward(config, T, causal=False) - flops_forward(config, T)
        assert every == each * (T * T - seen.sum()), name


def test_settings_at_their_default_leave_no_trace():
    """Breaks if a study from before there was a choice gets another fingerprint."""
    known = {"vocab_size", "layers", "width", "heads", "kv_heads", "mlp_size", "activation"}
    assert known < set(to_dict(family("ours"))) and len(to_dict(family("ours"))) == 20
    assert fingerprint(TransformerConfig(8, 1, 4, 1, 1, 8)) == "9b6ff36939f8"
    for name in FAMILIES:
        assert build(TransformerConfig, to_dict(family(name))) == family(name)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "ours"])
def test_the_kernel_of_small_models_refuses_what_it_does_not_know(name):
    """Breaks if a study trains another model than its config says, only faster."""
    assert "not " in fused.supports(family(name), 16)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"positions": "learned"}, "positions 'learned' need a row for each; give context"),
        ({"positions": "learned", "context": 8, "rotary_fraction": 0.5}, "leave them out"),
        ({"positions": "relative", "rope_scaling": (8.0, 1.0, 4.0, 99.0)}, "leave them out"),
        ({"head_width": 5}, "head size 5 is odd"),
        ({"rotary_fraction": 0.0}, "rotary_fraction is 0.0; it must be above 0 and at most 1"),
        ({"rotary_fraction": 0.1}, "rotary_fraction 0.1 of a head of 6 rotates nothing"),
        ({"rope_scaling": (8.0, 1.0)}, "rope_scaling is [8.0, 1.0]; it must be four positive"),
        ({"rope_scaling": (8.0, 4.0, 1.0, 99.0)}, "not below the high one of 1.0"),
        ({"rope_scaling": (8.0, float("nan"), 4.0, 99.0)}, "it must be four positive"),
        ({"window": -1}, "window is -1; it must be at least 0"),
        ({"context": -1}, "context is -1; it must be at least 0"),
    ],
    ids=str,
)
def test_impossible_settings_are_sentences(changes, words):
    """Breaks if a setting that no model can have, or that nothing reads, is taken in silence."""
    with pytest.raises(UserError) as error:
        family("ours", **changes)
    assert words in str(error.value)


def test_a_row_longer_than_the_learned_positions_is_a_sentence():
    """Breaks if positions without a row are read as NaN."""
    config, row = family("gpt2"), jnp.zeros((1, 17), jnp.int32)
    with pytest.raises(UserError, match="a row of 17 tokens is longer than the context of 16"):
        jax.eval_shape(
            lambda p: Transformer(config).apply({"params": p}, row, row, row), make_params(config)
        )
