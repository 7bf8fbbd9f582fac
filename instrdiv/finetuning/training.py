"""Training a population of adapters over one frozen base: the step, the compiled chunk, and the trainer.

All members go through the model together: their rows lie one after another in one batch, the base's products run over
all of it, and only the thin products of LoRA are a member's own. Gradients are taken of the adapters alone; the base's
weights are an argument of the program, held once, however many members there are.

The loss of a member is the mean over the response tokens of its batch, each predicted from the place before. A batch
may go through the model in several parts (``microbatch_size``): sums are added up and divided in the end, so the result
is that of the whole batch, however the tokens are spread over its parts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from instrdiv.checkpoints import stacked_state
from instrdiv.finetuning import llama, lora
from instrdiv.finetuning.config import ModelConfig
from instrdiv.finetuning.lora import Adapter, Lora
from instrdiv.finetuning.packing import Packed
from instrdiv.optimizers import rate_at
from instrdiv.population import ExampleOrder, padded_size, put
from instrdiv.results import plain
from instrdiv.settings import BadInput, field

#: The head is applied to pieces of the rows: so many bytes of logits are there at once, at most, on a device.
LOGIT_BYTES = 1 << 28


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How the members of a run are trained: what they share. Hashable.

    The fields are flags, ``--config.<field>``.
    """

    steps: int = field(2000, "training steps; the schedule ends with them")
    batch_size: int = field(64, "rows a step of one member")
    microbatch_size: int | None = field(None, "rows of a member that go through the model at once (default: all)")
    schedule: str = field("linear", "decay of the rate to the end of the steps", ("linear", "cosine", "constant"))
    warmup_steps: int = field(0, "steps of linear warm-up")
    final_rate: float = field(0.0, "rate at the end, as a share of the peak")
    weight_decay: float = field(0.0, "decoupled weight decay of the adapters, times the learning rate")
    adam_b2: float = field(0.999, "decay of Adam's second moment")
    clip: float = field(1.0, "largest global norm of a member's gradient")
    precision: str = field("bfloat16", "compute precision; adapters are float32", ("float32", "bfloat16"))
    remat: bool = field(False, "keep only the input of every layer for the backward pass: less memory, a third slower")
    attention: str = field("plain", "how attention is computed", llama.ATTENTION)
    reports: int = field(100, "progress reports a run, at most; they cut it into equal chunks, but for the last")

    @property
    def chunk_steps(self) -> int:
        """Steps between two reports."""
        return math.ceil(self.steps / self.reports)

    @property
    def parts(self) -> int:
        """Parts that a batch goes through the model in."""
        return self.batch_size // (self.microbatch_size or self.batch_size)

    def validate(self) -> None:
        """Raises BadInput, naming the flag, for a recipe that cannot be followed."""
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value not in choices:
                raise BadInput(f"--config.{f.name}={value}: must be one of {', '.join(choices)}")
        for name in ("steps", "batch_size", "reports"):
            if getattr(self, name) < 1:
                raise BadInput(f"--config.{name}={getattr(self, name)}: must be at least 1")
        for name in ("warmup_steps", "final_rate", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise BadInput(f"--config.{name}={getattr(self, name)}: must be at least 0, and finite")
        if not 0 <= self.adam_b2 < 1:
            raise BadInput(f"--config.adam_b2={self.adam_b2}: must be in [0, 1)")
        if not self.clip > 0:
            raise BadInput(f"--config.clip={self.clip}: must be positive")
        if self.warmup_steps > self.steps:
            raise BadInput(f"--config.warmup_steps={self.warmup_steps}: must not exceed --config.steps={self.steps}")
        part = self.microbatch_size
        if part is not None and (part < 1 or self.batch_size % part):
            raise BadInput(f"--config.microbatch_size={part}: must divide --config.batch_size={self.batch_size}")
        if self.attention != "plain" and (jax.default_backend() != "gpu" or self.precision != "bfloat16"):
            raise BadInput(f"--config.attention={self.attention}: needs an NVIDIA GPU and --config.precision=bfloat16")


@dataclasses.dataclass(frozen=True)
class AdapterMember:
    """A member of a population: an adapter, how it is trained, and what tables say of it.

    Attributes:
      lora: its shape.
      learning_rate: at the peak.
      seed: decides its initial weights and the order of its rows.
      setting: whatever else tells it from others, for tables: column -> value, such as ``{"instructions": 1000}``. Its
        data come beside it, one ``Packed`` a member.
    """

    lora: Lora
    learning_rate: float = 1e-5
    seed: int = 0
    setting: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def as_row(self) -> dict[str, Any]:
        """Flat values for tables, but for the seed."""
        return {
            **self.setting,
            "rank": self.lora.rank,
            "alpha": float(self.lora.alpha),
            "targets": "+".join(self.lora.targets),
            "learning_rate": float(self.learning_rate),
        }

    @property
    def id(self) -> str:
        """Stable name: a hash of its row and its seed."""
        text = json.dumps(plain(self.as_row() | {"seed": self.seed}), sort_keys=True)
        return "a" + hashlib.sha256(text.encode()).hexdigest()[:9]


@struct.dataclass
class MemberData:
    """Numbers of the members, float32 [M].

    Attributes:
      scale: alpha over rank.
      learning_rate: at the peak.
    """

    scale: jax.Array
    learning_rate: jax.Array


@struct.dataclass
class Batch:
    """Rows of all members: [K steps, parts of a step, M * microbatch, T]; the members' one after another.

    Attributes:
      tokens, positions, segments: int32.
      loss_mask: bool; True where the token is to be predicted from the place before.
      sources: int8, index of the token's source among those of the run; -1 is padding.
    """

    tokens: Any
    positions: Any
    segments: Any
    loss_mask: Any
    sources: Any


@struct.dataclass
class AdapterState:
    """What training changes, all of it with a leading axis M.

    Attributes:
      adapters: float32, see ``lora.py``.
      optimizer: AdamW's state of each member.
      diverged_at: int32 step at which the member was frozen because its gradients or its update stopped being finite;
        -1 while it trains.
    """

    adapters: Adapter
    optimizer: Any
    diverged_at: jax.Array


@struct.dataclass
class ChunkMetrics:
    """Of the steps of a chunk before any divergence.

    Attributes:
      losses: float32 [M, S], sums of the losses of the response tokens of every source.
      tokens: int32 [M, S], how many these are.
      gradient_norm: float32 [M], mean over the steps, before clipping.
    """

    losses: jax.Array
    tokens: jax.Array
    gradient_norm: jax.Array


def make_mesh(
    devices: int = 1,
    data_parallel: int = 1,
    tensor_parallel: int = 1,
    available: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A ('member', 'data', 'tensor') mesh over the first ``devices`` devices.

    ``data_parallel`` of them share the rows of a member, ``tensor_parallel`` of them every matrix product; what is left
    of them holds different members. Raises BadInput where that does not come out even.
    """
    available = jax.devices() if available is None else available
    if devices > len(available):
        raise BadInput(f"--devices={devices}: this machine has {len(available)} ({jax.default_backend()})")
    if devices % (data_parallel * tensor_parallel):
        raise BadInput(f"--devices={devices}: must be a multiple of --data_parallel={data_parallel} times "
                       f"--tensor_parallel={tensor_parallel}")  # fmt: skip
    grid = np.array(available[:devices]).reshape(-1, data_parallel, tensor_parallel)
    return Mesh(grid, ("member", "data", "tensor"))


def make_optimizer(recipe: Recipe, learning_rate: Any) -> optax.GradientTransformation:
    """AdamW on one member's adapter, its gradient clipped by global norm; a and b are decayed alike, as by PyTorch's.

    The rate may be traced: the optimiser is made anew in every step.
    """
    adamw = optax.adamw(learning_rate, b1=0.9, b2=recipe.adam_b2, weight_decay=recipe.weight_decay)
    return optax.chain(optax.clip_by_global_norm(recipe.clip), adamw)


def init_state(config: ModelConfig, recipe: Recipe, loras: Sequence[Lora], seeds: Any) -> AdapterState:
    """The state of a population before its first step; ``seeds`` uint32 [M]."""
    adapters = lora.init_adapters(config, loras, seeds)
    optimizer = jax.vmap(make_optimizer(recipe, 0.0).init)(adapters)
    return AdapterState(adapters, optimizer, jnp.full(len(loras), -1, jnp.int32))


def response_losses(
    config: ModelConfig,
    recipe: Recipe,
    weights: Mapping[str, Any],
    adapters: Adapter,
    scale: jax.Array,
    batch: Batch,
    sources: int,
    piece: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sums of the losses of the response tokens, and how many these are: float32 and int32 [M, sources].

    Args:
      config, weights: the base.
      recipe: precision, remat and attention are read.
      adapters, scale: of M members.
      batch: [B, T], M divides B.
      sources: how many there are.
      piece: places of every row that the head is applied to at once; default: all. Logits of the whole batch would be
        larger than everything else (T times the vocabulary), so they are made and forgotten piece by piece, and again
        for the backward pass.
    """
    rows = llama.Rows(batch.tokens, batch.positions, batch.segments)
    precision = jnp.dtype(recipe.precision)
    x, _ = llama.hidden(config, weights, rows, adapters, scale, precision=precision, remat=recipe.remat,
                        attention=recipe.attention)  # fmt: skip
    # Everything about a token, moved to the place that predicts it; the first token is predicted from nowhere.
    targets, wanted, source = (jnp.roll(part, -1, axis=1) for part in (batch.tokens, batch.loss_mask, batch.sources))
    wanted = wanted.at[:, -1].set(False)
    members, (count, places) = len(scale), batch.tokens.shape

    def sums(carry, part):
        x, targets, wanted, source = part
        logits = llama.logits(config, weights, x, adapters, scale)
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
    """Places of so many rows, spread over a mesh, that the head is applied to at once: ``LOGIT_BYTES`` of logits."""
    shards = mesh.shape["member"] * mesh.shape["data"]
    piece = max(1, LOGIT_BYTES // (4 * config.vocab_size * rows // shards))
    return math.ceil(places / math.ceil(places / piece))  # pieces of one size


def train_step(
    config: ModelConfig,
    recipe: Recipe,
    sources: int,
    piece: int,
    weights: Mapping[str, Any],
    data: MemberData,
    state: AdapterState,
    step: jax.Array,
    batch: Batch,
) -> tuple[AdapterState, ChunkMetrics]:
    """One step of all members on a batch [parts, B, T].

    A member whose gradients or update are not finite is frozen before the update is applied; nothing of it reaches the
    others. A batch without a response token of a member has a gradient of zero.
    """

    def loss_sum(adapters, part):
        losses, tokens = response_losses(config, recipe, weights, adapters, data.scale, part, sources, piece)
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
        updates, optimizer_state = make_optimizer(recipe, rate).update(gradients, optimizer_state, adapter)
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


def place_population(adapters: Adapter, scale: np.ndarray, mesh: Mesh) -> tuple[Any, jax.Array]:
    """Adapters and scales of M members (``FineTuned.population``) on the mesh, filled up with copies of the first."""
    idle = padded_size(len(scale), mesh, 1) - len(scale)

    def placed(leaf: Any) -> jax.Array:
        return put(np.concatenate([leaf, np.repeat(leaf[:1], idle, 0)]), mesh, P("member"))

    return jax.tree.map(placed, adapters), placed(scale)


class AdapterTrainer:
    """The adapters of a population and their optimisers on a mesh, advanced chunk by chunk.

    Args:
      config, weights: the frozen base; its arrays lie on ``mesh`` (see ``weights.py``), or on one device.
      members: what is trained, in the order of the rows of its arrays.
      data: packed rows of each member; several may share one.
      recipe, mesh: how, and where (``make_mesh``).
      restored: the step and the named arrays of a checkpoint to go on from.

    Attributes:
      step: steps done.
      size: members including idle ones, copies of the first that fill the mesh; they come last, and are dropped.
      source_names: of all members' data, in the order of ``ChunkMetrics``.
      weights, data, state: on device.
      program: the jitted chunk; ``program.lower(*trainer.chunk_arguments())`` is for those who want to look at it.

    Raises:
      BadInput: members, data and layout do not fit one another; before anything is compiled.
      ValueError: what was restored is not this population's.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Any],
        members: Sequence[AdapterMember],
        data: Sequence[Packed],
        recipe: Recipe,
        mesh: Mesh,
        restored: tuple[int, dict[str, np.ndarray]] | None = None,
    ):
        check(config, members, data, recipe, mesh)
        self.config, self.members, self.recipe, self.mesh = config, tuple(members), recipe, mesh
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
        self.weights = jax.tree.map(self._placed, weights)
        self.program = self._compiled()
        loras, seeds = [m.lora for m in everyone], np.array([m.seed for m in everyone], np.uint32)

        def initial(seeds):
            return init_state(config, recipe, loras, seeds)

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
        config, recipe, sources = self.config, self.recipe, len(self.source_names)
        rows = self.size * recipe.batch_size // recipe.parts
        piece = head_piece(config, rows, self._rows[0].tokens.shape[1], self.mesh)

        def train_adapters(weights, data, state, first_step, batches):
            def body(state, step_and_batch):
                return train_step(config, recipe, sources, piece, weights, data, state, *step_and_batch)

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
        return self.weights, self.data, self.state, jnp.int32(self.step), batches

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
