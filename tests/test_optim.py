"""Optimisers: the direction times the rate equals optax's own update, in every tensor."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from lm.config import UserError
from lm.models import TransformerConfig, abstract, mup_multipliers
from lm.train.optim import OptimConfig, direction, schedule


def tree(seed, scale=1.0):
    """Parameters or gradients with every kind of tensor that optimisers tell apart."""
    rng = np.random.default_rng(seed)
    shapes = {
        "embed": (8, 6),
        "layers": {"qkv": (2, 6, 4), "up": (2, 6, 8), "norm1": (2, 6)},
        "norm": (6,),
    }
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    make = lambda shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32)  # noqa: E731
    return jax.tree.map(make, shapes, is_leaf=is_shape)


def ones():
    return jax.tree.map(lambda _: 1.0, tree(0))


def run(tx, params, steps, rate=None):
    """Parameters after some steps, the last of which has a gradient too small to be clipped."""
    update, state = jax.jit(tx.update), tx.init(params)
    for i in range(steps):
        updates, state = update(tree(100 + i, 0.01 if i == steps - 1 else 3.0), state, params)
        scale = 1.0 if rate is None else -rate(i)
        params = jax.tree.map(lambda p, u, s=scale: p + s * u, params, updates)
    return params


def close(got, want, rtol=2e-6):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7, err_msg=str(path))


def rate(step):
    """A rate that changes, to tell a decay that scales with it from one that does not."""
    return 0.05 / (1 + step)


def adamw(config):
    """The oracle, with the rate inside; norms are not decayed."""
    mask = {
        "embed": True,
        "layers": {"qkv": True, "up": True, "norm1": False},
        "norm": False,
    }
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            rate, config.b1, config.b2, config.epsilon, weight_decay=config.weight_decay, mask=mask
        ),
    )


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adamw_is_that_of_optax(decay):
    """Catches another order of clipping, moments, decay and rate, and decay on norms."""
    config = OptimConfig(b1=0.8, b2=0.95, epsilon=1e-3, weight_decay=decay, clip=0.5)
    got = run(direction(config, ones()), tree(0), 5, rate)
    close(got, run(adamw(config), tree(0), 5))


def test_muon_is_that_of_optax_on_stacked_matrices_and_adam_elsewhere():
    """Catches Muon over the wrong axes, over embeddings or norms, and another scale than 0.2
    sqrt(max side)."""
    config = OptimConfig("muon", b1=0.8, b2=0.95, weight_decay=0.1, clip=0.5)
    params = tree(0)
    got = run(direction(config, ones()), params, 4, rate)
    matrices = lambda p: jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), p)  # noqa: E731
    muon = optax.contrib.scale_by_muon(beta=0.95, weight_dimension_numbers=matrices)
    clip = optax.clip_by_global_norm(config.clip)

    def slices(t):
        """Every hidden matrix by itself, wide and tall, of both layers."""
        return [t["layers"][name][layer] for name in ("qkv", "up") for layer in range(2)]

    want, state = slices(params), muon.init(slices(params))
    update = jax.jit(muon.update)
    for i in range(4):
        gradient, _ = clip.update(tree(100 + i, 0.01 if i == 3 else 3.0), optax.EmptyState())
        updates, state = update(slices(gradient), state)
        want = [
            p - rate(i) * (0.2 * max(p.shape) ** 0.5 * u + config.weight_decay * p)
            for p, u in zip(want, updates, strict=True)
        ]
    close(slices(got), want, rtol=2e-5)

    rest = run(adamw(config), params, 4)
    close(got["embed"], rest["embed"])
    close(got["norm"], rest["norm"])
    close(got["layers"]["norm1"], rest["layers"]["norm1"])


def test_muon_has_the_size_of_adam():
    """Catches a direction without the scale that lets one learning rate serve both."""
    config = OptimConfig("muon", weight_decay=0.0)
    tx = direction(config, ones())
    updates, _ = jax.jit(tx.update)(tree(1), tx.init(tree(0)), tree(0))
    qkv = updates["layers"]["qkv"]
    # Orthogonal: `min` singular values near 1, times 0.2 sqrt(max), spread over min x max elements.
    assert float(jnp.sqrt(jnp.mean(qkv**2))) == pytest.approx(0.2, rel=0.25)
    singular = jnp.linalg.svd(qkv[0], compute_uv=False) / (0.2 * 6**0.5)
    assert float(singular.min()) > 0.6 and float(singular.max()) < 1.3


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_mup_divides_the_update_of_hidden_weights_by_the_width_ratio(name):
    """Catches multipliers before clipping or Adam, which would cancel them, and on embeddings.

    Muon's update grows with the root of the width, so its factor is the root of Adam's.
    """
    config = TransformerConfig(16, 2, 16, 2, 2, 32, base_width=4, head="untied")
    multipliers = mup_multipliers(config)
    rng = np.random.default_rng(0)
    shapes = nn.unbox(abstract(config))
    params, gradient = (
        jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), shapes)
        for _ in range(2)
    )
    updates = {}
    for key, factors in (("mup", multipliers), ("plain", jax.tree.map(lambda _: 1.0, multipliers))):
        tx = direction(OptimConfig(name), factors)
        updates[key], _ = jax.jit(tx.update)(gradient, tx.init(params), params)
    hidden = {"qkv", "out", "gate", "up", "down"}
    assert hidden < set(updates["plain"]["layers"])
    for part, leaf in updates["plain"]["layers"].items():
        factor = {"adamw": 1 / 4, "muon": 1 / 2}[name] if part in hidden else 1
        np.testing.assert_allclose(updates["mup"]["layers"][part], leaf * factor, rtol=1e-6)
    for part in ("embed", "head", "norm"):
        np.testing.assert_array_equal(updates["mup"][part], updates["plain"][part])


BUDGET, WARM = 1000, 200


def shares(config, seen, tokens=BUDGET):
    found = jax.jit(schedule(config, tokens))(jnp.asarray(seen, jnp.float32))
    return np.asarray(found).tolist()


def test_cosine_schedule():
    """Catches a schedule in steps, a cosine that begins before the warm-up ends, a wrong end."""
    config = OptimConfig(schedule="cosine", warmup_tokens=WARM, final=0.1)
    seen = [0, 50, 200, 400, 600, 1000, 1100]
    quarter = 0.1 + 0.9 * (0.5 + 0.5 * 0.5**0.5)
    want = [0, 0.25, 1, quarter, 0.55, 0.1, 0.1]
    assert shares(config, seen) == pytest.approx(want, abs=1e-6)


def test_wsd_schedule():
    """Catches a decay over the wrong share, and one that is not linear or misses `final`."""
    config = OptimConfig(schedule="wsd", warmup_tokens=WARM, final=0.1, decay_share=0.4)
    seen = [0, 50, 200, 400, 600, 800, 1000]
    assert shares(config, seen) == pytest.approx([0, 0.25, 1, 1, 1, 0.55, 0.1], abs=1e-6)
    config = OptimConfig(schedule="wsd", decay_share=0.0)
    assert shares(config, [1, 999]) == pytest.approx([1, 1])


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_schedule_of_more_tokens_than_an_int32_counts(name):
    """Catches token counts that enter the program as int32: billions would overflow."""
    config = OptimConfig(schedule=name, warmup_tokens=3_000_000_000, final=0.0)
    found = shares(config, [1.5e9, 3e9, 1e11], tokens=100_000_000_000)
    assert found == pytest.approx([0.5, 1, 0], abs=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be greater than 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"epsilon": 0.0}, "epsilon is 0.0"),
        ({"b1": 1.0}, "b1 is 1.0; it must be between 0 and"),
        ({"b2": -0.1}, "b2 is -0.1"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; it must be at least 0"),
        ({"warmup_tokens": -1}, "warmup_tokens is -1"),
        ({"final": 1.5}, "final is 1.5; it must be between 0 and 1"),
        ({"decay_share": float("nan")}, "decay_share is nan"),
    ],
)
def test_bad_values_are_sentences(change, words):
    """Catches a value that would only show as a NaN in the first step."""
    with pytest.raises(UserError) as error:
        OptimConfig(**change)
    assert words in str(error.value)


def test_warmup_longer_than_the_budget_is_a_sentence():
    """Catches a run that never leaves its warm-up."""
    with pytest.raises(UserError, match="optim.warmup_tokens 1000 is not below the budget, 1000"):
        schedule(OptimConfig(warmup_tokens=1000), 1000)
