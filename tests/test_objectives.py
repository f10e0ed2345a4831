"""The loss: nats per weighted token, with the gradient of the textbook's softmax."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from lm import objectives
from lm.config import UserError, build
from lm.data.loader import Batch
from lm.models import Transformer, TransformerConfig, abstract, initialise
from lm.sharding import batch_sharding, make_mesh, shardings


def logits(seed=0, scale=3.0):
    """[B, T, V] and targets [B, T]."""
    rng = np.random.default_rng(seed)
    values = jnp.asarray(scale * rng.normal(size=(3, 5, 7)), jnp.float32)
    return values, jnp.asarray(rng.integers(0, 7, (3, 5)), jnp.int32)


def nats(values, targets):
    return objectives.nats(values, targets)[0]


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_nats_are_those_of_optax(scale):
    """Catches a log-sum-exp that overflows, a target off by one, and a wrong gradient."""
    values, targets = logits(scale=scale)
    oracle = optax.softmax_cross_entropy_with_integer_labels
    np.testing.assert_allclose(nats(values, targets), oracle(values, targets), rtol=1e-6, atol=1e-5)
    weights = jnp.arange(15.0).reshape(3, 5)
    got, want = (
        jax.grad(lambda x, f=f: (f(x, targets) * weights).sum())(values) for f in (nats, oracle)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    assert np.abs(want).max() > 1


class Given:
    """A model whose logits are its parameters."""

    config = SimpleNamespace(loss="logits", vocab_size=7, z_loss=0.0)

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


def model_and_batch(**settings):
    """A model with dropout off, its parameters, and two rows with weights."""
    config = TransformerConfig(**{"vocab_size": 37, **SHAPE, **settings})
    rng = np.random.default_rng(0)
    tokens, targets = jnp.asarray(rng.integers(0, config.vocab_size, (2, 2, 6)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    weights = jnp.asarray(rng.uniform(size=(2, 6)), jnp.float32)
    rows = Batch(tokens, targets, weights, jnp.ones_like(tokens), positions)
    return Transformer(config), nn.unbox(initialise(config, jax.random.key(0))), rows


SHAPE = {"layers": 1, "width": 8, "heads": 1, "kv_heads": 1, "mlp_size": 8}


@pytest.mark.parametrize(
    "settings",
    [{"z_loss": 0.1}, {"head": "untied", "base_width": 2}, {"dtype": "bfloat16"}],
    ids=str,
)
def test_chunked_equals_logits(settings):
    """Breaks if the two ways differ in the head, in muP's factor, in the weights or in z-loss."""
    found = []
    for way in ("logits", "chunked"):
        model, params, rows = model_and_batch(loss=way, **settings)
        run = jax.jit(
            jax.value_and_grad(
                lambda p, model=model, rows=rows: objectives.causal(model, p, rows), has_aux=True
            )
        )
        found.append(run(params))
    (loss, metrics), gradient = found[0]
    (other, others), same = found[1]
    tolerance = 2e-2 if "dtype" in settings else 1e-5
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    np.testing.assert_allclose(others.loss, metrics.loss, rtol=1e-5)
    assert jax.tree.structure(same) == jax.tree.structure(gradient)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * float(jnp.abs(b).max()))


def test_z_loss_is_added_to_what_is_trained_and_not_to_what_is_reported():
    """Breaks if the curve of a run with z-loss cannot be compared with one without."""
    model, params, rows = model_and_batch(loss="logits", z_loss=0.25)
    loss, metrics = objectives.causal(model, params, rows)
    values = model.apply({"params": params}, rows.tokens, rows.segments, rows.positions)
    lse = jax.nn.logsumexp(values, axis=-1)
    assert float(metrics.loss) == pytest.approx(
        float(np.average(nats(values, rows.targets), weights=rows.weights)), rel=1e-5
    )
    extra = 0.25 * np.average(lse**2, weights=rows.weights)
    assert float(loss - metrics.loss) == pytest.approx(float(extra), rel=1e-4)


@pytest.mark.parametrize(
    "size, way, made",
    [(8191, "auto", True), (8192, "auto", False), (37, "chunked", False), (8192, "logits", True)],
)
def test_auto_goes_without_logits_where_the_vocabulary_is_large(size, way, made):
    """Breaks if [B, T, V] is held for a large vocabulary, or a small one pays for chunks."""
    model, params, rows = model_and_batch(vocab_size=size, loss=way)
    text = str(jax.make_jaxpr(lambda p: objectives.causal(model, p, rows)[0])(params))
    assert (f"f32[2,6,{size}]" in text) == made


def test_the_head_adds_no_parameters():
    """Breaks if the two ways make different trees: a checkpoint would fit only one of them."""
    model, params, rows = model_and_batch(head="untied")
    row = rows.tokens[:1, :1]
    other = model.init(jax.random.key(0), row, row, row, method="hidden")["params"]
    jax.tree.map(np.testing.assert_array_equal, nn.unbox(other), params)


@pytest.mark.parametrize(
    "settings, sentence",
    [({"loss": "chunk"}, "chunked"), ({"z_loss": -1}, "z_loss is -1"), ({"z_loss": 2}, "z_loss")],
)
def test_options_of_the_loss_are_checked(settings, sentence):
    """Breaks if a typing error trains with another loss, or a negative z-loss drives lse away."""
    with pytest.raises(UserError, match=sentence):
        build(TransformerConfig, {"vocab_size": 8, **SHAPE, **settings})


@pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 (simulated) devices")
def test_chunked_on_a_mesh_equals_one_device():
    """Breaks if the states or the head's table reach the loss cut in a way it does not expect."""
    heads = {"heads": 2, "kv_heads": 2, "width": 16}
    model, params, rows = model_and_batch(loss="chunked", vocab_size=38, z_loss=0.1, **heads)
    rows = Batch(*(jnp.concatenate([a, a]) for a in rows))
    run = jax.value_and_grad(lambda p, b: objectives.causal(model, p, b)[0])
    loss, gradient = jax.jit(run)(params, rows)
    mesh = make_mesh("fsdp_tp", jax.devices()[:8])
    at_rest = shardings(abstract(model.config), mesh, "fsdp_tp")
    cut = batch_sharding(mesh, len(rows.tokens))
    with jax.set_mesh(mesh):
        spread = jax.jit(run, in_shardings=(at_rest, cut), out_shardings=(None, at_rest))
        other, same = spread(*jax.device_put((params, rows), (at_rest, cut)))
    np.testing.assert_allclose(other, loss, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(gradient), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))
