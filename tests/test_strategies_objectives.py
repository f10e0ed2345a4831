"""Masked tokens, cut spans, smoothed targets and an LSTM under every strategy that takes them: the
loss and gradients of one device (`causal` is in tests/test_strategies.py, with its collectives;
what `sequence` does not take is refused by `lm.train.objective`).
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from lm import models, objectives
from lm.corruption import Masking, Spans
from lm.data.loader import Batch
from lm.models import EncoderDecoderConfig, LSTMConfig, TransformerConfig
from lm.sharding import batch_sharding, make_mesh, shardings

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 (simulated) devices")

B, T, V, SOURCE = 8, 32, 32, 24
BOUND = 5e-6  # of the largest entry of an array, in float32; see tests/test_strategies.py
SHAPE = {"vocab_size": V, "layers": 2, "width": 16, "heads": 4, "mlp_size": 24, "head": "untied"}
PAIR = EncoderDecoderConfig(source_length=SOURCE, **SHAPE)
BOTH = TransformerConfig(kv_heads=4, direction="both", **SHAPE)
SPANS = Spans(SOURCE, T - SOURCE, V - 1, 0, 1, 2, rate=0.2)
CASES = {
    "masked": (BOTH, partial(objectives.masked, masking=Masking(V - 1, 4, V - 1, 0.3))),
    "span": (PAIR, partial(objectives.span, spans=SPANS)),
    "smoothed": (PAIR, partial(objectives.seq2seq, smoothing=0.1)),
    "lstm": (LSTMConfig(V, 2, 16), objectives.causal),
}
STRATEGIES = ("replicated", "fsdp", "fsdp_tp")


@cache
def batch():
    """[B, T]: whole rows without padding."""
    rng = np.random.default_rng(0)
    tokens, targets = rng.integers(4, V - 6, (2, B, T), dtype=np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T)).copy()
    weights = rng.random((B, T), np.float32)
    weights[:, :SOURCE] = 0
    return Batch(tokens, targets, weights, np.ones((B, T), np.int32), positions)


def loss(case, params, rows):
    config, objective = CASES[case]
    return objective(models.build(config), params, rows, jax.random.key(7))[0]


@cache
def single(case):
    params = nn.unbox(models.initialise(CASES[case][0], jax.random.key(0)))
    return params, jax.jit(jax.value_and_grad(partial(loss, case)))(params, batch())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("case", CASES)
def test_a_mesh_equals_one_device(case, strategy):
    """Catches an axis that is cut and mixed, and a draw of masks or spans that depends on how the
    rows are dealt.
    """
    params, want = single(case)
    mesh = make_mesh(strategy, jax.devices()[:8])
    at_rest = shardings(models.abstract(CASES[case][0]), mesh, strategy)
    rows = batch_sharding(mesh, B)
    step = jax.value_and_grad(partial(loss, case))
    step = jax.jit(step, in_shardings=(at_rest, rows), out_shardings=(None, at_rest))
    with jax.set_mesh(mesh):
        got = step(*jax.device_put((params, batch()), (at_rest, rows)))
    assert float(want[0]) > 1
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert float(jnp.abs(one - other).max() / jnp.abs(other).max()) < BOUND
