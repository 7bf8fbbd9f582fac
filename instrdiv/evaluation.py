"""Exact match of a group on test rules, sliced by what the examples are.

Test example i of a split has the same rule (but for `seen`) and the same key for every member of a sweep, drawn with
the member's own knobs. All splits go through one compiled program, in pieces of a fixed number of tests.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from instrdiv.population import TEST_STREAM, Group, MemberData, RulePools, build_rules, over_members, put, stream_key
from instrdiv.results import Row
from instrdiv.rewriting.examples import Example, Rules, TaskShape, make_example
from instrdiv.rewriting.rules import RuleSource, RuleTable, seen_in
from instrdiv.settings import Member
from instrdiv.thresholds import exact_interval
from instrdiv.training import Trainer, exact_matches, make_decoder, predict

#: Splits: trained rules with fresh inputs, each rule equally often; held-out rules for curves and tuning; held-out
#: rules for the end; trained rules as often as they were trained. Each with the number of its stream of inputs.
SPLITS = {"seen": 0, "unseen_dev": 1, "unseen": 2, "seen_by_share": 0}

#: slice -> which test examples belong to it. ``seen`` is bool [B, 2]: the rule's pattern (replacement) was trained on.
SLICES = {
    "all": lambda example, seen: jnp.ones_like(example.near_miss),
    "has_op": lambda example, seen: example.occurrences > 0,
    "no_op": lambda example, seen: example.occurrences == 0,
    "near_miss": lambda example, seen: example.near_miss,
    "occurrences=1": lambda example, seen: example.occurrences == 1,
    "occurrences>1": lambda example, seen: example.occurrences > 1,
    "pattern_seen": lambda example, seen: seen[:, 0],
    "replacement_seen": lambda example, seen: seen[:, 1],
}


@dataclasses.dataclass(frozen=True)
class TestSet:
    """The tests of one split for the members of a group.

    Attributes:
      split: one of ``SPLITS``.
      rules: a table [tests] a member (the same object where members share it).
      seen: bool [tests, 2] a member: pattern, replacement of the *unseen* rule were trained on (looser splits).
    """

    split: str
    rules: Sequence[RuleTable]
    seen: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.rules[0])


@functools.lru_cache(maxsize=32)
def held_out_rules(source: RuleSource, dev_tests: int, tests: int) -> dict[str, RuleTable]:
    """The held-out rules of ``unseen_dev`` and ``unseen``: different ones, one a test, shared by all members."""
    rules = build_rules(source, dev_tests + tests, seed=None)
    return {"unseen_dev": rules[:dev_tests], "unseen": rules[dev_tests:]}


def seen_rules(member: Member, tests: int, by_share: bool = False) -> np.ndarray:
    """Trained rules to test on, as places in the pool int32 [tests].

    Each rule that has an example equally often; or each with the share of the examples that it has.
    """
    counts = member.rule_counts()
    if by_share:
        words = np.random.Philox(key=np.array([member.seed, 0x7368617265], np.uint64)).random_raw(tests)
        examples = (words % np.uint64(member.setting.examples)).astype(np.int64)
        return np.searchsorted(np.cumsum(counts), examples, side="right").astype(np.int32)
    trained = np.flatnonzero(counts)
    words = np.random.Philox(key=np.array([member.seed, 0x7365656E], np.uint64)).random_raw(len(trained))
    order = trained[np.argsort(words, kind="stable")]
    return np.resize(order, tests).astype(np.int32)


def make_test_set(split: str, members: Sequence[Member], pools: RulePools, dev_tests: int, tests: int) -> TestSet:
    """The tests of a split for these members."""
    if split in ("seen", "seen_by_share"):
        tables = [pools.of(member)[seen_rules(member, tests, split == "seen_by_share")] for member in members]
        return TestSet(split, tables, [np.zeros((tests, 2), bool)] * len(members))
    tables = [held_out_rules(member.setting.rule_source, dev_tests, tests)[split] for member in members]
    seen = []
    for member, table in zip(members, tables, strict=True):
        trained = pools.of(member)
        columns = [seen_in(trained.patterns, table.patterns), seen_in(trained.replacements, table.replacements)]
        seen.append(np.stack(columns, axis=1))
    return TestSet(split, tables, seen)


def stream_of_split(split: str, split_seed: int) -> int:
    """The number that a split's inputs are keyed by."""
    return split_seed * len(set(SPLITS.values())) + SPLITS[split]


def sample_test(shape: TaskShape, data: MemberData, rule: Rules, stream, index) -> Example:
    """Test example ``index`` of a split (see ``stream_of_split``): one rule with a fresh input."""
    return make_example(shape, data.knobs, rule, jax.random.fold_in(stream_key(TEST_STREAM, stream), index))


def piece_size(dev_tests: int, tests: int, data_parallel: int) -> int:
    """Tests a call of the compiled evaluation: all of ``unseen_dev`` where that is 128 to 1024; a multiple of the
    data axis."""
    size = min(1024, max(dev_tests, min(tests, 128)))
    return -(-size // data_parallel) * data_parallel


def identity(figure: str, group: Group, member: Member, step: int) -> Row:
    """The cells that every row about a member begins with."""
    return {
        "figure": figure,
        "group": group.name,
        "member": member.id,
        "seed": member.seed,
        "step": step,
        "examples_seen": step * group.config.batch_size,
    }


def result_row(who: Row, member: Member, split: str, slice: str, right: int, tests: int, status: str) -> Row:
    """A row of results.csv; ``who`` is the member's ``identity``."""
    low, high = exact_interval(right, tests)
    setting = member.setting
    return (
        who
        | setting.as_row()
        | {
            "split": split,
            "slice": slice,
            "exact_match": right / tests,
            "tests": tests,
            "status": status,
            "examples_per_rule": setting.examples / setting.instructions,
            "exact_match_low": round(low, 6),
            "exact_match_high": round(high, 6),
        }
    )


class Evaluator:
    """Counts exact matches of a trainer's members, slice by slice."""

    def __init__(self, trainer: Trainer, piece: int):
        """``piece`` is the number of tests a call of the compiled program; a multiple of the mesh's data axis."""
        self.trainer, self.piece = trainer, piece
        group, data_parallel = trainer.group, trainer.mesh.shape["data"]

        def evaluate(data: MemberData, params, rules: Rules, seen, stream, index):
            batch = jax.vmap(lambda rule, i: sample_test(group.shape, data, rule, stream, i))(rules, index)
            logits, targets = predict(make_decoder(group), params, batch)
            right = exact_matches(logits, targets, batch.loss_mask)
            member_of = jnp.stack([choose(batch, seen) for choose in SLICES.values()]) & (index >= 0)
            counts = jnp.stack([(member_of & right).sum(-1), member_of.sum(-1)], axis=-1)
            return jax.lax.psum(counts, "data") if data_parallel > 1 else counts

        member, test = P("member"), P("data")
        member_test = P("member", "data")
        in_specs = [member, member, member_test, member_test, member, test]
        self.program = over_members("evaluate", evaluate, trainer.mesh, trainer.members_per_vmap, in_specs)

    def pieces(self, tests: TestSet) -> Iterator[tuple]:
        """The tests as device arguments of the program, piece by piece, padded with tests of index -1."""
        members, mesh = self.trainer.group.members, self.trainer.mesh
        rows = [*range(len(members)), *[0] * (self.trainer.size - len(members))]
        streams = [stream_of_split(tests.split, members[row].setting.split_seed) for row in rows]
        stream = put(np.array(streams, np.uint32), mesh, P("member"))
        for start in range(0, len(tests), self.piece):
            index = np.arange(start, start + self.piece)
            chosen = np.minimum(index, len(tests) - 1)
            rules = [Rules.from_table(tests.rules[row][chosen]) for row in rows]
            stacked = jax.tree.map(lambda *parts: np.stack(parts), *rules)
            seen = np.stack([tests.seen[row][chosen] for row in rows])
            index = np.where(index < len(tests), index, -1).astype(np.int32)
            yield (*put((stacked, seen), mesh, P("member", "data")), stream, put(index, mesh, P("data")))

    def count(self, pieces: Iterable[tuple]) -> jax.Array:
        """int32 [M, slices, 2]: right answers and tests of every slice, without waiting for them."""
        totals = (self.program(self.trainer.data, self.trainer.state.params, *piece) for piece in pieces)
        return functools.reduce(jnp.add, totals)
