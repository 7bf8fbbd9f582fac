"""Our own contenders: a population, one member at a time, and individual parts of a run.

All of them use the code of a real run: its trainer, its compiled chunk, its evaluation. Only the number of steps per
chunk is smaller where a chunk of a real run would take longer than a sample.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from instrdiv.config.groups import make_groups
from instrdiv.config.layout import Options
from instrdiv.config.pools import RulePools
from instrdiv.config.presets import PAPER, Setting
from instrdiv.config.settings import Member
from instrdiv.evaluation.exact_match import Evaluator, piece_size
from instrdiv.evaluation.test_sets import make_test_set
from instrdiv.runs.planning import REACHED_FLOPS, flops_per_example
from instrdiv.runtime.memory import peak_device_bytes, program_bytes
from instrdiv.runtime.mesh import make_mesh, over_members
from instrdiv.tasks.strings.rules import RuleTable
from instrdiv.tasks.tokens import PAD
from instrdiv.training.members import Trainer, chunk_program, chunk_shapes
from instrdiv.training.population import Tables, stack_group, training_example
from tools.measuring import Contender, Ready

#: Pieces per call of the evaluation; a piece is one call of the compiled program, as in a run's final tests.
_PIECES = 4
#: Members in the memory measurement.
MEMORY_MEMBERS = 48


class World:
    """What all contenders train on.

    Attributes:
      setting: setting of every member, except for what a contender changes (batch size, optimizer, chunk length).
      members: members that differ in their seed, and so in their rules.
      pools: the rules of all members.
      seconds: approximate duration of a sample.
      tokens: average tokens per example, including the end token and excluding padding.
      flops: FLOPs of training on one example, as counted by ``instrdiv.runs.planning``.
    """

    def __init__(self, setting: Setting, members: int, seconds: float):
        self.setting, self.seconds = setting, seconds
        self.members = self.members_of(setting, members)
        self.pools = RulePools(self.members)
        self.tokens = float((self.rows(256)[0] != PAD).sum(-1).mean())
        self.flops = flops_per_example(make_groups(self.members)[0])

    @staticmethod
    def members_of(setting: Setting, count: int) -> list[Member]:
        return [Member(setting, seed) for seed in range(count)]

    @property
    def rules(self) -> RuleTable:
        """The rules of the first member."""
        return self.pools.of(self.members[0])

    def rows(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Examples of the first member: tokens int32 [count, T], and the loss mask bool [count, answer + 1]."""
        (group,) = make_groups(self.members[:1])
        tables, data = jax.tree.map(jnp.asarray, stack_group(group, self.pools, 1))
        data = jax.tree.map(lambda leaf: leaf[0], data)
        index = jnp.arange(count, dtype=jnp.int32) % self.setting.examples
        batch = jax.jit(jax.vmap(lambda i: training_example(group, tables, data, i)))(index)
        return np.asarray(batch.tokens), np.asarray(batch.loss_mask)

    def trainer(
        self,
        members: int,
        batch_size: int,
        optimizer: str,
        members_per_vmap: int,
        devices: int,
        attention: str = "plain",
    ) -> Trainer:
        """A trainer whose chunks take about half as long as a sample, with at most as many steps as a run's chunks."""
        setting = dataclasses.replace(self.setting, batch_size=batch_size, optimizer=optimizer)
        step_seconds = members * batch_size * self.flops / (REACHED_FLOPS[jax.default_backend()] * devices)
        steps = max(1, min(setting.chunk_steps, int(self.seconds / 2 / step_seconds)))
        setting = dataclasses.replace(setting, reports=max(setting.reports, -(-setting.steps // steps)))
        (group,) = make_groups(self.members_of(setting, members), attention=attention)
        return Trainer(group, self.pools, make_mesh(devices), members_per_vmap)


def population(
    world: World, batch_size: int, optimizer: str, members_per_vmap: int, devices: int, attention: str = "plain"
) -> Contender:
    """All members trained together, as in a run."""
    members = len(world.members)
    kernel = "" if attention == "plain" else f", {attention} attention"
    return Contender(
        kind="population",
        side="ours",
        label=f"ours: {members} members together, {optimizer}, batch {batch_size}{_blocks(members_per_vmap)}{kernel}",
        batch_size=batch_size,
        members=members,
        set_up=lambda: _train(world.trainer(members, batch_size, optimizer, members_per_vmap, devices, attention)),
        facts={
            "optimizer": optimizer,
            "members_per_vmap": members_per_vmap,
            "devices": devices,
            "attention": attention,
        },
    )


def one_at_a_time(world: World, batch_size: int, optimizer: str) -> Contender:
    """A group of one on one device, which has all cores: the rate of training members one after another.

    Only the first member is trained: they differ only in their seeds, and all would run the same program.
    """
    return Contender(
        kind="one_at_a_time",
        side="ours",
        label=f"ours: one member at a time, {optimizer}, batch {batch_size}",
        batch_size=batch_size,
        members=1,
        set_up=lambda: _train(world.trainer(1, batch_size, optimizer, 1, 1)),
        facts={"optimizer": optimizer, "members_per_vmap": 1, "devices": 1},
    )


def sampling(world: World, batch_size: int, members_per_vmap: int, devices: int) -> Contender:
    """Sampling alone: the examples of every step of a population's chunk, without the training."""
    members = len(world.members)

    def set_up() -> Ready:
        trainer = world.trainer(members, batch_size, world.setting.optimizer, members_per_vmap, devices)
        group, mesh = trainer.group, trainer.mesh

        def sample(tables: Tables, data: Any, indices_KxB: jax.Array) -> jax.Array:
            def body(total, indices_B):
                batch = jax.vmap(lambda index: training_example(group, tables, data, index))(indices_B)
                return total + batch.tokens.sum() + batch.loss_mask.sum(), None  # uses everything that a step needs

            return jax.lax.scan(body, jnp.int32(0), indices_KxB)[0]

        program = over_members("sample", sample, mesh, members_per_vmap, in_specs=[P(), P("member"), P(None, "data")])
        *_, indices = trainer.chunk_arguments()
        arguments = (trainer.tables, trainer.data, indices)
        compiled, seconds = compile_program(program, *arguments)
        return _Latest(lambda: compiled(*arguments)).ready(members * indices.size, seconds, compiled)

    return Contender(
        kind="sampling",
        side="parts",
        label=f"part: sampling alone, batch {batch_size}{_blocks(members_per_vmap)}",
        batch_size=batch_size,
        members=members,
        set_up=set_up,
        facts={"members_per_vmap": members_per_vmap, "devices": devices},
    )


def evaluation(world: World, members_per_vmap: int, devices: int, dev_tests: int, tests: int) -> Contender:
    """Tests on held-out rules, including the transfer to the devices; the test set is made once, in the set-up."""
    members, piece = len(world.members), piece_size(dev_tests, tests, 1)
    count = min(_PIECES * piece, tests)

    def set_up() -> Ready:
        setting = world.setting
        trainer = world.trainer(members, setting.batch_size, setting.optimizer, members_per_vmap, devices)
        evaluator = Evaluator(trainer, piece)
        test_set = make_test_set("unseen", trainer.group.members, world.pools, dev_tests, count)
        return _Latest(lambda: evaluator.count(evaluator.pieces(test_set))).ready(members * count)

    return Contender(
        kind="evaluation",
        side="parts",
        label=f"part: evaluation, {piece} tests per piece{_blocks(members_per_vmap)}",
        batch_size=piece,
        members=members,
        set_up=set_up,
        facts={"members_per_vmap": members_per_vmap, "devices": devices},
    )


def _blocks(members_per_vmap: int) -> str:
    return f", blocks of {members_per_vmap}" if members_per_vmap > 1 else ""


def _train(trainer: Trainer) -> Ready:
    arguments = trainer.chunk_arguments()
    trainer.train_chunk, seconds = compile_program(trainer.train_chunk, *arguments)
    members, config = len(trainer.group.members), trainer.group.config
    return Ready(
        call=trainer.advance,
        wait=lambda: jax.block_until_ready(trainer.state),
        examples=members * config.chunk_steps * config.batch_size,
        compile_seconds=seconds,
        peak_bytes=functools.partial(program_bytes, trainer.train_chunk),
    )


def memory() -> dict[str, Any]:
    """Memory of ``MEMORY_MEMBERS`` members of the papers' shape at batch 512 on one device, as the compiler reports it.

    On an accelerator they also train for one step, which gives the peak memory that was really in use.
    """
    setting = dataclasses.replace(PAPER, reports=PAPER.steps)  # chunks of one step
    members = [Member(setting, seed) for seed in range(MEMORY_MEMBERS)]
    (group,), pools, mesh = make_groups(members), RulePools(members), make_mesh(1)
    block = Options(devices=1).resolve(members).members_per_vmap
    assert block
    program = chunk_program(group, mesh, block)
    compiled = program.lower(*chunk_shapes(group, pools, mesh, block)).compile()
    found = {"members": MEMORY_MEMBERS, "members_per_vmap": block, "program_bytes": program_bytes(compiled)}
    if jax.default_backend() == "cpu":
        return found
    trainer = Trainer(group, pools, mesh, block)
    trainer.train_chunk = compiled
    jax.block_until_ready(trainer.advance())
    return found | {"peak_bytes": peak_device_bytes()}


class _Latest:
    """Calls whose results are dropped; the last result is kept to wait for it."""

    def __init__(self, work: Callable[[], Any]):
        self._work, self._result = work, None

    def ready(self, examples: int, compile_seconds: float | None = None, program: Any = None) -> Ready:
        peak_bytes = functools.partial(program_bytes, program) if program else lambda: None
        return Ready(self._call, lambda: jax.block_until_ready(self._result), examples, compile_seconds, peak_bytes)

    def _call(self) -> None:
        self._result = self._work()


def compile_program(program: Any, *arguments: Any) -> tuple[Any, float]:
    """The compiled program, and the seconds that tracing and compiling took."""
    jax.block_until_ready(arguments)
    started = time.perf_counter()
    return program.lower(*arguments).compile(), time.perf_counter() - started
