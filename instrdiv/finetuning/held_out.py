"""Held-out rows of every source: how they are set apart, and how well each member of a population predicts them.

Which rows are held out is decided by a keyed hash of what they say, with a key of its own: it depends on no member's
seed or mixture, and more of them contain fewer. Nothing of them is in any mixture, for mixtures are taken of the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from instrdiv.finetuning.cleaning import whole
from instrdiv.finetuning.config import ModelConfig
from instrdiv.finetuning.lora import Adapter
from instrdiv.finetuning.mixtures import shuffled
from instrdiv.finetuning.packing import Packed
from instrdiv.finetuning.sources import Row
from instrdiv.finetuning.training import Batch, Recipe, head_piece, place_population, response_losses
from instrdiv.settings import BadInput

#: Key of the order in which rows are held out; seeds of members are below 2^31.
_KEY = 2**63


def hold_out(sources: Mapping[str, Sequence[Row]], count: int) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """The rows to train on, in their order, and ``count`` rows of every source that are kept out of training.

    No text is in both where the sources hold none twice (``clean`` with duplicates dropped). Raises BadInput where a
    source would have nothing left.
    """
    training, held_out = {}, {}
    for name, rows in sources.items():
        if count >= len(rows):
            raise BadInput(f"--held_out={count}: {name} has {len(rows):,} rows once cleaned, and some must be left to "
                           "train on")  # fmt: skip
        order = shuffled([whole(row) for row in rows], _KEY)
        held_out[name] = [rows[i] for i in order[:count]]
        training[name] = [rows[i] for i in np.sort(order[count:])]
    return training, held_out


def held_out_losses(
    config: ModelConfig,
    weights: Mapping[str, Any],
    data: Packed,
    recipe: Recipe,
    mesh: Mesh,
    adapters: Adapter | None = None,
    scale: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
    """How well every member predicts the responses of held-out rows, token by token, each given all before it.

    Args:
      config, weights: the base, its weights on ``mesh``.
      data: the rows; all members are asked the same.
      recipe: of the training: its precision is used, and as many rows go through the model at once.
      mesh: members and rows are spread over it.
      adapters, scale: of M members, numpy (``FineTuned.population``); None for the base itself, M = 1.

    Returns:
      float64 [M, sources]: mean loss of a response token of each of ``data.source_names``, in nats.
      int64 [sources]: how many tokens these are; they are the same for all members.
    """
    by_row = NamedSharding(mesh, P(("member", "data")))
    members = size = 1
    at_once, several = recipe.batch_size // recipe.parts, mesh.shape["data"]
    if adapters is None:
        adapters, scale = {}, jnp.ones(1)
        several *= mesh.shape["member"]
    else:
        members = len(scale)
        adapters, scale = place_population(adapters, scale, mesh)
        size = len(scale)
    at_once = -(-at_once // several) * several
    count, places = data.tokens.shape
    piece = head_piece(config, size * at_once, places, mesh)
    sums, tokens = np.zeros((size, len(data.source_names))), np.zeros(len(data.source_names), np.int64)
    for first in range(0, count, at_once):
        rows = np.arange(first, first + at_once)
        there = rows < count
        fields = {name: getattr(data, name)[np.minimum(rows, count - 1)] for name in Batch.__dataclass_fields__}
        fields["segments"] = fields["segments"] * there[:, None]  # what fills the last batch up is padding
        fields["loss_mask"] = fields["loss_mask"] & there[:, None]
        batch = Batch(**{name: jax.device_put(np.tile(part, (size, 1)), by_row) for name, part in fields.items()})
        losses, counts = _losses(config, recipe, weights, adapters, scale, batch, len(data.source_names), piece)
        sums += np.asarray(losses, np.float64)
        tokens += np.asarray(counts)[0]
    with np.errstate(invalid="ignore"):  # a source of which nothing is left has no mean
        return (sums / tokens)[:members], tokens


_losses = jax.jit(response_losses, static_argnames=("config", "recipe", "sources", "piece"))
