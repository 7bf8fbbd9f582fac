"""Held-out losses of a population's members, by source."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from instrdiv.data.packing import Packed
from instrdiv.models.llama import Adapters, Model
from instrdiv.training.adapter_trainer import Population
from instrdiv.training.adapters import Batch, head_piece, response_losses
from instrdiv.training.recipe import Recipe


def held_out_losses(
    model: Model, data: Packed, recipe: Recipe, mesh: Mesh, population: Population | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Each member's mean loss on the response tokens of held-out rows, by source, with teacher forcing.

    Args:
      model: the base, its weights on ``mesh``.
      data: the rows, the same for all members.
      recipe: the training recipe; its precision, attention and microbatch size are used.
      mesh: members and rows are sharded over it.
      population: the adapters of M members, on ``mesh``; None for the base itself, M = 1.

    Returns:
      float64 [M, sources]: mean loss per response token for each of ``data.source_names``, in nats.
      int64 [sources]: number of these tokens, the same for all members.
    """
    by_row = NamedSharding(mesh, P(("member", "data")))
    at_once, several = recipe.batch_size // recipe.parts, mesh.shape["data"]
    if population is None:
        population = Population(1, Adapters({}, jnp.ones(1)))
        several *= mesh.shape["member"]
    size = len(population.adapters.scale)
    at_once = -(-at_once // several) * several
    count, places = data.tokens.shape
    piece = head_piece(model.config, size * at_once, places, mesh)
    sums, tokens = np.zeros((size, len(data.source_names))), np.zeros(len(data.source_names), np.int64)
    for first in range(0, count, at_once):
        rows = np.arange(first, first + at_once)
        there = rows < count
        fields = {name: getattr(data, name)[np.minimum(rows, count - 1)] for name in Batch.__dataclass_fields__}
        fields["segments"] = fields["segments"] * there[:, None]  # rows that fill up the last batch are padding
        fields["loss_mask"] = fields["loss_mask"] & there[:, None]
        batch = Batch(**{name: jax.device_put(np.tile(part, (size, 1)), by_row) for name, part in fields.items()})
        losses, counts = _losses(model, recipe, population.adapters, batch, len(data.source_names), piece)
        sums += np.asarray(losses, np.float64)
        tokens += np.asarray(counts)[0]
    with np.errstate(invalid="ignore"):  # a source with no response tokens has no mean
        return (sums / tokens)[: population.members], tokens


_losses = jax.jit(response_losses, static_argnames=("recipe", "sources", "piece"))
