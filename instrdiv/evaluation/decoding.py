"""Greedy decoding with a key-value cache, for all members of a group in one compiled program.

The prompt is read once, then the most likely next token is decoded at each step. The model does not see the right
answer, so wrong answers can be classified by their mistakes: see ``Task.classify``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from instrdiv.config.groups import Group
from instrdiv.evaluation.test_sets import stack_rules
from instrdiv.models.decoder import decode_greedily, make_decoder
from instrdiv.runtime.mesh import PROGRAMS, over_members, padded_size, put
from instrdiv.tasks.task import Shape
from instrdiv.tasks.tokens import blank_instruction


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Tests of some members of a group, and the instructions that their prompts show.

    Attributes:
      knobs: sampling settings of each member's inputs, numpy, stacked along M.
      keys: typed PRNG keys [M]; the input of a member's test i is sampled with ``Task.test_key(key, i)``.
      rules: one table of instructions per member, one test per instruction. Tables may differ in length.
      shown: the instructions that the prompts show, tables of the same lengths; equal to ``rules`` except in an
        ablation. Right answers are always those of ``rules``.
      blanked: replace the instruction in the prompt by padding.
      relations: ``Task.relation`` of each table to the instructions its member was trained on, bool [tests, K]; may be
        omitted if no slice depends on it.
    """

    knobs: Any
    keys: jax.Array
    rules: Sequence[Any]
    shown: Sequence[Any]
    blanked: bool = False
    relations: Sequence[np.ndarray] = ()

    def __len__(self) -> int:
        """The largest number of tests of any member."""
        return max(map(len, self.rules))


@struct.dataclass
class Answers:
    """Answered tests [M, B], as numpy arrays.

    Attributes:
      rules, input: the instruction and the input of each test, as the task's trees.
      tokens: the right row, tokens [M, B, T]: prompt, answer, end, padding.
      asked: the same for the instruction that the prompt shows.
      decoded: the member's answer, tokens [M, B, A + 1]: answer, end, padding.
      facts: see ``Example``.
      index: int32, index of the test; -1 where a member has fewer tests than others.
      relation: bool [M, B, K], see ``Prompts``; None if it was omitted.
    """

    rules: Any
    input: Any
    tokens: Any
    asked: Any
    decoded: Any
    facts: Any
    index: Any
    relation: Any = None

    @property
    def right(self) -> Any:
        """The right answer, in the layout of ``decoded``."""
        return self.tokens[..., -self.decoded.shape[-1] :]

    @property
    def differs(self) -> Any:
        """bool [M, B]: the instruction that was shown has a different answer than the right one."""
        return (self.right != self.asked[..., -self.decoded.shape[-1] :]).any(-1)


@functools.lru_cache(PROGRAMS)
def _program(group: Group, mesh: Mesh, members_per_vmap: int) -> Any:
    """Decodes tests of the group's shape: (parameters, knobs, keys, rules, shown, index [M, B], blanked) to Answers."""
    data_parallel, task = mesh.shape["data"], group.task
    shape, decoder = group.shape, make_decoder(group)
    small = jnp.uint8 if shape.vocabulary <= 256 else jnp.int32  # less to transfer to the host

    def decode(params, knobs, key, rules, shown, index, blanked):
        def make(rule, shown, i):
            input = task.make_input(shape, knobs, rule, task.test_key(key, i))
            right, asked = (task.spell(shape, each, input) for each in (rule, shown))
            prompt = asked.tokens[: shape.prompt]
            prompt = jnp.where(blanked, blank_instruction(prompt), prompt)
            known = Answers(rule, input, right.tokens.astype(small), asked.tokens.astype(small), None, right.facts, i)
            return known, prompt, asked.padding

        known, prompt, padding = jax.vmap(make)(rules, shown, index)
        decoded = decode_greedily(decoder, params, prompt, padding)
        answers = known.replace(decoded=decoded.astype(small))
        return jax.lax.all_gather(answers, "data", tiled=True) if data_parallel > 1 else answers

    member, member_test = P("member"), P("member", "data")
    in_specs = [member, member, member, member_test, member_test, member_test, P()]
    return over_members("decode", decode, mesh, members_per_vmap, in_specs)


class GroupDecoder:
    """Decodes the answers of a group's members, on tests of any shape that the model can read."""

    def __init__(self, group: Group, shape: Shape, mesh: Mesh, members_per_vmap: int, piece: int):
        """``shape`` is the tests' shape; ``piece`` is the number of tests per call of the compiled program, a multiple
        of the mesh's data axis."""
        self.mesh, self.members_per_vmap, self.piece = mesh, members_per_vmap, piece
        self.program = _program(dataclasses.replace(group.program, shape=shape), mesh, members_per_vmap)

    def answers(self, params: Any, prompts: Prompts) -> Iterator[Answers]:
        """Yields the answers piece by piece; the next piece is decoded while the caller processes this one.

        Args:
          params: stacked over the members of ``prompts``, on the host; or over these and the idle members, on device.
        """
        members = len(prompts.rules)
        rows = np.array([*range(members), *[0] * (padded_size(members, self.mesh, self.members_per_vmap) - members)])
        if len(jax.tree.leaves(params)[0]) != len(rows):
            params = jax.tree.map(lambda leaf: leaf[rows], params)
        member = (params, jax.tree.map(lambda leaf: leaf[rows], prompts.knobs), prompts.keys[rows])
        member = put(member, self.mesh, P("member"))
        waiting = None
        for start in range(0, len(prompts), self.piece):
            place = np.arange(start, start + self.piece)
            rules, shown = (stack_rules(tables, place, rows) for tables in (prompts.rules, prompts.shown))
            index = np.stack([np.where(place < len(prompts.rules[row]), place, -1) for row in rows]).astype(np.int32)
            tests = put((rules, shown, index), self.mesh, P("member", "data"))
            running = self.program(*member, *tests, np.bool_(prompts.blanked))
            if waiting is not None:
                yield _on_host(waiting, prompts)
            waiting = running
        if waiting is not None:
            yield _on_host(waiting, prompts)


def _on_host(answers: Answers, prompts: Prompts) -> Answers:
    """The answers on the host, without those of idle members."""
    found = jax.tree.map(lambda leaf: leaf[: len(prompts.rules)], jax.device_get(answers))
    if not prompts.relations:
        return found
    each = zip(prompts.relations, found.index, strict=True)
    return found.replace(relation=np.stack([relation[index] for relation, index in each]))
