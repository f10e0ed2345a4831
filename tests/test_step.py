"""The step in all its costumes: a scan of it is a loop, a population of it is solo runs, a mesh of
it is one device."""

from functools import cache

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from lm import objectives
from lm.config import UserError
from lm.data.loader import Batch, read_rows
from lm.data.prepare import document, pack
from lm.eval.score import make_scorer, nothing_asked
from lm.models import Transformer, TransformerConfig, initialise, mup_multipliers
from lm.sharding import make_mesh
from lm.train import mixture, optim
from lm.train.cell import build_point, cells
from lm.train.population import choose, make_population, replica
from lm.train.program import compile_cell
from lm.train.step import ALIVE, make_chunk, make_step, new_state

MODEL = TransformerConfig(
    vocab_size=16, layers=2, width=8, heads=2, kv_heads=2, mlp_size=16, dropout=0.1
)
STEPS, ROWS, LENGTH = 4, 8, 8
INIT, DROPOUT, RATES = (0, 1, 2), (7, 8, 9), (1e-2, 3e-3, 3e-2)
# Sums in another order differ in the last bits, which Adam magnifies where a gradient is near 0.
LOSS, PARAMS = {"rtol": 2e-5, "atol": 0}, {"rtol": 1e-3, "atol": 2e-5}


def make_batches(seeds, steps=STEPS):
    """[R, steps, B, T]: random tokens in two documents a row, the first without weights."""
    found = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        tokens = rng.integers(0, MODEL.vocab_size, (steps, ROWS, LENGTH + 1)).astype(np.int32)
        segments = np.broadcast_to(1 + (np.arange(LENGTH) > 2), (steps, ROWS, LENGTH))
        positions = np.broadcast_to([0, 1, 2, 0, 1, 2, 3, 4], segments.shape)
        weights = (segments == 2).astype(np.float32)
        found.append(
            Batch(
                tokens[..., :-1],
                tokens[..., 1:],
                weights,
                segments.astype(np.int32),
                positions.astype(np.int32),
            )
        )
    return Batch(*(np.stack(arrays) for arrays in zip(*found, strict=True)))


def parts(name="adamw", dropout=True):
    """The optimiser and one step."""
    config = optim.OptimConfig(name, warmup_tokens=100, epsilon=1e-6)
    tx = optim.direction(config, mup_multipliers(MODEL))
    step = make_step(
        Transformer(MODEL),
        objectives.causal,
        tx,
        optim.schedule(config, 2000),
        tokens_per_step=ROWS * LENGTH,
        random=dropout,
    )
    return tx, step


FAST = {"xla_backend_optimization_level": 0}  # compiles in a third of the time


def fast(jitted):
    """A function of `jax.jit`, compiled with `FAST` for the arguments of its first call."""
    compiled = []

    def call(*args):
        if not compiled:
            compiled.append(jitted.lower(*args).compile(FAST))
        return compiled[0](*args)

    return call


INITIALISE = fast(jax.jit(lambda seed: nn.unbox(initialise(MODEL, jax.random.key(seed)))))


def solo_state(tx, init, rate, dropout):
    return new_state(INITIALISE(np.uint32(init)), tx, rate, dropout)


@cache
def loop():
    """The slow obvious run of one replica: (init, rate, dropout, batches) -> state, losses."""
    tx, step = parts()
    step = fast(jax.jit(step))

    def run(init, rate, dropout, batches):
        state, losses = solo_state(tx, init, rate, dropout), []
        for i in range(STEPS):
            state, loss = step(state, jax.tree.map(lambda a, i=i: a[i], batches))
            losses.append(float(loss))
        return state, np.array(losses)

    return run


@cache
def population(mode):
    """A population of three on one device, by its mode."""
    tx, step = parts()
    mesh = make_mesh("replicated", jax.devices()[:1])
    made = make_population(MODEL, make_chunk(step), tx, replicas=3, rows=ROWS, mesh=mesh, mode=mode)
    return mesh, made._replace(init=fast(made.init), run=fast(made.run))


def train(mode, batches, init=INIT, rates=RATES, dropout=DROPOUT):
    """States before training (as NumPy), after it, and losses [R, n]."""
    mesh, made = population(mode)
    with jax.set_mesh(mesh):
        numbers = np.uint32(init), np.float32(rates), np.uint32(dropout)
        states = made.init(*numbers)
        before = jax.tree.map(np.array, states)
        states, losses = made.run(states, jax.device_put(batches, made.batches))
    return before, states, np.asarray(losses)


def assert_close(got, want, rtol, atol):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b), rtol=rtol, atol=atol, err_msg=name
        )


def assert_same_bits(got, want):
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)


def test_a_step_is_rate_times_direction():
    """Catches the rate of the step before, an update of the other sign, a step that is not counted.

    The objective is a parabola, so that the gradient is the parameter less the batch.
    """
    tx = optax.sgd(1.0, momentum=0.5)
    tx = optax.chain(tx, optax.scale(-1.0))  # a direction points uphill

    def parabola(model, params, batch, key):
        loss = 0.5 * ((params - batch) ** 2).sum()
        return loss, objectives.Metrics(loss, 1.0)

    step = jax.jit(make_step(None, parabola, tx, lambda seen: seen / 1000, tokens_per_step=100))
    state = new_state(np.float32([1.0, 2.0]), tx, 0.5, 0)
    state, loss = step(state, np.float32([0.0, 4.0]))
    np.testing.assert_allclose(state.params, [1 - 0.05 * 1, 2 + 0.05 * 2], rtol=1e-6)
    assert float(loss) == 2.5 and int(state.step) == 1
    state, _ = step(state, state.params)
    np.testing.assert_allclose(state.params, [0.95 - 0.1 * 0.5, 2.1 + 0.1 * 1.0], rtol=1e-6)


@pytest.mark.parametrize("lost", ["loss", "gradient"])
def test_a_loss_or_a_gradient_that_is_not_finite_ends_a_replica(lost):
    """Catches a step that looks at one of the two: either alone can be infinite."""
    spoil = jax.lax.stop_gradient if lost == "loss" else lambda x: x - jax.lax.stop_gradient(x)

    def objective(model, params, batch, key):
        loss = params.sum() + spoil((params * batch).sum())
        return loss, objectives.Metrics(loss, 1.0)

    tx = optax.sgd(-1.0)
    step = jax.jit(make_step(None, objective, tx, lambda seen: 1.0, tokens_per_step=1))
    healthy, _ = step(new_state(np.float32([1, 2]), tx, 0.5, 0), np.float32([0, 3]))
    state, _ = step(healthy, np.float32([np.inf, 0]))
    assert int(healthy.diverged_at) == ALIVE and int(state.diverged_at) == 1
    assert state.params.tolist() == healthy.params.tolist() != [1, 2]


def test_scan_equals_a_loop():
    """Catches a scan that sees its batches in another order, and state that a step forgets.

    The two programs are compiled apart, so a last bit may differ.
    """
    tx, step = parts()
    batches = replica(make_batches([0]), 0)
    state, losses = fast(jax.jit(make_chunk(step)))(solo_state(tx, 0, 1e-2, 7), batches)
    want, want_losses = loop()(0, 1e-2, 7, batches)
    np.testing.assert_allclose(losses, want_losses, **LOSS)
    assert_close(state, want, **PARAMS)
    assert int(state.step) == STEPS and int(state.diverged_at) == ALIVE
    assert len(set(want_losses)) == STEPS


@pytest.mark.parametrize("mode", ["sequential", "vmap"])
def test_a_population_equals_solo_runs(mode):
    """Catches replicas that share a seed, a rate, a batch or a clipping norm."""
    batches = make_batches([10, 11, 12])
    before, states, losses = train(mode, batches)
    for i in range(3):
        want, want_losses = loop()(INIT[i], RATES[i], DROPOUT[i], replica(batches, i))
        np.testing.assert_allclose(losses[i], want_losses, **LOSS)
        assert_close(replica(states, i), want, **PARAMS)
    moved = [np.abs(a - b).max() for a, b in zip(*map(leaves, (before, states)), strict=True)]
    assert min(moved) > 100 * PARAMS["atol"]  # else the comparison above would say nothing


def leaves(states):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(states.params)]


def test_modes_agree():
    """Catches a mode that rounds so unlike the other that rows could not be compared."""
    batches = make_batches([10, 11, 12])
    (_, one, a), (_, other, b) = (train(mode, batches) for mode in ("sequential", "vmap"))
    np.testing.assert_allclose(a, b, **LOSS)
    assert_close(one, other, **PARAMS)


def test_seed_axes_are_kept_apart():
    """Catches a seed that moves what another axis owns: variance could not be split by cause."""
    same = make_batches([5, 5, 5])
    before, states, losses = train("sequential", same, (4, 4, 4), [1e-2] * 3, (7, 7, 7))
    assert_same_bits(replica(states, 0), replica(states, 1))
    assert_same_bits(losses[0], losses[2])

    # Replica 1 differs in its dropout seed only, replica 2 in its data only.
    batches = make_batches([5, 5, 6])
    before, states, losses = train("sequential", batches, (4, 4, 4), [1e-2] * 3, (7, 8, 7))
    for i in (1, 2):
        assert_same_bits(replica(before.params, 0), replica(before.params, i))
        assert losses[0, 0] != losses[i, 0]

    # Replica 1 differs in its init seed only: the same masks and batches on other parameters.
    before, states, losses = train("sequential", same, (4, 3, 4), [1e-2] * 3, (7, 7, 7))
    for a in leaves(before):
        assert (a[0] == a[2]).all() and ((a[0] != a[1]).any() or (a == 1).all())
    want, want_losses = loop()(3, 1e-2, 7, replica(same, 1))
    np.testing.assert_allclose(losses[1], want_losses, **LOSS)


def test_dropout_is_drawn_anew_at_each_step():
    """Catches one mask for all steps: at a rate of nearly 0 they would lose the same."""
    once = make_batches([5, 5, 5], steps=1)
    batches = Batch(*(np.repeat(a, STEPS, axis=1) for a in once))
    _, _, losses = train("sequential", batches, (4, 4, 4), [1e-12] * 3, (7, 8, 9))
    assert len(set(losses.ravel().tolist())) == 3 * STEPS


POINT = {
    "name": "p",
    "model": {"size": "1x4", "vocab_size": 128},
    "optim": {},
    "data": {"length": 16, "mixture": {"a": {"task": "recall", "level": "3", "rows": 2}}},
    "train": {"tokens": 1000},
}


def test_data_seed_orders_the_batches_and_nothing_else_does():
    """Catches a loader that is seeded by init, or by the number of the replica."""
    rng = np.random.default_rng(0)
    packed = pack([document(rng.integers(4, 99, 9)) for _ in range(60)], "fit", 16)
    prepared = mixture.Prepared(None, {("recall", "3"): packed}, {}, [])
    found = {}
    for axis in ("init", "data", "dropout"):
        (cell,) = cells("s", [build_point(POINT | {"seeds": {"vary": [axis]}})])
        assert [getattr(r, axis) for r in cell.replicas] == [0, 1, 2]
        found[axis] = [loader.batch(3) for loader in mixture.loaders(cell, prepared)]
    for axis in ("init", "dropout"):
        assert_same_bits(found[axis][0], found[axis][1])
    assert_same_bits(found["data"][0], found["init"][0])
    first, second, third = (batch.tokens.tobytes() for batch in found["data"])
    assert len({first, second, third}) == 3


@pytest.mark.parametrize("mode", ["sequential", "vmap"])
def test_a_replica_that_diverges_is_marked_and_harms_nobody(mode):
    """Catches a NaN that spreads, parameters spoilt by it, a wrong step, and a second marking."""
    batches = make_batches([10, 11, 12])
    _, healthy, losses = train(mode, batches)
    spoilt = batches._replace(weights=batches.weights.copy())
    spoilt.weights[1, 2, 3, 5] = np.nan
    rates = (RATES[0], RATES[1], 1e30)
    _, states, found = train(mode, spoilt, rates=rates)

    assert states.diverged_at.tolist() == [ALIVE, 2, 1]
    assert np.isnan(found[1]).tolist() == [False, False, True, True]
    assert np.isfinite(found[2, 0]) and np.isnan(found[2, 2:]).all()
    assert all(np.isfinite(leaf).all() for leaf in leaves(states))
    assert_same_bits(replica(states, 0), replica(healthy, 0))
    assert_same_bits(found[0], losses[0])
    assert_same_bits(found[1, :2], losses[1, :2])

    # Dead is dead: healthy batches change nothing more, and the mark stays.
    mesh, made = population(mode)
    last = jax.tree.map(np.array, states)
    with jax.set_mesh(mesh):
        states, found = made.run(states, jax.device_put(batches, made.batches))
    assert states.diverged_at.tolist() == [ALIVE, 2, 1]
    assert_same_bits(replica(states.params, 1), replica(last.params, 1))
    assert_same_bits(replica(states.opt_state, 1), replica(last.opt_state, 1))
    assert np.isfinite(found[0]).all() and np.isnan(found[1:]).all()


def test_states_are_donated():
    """Catches a program that holds two copies of parameters and moments."""
    mesh, made = population("sequential")
    with jax.set_mesh(mesh):
        states = made.init(np.uint32(INIT), np.float32(RATES), np.uint32(DROPOUT))
        made.run(states, jax.device_put(make_batches([0, 1, 2]), made.batches))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((states.params, states.opt_state)))


def test_auto_is_side_by_side_where_replicas_are_spread():
    """Catches replicas on devices of their own that wait for each other."""
    eight = jax.devices()[:8]
    assert choose("auto", make_mesh("fsdp", eight, replicas=2)) == "vmap"
    assert choose("auto", make_mesh("fsdp", eight)) == "sequential"
    assert choose("vmap", make_mesh("fsdp", eight)) == "vmap"


# Sharding: two replicas, two steps, eight devices.

needs_eight = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 (simulated) devices")


def on_mesh(optimiser, mesh, strategy, rows=ROWS):
    tx, step = parts(optimiser, dropout=False)
    return make_population(
        MODEL, make_chunk(step), tx, replicas=2, rows=rows, mesh=mesh, strategy=strategy
    )


def two_steps(optimiser, mesh, strategy):
    """States and losses."""
    made = on_mesh(optimiser, mesh, strategy)
    with jax.set_mesh(mesh):
        numbers = np.uint32(INIT[:2]), np.float32(RATES[:2]), np.uint32(DROPOUT[:2])
        states = fast(made.init)(*numbers)
        batches = jax.device_put(make_batches([0, 1], steps=2), made.batches)
        return fast(made.run)(states, batches)


@cache
def one_device(optimiser):
    return two_steps(optimiser, make_mesh("replicated", jax.devices()[:1]), "replicated")


STRATEGIES = [
    ("adamw", "replicated", 1),
    ("adamw", "replicated", 2),
    ("adamw", "fsdp", 1),
    ("adamw", "fsdp", 2),
    ("adamw", "fsdp_tp", 1),
    ("adamw", "fsdp_tp", 2),
    ("muon", "fsdp", 1),
    ("muon", "fsdp_tp", 2),
]


@needs_eight
@pytest.mark.parametrize(("optimiser", "strategy", "spread"), STRATEGIES)
def test_a_mesh_equals_one_device(optimiser, strategy, spread):
    """Catches a clipping norm or an orthogonalised matrix of one shard only, a mean over the wrong
    rows, and parameters that every device holds whole."""
    mesh = make_mesh(strategy, jax.devices()[:8], replicas=spread)
    states, losses = two_steps(optimiser, mesh, strategy)
    want, want_losses = one_device(optimiser)
    np.testing.assert_allclose(losses, want_losses, **LOSS)
    assert_close(states, want, **PARAMS)

    lead = "replica" if spread > 1 else None
    cut = {"replicated": (), "fsdp": (None, "data"), "fsdp_tp": (None, "data", "tensor")}[strategy]
    found = [
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(states) if "qkv" in str(path)
    ]
    assert len(found) == {"adamw": 3, "muon": 2}[optimiser]  # the parameter and its moments
    for leaf in found:
        wanted = jax.NamedSharding(mesh, PartitionSpec(lead, *cut))
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), leaf.sharding
        pieces = np.prod([mesh.shape[axis] for axis in (lead, *cut) if axis])
        assert leaf.addressable_shards[0].data.size == leaf.size // pieces


@needs_eight
def test_rows_that_do_not_divide_the_devices_are_a_sentence():
    """Catches an error of XLA, after minutes of compiling, that names neither number."""
    mesh = make_mesh("fsdp", jax.devices()[:8])
    with pytest.raises(UserError, match="batch 12 is not divisible by the 8 devices .*8 or 16"):
        on_mesh("adamw", mesh, "fsdp", rows=12)


@needs_eight
def test_a_cell_on_a_mesh_is_trained_and_scored():
    """Catches a scorer compiled for whole parameters that is given cut ones: training would end at
    the first evaluation."""
    point = POINT | {
        "model": {"size": "1x8", "vocab_size": 128},
        "data": {"length": 16, "mixture": {"a": {"task": "recall", "level": "3", "rows": 8}}},
        "train": {"tokens": 256, "chunk": 2, "strategy": "fsdp", "replica_devices": 2},
        "seeds": {"replicas": 2},
    }
    (cell,) = cells("s", [build_point(point)])
    rng = np.random.default_rng(0)
    packed = pack([document(rng.integers(4, 99, 9)) for _ in range(60)], "fit", 16)
    rows = read_rows(packed, np.arange(8))
    program = compile_cell(cell, rows, jax.devices()[:8])
    stacked = Batch(*(np.stack([np.stack([a, a])] * 2) for a in rows))
    with jax.set_mesh(program.mesh):
        states = program.init(np.uint32([0, 1]), np.float32([1e-2, 1e-2]), np.uint32([0, 0]))
        states, losses = program.run(states, jax.device_put(stacked, program.population.batches))
        params = replica(states.params, 1)
        asked = nothing_asked(*rows.tokens.shape)
        found = program.score(params, rows, asked)
        elsewhere = program.score(jax.device_put(params, jax.devices()[3]), rows, asked)
    assert np.isfinite(losses).all()
    whole = jax.tree.map(np.asarray, params)
    want = jax.jit(make_scorer(Transformer(cell.model)))(whole, rows, asked)
    for scores in (found, elsewhere):
        np.testing.assert_allclose(scores.logprob, want.logprob, rtol=1e-4, atol=1e-5)
