"""Every strategy, alone and in products, gives the loss and gradients of one device for every
objective that runs on a mesh, by collectives that are counted.

Of the objectives `causal` has two forms, with logits and in chunks of the vocabulary; `fused` is
one kernel on one device and is refused on a mesh (tests/test_fused_cells.py).
"""

import collections
import contextlib
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.experimental.compilation_cache import compilation_cache

from lm import objectives
from lm.attention.ring import deal
from lm.data.loader import Batch
from lm.models import Transformer, TransformerConfig, abstract, initialise, mup_multipliers
from lm.sharding import batch_sharding, make_mesh, replica_axis, shardings
from lm.train import optim
from lm.train.population import make_population
from lm.train.step import make_chunk, make_step

pytestmark = pytest.mark.skipif(len(jax.devices()) < 8, reason="needs 8 (simulated) devices")

R, B, T, V = 2, 8, 16, 32
ALONE = make_mesh("replicated", jax.devices()[:1])
SHAPE = {"layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "mlp_size": 24, "head": "untied"}

# Compiling is nearly all the time of these tests; unoptimised, it is half as long. Collectives are
# placed before the passes that this leaves out.
QUICK = {"xla_backend_optimization_level": 0}

# Largest error over the largest entry of an array, in float32. Sums of 8 devices are in another
# order (7e-7 was measured), and a ring's softmax is merged from tiles (2.1e-6).
BOUND = 5e-6

# A mesh: its strategy, the sizes of its axes, and its all-gathers, all-reduces and permutes.
#
# Gathers of weights that rest cut, each where it is used: five in the loop over layers (qkv, out,
# gate, up, down), the embedding and the head; backward uses what it gathered before (without
# remat). Reductions: the weighted sums of the loss, the gradients inside the loop and those
# outside it, which XLA merges into one message each. A tensor axis adds eight: for each pair of
# products one forward and one backward in the loop, or two where dx is needed apart; the
# embedding's gather, the maximum and the sums of softmax, and the gradient of the states. A ring
# of two sends keys once forward and once backward, and their gradients on and home; one of four
# sends once more in each loop. Segments are the same for all layers: outside the loop over them
# their hop is made once, inside the ring's loop once in each.
MESHES = {
    "replicated": ("replicated", {}, (0, 3, 0)),
    "fsdp": ("fsdp", {}, (7, 3, 0)),
    "fsdp_tp": ("fsdp_tp", {}, (7, 11, 0)),
    "sequence": ("sequence", {}, (7, 3, 5)),
    "sequence of 4": ("sequence", {"sequence": 4}, (7, 3, 10)),
    "replicated x sequence": ("replicated", {"sequence": 4}, (0, 3, 10)),
    "fsdp_tp x sequence": ("fsdp_tp", {"sequence": 2}, (7, 11, 5)),
    "replica x replicated": ("replicated", {"replicas": 2}, (0, 3, 0)),
    "replica x fsdp": ("fsdp", {"replicas": 2}, (7, 3, 0)),
    "replica x fsdp_tp": ("fsdp_tp", {"replicas": 2}, (7, 11, 0)),
    "replica x sequence": ("sequence", {"replicas": 2, "sequence": 4}, (7, 3, 10)),
    "all axes": ("fsdp_tp", {"replicas": 2, "sequence": 2}, (7, 11, 5)),
}
OBJECTIVES = ("logits", "chunked")

# The rest takes a minute or two.
IN_QUICK = [
    *(("logits", name) for name in ("replicated", "fsdp", "fsdp_tp", "sequence", "all axes")),
    ("chunked", "sequence"),
]
CASES = [
    pytest.param(kind, name, marks=() if (kind, name) in IN_QUICK else pytest.mark.slow)
    for kind in OBJECTIVES
    for name in MESHES
]


@cache
def batches():
    """[R, B, T]: rows of several documents and padding, with the weights of training."""
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(0, 4, (R, B, T)), axis=-1)
    segments = np.where(segments == 3, 0, segments + 1).astype(np.int32)
    positions = np.zeros((R, B, T), np.int32)
    for t in range(1, T):
        same = segments[..., t] == segments[..., t - 1]
        positions[..., t] = np.where(same, positions[..., t - 1] + 1, 0)
    tokens, targets = rng.integers(0, V, (2, R, B, T), dtype=np.int32)
    return Batch(tokens, targets, rng.random((R, B, T), np.float32), segments, positions)


def model(kind):
    return TransformerConfig(vocab_size=V, loss=kind, z_loss=0.01, **SHAPE)


def loss(config, params, batch):
    return objectives.causal(Transformer(config), params, deal(batch))[0]


@cache
def single(kind):
    """Parameters of the replicas, and their losses and gradients on one device."""
    config = model(kind)
    keys = jax.random.split(jax.random.key(0), R)
    params = jax.vmap(lambda key: nn.unbox(initialise(config, key)))(keys)
    step = jax.vmap(jax.value_and_grad(partial(loss, config)))
    return params, jax.jit(step)(params, batches())


@contextlib.contextmanager
def no_cache():
    """The compiler speaks only when it compiles."""
    folder = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()


def one_replica(tree):
    return jax.tree.map(lambda x: x[0], tree)


def lowered(kind, name):
    """The loss and gradients on a mesh, its operands, and what one device gives for them."""
    strategy, sizes, _ = MESHES[name]
    config, mesh = model(kind), make_mesh(strategy, jax.devices()[:8], **sizes)
    spread = replica_axis(mesh)
    params, want = single(kind)
    shapes, args, step = (
        abstract(config),
        (params, batches()),
        jax.value_and_grad(partial(loss, config)),
    )
    if spread:
        shapes = jax.eval_shape(
            jax.vmap(partial(initialise, config)),
            jax.eval_shape(lambda: jax.random.split(jax.random.key(0), R)),
        )
        step = jax.vmap(step, spmd_axis_name=spread)
    else:
        args, want = one_replica((args, want))
    at_rest = shardings(shapes, mesh, strategy, replicas=bool(spread))
    rows = batch_sharding(mesh, B, replicas=R if spread else 0)
    step = jax.jit(step, in_shardings=(at_rest, rows), out_shardings=(None, at_rest))
    with jax.set_mesh(mesh):
        args = jax.device_put(args, (at_rest, rows))
        return step.lower(*args), args, want


@pytest.mark.parametrize("kind, name", CASES)
def test_a_mesh_equals_one_device(kind, name, capfd):
    """Catches a table that cuts an axis which the model mixes, replicas that are mixed, rows dealt
    otherwise than the ring takes them, and any collective that nobody asked for.
    """
    program, args, want = lowered(kind, name)
    capfd.readouterr()
    cached = (kind, name) in IN_QUICK and name != "all axes"
    with contextlib.nullcontext() if cached else no_cache():
        compiled = program.compile(QUICK)
    assert "rematerialization" not in capfd.readouterr().err
    for got, leaf in zip(jax.tree.leaves(compiled(*args)), jax.tree.leaves(want), strict=True):
        assert float(jnp.abs(got - leaf).max() / jnp.abs(leaf).max()) < BOUND

    found = re.findall(r" (all-\w+|reduce-scatter|collective-\w+|ragged-\w+)\(", compiled.as_text())
    gathers, reductions, permutes = MESHES[name][2]
    wanted = {"all-gather": gathers, "all-reduce": reductions, "collective-permute": permutes}
    assert collections.Counter(found) == collections.Counter(wanted)


def test_the_compiler_is_heard(capfd):
    """Catches a capture that hears nothing: a table that is gathered from while it is cut along
    both of its axes is what the compiler complains about.
    """
    mesh = make_mesh("fsdp_tp", jax.devices()[:8])
    at_rest, rows = (jax.NamedSharding(mesh, jax.P(*s)) for s in (("tensor", "data"), ("data",)))

    def f(table, tokens):
        x = jax.lax.with_sharding_constraint(jnp.take(table, tokens, axis=0), rows)
        return (x * x).sum()

    shapes = jax.ShapeDtypeStruct((V, 16), "float32"), jax.ShapeDtypeStruct((B, T), "int32")
    step = jax.jit(jax.grad(f), in_shardings=(at_rest, rows), out_shardings=at_rest)
    with jax.set_mesh(mesh), no_cache():
        step.lower(*shapes).compile(QUICK)
    assert "Involuntary full rematerialization" in capfd.readouterr().err


@cache
def steps(optimiser, strategy, mesh):
    """States after two steps of two replicas, the losses, the states before, and the program."""
    config = model("logits")
    settings = optim.OptimConfig(name=optimiser, warmup_tokens=0)
    tx = optim.direction(settings, mup_multipliers(config))
    step = make_step(
        Transformer(config),
        objectives.causal,
        tx,
        optim.schedule(settings, 10 * B * T),
        tokens_per_step=B * T,
    )
    made = make_population(
        config, make_chunk(step), tx, replicas=R, rows=B, mesh=mesh, strategy=strategy
    )
    rows = jax.tree.map(lambda a: np.stack([a, a[:, ::-1]], axis=1), batches())
    if mesh.size == 1:
        seeds = np.arange(R, dtype=np.uint32), np.full(R, 3e-3, np.float32), np.zeros(R, np.uint32)
        with jax.set_mesh(mesh):
            fresh = made.init.lower(*seeds).compile(QUICK)(*seeds)
        fresh = jax.tree.map(np.asarray, fresh)  # what runs is donated
    else:
        fresh = steps(optimiser, "replicated", ALONE)[2]
    with jax.set_mesh(mesh):
        states = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), fresh, made.states)
        rows = jax.device_put(rows, made.batches)
        program = made.run.lower(states, rows).compile(QUICK)
        return *program(states, rows), fresh, program.as_text()


@pytest.mark.parametrize(
    "optimiser, strategy, sizes, cut",
    [
        ("adamw", "sequence", {}, (None, None, ("data", "sequence"))),
        pytest.param(
            *("adamw", "fsdp_tp", {"replicas": 2, "sequence": 2}),
            ("replica", None, ("data", "sequence"), "tensor"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("muon", "sequence", {"sequence": 4}),
            (None, None, ("data", "sequence")),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_steps_with_shared_rows_equal_one_device(optimiser, strategy, sizes, cut):
    """Catches a population that does not deal its rows (which would be right, and hold whole rows
    on each device), a clipping norm of one part, and moments that every device holds whole.
    """
    mesh = make_mesh(strategy, jax.devices()[:8], **sizes)
    states, losses, _, text = steps(optimiser, strategy, mesh)
    assert " collective-permute(" in text
    want, want_losses, *_ = steps(optimiser, "replicated", ALONE)
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)
    for path, leaf in jax.tree_util.tree_leaves_with_path(states):
        other = dict(jax.tree_util.tree_leaves_with_path(want))[path]
        # A parameter moves by 3e-3 a step, in Adam's direction g / (|g| + 1e-8).
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=2e-5, err_msg=str(path))
        if "qkv" in str(path):
            wanted = jax.NamedSharding(mesh, jax.P(*cut))
            assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), leaf.sharding
