"""The loss: nats per weighted token, with the gradient of the textbook's softmax."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import objectives
from lm.data.loader import Batch
from lm.models import Transformer, TransformerConfig


def logits(seed=0, scale=3.0):
    """[B, T, V] and targets [B, T]."""
    rng = np.random.default_rng(seed)
    values = jnp.asarray(scale * rng.normal(size=(3, 5, 7)), jnp.float32)
    return values, jnp.asarray(rng.integers(0, 7, (3, 5)), jnp.int32)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_nats_are_those_of_optax(scale):
    """Catches a log-sum-exp that overflows, a target off by one, and a wrong gradient."""
    values, targets = logits(scale=scale)
    oracle = optax.softmax_cross_entropy_with_integer_labels
    np.testing.assert_allclose(
        objectives.nats(values, targets), oracle(values, targets), rtol=1e-6, atol=1e-5
    )
    weights = jnp.arange(15.0).reshape(3, 5)
    got, want = (
        jax.grad(lambda x, f=f: (f(x, targets) * weights).sum())(values)
        for f in (objectives.nats, oracle)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.abs(want).max() > 1


class Given:
    """A model whose logits are its parameters."""

    def apply(self, variables, tokens, segments, positions, *, deterministic, rngs):
        return variables["params"]


def batch(targets, weights):
    return SimpleNamespace(
        tokens=None, segments=None, positions=None, targets=targets, weights=weights
    )


def test_loss_is_the_weighted_mean():
    """Catches a mean over all tokens: the loss would depend on how much of a row is prompt."""
    values, targets = logits()
    weights = jnp.asarray(np.random.default_rng(1).choice([0, 0.25, 1], (3, 5)), jnp.float32)
    loss, metrics = objectives.causal(Given(), values, batch(targets, weights))
    logp = np.asarray(jax.nn.log_softmax(values))
    terms = -np.take_along_axis(logp, np.asarray(targets)[..., None], -1)[..., 0]
    assert float(loss) == pytest.approx(np.average(terms, weights=weights), rel=1e-6)
    assert float(metrics.weight) == pytest.approx(float(weights.sum()))
    assert float(metrics.loss) == float(loss)


def test_tokens_of_weight_zero_have_no_gradient():
    """Catches prompts and padding that train the model."""
    values, targets = logits()
    weights = jnp.ones((3, 5)).at[1, 2].set(0).at[2].set(0)
    gradient = jax.grad(lambda x: objectives.causal(Given(), x, batch(targets, weights))[0])(values)
    assert not gradient[1, 2].any() and not gradient[2].any()
    assert (jnp.abs(gradient).sum(-1)[weights > 0] > 0).all()


def test_a_batch_without_weights_loses_nothing():
    """Catches 0/0: a batch of prompts would end every replica as diverged."""
    values, targets = logits()
    loss, gradient = jax.value_and_grad(
        lambda x: objectives.causal(Given(), x, batch(targets, jnp.zeros((3, 5))))[0]
    )(values)
    assert float(loss) == 0 and not gradient.any()


def test_a_key_switches_dropout_on():
    """Catches an evaluation with dropout, and a training without."""
    config = TransformerConfig(8, 1, 4, 1, 1, 8, dropout=0.5)
    model, row = Transformer(config), jnp.zeros((1, 4), jnp.int32)
    params = model.init(jax.random.key(0), row, row + 1, row)["params"]
    rows = Batch(row, row + 1, jnp.ones((1, 4)), row + 1, jnp.arange(4)[None])
    loss = jax.jit(lambda key: objectives.causal(model, params, rows, key)[0])
    a, b, again = (float(loss(jax.random.key(seed))) for seed in (1, 2, 1))
    plain = float(objectives.causal(model, params, rows)[0])
    assert len({a, b, plain}) == 3 and a == again
