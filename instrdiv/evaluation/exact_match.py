"""Exact match of a group on test instructions, by slice.

Test example i of a split has the same instruction (except in `seen`) and the same key for every member of a sweep, but
its input is sampled with the member's own knobs. All splits go through one compiled program, in pieces of fixed size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from instrdiv.config.groups import Group
from instrdiv.evaluation.test_sets import (
    TestSet,
    sample_test,
    stack_rules,
    stream_of_split,
)
from instrdiv.models.decoder import make_decoder
from instrdiv.runtime.mesh import PROGRAMS, over_members, put
from instrdiv.training.members import Trainer, exact_matches, predict
from instrdiv.training.population import MemberData


def piece_size(dev_tests: int, tests: int, data_parallel: int) -> int:
    """Tests per call of the compiled evaluation, a multiple of the data axis: all of ``unseen_dev`` if that is 128 to
    1024 tests."""
    size = min(1024, max(dev_tests, min(tests, 128)))
    return -(-size // data_parallel) * data_parallel


@functools.lru_cache(PROGRAMS)
def _program(group: Group, mesh: Mesh, members_per_vmap: int) -> Any:
    """Counts right answers and tests: (data, params, rules, relations, streams, index [B]) to int32 [M, slices, 2]."""
    data_parallel = mesh.shape["data"]

    def evaluate(data: MemberData, params, rules, relation, stream, index):
        batch = jax.vmap(lambda rule, i: sample_test(group, data, rule, stream, i))(rules, index)
        logits, targets = predict(make_decoder(group), params, batch)
        right = exact_matches(logits, targets, batch.loss_mask)
        chosen = [choose(batch.facts, relation) for choose in group.task.slices.values()]
        member_of = jnp.stack([jnp.broadcast_to(part, index.shape) for part in chosen]) & (index >= 0)
        counts = jnp.stack([(member_of & right).sum(-1), member_of.sum(-1)], axis=-1)
        return jax.lax.psum(counts, "data") if data_parallel > 1 else counts

    member, test = P("member"), P("data")
    member_test = P("member", "data")
    in_specs = [member, member, member_test, member_test, member, test]
    return over_members("evaluate", evaluate, mesh, members_per_vmap, in_specs)


class Evaluator:
    """Counts exact matches of a trainer's members, per slice."""

    def __init__(self, trainer: Trainer, piece: int):
        """``piece`` is the number of tests per call of the compiled program, a multiple of the mesh's data axis."""
        self.trainer, self.piece = trainer, piece
        self.program = _program(trainer.group.program, trainer.mesh, trainer.members_per_vmap)

    def pieces(self, tests: TestSet) -> Iterator[tuple]:
        """The tests as on-device arguments of the program, piece by piece, padded with tests of index -1."""
        members, mesh = self.trainer.group.members, self.trainer.mesh
        rows = [*range(len(members)), *[0] * (self.trainer.size - len(members))]
        streams = [stream_of_split(tests.split, members[row].setting.split_seed) for row in rows]
        stream = put(np.array(streams, np.uint32), mesh, P("member"))
        for start in range(0, len(tests), self.piece):
            index = np.arange(start, start + self.piece)
            chosen = np.minimum(index, len(tests) - 1)
            rules = stack_rules(tests.rules, chosen, rows)
            relations = np.stack([tests.relations[row][chosen] for row in rows])
            index = np.where(index < len(tests), index, -1).astype(np.int32)
            yield (*put((rules, relations), mesh, P("member", "data")), stream, put(index, mesh, P("data")))

    def count(self, pieces: Iterable[tuple]) -> jax.Array:
        """Number of right answers and of tests per slice, int32 [M, slices, 2]; does not wait for the result."""
        totals = (self.program(self.trainer.data, self.trainer.state.params, *piece) for piece in pieces)
        return functools.reduce(jnp.add, totals)
