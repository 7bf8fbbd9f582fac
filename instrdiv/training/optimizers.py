"""Optimizers for models, adapters, and the small base, and the learning-rate schedule; rates may be traced."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from instrdiv.config.settings import TrainingFields
from instrdiv.models.decoder import MUON_MATRICES
from instrdiv.training.recipe import Recipe


def make_optimizer(
    config: TrainingFields, learning_rate: Any, adam_learning_rate: Any, weight_decay: Any
) -> optax.GradientTransformation:
    """AdamW, or Muon on the blocks' matrices with AdamW on the rest; gradients are clipped by global norm.

    The rates may be traced, so the optimizer is built inside every step; its state's structure depends only on
    ``config``. Weight decay is decoupled, multiplied by the rate, and applies only to matrices (embeddings included,
    norms and biases not).

    Muon is assembled from optax's parts, except ``orthogonalize``: ``optax.contrib.muon`` would also decay norms and
    biases, and processes matrices one at a time (see docs/performance.md). The momentum is Nesterov's without bias
    correction, as in the original Muon; its scale does not matter, because orthogonalization removes it.
    """
    clip = optax.clip_by_global_norm(config.clip)

    def adamw(rate):
        return optax.adamw(rate, b1=0.9, b2=config.adam_b2, weight_decay=weight_decay, mask=decayed_parameters)

    if config.optimizer == "adamw":
        return optax.chain(clip, adamw(learning_rate))
    if config.optimizer != "muon":
        raise NotImplementedError(f"the optimizer {config.optimizer}")
    muon = optax.chain(
        optax.trace(decay=0.95, nesterov=True),
        optax.stateless(lambda updates, _: orthogonalize(updates)),
        optax.stateless(lambda updates, _: jax.tree.map(_scale_to_shape, updates)),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
    return optax.chain(clip, optax.partition({"muon": muon, "adam": adamw(adam_learning_rate)}, optimizer_of))


def adapter_optimizer(recipe: Recipe, learning_rate: Any) -> optax.GradientTransformation:
    """AdamW on one member's adapter, its gradient clipped by global norm; a and b are both decayed, as in PyTorch.

    The rate may be traced: the optimizer is built inside every step.
    """
    adamw = optax.adamw(learning_rate, b1=0.9, b2=recipe.adam_b2, weight_decay=recipe.weight_decay)
    return optax.chain(optax.clip_by_global_norm(recipe.clip), adamw)


def base_optimizer(
    recipe: Recipe, learning_rate: float, adam_learning_rate: float, weights: Any
) -> optax.GradientTransformation:
    """Muon on the kernels of a Llama's layers, Adam on the rest; for a small base trained from scratch.

    Args:
      recipe: schedule, clipping and weight decay.
      learning_rate, adam_learning_rate: peak rates.
      weights: the tree of weights, or of their shapes.
    """
    kernels = jax.tree_util.tree_map_with_path(
        lambda path, _: (
            optax.contrib.MuonDimensionNumbers(1, 2) if path[0].key == "layers" and path[-1].key == "kernel" else None
        ),
        weights,
    )
    muon = optax.contrib.muon(
        lambda step: learning_rate * rate_at(recipe, step),
        adam_learning_rate=lambda step: adam_learning_rate * rate_at(recipe, step),
        adam_b2=recipe.adam_b2,
        weight_decay=recipe.weight_decay,
        muon_weight_dimension_numbers=kernels,
    )
    return optax.chain(optax.clip_by_global_norm(recipe.clip), muon)


def orthogonalize(matrices: Any) -> Any:
    """Brings all singular values of the matrices in a tree near 1 (0.7 to 1.2), as Muon does with its updates.

    Five steps of a quintic Newton-Schulz iteration (Jordan et al. 2024), as in ``optax.contrib.muon``; but matrices of
    the same shape, up to transposition, are batched: there are two or three such shapes, and many matrices.
    """
    leaves, structure = jax.tree.flatten(matrices)
    wide = [leaf.T if leaf.shape[0] > leaf.shape[1] else leaf for leaf in leaves]
    done: list[Any] = [None] * len(leaves)
    for shape in dict.fromkeys(leaf.shape for leaf in wide):
        places = [place for place, leaf in enumerate(wide) if leaf.shape == shape]
        x = jnp.stack([wide[place] for place in places])
        x = x / (jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-8)
        for _ in range(5):
            gram = x @ x.mT
            x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
        for place, matrix in zip(places, x, strict=True):
            done[place] = matrix.T if leaves[place].shape != shape else matrix
    return jax.tree.unflatten(structure, done)


def _scale_to_shape(update: jax.Array) -> jax.Array:
    """Muon's usual scale, which makes a rate comparable across shapes: sqrt(max(1, fan_out / fan_in))."""
    fan_in, fan_out = update.shape
    return update * max(1.0, fan_out / fan_in) ** 0.5


def decayed_parameters(params: Any) -> Any:
    """Tree of bools: True for the parameters with two dimensions, which are decayed."""
    return jax.tree.map(lambda p: p.ndim == 2, params)


def optimizer_of(params: Any) -> Any:
    """Tree of names: ``muon`` for the kernels of ``MUON_MATRICES``, ``adam`` for everything else."""

    def name(path, _):
        names = [key.key for key in path]
        return "muon" if names[-1] == "kernel" and names[-2] in MUON_MATRICES else "adam"

    return jax.tree_util.tree_map_with_path(name, params)


class HasSchedule(Protocol):
    """A config with a learning-rate schedule; see ``ScheduleFields``."""

    @property
    def steps(self) -> int: ...
    @property
    def warmup_steps(self) -> int: ...
    @property
    def schedule(self) -> str: ...
    @property
    def final_rate(self) -> float: ...


def rate_at(config: HasSchedule, step: jax.Array) -> jax.Array:
    """The rate at a step (int32) as a share of the peak, float32: warm-up, then decay until the last step."""
    step = step.astype(jnp.float32)
    warm = jnp.minimum(1.0, (step + 1) / max(1, config.warmup_steps))
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    progress = jnp.clip(progress, 0.0, 1.0)
    if config.schedule == "constant":
        left = jnp.float32(1.0)
    elif config.schedule == "linear":
        left = 1 - progress
    elif config.schedule == "cosine":
        left = 0.5 * (1 + jnp.cos(jnp.pi * progress))
    else:
        raise NotImplementedError(f"the schedule {config.schedule}")
    return warm * (config.final_rate + (1 - config.final_rate) * left)
