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
    """AdamW, or Muon on the matrices of the blocks with Adam on the rest; gradients clipped by global norm.

    The rates may be traced, so the optimiser is made anew inside every step; its state's structure depends on
    ``config`` alone. Decay is decoupled, multiplied by the rate, and applies to matrices only (embeddings included,
    norms and biases not).
    """
    clip = optax.clip_by_global_norm(config.clip)
    if config.optimizer == "adamw":
        update = optax.adamw(
            learning_rate, b1=0.9, b2=config.adam_b2, weight_decay=weight_decay, mask=decayed_parameters
        )
    else:
        update = optax.contrib.muon(
            learning_rate,
            adam_learning_rate=adam_learning_rate,
            adam_b2=config.adam_b2,
            weight_decay=weight_decay,
            adam_weight_decay=weight_decay,
            weight_decay_mask=decayed_parameters,
            muon_weight_dimension_numbers=muon_parameters,
        )
    return optax.chain(clip, update)


def decayed_parameters(params: Any) -> Any:
    """Tree of bools: decayed are the parameters with two dimensions."""
    return jax.tree.map(lambda p: p.ndim == 2, params)


def muon_parameters(params: Any) -> Any:
    """Tree of Muon's dimension numbers where a parameter is one of ``MUON_MATRICES``, None elsewhere."""

    def dimensions(path, _):
        names = [key.key for key in path]
        is_matrix = len(names) >= 2 and names[-2] in MUON_MATRICES and names[-1] == "kernel"
        return optax.contrib.MuonDimensionNumbers() if is_matrix else None

    return jax.tree_util.tree_map_with_path(dimensions, params)


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
