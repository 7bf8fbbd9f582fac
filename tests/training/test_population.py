"""Groups, the finite training set, and the independence of members from how they are laid out."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instrdiv.config.groups import make_groups
from instrdiv.config.pools import RulePools
from instrdiv.config.presets import Setting
from instrdiv.config.settings import Member
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.mesh import make_mesh, padded_size
from instrdiv.tasks.strings.alphabet import Alphabet
from instrdiv.training.order import ExampleOrder
from instrdiv.training.population import stack_group, training_example
from tests.worlds import members, tiny, trainer
from tools.hlo import Program
from tools.inspect_program import replica_groups

#: Enough for eight devices, with batches that eight can share; of ragged rows: devices do not have equally many tokens.
MANY = members(8, reports=8, input_length_min=2)


class TestGroups:
    def test_members_that_differ_in_tables_or_traced_values_share_a_group(self):
        changes = [{"instructions": 4}, {"no_op_fraction": 0.5}, {"learning_rate": 1e-3}, {"tail_shape": 0.5}]
        changes += [{"occurrences": (1, 2)}, {"family": "repeated", "k_max": 2}, {"split_seed": 3}]
        assert len(make_groups([Member(tiny(**change), 0) for change in changes])) == 1

    def test_members_that_differ_in_static_values_do_not(self):
        changes = [
            {"width": 32},
            {"batch_size": 16},
            {"warmup_steps": 2},
            {"optimizer": "muon"},
            {"positions": "rotary"},
            {"epochs": 1.0},
        ]
        assert len(make_groups([Member(tiny(**change), 0) for change in changes])) == len(changes)

    def test_the_id_of_a_member_is_stable(self):
        """Ids are in every table: a golden one. They begin with a letter, so that no table reads them as numbers."""
        assert Member(Setting(instructions=500, width=128), 3).id == GOLDEN_ID
        assert Member(tiny(), 3).id != Member(tiny(), 4).id
        assert Member(tiny(), 3).id != Member(tiny(width=32), 3).id

    def test_idle_members_fill_up_devices_and_blocks(self):
        assert [padded_size(n, make_mesh(2), 3) for n in (1, 6, 7)] == [6, 6, 12]

    def test_members_of_a_seed_share_one_pool(self):
        population = [Member(tiny(instructions=i), seed) for i in (4, 8, 16) for seed in (0, 1)]
        tables, data = stack_group(make_groups(population)[0], RulePools(population), 6)
        assert tables.pools.patterns.shape[:2] == (2, 16)
        assert data.pool.tolist() == [0, 1] * 3

    def test_a_family_that_is_too_small_is_refused_with_the_numbers(self):
        small = tiny(family="repeated", k_min=2, k_max=2, instructions=64 * 16, examples=2048, alphabet_size=4)
        with pytest.raises(BadInput, match=r"--config.family=repeated: 1024 training rules .* has only \d+"):
            RulePools([Member(small, 0)])


class TestFiniteSet:
    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 60), st.integers(1, 40), st.integers(1, 5))
    def test_each_example_is_visited_once_an_epoch(self, examples, batch, chunk):
        order = ExampleOrder(examples, batch)
        steps = chunk * -(-4 * examples // (batch * chunk))
        visited = np.concatenate([order.batches(s, chunk).ravel() for s in range(0, steps, chunk)])
        for epoch in range(len(visited) // examples):
            assert sorted(visited[epoch * examples : (epoch + 1) * examples]) == list(range(examples))

    def test_epochs_have_orders_of_their_own(self):
        order = ExampleOrder(50, 50)
        assert (order.batches(0, 1) != order.batches(1, 1)).any()

    def test_a_batch_depends_on_its_step_alone(self):
        straight, jumping = ExampleOrder(30, 7), ExampleOrder(30, 7)
        everything = straight.batches(0, 20)
        assert (jumping.batches(13, 4) == everything[13:17]).all()
        assert (jumping.batches(2, 1) == everything[2:3]).all()

    def test_orders_are_the_same_everywhere(self):
        assert ExampleOrder(10, 10).batches(0, 2).tolist() == GOLDEN_ORDER

    def test_each_rule_is_used_as_often_as_its_count_says_and_no_other(self):
        population = [Member(tiny(instructions=5, examples=64, tail_shape=0.7), 2)]
        group, tables, one = on_device(population)
        pools = RulePools(population)
        make = jax.jit(jax.vmap(lambda i: training_example(group, tables, one, i)))
        batch = make(np.arange(64))
        prompts = [tuple(row) for row in np.asarray(batch.tokens)[:, [0, 1, 3, 4]] - 3]
        table = pools.of(population[0])
        rules = [(*p, *r) for p, r in zip(table.patterns.tolist(), table.replacements.tolist(), strict=True)]
        counts = np.diff(np.asarray(one.cumulative_counts), prepend=0)
        assert [prompts.count(rule) for rule in rules] == counts[:5].tolist() and counts.sum() == 64

    def test_the_set_is_fixed_and_differs_between_seeds(self):
        def tokens(seed):
            t = trainer([Member(tiny(), seed)])
            one = jax.tree.map(lambda leaf: leaf[0], t.data)
            make = jax.jit(jax.vmap(lambda i: training_example(t.group, t.tables, one, i)))
            return np.asarray(make(np.arange(64)).tokens)

        assert (tokens(0) == tokens(0)).all() and (tokens(0) != tokens(1)).any()
        assert len({row.tobytes() for row in tokens(0)}) > 60  # 16 rules, 4 inputs each, rarely the same one twice


class TestSplit:
    WORLDS = (
        {"alphabet_size": 3, "pattern_length": 2, "instructions": 8, "split_seed": 1, "held_out_share": 0.4},
        {"alphabet_size": 4, "pattern_length": 2, "instructions": 30, "held_out": "pattern"},
        {"alphabet_size": 4, "pattern_length": 2, "instructions": 30, "held_out": "rule", "tail_shape": 0.5},
        {
            "alphabet_size": 4,
            "pattern_length": 4,
            "instructions": 20,
            "family": "mirrored+periodic",
            "k_min": 2,
            "k_max": 2,
        },
    )

    @pytest.mark.parametrize("world", WORLDS)
    def test_no_example_of_an_epoch_uses_a_held_out_rule(self, world):
        """What is really trained, decoded from the tokens, against every held-out rule of a small world."""
        setting = tiny(input_length=6, examples=128, epochs=1.0, **world)
        source, alphabet = setting.source, Alphabet(setting.alphabet_size)
        held_out = source.held_out(source.capacity(held_out=True))
        assert len(held_out) > 1
        held_rules = {held_out.text(i, alphabet) for i in range(len(held_out))}
        group, tables, data = on_device([Member(setting, 5)])
        order = ExampleOrder(128, 32).batches(0, 4).ravel()
        batch = jax.jit(jax.vmap(lambda i: training_example(group, tables, data, i)))(order)
        trained = {tuple(alphabet.decode_tokens(row).split("#")[:2]) for row in np.asarray(batch.tokens)}
        assert len(trained) > 1 and not trained & held_rules
        held_patterns, held_replacements = map(set, zip(*held_rules, strict=True))
        if setting.held_out != "rule":
            assert not {pattern for pattern, _ in trained} & held_patterns
        if setting.held_out == "pattern_and_replacement":
            assert not {replacement for _, replacement in trained} & held_replacements


def on_device(population):
    """The group of these members, its tables, and the data of the first of them."""
    (group,) = make_groups(population)
    tables, data = jax.tree.map(jnp.asarray, stack_group(group, RulePools(population), len(population)))
    return group, tables, jax.tree.map(lambda leaf: leaf[0], data)


class Trained(NamedTuple):
    """Two chunks of ``MANY``, or of the first of them, on some layout."""

    losses: list[np.ndarray]
    exact_matches: list[np.ndarray]
    params: list[np.ndarray]
    text: str


@functools.cache
def trained(layout, count):
    """Compiles each layout once, for what it computes and for the text of its program."""
    run = trainer(MANY[:count], *layout)
    program = run.train_chunk = run.train_chunk.lower(*run.chunk_arguments()).compile()
    metrics = jax.device_get([run.advance(), run.advance()])
    params = [np.asarray(leaf) for leaf in jax.tree.leaves(run.state.params)]
    return Trained([m.loss for m in metrics], [m.exact_match for m in metrics], params, program.as_text())


#: (devices, data_parallel, members_per_vmap)
ONE = (1, 1, 1)
LAYOUTS = [(2, 1, 1), (8, 1, 1), (2, 2, 1), (4, 2, 2), (8, 8, 1)]


@pytest.mark.optimized
class TestLayout:
    @pytest.mark.parametrize("count", [1, 4])
    def test_a_member_is_bitwise_the_same_alone_among_4_and_among_8(self, count):
        among, few = trained(ONE, 8), trained(ONE, count)
        np.testing.assert_array_equal(np.array(among.losses)[:, :count], few.losses)
        for many, some in zip(among.params, few.params, strict=True):
            np.testing.assert_array_equal(many[:count], some)

    def test_members_together_under_vmap_agree_closely(self):
        apart, together = trained(ONE, 4), trained((1, 1, 4), 4)
        np.testing.assert_allclose(apart.losses[0], together.losses[0], atol=1e-4)

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_devices_agree(self, layout):
        """1 to 8 devices: losses to 1e-4 in the first steps, parameters closely; the examples are the same."""
        one, many = trained(ONE, 8), trained(layout, 8)
        assert np.ptp(one.losses) > 1e-2  # so that agreement means something
        np.testing.assert_allclose(many.losses, one.losses, atol=1e-4)
        np.testing.assert_allclose(many.exact_matches, one.exact_matches, atol=1e-6)
        for a, b in zip(one.params, many.params, strict=True):
            np.testing.assert_allclose(a, b, atol=2e-3)

    @pytest.mark.parametrize("layout", [ONE, *LAYOUTS])
    def test_members_never_communicate_and_data_parallel_reduces_once_a_step(self, layout):
        """All gradients, the loss and the counts in one all-reduce along data, in the loop over the steps; no more."""
        devices, data_parallel, _ = layout
        one = trained(layout, 8)
        found = collectives(one.text)
        assert len(found) == (data_parallel > 1)
        for reduction, in_step in found:
            assert (reduction.kind, reduction.instruction.opcode, in_step) == ("collective", "all-reduce", True)
            assert len(reduction.operands) == len(one.params) + len(("loss", "exact", "tokens"))
            assert replica_groups(reduction) in rows_of_the_mesh(devices, data_parallel), replica_groups(reduction)

    def test_idle_members_change_nothing(self):
        padded = trainer(MANY[:3], devices=2)
        assert padded.size == 4
        np.testing.assert_array_equal(np.asarray(padded.advance().loss)[:3], trained(ONE, 8).losses[0][:3])


def collectives(text):
    """The kernels of a compiled chunk that communicate, and whether each is in the loop over the steps."""
    program = Program.parse(text)
    step = {kernel.instruction for kernel in program.kernels(program.step)}
    assert program.step != program.entry and len(step) > 100
    kernels = program.kernels(program.entry)
    return [(kernel, kernel.instruction in step) for kernel in kernels if kernel.kind == "collective"]


def rows_of_the_mesh(devices, data_parallel):
    """The devices of one member, as replica groups in any of XLA's notations."""
    rows = np.arange(devices).reshape(-1, data_parallel)
    listed = ",".join("{" + ",".join(map(str, row)) + "}" for row in rows)
    return ("{" + listed + "}", f"[{len(rows)},{data_parallel}]<=[{devices}]",
            f"mesh['member'={len(rows)},'data'={data_parallel}] {{'data'}}")  # fmt: skip


def test_members_of_a_group_may_need_different_answer_lengths():
    """A shorter pattern that makes answers grow pads the others' rows, and changes no example."""
    fixed = Member(tiny(replacement_length=3), 0)
    growing = Member(dataclasses.replace(fixed.setting, pattern_length_min=1), 0)
    group = make_groups([fixed, growing])[0]
    assert group.shape.ragged and group.shape.answer == 5 + 2


GOLDEN_ORDER = [[2, 8, 0, 4, 3, 5, 7, 1, 9, 6], [6, 9, 0, 2, 3, 8, 1, 5, 7, 4]]
GOLDEN_ID = "mc65705841"
