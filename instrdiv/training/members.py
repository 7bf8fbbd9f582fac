"""Training a group: one member's step, the compiled chunk of all members, and the trainer that owns their state."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from instrdiv.config.groups import Group
from instrdiv.config.pools import RulePools
from instrdiv.models.decoder import Decoder, make_decoder
from instrdiv.runtime.checkpoints import stacked_state
from instrdiv.runtime.mesh import PROGRAMS, over_members, padded_size, put
from instrdiv.runtime.streams import DROPOUT_STREAM, INIT_STREAM, stream_key
from instrdiv.tasks.task import Example
from instrdiv.training.optimizers import make_optimizer, rate_at
from instrdiv.training.order import ExampleOrder
from instrdiv.training.population import MemberData, Tables, stack_group, training_example


@struct.dataclass
class MemberState:
    """What training changes in a member; groups stack it along M.

    Attributes:
      params: the decoder's parameters, float32.
      optimizer: the optimizer's state.
      diverged_at: int32 step at which the member was frozen because its gradients or its update stopped being finite;
        -1 while it trains.
    """

    params: Any
    optimizer: Any
    diverged_at: jax.Array


@struct.dataclass
class StepMetrics:
    """Per-member means over a chunk's steps before any divergence, float32."""

    loss: jax.Array
    gradient_norm: jax.Array
    exact_match: jax.Array


def predict(
    decoder: Decoder, params: Any, batch: Example, dropout_key: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Teacher-forced logits float32 [B, A + 1, V] on the answer and end tokens, and those tokens int32 [B, A + 1]."""
    rngs = None if dropout_key is None else {"dropout": dropout_key}
    logits: Any = decoder.apply(params, batch.tokens[:, :-1], batch.padding, train=dropout_key is not None, rngs=rngs)
    return logits, batch.tokens[:, decoder.prompt :]


def exact_matches(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """bool [B]: the most likely token is right at every position of the answer and its end token.

    With teacher forcing, this equals the exact match of greedy decoding: up to the first error, both read the same
    tokens.
    """
    return ((logits.argmax(-1) == targets) | ~mask).all(-1)


def init_member(group: Group, data: MemberData) -> MemberState:
    """A member's state before its first step. The initial weights depend only on the seed."""
    decoder = make_decoder(group)
    tokens = jnp.zeros((1, decoder.sequence), jnp.int32)
    params = decoder.init(stream_key(INIT_STREAM, data.seed), tokens, jnp.zeros(1, jnp.int32))
    optimizer = make_optimizer(group.config, 0.0, 0.0, 0.0).init(params)
    return MemberState(params=params, optimizer=optimizer, diverged_at=jnp.int32(-1))


def abstract_member(group: Group) -> MemberState:
    """Shapes and dtypes of one member's state."""
    seed = jax.ShapeDtypeStruct((), np.uint32)
    data = MemberData(seed, *[None] * 6)  # type: ignore[arg-type]
    return jax.eval_shape(lambda data: init_member(group, data), data)


def train_step(
    group: Group, data_parallel: int, tables: Tables, data: MemberData, state: MemberState, step, indices_B
) -> tuple[MemberState, StepMetrics]:
    """One step of one member on the examples ``indices_B`` (this device's part of the batch).

    A member whose gradients or update are not finite is frozen before the update is applied.
    """
    config, decoder = group.config, make_decoder(group)
    with jax.named_scope("examples"):
        batch = jax.vmap(lambda index: training_example(group, tables, data, index))(indices_B)
    tokens = batch.loss_mask.sum()

    dropout_key = None
    if config.dropout > 0:
        dropout_key = jax.random.fold_in(stream_key(DROPOUT_STREAM, data.seed), step)
        if data_parallel > 1:
            dropout_key = jax.random.fold_in(dropout_key, jax.lax.axis_index("data"))

    def loss_function(params):
        logits, targets = predict(decoder, params, batch, dropout_key)
        losses = optax.softmax_cross_entropy(logits, jax.nn.one_hot(targets, logits.shape[-1]))
        exact = exact_matches(logits, targets, batch.loss_mask).sum()
        return jnp.where(batch.loss_mask, losses, 0).sum() / tokens, exact

    (loss, exact), gradients = jax.value_and_grad(loss_function, has_aux=True)(state.params)
    if data_parallel > 1:
        loss, gradients, exact = over_the_batch(loss, gradients, exact, tokens)

    with jax.named_scope("update"):
        rate = rate_at(config, step)
        optimizer = make_optimizer(config, rate * data.learning_rate, rate * data.adam_learning_rate, data.weight_decay)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        gradient_norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(gradient_norm) & jnp.isfinite(optax.tree.norm(updates))
        active = finite & (state.diverged_at < 0)

        def keep_if_frozen(new, old):
            return jax.tree.map(lambda n, o: jnp.where(active, n, o), new, old)

        new_state = MemberState(
            params=keep_if_frozen(optax.apply_updates(state.params, updates), state.params),
            optimizer=keep_if_frozen(optimizer_state, state.optimizer),
            diverged_at=jnp.where(active | (state.diverged_at >= 0), state.diverged_at, step),
        )
    metrics = StepMetrics(loss=loss, gradient_norm=gradient_norm, exact_match=exact / config.batch_size)
    return new_state, jax.tree.map(lambda value: jnp.where(active, value, jnp.nan), metrics)


def over_the_batch(loss, gradients, exact, tokens) -> tuple[jax.Array, Any, jax.Array]:
    """Reduces over the whole batch: means of the loss and gradients (given as means over this device's tokens).

    Exact matches are summed. Everything goes through a single float32 reduction, because separate ones would each wait.
    """
    weight = tokens.astype(jnp.float32)
    parts = jax.tree.map(lambda mean: mean * weight, (loss, gradients))
    (loss, gradients), exact, tokens = jax.lax.psum((parts, exact.astype(jnp.float32), weight), "data")
    loss, gradients = jax.tree.map(lambda total: total / tokens, (loss, gradients))
    return loss, gradients, exact


def train_chunk(
    group: Group, data_parallel: int, tables: Tables, data: MemberData, state: MemberState, first_step, indices_KxB
) -> tuple[MemberState, StepMetrics]:
    """Runs K steps of one member; also returns the means of their metrics."""

    def body(state, step_and_indices):
        step, indices_B = step_and_indices
        return train_step(group, data_parallel, tables, data, state, step, indices_B)

    steps = first_step + jnp.arange(indices_KxB.shape[0], dtype=jnp.int32)
    state, metrics = jax.lax.scan(body, state, (steps, indices_KxB))
    return state, jax.tree.map(jnp.nanmean, metrics)


def chunk_program(group: Group, mesh: Mesh, members_per_vmap: int) -> Any:
    """``train_chunk`` for the members of a group, jitted: (tables, data, state, first step, indices [K, B])."""
    return _chunk_program(group.program, mesh, members_per_vmap)


@functools.lru_cache(PROGRAMS)
def _chunk_program(group: Group, mesh: Mesh, members_per_vmap: int) -> Any:
    data_parallel, member = mesh.shape["data"], P("member")
    return over_members(
        "train_chunk",
        lambda *args: train_chunk(group, data_parallel, *args),
        mesh,
        members_per_vmap,
        in_specs=[P(), member, member, P(), P(None, "data")],
        donate=(2,),
    )


@functools.lru_cache(PROGRAMS)
def _init_program(group: Group, mesh: Mesh, members_per_vmap: int) -> Any:
    return over_members(
        "init_members", lambda data: init_member(group, data), mesh, members_per_vmap, in_specs=[P("member")]
    )


def chunk_shapes(
    group: Group, pools: RulePools, mesh: Mesh, members_per_vmap: int, steps: int | None = None
) -> tuple[Any, ...]:
    """The arguments of ``chunk_program`` as shapes on the mesh, to compile it without memory or even a device.

    ``steps`` is the number of steps in the chunk, by default that of the group's config.
    """
    size = padded_size(len(group.members), mesh, members_per_vmap)

    def shapes(tree, spec, leading=()):
        def shape(leaf):
            return jax.ShapeDtypeStruct((*leading, *leaf.shape), leaf.dtype, sharding=NamedSharding(mesh, spec))

        return jax.tree.map(shape, tree)

    tables, data = stack_group(group, pools, size)
    step = jax.ShapeDtypeStruct((), np.int32)
    indices = jax.ShapeDtypeStruct((steps or group.config.chunk_steps, group.config.batch_size), np.int32)
    return (
        shapes(tables, P()),
        shapes(data, P("member")),
        shapes(abstract_member(group), P("member"), (size,)),
        shapes(step, P()),
        shapes(indices, P(None, "data")),
    )


class Trainer:
    """The state of a group on its mesh, advanced chunk by chunk.

    Args:
      group, pools, mesh, members_per_vmap: what to train, and its layout.
      restored: the step and the named arrays of a checkpoint to resume from; ValueError if they do not match the group.

    Attributes:
      step: number of steps done.
      size: number of members, including idle ones.
      tables, data, state: on device.
    """

    def __init__(
        self,
        group: Group,
        pools: RulePools,
        mesh: Mesh,
        members_per_vmap: int = 1,
        restored: tuple[int, dict[str, np.ndarray]] | None = None,
    ):
        self.group, self.mesh, self.members_per_vmap = group, mesh, members_per_vmap
        self.size = padded_size(len(group.members), mesh, members_per_vmap)
        self.step, arrays = restored or (0, None)
        self._order = ExampleOrder(group.config.examples, group.config.batch_size)
        tables, data = stack_group(group, pools, self.size)
        self.tables = put(tables, mesh, P())
        self.data = put(data, mesh, P("member"))

        self.train_chunk = chunk_program(group, mesh, members_per_vmap)
        self.state: MemberState = self._initial() if arrays is None else self._restore(arrays)

    def _initial(self) -> MemberState:
        return _init_program(self.group.program, self.mesh, self.members_per_vmap)(self.data)

    def _restore(self, arrays: dict[str, np.ndarray]) -> MemberState:
        state = stacked_state(arrays, abstract_member(self.group), len(self.group.members), self.size)
        # Not aliased, because the buffers are donated to the first chunk.
        return jax.device_put(state, NamedSharding(self.mesh, P("member")), may_alias=False)

    def chunk_arguments(self) -> tuple[Any, ...]:
        """The arguments for the next call of ``train_chunk``."""
        indices = self._order.batches(self.step, self.group.config.chunk_steps)
        indices = put(indices, self.mesh, P(None, "data"))
        return self.tables, self.data, self.state, jnp.int32(self.step), indices

    def advance(self) -> StepMetrics:
        """Dispatches the next chunk and returns its metrics [M], without waiting for them."""
        self.state, metrics = self.train_chunk(*self.chunk_arguments())
        self.step += self.group.config.chunk_steps
        return metrics
