"""Optimisers as directions: what to subtract per unit of learning rate; the step multiplies by the
rate.

Keeping the rate out of optax's state lets every replica have its own peak rate under `vmap`, and
lets the schedule be a function of tokens seen, so that it means the same under another batch size.
Weight decay is decoupled (Loshchilov and Hutter 2019) and scales with the rate. Under μP the
direction of each tensor is multiplied by a factor of its width (`mup_multipliers`), after clipping.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lm.config import UserError, positive, within


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """An optimiser and its schedule; horizons are in tokens or are shares of the token budget."""

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    b1: float = 0.9
    b2: float = 0.98
    epsilon: float = 1e-8
    weight_decay: float = 0.05
    clip: float = 1.0  # global norm of the gradient
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_tokens: int = 0
    decay_share: float = 0.3  # wsd: the last share of the tokens, in which the rate falls linearly
    final: float = 0.05  # the last rate as a share of the peak

    def __post_init__(self) -> None:
        for name in ("learning_rate", "epsilon", "clip"):
            positive(name, getattr(self, name))
        for name in ("b1", "b2"):
            within(name, getattr(self, name), 0, math.nextafter(1, 0))
        within("weight_decay", self.weight_decay, 0)
        within("warmup_tokens", self.warmup_tokens, 0)
        within("final", self.final, 0, 1)
        within("decay_share", self.decay_share, 0, 1)


def direction(config: OptimConfig, multipliers: Any) -> optax.GradientTransformation:
    """The descent direction per unit of learning rate; `multipliers` is a tree like the parameters
    (μP, for Adam).

    Muon (Jordan et al. 2024) orthogonalises hidden matrices, stacked over layers in their first
    axis; embeddings, head and norms take Adam. Its update has a spectral norm that grows with the
    root of the width where Adam's grows with the width, so it takes the roots of the multipliers
    (Yang et al. 2023, "A Spectral Condition for Feature Learning").
    """
    if config.name == "muon":
        multipliers = jax.tree.map(math.sqrt, multipliers)
    adam = optax.scale_by_adam(config.b1, config.b2, config.epsilon)
    core = (
        optax.partition({"adam": adam, "muon": _muon(config)}, _labels)
        if config.name == "muon"
        else adam
    )
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        core,
        optax.add_decayed_weights(config.weight_decay, mask=_matrices),
        optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, multipliers)),
    )


def schedule(config: OptimConfig, tokens: int) -> Callable[[Array], Array]:
    """The rate as a share of its peak: a function of tokens seen; raises UserError if the warm-up
    is longer than the budget.
    """
    if config.warmup_tokens >= tokens:
        raise UserError(
            f"optim.warmup_tokens {config.warmup_tokens} is not below the budget, {tokens} tokens;"
            " shorten it"
        )

    budget, warmup = float(tokens), float(config.warmup_tokens)  # a billion tokens are no int32

    def share(seen: Array) -> Array:
        warm = jnp.minimum(1.0, seen / max(warmup, 1.0))
        if config.schedule == "cosine":
            left = jnp.clip((budget - seen) / (budget - warmup), 0.0, 1.0)
            fall = 0.5 - 0.5 * jnp.cos(jnp.pi * left)
        else:
            fall = jnp.clip((budget - seen) / max(config.decay_share * budget, 1.0), 0.0, 1.0)
        return warm * (config.final + (1 - config.final) * fall)

    return share


def _muon(config: OptimConfig) -> optax.GradientTransformation:
    # Adam's update has a root mean square near 1 per element and Muon's 1/sqrt(max side): 0.2
    # sqrt(max side) lets one learning rate and one weight decay serve both (Liu et al. 2025, "Muon
    # is Scalable").
    def rescale(update: Array) -> Array:
        return 0.2 * math.sqrt(max(update.shape[-2:])) * update

    dims = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    return optax.chain(
        optax.contrib.scale_by_muon(
            beta=0.95, weight_dimension_numbers=lambda params: jax.tree.map(lambda _: dims, params)
        ),
        optax.stateless(lambda updates, _: jax.tree.map(rescale, updates)),
    )


def _labels(params: Any) -> Any:
    """Muon for stacked hidden matrices [L, in, out], Adam for everything else."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            "muon" if _name(path).startswith("layers/") and leaf.ndim == 3 else "adam"
        ),
        params,
    )


def _matrices(params: Any) -> Any:
    """Decay touches matrices and not the scales of norms, which are stacked to [L, D] inside the
    blocks.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: "norm" not in _name(path), params)


def _name(path: tuple) -> str:
    return "/".join(k.key for k in path if isinstance(k, jax.tree_util.DictKey))
