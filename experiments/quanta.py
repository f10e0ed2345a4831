"""Multitask sparse parity: the tasks, a network of one hidden layer, and its training program.

An input is the one-hot code of one of `tasks` tasks and `bits` random bits, its label the parity of
the k bits that belong to the task. Task i is asked with probability ~ (i + 1)^-zipf. With

    h = relu(code[task] + bits x + bias)      z = out h + out_bias      p(odd) = 1 / (1 + e^-z)

there are w (tasks + bits + 2) + 1 parameters. The code selects a row, so no product is spent on it:
6 w (bits + 1) FLOPs an example, forward and backward (two per multiply-add, as in `lm.sizes`).
A word of 32 bits holds an input and another its task, so an example is two random numbers.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm.config import UserError, positive
from lm.emergence.metrics import Measure, ratio
from lm.train.cell import Replica, SeedConfig

type Params = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """`tasks` parities of `k` of `bits` bits, asked with probability ~ rank^-zipf."""

    tasks: int
    bits: int
    k: int
    zipf: float

    def __post_init__(self) -> None:
        for name in ("tasks", "bits", "k"):
            positive(name, getattr(self, name))
        if self.bits > 32:
            raise UserError(f"bits is {self.bits}; an input is one word of at most 32")
        if self.k > self.bits or math.comb(self.bits, self.k) < self.tasks:
            raise UserError(
                f"there are no {self.tasks} different sets of {self.k} out of {self.bits} bits;"
                " lower tasks or k, or raise bits"
            )

    @property
    def frequency(self) -> np.ndarray:
        """How often each task is asked, [tasks]."""
        share = np.arange(1.0, self.tasks + 1) ** -self.zipf
        return share / share.sum()


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The hidden layer."""

    width: int

    def __post_init__(self) -> None:
        positive("width", self.width)


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Adam with a constant rate."""

    learning_rate: float

    def __post_init__(self) -> None:
        positive("learning_rate", self.learning_rate)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """`steps` of `batch` fresh examples, rounded up to whole dispatches of `chunk` steps."""

    steps: int
    batch: int
    chunk: int

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "chunk"):
            positive(name, getattr(self, name))


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """`items` of each task at `first`, 2 `first`, 4 `first`, … steps and at the end."""

    items: int
    first: int

    def __post_init__(self) -> None:
        positive("items", self.items)
        positive("first", self.first)


@dataclasses.dataclass(frozen=True)
class Settings:
    """One point."""

    task: TaskConfig
    model: ModelConfig
    optim: OptimConfig
    train: TrainConfig
    eval: EvalConfig
    seeds: SeedConfig

    @property
    def steps(self) -> int:
        return -(-self.train.steps // self.train.chunk) * self.train.chunk

    @property
    def eval_steps(self) -> set[int]:
        """Log-spaced steps at which the replicas are evaluated, on the grid of dispatches."""
        chunk = self.train.chunk
        doubled = itertools.takewhile(
            lambda step: step < self.steps, (self.eval.first << i for i in itertools.count())
        )
        return {self.steps, *(min(-(-step // chunk) * chunk, self.steps) for step in doubled)}


class State(NamedTuple):
    """Parameters and Adam's moments; in a population every leaf has a leading axis R."""

    params: Params
    moments: optax.OptState


def draw_masks(task: TaskConfig, seed: int) -> np.ndarray:
    """The bits of every task of one replica as words, uint32 [tasks], all different."""
    rng = np.random.default_rng([seed, task.tasks, task.bits, task.k])
    found: dict[int, None] = {}  # keeps the order, which is that of the frequencies
    while len(found) < task.tasks:
        chosen = rng.choice(task.bits, task.k, replace=False)
        found[int(sum(1 << int(bit) for bit in chosen))] = None
    return np.array(list(found), np.uint32)


def parity(words: jax.Array) -> jax.Array:
    """1 where a word has an odd number of ones, else 0; float32."""
    return (jax.lax.population_count(words) & 1).astype(jnp.float32)


def start(s: Settings, replicas: Sequence[Replica]) -> tuple[State, jax.Array]:
    """Fresh states of all replicas and the keys of their streams [R]."""
    seeds = np.array([(who.init, who.data) for who in replicas], np.uint32)
    params = jax.vmap(lambda seed: init(s, jax.random.key(seed)))(seeds[:, 0])
    moments = jax.vmap(adam(s).init)(params)
    # Folded, so that the stream of data seed 0 is not made of the numbers of init seed 0.
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), 1))(seeds[:, 1])
    return State(params, moments), keys


def init(s: Settings, key: jax.Array) -> Params:
    """U(-1/sqrt(fan in), 1/sqrt(fan in)) for matrices and biases alike."""
    width, inputs = s.model.width, s.task.tasks + s.task.bits
    first, second = inputs**-0.5, width**-0.5
    shapes = {
        "code": ((s.task.tasks, width), first),
        "bits": ((s.task.bits, width), first),
        "bias": ((width,), first),
        "out": ((width,), second),
        "out_bias": ((), second),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: jax.random.uniform(k, shape, minval=-reach, maxval=reach)
        for k, (name, (shape, reach)) in zip(keys, shapes.items(), strict=True)
    }


def adam(s: Settings) -> optax.GradientTransformation:
    return optax.adam(s.optim.learning_rate)


def logit(params: Params, task: jax.Array, word: jax.Array) -> jax.Array:
    """The logit of "odd" [B] for tasks [B] (or one task) and words [B]."""
    shifts = jnp.arange(len(params["bits"]), dtype=jnp.uint32)
    x = ((word[:, None] >> shifts) & 1).astype(jnp.float32)
    hidden = jax.nn.relu(x @ params["bits"] + params["code"][task] + params["bias"])
    return hidden @ params["out"] + params["out_bias"]


def batch(s: Settings, key: jax.Array, masks: jax.Array, step: jax.Array) -> tuple[jax.Array, ...]:
    """Tasks, words and labels of one step, each [B]; a pure function of the key and the step."""
    edges = np.cumsum(s.task.frequency)[:-1] * 2.0**32
    numbers = jax.random.bits(jax.random.fold_in(key, step), (2, s.train.batch), jnp.uint32)
    task = jnp.sum(numbers[0][:, None] >= edges.astype(np.uint32), axis=1, dtype=jnp.int32)
    return task, numbers[1], parity(numbers[1] & masks[task])


def loss(params: Params, task: jax.Array, word: jax.Array, label: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats."""
    z = logit(params, task, word)
    return jnp.mean(jax.nn.softplus(z) - label * z)


def population_run(s: Settings) -> Any:
    """`run(states, keys, masks, first) -> (states, mean losses [R])`: a dispatch from step `first`.

    Replicas go one after another: at these sizes that is faster than side by side (3.2 against
    3.9 s for four of width 128), and a replica's bits do not depend on its company.
    """
    optimiser = adam(s)

    def one(states: State, key: jax.Array, masks: jax.Array, first: Any) -> tuple[State, jax.Array]:
        def step(state: State, at: jax.Array) -> tuple[State, jax.Array]:
            value, gradient = jax.value_and_grad(loss)(state.params, *batch(s, key, masks, at))
            updates, moments = optimiser.update(gradient, state.moments)
            return State(optax.apply_updates(state.params, updates), moments), value

        states, losses = jax.lax.scan(step, states, first + jnp.arange(s.train.chunk))
        return states, losses.mean()

    def run(states: State, keys: jax.Array, masks: jax.Array, first: Any) -> Any:
        return jax.lax.map(lambda a: one(a[0], a[1], a[2], first), (states, keys, masks))

    return run


def test_words(s: Settings) -> jax.Array:
    """The fixed inputs of every task, uint32 [tasks, items]: the same for every replica."""
    key = jax.random.fold_in(jax.random.key(s.seeds.eval), 2)
    return jax.random.bits(key, (s.task.tasks, s.eval.items), jnp.uint32)


def population_logits(params: Params, words: jax.Array) -> jax.Array:
    """Logits [R, tasks, items] of every task on its own inputs, for parameters with an axis R."""
    numbers = jnp.arange(len(words))
    return jax.lax.map(
        lambda p: jax.lax.map(lambda a: logit(p, *a), (numbers, words)),
        params,
    )


def measures(z: np.ndarray, y: np.ndarray) -> dict[str, Measure]:
    """Metrics of one task from logits and labels [items]; an answer is one token of two, and all
    are NaN if a logit is.
    """
    ones, margin = np.ones(len(z)), np.where(y > 0, z, -z)  # > 0: right
    right = np.where(np.isfinite(z), margin > 0, np.nan)
    with np.errstate(invalid="ignore"):
        wrong = np.exp(-np.logaddexp(0, margin))  # probability of the wrong answer
        return {
            "exact_match": ratio(right, ones),
            "token_accuracy": ratio(right, ones),
            "nll": ratio(np.logaddexp(0, -margin), ones),
            "brier": ratio(2 * wrong**2, ones),
        }
