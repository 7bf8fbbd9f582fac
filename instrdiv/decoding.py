"""Greedy decoding with a cache of keys and values, for all members of a group in one compiled program.

The prompt is read once; then one token a step, each the most likely one after all before it. Nothing of the right
answer is read, so a wrong answer can be looked at: see ``errors.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from instrdiv.model import Decoder
from instrdiv.population import Group, over_members, padded_size, put
from instrdiv.rewriting.alphabet import END, FIRST_LETTER, PAD, SEPARATOR
from instrdiv.rewriting.examples import Knobs, Rules, TaskShape, make_input, spell
from instrdiv.rewriting.rules import RuleTable
from instrdiv.training import make_decoder


def decode_greedily(decoder: Decoder, params: Any, prompt_BxP: jax.Array, padding_B: jax.Array) -> jax.Array:
    """The greedy answers int32 [B, A + 1]: letters, then the end token, then PAD; no end token where none came.

    Args:
      decoder: its ``prompt`` is P; it leaves room for A answer letters.
      params: of one member.
      prompt_BxP: int32, right-aligned: every answer starts at the same place.
      padding_B: int32, tokens of padding before each prompt (ignored unless ``decoder.ragged``).
    """
    logits, cache = decoder.apply(params, prompt_BxP, padding_B, start=0, mutable=["cache"])

    def step(carry, place):
        cache, token_B = carry
        logits, cache = decoder.apply(
            params | cache, token_B[:, None], padding_B, answer_only=False, start=place, mutable=["cache"]
        )
        return (cache, logits[:, 0].argmax(-1)), token_B

    places = jnp.arange(decoder.prompt, decoder.sequence)
    (_, last_B), tokens_AxB = jax.lax.scan(step, (cache, logits[:, 0].argmax(-1)), places)
    tokens = jnp.concatenate([tokens_AxB, last_B[None]]).T.astype(jnp.int32)
    ends = tokens == END
    return jnp.where(ends.cumsum(1) - ends > 0, PAD, tokens)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Tests of some members of a group, and what their prompts show.

    Attributes:
      knobs: how each member's inputs are made, numpy, stacked along M.
      keys: typed PRNG keys [M]; test i of a member is keyed by ``fold_in(key, i)``.
      rules: a table a member; one test a rule. Tables may differ in length.
      shown: the rules that the prompts show, of the same lengths; ``rules`` but for an ablation. Right answers are
        always those of ``rules``.
      blanked: the letters of the rule are PAD in the prompt.
    """

    knobs: Knobs
    keys: jax.Array
    rules: Sequence[RuleTable]
    shown: Sequence[RuleTable]
    blanked: bool = False

    def __len__(self) -> int:
        """Tests of the member that has most."""
        return max(map(len, self.rules))


@struct.dataclass
class Answers:
    """Answered tests [M, B], as numpy arrays.

    Attributes:
      rules: the rule of each test.
      shown: the rule that its prompt shows.
      text, length: the input, uint8 letters [M, B, I], and its length, int32.
      right, decoded: the right answer and the member's, uint8 tokens [M, B, A + 1]: letters, end, padding.
      occurrences: int32, how often the pattern occurs in the input.
      near_miss: bool.
      differs: bool, the rule that was shown asks for another answer than the right one.
      index: int32, number of the test; -1 where a member has fewer tests than others.
    """

    rules: Rules
    shown: Rules
    text: Any
    length: Any
    right: Any
    decoded: Any
    occurrences: Any
    near_miss: Any
    differs: Any
    index: Any


class GroupDecoder:
    """Decodes the answers of members of a group, on tests of any shape that the model can read."""

    def __init__(self, group: Group, shape: TaskShape, mesh: Mesh, members_per_vmap: int, piece: int):
        """``shape`` is that of the tests; ``piece`` the number of tests a call of the compiled program, a multiple of
        the mesh's data axis."""
        self.mesh, self.members_per_vmap, self.piece = mesh, members_per_vmap, piece
        data_parallel = mesh.shape["data"]
        decoder = make_decoder(dataclasses.replace(group, shape=shape))

        def decode(params, knobs, key, rules: Rules, shown: Rules, index, blanked):
            def make(rule, shown, i):
                text, length, near_miss = make_input(shape, knobs, rule, jax.random.fold_in(key, i))
                example, asked = (spell(shape, r, text, length, near_miss) for r in (rule, shown))
                prompt, right = jnp.split(example.tokens, [shape.prompt])
                prompt, other = jnp.split(asked.tokens, [shape.prompt])
                prompt = jnp.where(blanked, blank_rule(prompt), prompt)
                known = Answers(
                    rules=rule,
                    shown=shown,
                    text=text.astype(jnp.uint8),
                    length=length,
                    right=right.astype(jnp.uint8),
                    decoded=None,
                    occurrences=example.occurrences,
                    near_miss=near_miss,
                    differs=(right != other).any(),
                    index=i,
                )
                return known, prompt, asked.padding

            known, prompt, padding = jax.vmap(make)(rules, shown, index)
            decoded = decode_greedily(decoder, params, prompt, padding)
            answers = known.replace(decoded=decoded.astype(jnp.uint8))
            return jax.lax.all_gather(answers, "data", tiled=True) if data_parallel > 1 else answers

        member, member_test = P("member"), P("member", "data")
        in_specs = [member, member, member, member_test, member_test, member_test, P()]
        self.program = over_members("decode", decode, mesh, members_per_vmap, in_specs)

    def answers(self, params: Any, prompts: Prompts) -> Iterator[Answers]:
        """The answers, piece by piece; the next piece is decoded while the caller works on this one.

        Args:
          params: with a leading axis of the members of ``prompts``, on the host, or of these and idle ones, on device.
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
                yield _on_host(waiting, members)
            waiting = running
        if waiting is not None:
            yield _on_host(waiting, members)


def stack_rules(tables: Sequence[RuleTable], places: np.ndarray, rows: Sequence[int] | np.ndarray) -> Rules:
    """The rules at these places of each row's table, numpy [M, B, ...]; past a table's end, its last rule again."""
    chosen = [Rules.from_table(tables[row][np.minimum(places, len(tables[row]) - 1)]) for row in rows]
    return jax.tree.map(lambda *parts: np.stack(parts), *chosen)


def blank_rule(prompt: jax.Array) -> jax.Array:
    """A prompt [P] whose letters before the input, those of pattern and replacement, are PAD."""
    in_rule = (prompt == SEPARATOR).cumsum() < 2
    return jnp.where(in_rule & (prompt >= FIRST_LETTER), PAD, prompt)


def _on_host(answers: Answers, members: int) -> Answers:
    return jax.tree.map(lambda leaf: leaf[:members], jax.device_get(answers))
