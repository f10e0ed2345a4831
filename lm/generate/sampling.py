"""How a token is chosen: samplers, functions (logits, key) -> tokens that are records of numbers.

    Greedy()                                          the likeliest token
    Sample((Temperature(0.7), TopK(50), TopP(0.9)))   the steps from left to right, then one draw

A step maps logits [..., V] to logits [..., V]; what it drops gets -inf. Numbers are leaves of a
pytree, so that another temperature compiles nothing anew; only another list of steps does. TopK and
TopP find the lowest logit that stays by bisecting over its 32 bits, which is exact and takes no
sort: 32 sums over the vocabulary, which vectorise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from lm.config import UserError, within


class Sampler(Protocol):
    """(logits [..., V], key) -> tokens int32 [...]."""

    def __call__(self, logits: Array, key: Array) -> Array: ...


class Step(Protocol):
    """logits [..., V] -> logits [..., V]."""

    def __call__(self, logits: Array) -> Array: ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Greedy:
    """The likeliest token; of equals the first."""

    def __call__(self, logits: Array, key: Array) -> Array:
        return likeliest(logits)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Temperature:
    """Divides the logits: below 1 sharper, above 1 flatter."""

    value: float

    def __call__(self, logits: Array) -> Array:
        return logits / self.value


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TopK:
    """Keeps the `count` likeliest tokens, and what ties with the last of them."""

    count: int

    def __call__(self, logits: Array) -> Array:
        return _keep(logits, lambda kept: kept.sum(-1) >= self.count)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TopP:
    """Keeps the fewest likeliest tokens whose probabilities sum to at least `mass`, and ties.

    Holtzman et al. 2020, equation 2.
    """

    mass: float

    def __call__(self, logits: Array) -> Array:
        p = jax.nn.softmax(logits, axis=-1)
        return _keep(logits, lambda kept: jnp.where(kept, p, 0).sum(-1) >= self.mass)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MinP:
    """Keeps tokens at least `share` times as likely as the likeliest (Nguyen et al. 2024)."""

    share: float

    def __call__(self, logits: Array) -> Array:
        low = logits.max(-1, keepdims=True) + jnp.log(self.share)
        return jnp.where(logits >= low, logits, -jnp.inf)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sample:
    """A draw from softmax(logits) after `steps`, from left to right."""

    steps: tuple[Step, ...] = ()

    def __call__(self, logits: Array, key: Array) -> Array:
        for step in self.steps:
            logits = step(logits)
        return likeliest(logits + jax.random.gumbel(key, logits.shape))


def choose_sampler(
    temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Sampler:
    """Temperature, then top-k, top-p and min-p, each left out at its default; 0 is greedy.

    Raises UserError for a value out of range, or for a limit at temperature 0.
    """
    within("temperature", temperature, 0, 100)
    within("top_k", top_k, 0)
    within("top_p", top_p, 0, 1)
    within("min_p", min_p, 0, 1)
    if top_p == 0:
        raise UserError("top_p 0 keeps no token; use more than 0, or temperature 0 for the best")
    named = {"top_k": top_k > 0, "top_p": top_p < 1, "min_p": min_p > 0}
    if temperature == 0:
        if given := [name for name, on in named.items() if on]:
            raise UserError(f"{given[0]} says nothing at temperature 0; give a temperature above 0")
        return Greedy()
    steps: list[Step] = [] if temperature == 1 else [Temperature(temperature)]
    steps += [TopK(top_k)] if named["top_k"] else []
    steps += [TopP(top_p)] if named["top_p"] else []
    steps += [MinP(min_p)] if named["min_p"] else []
    return Sample(tuple(steps))


def penalise(logits: Array, seen: Array, penalty: Array | float) -> Array:
    """Logits [B, V] of tokens that were `seen` bool [B, V]: divided by the penalty if positive,
    else multiplied by it (Keskar et al. 2019, section 4.1, with the sign mended as elsewhere).
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def likeliest(logits: Array) -> Array:
    """The first argmax over the last axis, int32, by two reductions that vectorise on a CPU."""
    places = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    top = logits.max(-1, keepdims=True)
    # NaN equals nothing: then the last place, which is at least a token.
    return jnp.where(logits == top, places, logits.shape[-1] - 1).min(-1)


def _keep(logits: Array, enough: Callable[[Array], Array]) -> Array:
    """The logits from the largest threshold on for which `enough` (of bool [..., V]) holds."""
    bits = lax.bitcast_convert_type(logits.astype(jnp.float32), jnp.uint32)
    # Unsigned integers in the order of the floats: negative ones turned round, the others above.
    order = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))

    def narrow(i: Array, low: Array) -> Array:
        higher = low | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(enough(order >= higher[..., None]), higher, low)

    low = lax.fori_loop(0, 32, narrow, jnp.zeros(logits.shape[:-1], jnp.uint32))
    return jnp.where(order >= low[..., None], logits, -jnp.inf)
