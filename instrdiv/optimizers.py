"""Optimisers and schedules, with rates that are traced values of a member."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from instrdiv.model import MUON_MATRICES
from instrdiv.settings import StaticFields


def make_optimizer(
    config: StaticFields, learning_rate: Any, adam_learning_rate: Any, weight_decay: Any
) -> optax.GradientTransformation:
    """AdamW, or Muon on the matrices of the blocks with AdamW on the rest; gradients clipped by global norm.

    The rates may be traced, so the optimiser is made anew inside every step; its state's structure depends on
    ``config`` alone. Decay is decoupled, multiplied by the rate, and applies to matrices only (embeddings included,
    norms and biases not).

    Muon is assembled from optax's parts: ``optax.contrib.muon`` would decay norms and biases, too.
    """
    clip = optax.clip_by_global_norm(config.clip)

    def adamw(rate):
        return optax.adamw(rate, b1=0.9, b2=config.adam_b2, weight_decay=weight_decay, mask=decayed_parameters)

    if config.optimizer == "adamw":
        return optax.chain(clip, adamw(learning_rate))
    muon = optax.chain(
        optax.contrib.scale_by_muon(weight_dimension_numbers=_two_dimensional),
        optax.stateless(lambda updates, _: jax.tree.map(_scale_to_shape, updates)),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    return optax.chain(clip, optax.partition({"muon": muon, "adam": adamw(adam_learning_rate)}, optimizer_of))


def _two_dimensional(params: Any) -> Any:
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(), params)


def _scale_to_shape(update: jax.Array) -> jax.Array:
    """Muon's usual scale, by which a rate means the same for every shape: sqrt(max(1, fan_out / fan_in))."""
    fan_in, fan_out = update.shape
    return update * max(1.0, fan_out / fan_in) ** 0.5


def decayed_parameters(params: Any) -> Any:
    """Tree of bools: decayed are the parameters with two dimensions."""
    return jax.tree.map(lambda p: p.ndim == 2, params)


def optimizer_of(params: Any) -> Any:
    """Tree of names: ``muon`` for the kernels of ``MUON_MATRICES``, ``adam`` for everything else."""

    def name(path, _):
        names = [key.key for key in path]
        return "muon" if names[-1] == "kernel" and names[-2] in MUON_MATRICES else "adam"

    return jax.tree_util.tree_map_with_path(name, params)


def rate_at(config: StaticFields, step: jax.Array) -> jax.Array:
    """The rate of a step (int32) as a share of the peak, float32: warm-up, then decay to the end of the budget."""
    step = step.astype(jnp.float32)
    warm = jnp.minimum(1.0, (step + 1) / max(1, config.warmup_steps))
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    progress = jnp.clip(progress, 0.0, 1.0)
    if config.schedule == "constant":
        left = jnp.float32(1.0)
    elif config.schedule == "linear":
        left = 1 - progress
    else:
        left = 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return warm * (config.final_rate + (1 - config.final_rate) * left)
