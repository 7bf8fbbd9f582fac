"""A population of adapters on a mesh: the training job, its trainer, and placing trained adapters."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from instrdiv.data.packing import Packed
from instrdiv.models import lora
from instrdiv.models.llama import Adapters, Model
from instrdiv.models.llama_config import ModelConfig
from instrdiv.models.lora import Adapter
from instrdiv.runtime.checkpoints import stacked_state
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.mesh import PROGRAMS, padded_size, put
from instrdiv.training.adapters import (
    AdapterState,
    Batch,
    ChunkMetrics,
    MemberData,
    head_piece,
    init_state,
    train_step,
)
from instrdiv.training.order import ExampleOrder
from instrdiv.training.recipe import AdapterMember, Recipe


@dataclasses.dataclass(frozen=True)
class Job:
    """A population to train.

    Attributes:
      model: the frozen base; its weights are on ``mesh`` (see ``weights.py``), or on one device.
      members: the members to train, in the order of the population axis of the arrays.
      data: packed rows of each member; members may share the same object.
      recipe: how they are trained.
      mesh: where (``make_mesh``).
    """

    model: Model
    members: Sequence[AdapterMember]
    data: Sequence[Packed]
    recipe: Recipe
    mesh: Mesh

    def check(self) -> None:
        """Raises BadInput if the parts do not fit together; see ``check``."""
        check(self.model.config, self.members, self.data, self.recipe, self.mesh)


@dataclasses.dataclass(frozen=True)
class Population:
    """Trained adapters on a mesh, ready for use, with idle copies of the first member to fill the mesh.

    Attributes:
      members: number of members, without the idle ones.
      adapters: of all members, with the idle ones last.
    """

    members: int
    adapters: Adapters


def place_population(adapters: Adapters, mesh: Mesh) -> Population:
    """Places the adapters of M members, numpy (``FineTuned.population``), on the mesh."""
    members = len(adapters.scale)
    idle = padded_size(members, mesh, 1) - members

    def placed(leaf: Any) -> jax.Array:
        return put(np.concatenate([leaf, np.repeat(leaf[:1], idle, 0)]), mesh, P("member"))

    return Population(members, jax.tree.map(placed, adapters))


@functools.lru_cache(PROGRAMS)
def _program(recipe: Recipe, sources: int, piece: int, mesh: Mesh) -> Any:
    """The jitted chunk: (model, data, state, first step, batches); the state is donated."""

    def train_adapters(model, data, state, first_step, batches):
        def body(state, step_and_batch):
            return train_step(model, recipe, sources, piece, data, state, *step_and_batch)

        steps = first_step + jnp.arange(len(batches.tokens), dtype=jnp.int32)
        state, metrics = jax.lax.scan(body, state, (steps, batches))
        losses, tokens = metrics.losses.sum(0), metrics.tokens.sum(0)
        return state, ChunkMetrics(losses, tokens, jnp.nanmean(metrics.gradient_norm, 0))

    return jax.jit(train_adapters, donate_argnums=2, out_shardings=NamedSharding(mesh, P("member")))


@functools.lru_cache(PROGRAMS)
def _init_program(config: ModelConfig, recipe: Recipe, loras: tuple[lora.Lora, ...], mesh: Mesh) -> Any:
    """The jitted initial state of a population, from its seeds [M]."""
    initial = functools.partial(init_state, config, recipe, loras)
    return jax.jit(initial, out_shardings=NamedSharding(mesh, P("member")))


class AdapterTrainer:
    """The adapters of a population and their optimizers on a mesh, advanced chunk by chunk.

    Args:
      job: what to train, how, and where.
      restored: the step and the named arrays of a checkpoint to resume from.

    Attributes:
      step: number of steps done.
      size: number of members including idle ones: copies of the first that fill the mesh. They come last, and their
        results are dropped.
      source_names: names of the sources of all members' data, in the order of ``ChunkMetrics``.
      model, data, state: on device.
      program: the jitted chunk; inspect it with ``program.lower(*trainer.chunk_arguments())``.

    Raises:
      BadInput: members, data and layout do not fit together; raised before anything is compiled.
      ValueError: the restored arrays do not match this population.
    """

    def __init__(self, job: Job, restored: tuple[int, dict[str, np.ndarray]] | None = None):
        job.check()
        members, data, recipe, mesh = job.members, job.data, job.recipe, job.mesh
        self.members, self.recipe, self.mesh = tuple(members), recipe, mesh
        self.size = padded_size(len(members), mesh, 1)
        self.step, arrays = restored or (0, None)
        everyone = [*members, *[members[0]] * (self.size - len(members))]
        self._rows = [*data, *[data[0]] * (self.size - len(data))]
        self._orders = [
            ExampleOrder(len(rows.tokens), recipe.batch_size, member.seed)
            for member, rows in zip(everyone, self._rows, strict=True)
        ]
        self.source_names = tuple(dict.fromkeys(name for rows in data for name in rows.source_names))
        # Maps the source indices of a member to those of the run; the last entry is for padding.
        self._sources = [
            np.array([*map(self.source_names.index, rows.source_names), -1], np.int8) for rows in self._rows
        ]

        self._by_member = NamedSharding(mesh, P("member"))
        numbers = MemberData(
            scale=jnp.asarray(lora.scales([member.lora for member in everyone])),
            learning_rate=jnp.asarray([member.learning_rate for member in everyone], jnp.float32),
        )
        self.data: MemberData = put(numbers, mesh, P("member"))
        self.model = jax.tree.map(self._placed, job.model)
        rows = self.size * recipe.batch_size // recipe.parts
        piece = head_piece(self.model.config, rows, self._rows[0].tokens.shape[1], mesh)
        self.program = _program(recipe, len(self.source_names), piece, mesh)
        loras, seeds = tuple(m.lora for m in everyone), np.array([m.seed for m in everyone], np.uint32)
        initial = _init_program(job.model.config, recipe, loras, mesh)
        if arrays is None:
            self.state: AdapterState = initial(seeds)
        else:
            one = jax.eval_shape(initial, seeds)
            one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), one)
            state = stacked_state(arrays, one, len(members), self.size)
            # Not aliased, because the buffers are donated to the first chunk.
            self.state = jax.device_put(state, self._by_member, may_alias=False)

    def _placed(self, leaf: Any) -> jax.Array:
        """The weight as is if it is already on the mesh; else a copy on every device of the mesh."""
        on_mesh = isinstance(leaf, jax.Array) and leaf.sharding.device_set == set(self.mesh.devices.flat)
        return leaf if on_mesh else jax.device_put(leaf, NamedSharding(self.mesh, P()))

    def batches(self, first_step: int, steps: int) -> Batch:
        """The rows of consecutive steps (numpy). Which ones depends only on the steps and each member's seed."""
        recipe, parts = self.recipe, []
        for rows, order, sources in zip(self._rows, self._orders, self._sources, strict=True):
            chosen = order.batches(first_step, steps).reshape(steps, recipe.parts, -1)
            fields = {f.name: getattr(rows, f.name)[chosen] for f in dataclasses.fields(Batch)}
            parts.append(Batch(**fields | {"sources": sources[fields["sources"]]}))
        return jax.tree.map(lambda *of_member: np.concatenate(of_member, axis=2), *parts)

    @property
    def next_steps(self) -> int:
        """Number of steps in the next chunk; the last chunk may be shorter, and is then compiled separately."""
        return min(self.recipe.chunk_steps, self.recipe.steps - self.step)

    def chunk_arguments(self) -> tuple[Any, ...]:
        """The arguments for the next call of ``program``."""
        batches = put(self.batches(self.step, self.next_steps), self.mesh, P(None, None, ("member", "data")))
        return self.model, self.data, self.state, jnp.int32(self.step), batches

    def advance(self) -> ChunkMetrics:
        """Dispatches the next chunk and returns its metrics, without waiting for them."""
        steps = self.next_steps
        self.state, metrics = self.program(*self.chunk_arguments())
        self.step += steps
        return metrics

    def adapter(self, row: int) -> Adapter:
        """One member's adapter at its own rank, on the host."""
        return jax.device_get(lora.adapter_of(self.state.adapters, row, self.members[row].lora))


def check(
    config: ModelConfig, members: Sequence[AdapterMember], data: Sequence[Packed], recipe: Recipe, mesh: Mesh
) -> None:
    """Raises BadInput if members, data, layout and base do not fit together. Cheap, but reads all tokens."""
    recipe.validate()
    if not members or len(members) != len(data):
        raise BadInput(f"{len(members)} members and {len(data)} data sets: give at least one member, and one data set "
                       "per member")  # fmt: skip
    for member in members:
        member.lora.validate(config)
        if not (math.isfinite(member.learning_rate) and member.learning_rate >= 0):
            raise BadInput(f"--learning_rate={member.learning_rate}: must be a finite number, at least 0")
        if not 0 <= member.seed < 2**31:
            raise BadInput(f"seeds must be whole numbers from 0 to 2^31 - 1, got {member.seed}")
    if len({member.id for member in members}) < len(members):
        raise BadInput("two members are identical: they must differ in adapter, learning rate, seed or setting")
    at_once = recipe.batch_size // recipe.parts
    if at_once % mesh.shape["data"]:
        raise BadInput(f"--data_parallel={mesh.shape['data']}: must divide the {at_once} rows per member that go "
                       "through the model at once (--config.microbatch_size, or else --config.batch_size)")  # fmt: skip
    lengths = {rows.tokens.shape[1] for rows in data}
    if len(lengths) > 1:
        raise BadInput(f"rows are {' and '.join(map(str, sorted(lengths)))} tokens long: pack all data to one length")
    if len({name for rows in data for name in rows.source_names}) > 127:
        raise BadInput("the data have more than 127 sources; give several of them the same name")
    for member, packed in {id(packed): (member, packed) for member, packed in zip(members, data, strict=True)}.values():
        if not packed.loss_mask.any():
            raise BadInput(f"the data of member {member.id} have no response to learn from")
        if packed.tokens.min() < 0 or packed.tokens.max() >= config.vocab_size:
            raise BadInput(f"the data of member {member.id} have token {packed.tokens.max()}, but the model's "
                           f"vocabulary has {config.vocab_size}; use the model's own tokenizer")  # fmt: skip
