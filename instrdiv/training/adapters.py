"""Training a population of adapters over one frozen base: the state and the training step.

All members go through the model together: their rows are concatenated into one batch, the base matmuls run over all of
it, and only the thin LoRA matmuls are per member. Gradients are taken only with respect to the adapters; the base's
weights are an argument of the program, held once, however many members there are.

A member's loss is the mean over the response tokens of its batch, each predicted from the position before it. A batch
may go through the model in several parts (``microbatch_size``): sums are accumulated and divided once, so the result
is that of the whole batch, however the tokens are distributed over the parts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from instrdiv.models import llama, lora
from instrdiv.models.llama import Adapters, Model
from instrdiv.models.llama_config import ModelConfig
from instrdiv.models.lora import Adapter, Lora
from instrdiv.training.optimizers import adapter_optimizer, rate_at
from instrdiv.training.recipe import Recipe

#: The head is applied to the rows piece by piece, so that a device holds about this many bytes of logits at once.
LOGIT_BYTES = 1 << 28


@struct.dataclass
class MemberData:
    """Per-member scalars, float32 [M].

    Attributes:
      scale: alpha / rank.
      learning_rate: peak learning rate.
    """

    scale: jax.Array
    learning_rate: jax.Array


@struct.dataclass
class Batch:
    """Rows of all members: [K steps, parts of a step, M * microbatch, T]; grouped by member, in order.

    Attributes:
      tokens, positions, segments: int32.
      loss_mask: bool; True where the token is to be predicted from the position before it.
      sources: int8, index of the token's source among those of the run; -1 is padding.
    """

    tokens: Any
    positions: Any
    segments: Any
    loss_mask: Any
    sources: Any


@struct.dataclass
class AdapterState:
    """What training changes; every array has a leading axis M.

    Attributes:
      adapters: float32, see ``lora.py``.
      optimizer: AdamW's state, per member.
      diverged_at: int32 step at which the member was frozen because its gradients or its update stopped being finite;
        -1 while it trains.
    """

    adapters: Adapter
    optimizer: Any
    diverged_at: jax.Array


@struct.dataclass
class ChunkMetrics:
    """Metrics over a chunk's steps, excluding those from a member's divergence on.

    Attributes:
      losses: float32 [M, S], summed losses of the response tokens of each source.
      tokens: int32 [M, S], number of these tokens.
      gradient_norm: float32 [M], mean over the steps, before clipping.
    """

    losses: jax.Array
    tokens: jax.Array
    gradient_norm: jax.Array


def init_state(config: ModelConfig, recipe: Recipe, loras: Sequence[Lora], seeds: Any) -> AdapterState:
    """The state of a population before its first step; ``seeds`` uint32 [M]."""
    adapters = lora.init_adapters(config, loras, seeds)
    optimizer = jax.vmap(adapter_optimizer(recipe, 0.0).init)(adapters)
    return AdapterState(adapters, optimizer, jnp.full(len(loras), -1, jnp.int32))


def response_losses(
    model: Model,
    recipe: Recipe,
    adapters: Adapters,
    batch: Batch,
    sources: int,
    piece: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Summed losses of the response tokens, and the number of these tokens: float32 and int32 [M, sources].

    Args:
      model: the base.
      recipe: its precision, remat and attention are used.
      adapters: of M members.
      batch: [B, T]; M divides B.
      sources: number of sources.
      piece: number of positions of every row that the head is applied to at once; default: all. The whole batch's
        logits (T times the vocabulary per row) would be larger than everything else, so they are computed and discarded
        piece by piece, and recomputed in the backward pass.
    """
    rows = llama.Rows(batch.tokens, batch.positions, batch.segments)
    precision = jnp.dtype(recipe.precision)
    x, _ = llama.hidden(model, rows, adapters, precision=precision, remat=recipe.remat, attention=recipe.attention)
    # Shift everything about a token to the position that predicts it; nothing predicts the first token.
    targets, wanted, source = (jnp.roll(part, -1, axis=1) for part in (batch.tokens, batch.loss_mask, batch.sources))
    wanted = wanted.at[:, -1].set(False)
    members, (count, places) = len(adapters.scale), batch.tokens.shape

    def sums(carry, part):
        x, targets, wanted, source = part
        logits = llama.logits(model, x, adapters)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        of_source = (wanted & (source == jnp.arange(sources)[:, None, None])).reshape(sources, members, -1)
        by_source = jnp.where(of_source, losses.reshape(members, -1), 0).sum(-1).T
        return jax.tree.map(jnp.add, carry, (by_source, of_source.sum(-1, dtype=jnp.int32).T)), None

    piece = piece or places
    pieces = math.ceil(places / piece)

    def cut(array):
        array = jnp.pad(array, [(0, 0), (0, pieces * piece - places)] + [(0, 0)] * (array.ndim - 2))
        return jnp.moveaxis(array.reshape(count, pieces, piece, *array.shape[2:]), 1, 0)

    zeros = (jnp.zeros((members, sources)), jnp.zeros((members, sources), jnp.int32))
    parts = jax.tree.map(cut, (x, targets, wanted, source))
    return jax.lax.scan(jax.checkpoint(sums, prevent_cse=False), zeros, parts)[0]


def head_piece(config: ModelConfig, rows: int, places: int, mesh: Mesh) -> int:
    """How many positions of ``rows`` rows, spread over a mesh, the head is applied to at once; see ``LOGIT_BYTES``."""
    shards = mesh.shape["member"] * mesh.shape["data"]
    piece = max(1, LOGIT_BYTES // (4 * config.vocab_size * rows // shards))
    return math.ceil(places / math.ceil(places / piece))  # pieces of equal size


def train_step(
    model: Model,
    recipe: Recipe,
    sources: int,
    piece: int,
    data: MemberData,
    state: AdapterState,
    step: jax.Array,
    batch: Batch,
) -> tuple[AdapterState, ChunkMetrics]:
    """One step of all members on a batch [parts, B, T].

    A member whose gradients or update are not finite is frozen before the update is applied, and the others are not
    affected. If a member's batch has no response tokens, its gradient is zero.
    """

    def loss_sum(adapters, part):
        losses, tokens = response_losses(model, recipe, Adapters(adapters, data.scale), part, sources, piece)
        return losses.sum(), (losses, tokens)

    def add(total, part):
        (_, counted), gradients = jax.value_and_grad(loss_sum, has_aux=True)(state.adapters, part)
        return jax.tree.map(jnp.add, total, (counted, gradients)), None

    members = len(data.scale)
    nothing = (jnp.zeros((members, sources)), jnp.zeros((members, sources), jnp.int32))
    zeros = (nothing, jax.tree.map(jnp.zeros_like, state.adapters))
    ((losses, tokens), gradients), _ = jax.lax.scan(add, zeros, batch)

    def update(gradients, tokens, rate, optimizer_state, adapter):
        gradients = jax.tree.map(lambda leaf: leaf / jnp.maximum(tokens, 1), gradients)
        updates, optimizer_state = adapter_optimizer(recipe, rate).update(gradients, optimizer_state, adapter)
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
        return optax.apply_updates(adapter, updates), optimizer_state, norm, finite

    with jax.named_scope("update"):
        rates = rate_at(recipe, step) * data.learning_rate
        adapters, optimizer, norm, finite = jax.vmap(update)(
            gradients, tokens.sum(-1), rates, state.optimizer, state.adapters
        )
        active = finite & (state.diverged_at < 0)

        def keep_if_frozen(new, old):
            return jnp.where(active.reshape(-1, *[1] * (new.ndim - 1)), new, old)

        new_state = AdapterState(
            adapters=jax.tree.map(keep_if_frozen, adapters, state.adapters),
            optimizer=jax.tree.map(keep_if_frozen, optimizer, state.optimizer),
            diverged_at=jnp.where(active | (state.diverged_at >= 0), state.diverged_at, step),
        )
    losses, tokens = jax.tree.map(lambda leaf: jnp.where(active[:, None], leaf, 0), (losses, tokens))
    return new_state, ChunkMetrics(losses, tokens, jnp.where(active, norm, jnp.nan))
