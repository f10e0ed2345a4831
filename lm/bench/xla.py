"""Our side: the product that sets the scale, attention by its backends, and the training program.

Programs are compiled ahead of time and called as a cell calls them.
"""

import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lm.attention import Mask, attention
from lm.bench.cases import AttentionCase, Pass, TrainCase
from lm.bench.work import CHECKED, OPTIM, Work, operands, rows, weight
from lm.config import UserError
from lm.models import TransformerConfig
from lm.sizes import flops_per_sequence

# Temporaries above this are not run: the page would be measured, or the machine would kill us.
MOST = 4 * 2**30


def product(size: int) -> Work:
    """A float32 product [size, size] @ [size, size], 2 size^3 FLOPs: the machine's rate."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((size, size), np.float32))
    compiled, seconds = _compile(jnp.matmul, x, x)
    return Work(lambda: compiled(x, x).block_until_ready(), dict, compile_s=seconds)


def attend(case: AttentionCase, impl: str, dtype: str, which: Pass) -> Work:
    """Causal attention by the backend `impl`; raises UserError if it cannot run this case."""
    inputs = [jnp.asarray(a, dtype) for a in operands(case)]

    def forward(q: Array, k: Array, v: Array) -> Array:
        return attention(q, k, v, Mask(causal=True), impl=impl)

    def both(q: Array, k: Array, v: Array, dout: Array) -> tuple[Array, ...]:
        out, pull = jax.vjp(forward, q, k, v)
        return out, *pull(dout)

    inputs = inputs if which == "both" else inputs[:3]
    compiled, seconds = _compile(both if which == "both" else forward, *inputs)
    temporaries = _temporaries(compiled)
    if temporaries and temporaries > MOST:
        raise UserError(
            f"{temporaries / 2**30:.1f} GiB of temporaries are above the limit of"
            f" {MOST / 2**30:.0f} GiB; not run"
        )

    def results() -> dict[str, np.ndarray]:
        found = jax.tree.leaves(compiled(*inputs))
        names = ("out", "dq", "dk", "dv")[: len(found)]
        return {n: np.asarray(a.astype(jnp.float32)) for n, a in zip(names, found, strict=True)}

    return Work(
        lambda: jax.block_until_ready(compiled(*inputs)),
        results,
        temporaries=temporaries,
        compile_s=seconds,
    )


def train(case: TrainCase, mode: str, replicas: range) -> Work:
    """The program of a cell with these replicas of the case; a single one begins with the weights
    that the peers have.
    """
    # The data layers take seconds to import, and attention has no need of them.
    from lm.data.loader import Batch
    from lm.train.program import compile_cell

    tokens, targets = (
        np.stack(a) for a in zip(*(rows(case, r) for r in replicas), strict=True)
    )  # [R, chunk, B, T]
    places = np.broadcast_to(np.arange(case.length, dtype=np.int32), tokens.shape)
    whole = np.ones_like(tokens)  # one document fills each row
    batches = Batch(tokens, targets, whole.astype(np.float32), whole, places)
    cell = _cell(case, mode, len(replicas))
    program = compile_cell(cell, Batch(*(a[0, 0] for a in batches)), jax.devices()[:1])
    seeds = np.array(replicas, np.uint32)
    with jax.set_mesh(program.mesh):
        rates = np.full(len(replicas), OPTIM["learning_rate"], np.float32)
        state = program.init(seeds, rates, seeds)
        if len(replicas) == 1:
            state = state._replace(params=_common_weights(state.params))
        held = jax.device_put(batches, program.population.batches)

    def call() -> Array:
        nonlocal state
        with jax.set_mesh(program.mesh):
            state, losses = program.run(state, held)
        return losses.block_until_ready()

    return Work(
        call,
        lambda: {"losses": np.asarray(call())[:, :CHECKED]},
        case.chunk,
        _temporaries(program.run),
        program.seconds,
    )


def threads() -> int | None:
    """Threads of XLA's pool for products, counted; None where the system does not name them."""
    names = [p.read_text().strip() for p in Path("/proc/self/task").glob("*/comm")]
    return names.count("tf_XLAEigen") or None


def model(case: TrainCase) -> TransformerConfig:
    """The model of a case; layers are unrolled, as in the desk study."""
    return TransformerConfig(
        vocab_size=case.vocab,
        layers=case.layers,
        width=case.width,
        heads=case.heads,
        kv_heads=case.heads,
        mlp_size=4 * case.width,
        activation="gelu",
        layer_loop="unroll",
    )


def flops_per_step(case: TrainCase) -> int:
    """Exact, of all replicas: 6 per matrix entry and token, the head's included, and causal
    attention.
    """
    return case.replicas * case.rows * flops_per_sequence(model(case), case.length)


def _cell(case: TrainCase, mode: str, replicas: int) -> Any:
    """A cell whose budget is so long that the learning rate stays at its peak."""
    from lm.train import cell
    from lm.train.optim import OptimConfig

    return cell.Cell(
        "bench",
        case.name,
        model(case),
        OptimConfig(**OPTIM),  # type: ignore[arg-type]
        cell.DataConfig({"text": cell.MixtureConfig("text", case.rows)}, case.length),
        cell.TrainConfig(tokens=10**13, chunk=case.chunk, replicas=mode),  # type: ignore[arg-type]
        cell.EvalConfig(),
        tuple(cell.Replica("bench", "ladder", r, r, r, r, 0, 1e-3) for r in range(replicas)),
    )


def _common_weights(params: Any) -> Any:
    """The parameters [1, ...] with the values of `work.weight`, resting where they did."""

    def value(path: tuple, leaf: Array) -> Array:
        name = "/".join(key.key for key in path)
        return jax.device_put(weight(name, leaf.shape[1:])[None], leaf.sharding)

    return jax.tree_util.tree_map_with_path(value, params)


def _compile(f: Any, *args: Array) -> tuple[Any, float]:
    begin = time.perf_counter()
    compiled = jax.jit(f).lower(*args).compile()
    return compiled, time.perf_counter() - begin


def _temporaries(compiled: Any) -> int | None:
    analysis = compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)
