"""A population of adapters on a mesh: the job, the trainer that advances it, and trained adapters in use."""

from __future__ import annotations

import dataclasses
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
from instrdiv.runtime.mesh import padded_size, put
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
    """A population that is to be trained.

    Attributes:
      model: the frozen base; its weights lie on ``mesh`` (see ``weights.py``), or on one device.
      members: what is trained, in the order of the rows of its arrays.
      data: packed rows of each member; several may share one.
      recipe, mesh: how, and where (``make_mesh``).
    """

    model: Model
    members: Sequence[AdapterMember]
    data: Sequence[Packed]
    recipe: Recipe
    mesh: Mesh

    def check(self) -> None:
        """Raises BadInput unless all of it fits together; see ``check``."""
        check(self.model.config, self.members, self.data, self.recipe, self.mesh)


@dataclasses.dataclass(frozen=True)
class Population:
    """Trained adapters where they are used: on a mesh, with idle copies of the first member that fill it up.

    Attributes:
      members: how many there are, without the idle ones.
      adapters: of all, the idle ones last.
    """

    members: int
    adapters: Adapters


def place_population(adapters: Adapters, mesh: Mesh) -> Population:
    """The adapters of M members, numpy (``FineTuned.population``), on the mesh."""
    members = len(adapters.scale)
    idle = padded_size(members, mesh, 1) - members

    def placed(leaf: Any) -> jax.Array:
        return put(np.concatenate([leaf, np.repeat(leaf[:1], idle, 0)]), mesh, P("member"))

    return Population(members, jax.tree.map(placed, adapters))


class AdapterTrainer:
    """The adapters of a population and their optimizers on a mesh, advanced chunk by chunk.

    Args:
      job: what is trained, how, and where.
      restored: the step and the named arrays of a checkpoint to resume from.

    Attributes:
      step: steps done.
      size: members including idle ones, copies of the first that fill the mesh; they come last, and are dropped.
      source_names: of all members' data, in the order of ``ChunkMetrics``.
      model, data, state: on device.
      program: the jitted chunk; ``program.lower(*trainer.chunk_arguments())`` is for those who want to look at it.

    Raises:
      BadInput: members, data and layout do not fit one another; before anything is compiled.
      ValueError: what was restored is not this population's.
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
        # Index among the sources of the run of every source of a member; the last is that of padding.
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
        self.program = self._compiled()
        loras, seeds = [m.lora for m in everyone], np.array([m.seed for m in everyone], np.uint32)

        def initial(seeds):
            return init_state(job.model.config, recipe, loras, seeds)

        if arrays is None:
            self.state: AdapterState = jax.jit(initial, out_shardings=self._by_member)(seeds)
        else:
            one = jax.eval_shape(initial, seeds)
            one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), one)
            state = stacked_state(arrays, one, len(members), self.size)
            # Not aliased: the buffers are donated to the first chunk.
            self.state = jax.device_put(state, self._by_member, may_alias=False)

    def _placed(self, leaf: Any) -> jax.Array:
        """A weight where it lies, if that is on the mesh; else a copy on every device of it."""
        on_mesh = isinstance(leaf, jax.Array) and leaf.sharding.device_set == set(self.mesh.devices.flat)
        return leaf if on_mesh else jax.device_put(leaf, NamedSharding(self.mesh, P()))

    def _compiled(self) -> Any:
        recipe, sources = self.recipe, len(self.source_names)
        rows = self.size * recipe.batch_size // recipe.parts
        piece = head_piece(self.model.config, rows, self._rows[0].tokens.shape[1], self.mesh)

        def train_adapters(model, data, state, first_step, batches):
            def body(state, step_and_batch):
                return train_step(model, recipe, sources, piece, data, state, *step_and_batch)

            steps = first_step + jnp.arange(len(batches.tokens), dtype=jnp.int32)
            state, metrics = jax.lax.scan(body, state, (steps, batches))
            losses, tokens = metrics.losses.sum(0), metrics.tokens.sum(0)
            return state, ChunkMetrics(losses, tokens, jnp.nanmean(metrics.gradient_norm, 0))

        return jax.jit(train_adapters, donate_argnums=2, out_shardings=self._by_member)

    def batches(self, first_step: int, steps: int) -> Batch:
        """The rows of consecutive steps (numpy). They depend on the steps and each member's seed alone."""
        recipe, parts = self.recipe, []
        for rows, order, sources in zip(self._rows, self._orders, self._sources, strict=True):
            chosen = order.batches(first_step, steps).reshape(steps, recipe.parts, -1)
            fields = {f.name: getattr(rows, f.name)[chosen] for f in dataclasses.fields(Batch)}
            parts.append(Batch(**fields | {"sources": sources[fields["sources"]]}))
        return jax.tree.map(lambda *of_member: np.concatenate(of_member, axis=2), *parts)

    @property
    def next_steps(self) -> int:
        """Steps of the next chunk; the last one may be shorter, and is then compiled anew."""
        return min(self.recipe.chunk_steps, self.recipe.steps - self.step)

    def chunk_arguments(self) -> tuple[Any, ...]:
        """What the next call of ``program`` takes."""
        batches = put(self.batches(self.step, self.next_steps), self.mesh, P(None, None, ("member", "data")))
        return self.model, self.data, self.state, jnp.int32(self.step), batches

    def advance(self) -> ChunkMetrics:
        """Dispatches the next chunk and returns its metrics, without waiting for them."""
        steps = self.next_steps
        self.state, metrics = self.program(*self.chunk_arguments())
        self.step += steps
        return metrics

    def adapter(self, row: int) -> Adapter:
        """A member's adapter, at its own rank, on the host."""
        return jax.device_get(lora.adapter_of(self.state.adapters, row, self.members[row].lora))


def check(
    config: ModelConfig, members: Sequence[AdapterMember], data: Sequence[Packed], recipe: Recipe, mesh: Mesh
) -> None:
    """Raises BadInput unless members, data and layout fit one another and the base. Cheap, but reads the tokens."""
    recipe.validate()
    if not members or len(members) != len(data):
        raise BadInput(f"{len(members)} members and {len(data)} data sets: give at least one, and one for each member")
    for member in members:
        member.lora.validate(config)
        if not (math.isfinite(member.learning_rate) and member.learning_rate >= 0):
            raise BadInput(f"--learning_rate={member.learning_rate}: must be a number of at least 0")
        if not 0 <= member.seed < 2**31:
            raise BadInput(f"a seed is a whole number from 0 to 2^31 - 1, got {member.seed}")
    if len({member.id for member in members}) < len(members):
        raise BadInput("two members are the same: they must differ in their adapter, rate, seed or setting")
    at_once = recipe.batch_size // recipe.parts
    if at_once % mesh.shape["data"]:
        raise BadInput(f"--data_parallel={mesh.shape['data']}: must divide the {at_once} rows of a member that go "
                       "through the model at once (--config.microbatch_size, or --config.batch_size)")  # fmt: skip
    lengths = {rows.tokens.shape[1] for rows in data}
    if len(lengths) > 1:
        raise BadInput(f"rows are {' and '.join(map(str, sorted(lengths)))} tokens long: pack all members' data alike")
    if len({name for rows in data for name in rows.source_names}) > 127:
        raise BadInput("the data have more than 127 sources; give some of them one name")
    for member, packed in {id(packed): (member, packed) for member, packed in zip(members, data, strict=True)}.values():
        if not packed.loss_mask.any():
            raise BadInput(f"the data of member {member.id} have no response to learn from")
        if packed.tokens.min() < 0 or packed.tokens.max() >= config.vocab_size:
            raise BadInput(f"the data of member {member.id} have the token {packed.tokens.max()}, the model has "
                           f"{config.vocab_size}; use the model's own tokenizer")  # fmt: skip
