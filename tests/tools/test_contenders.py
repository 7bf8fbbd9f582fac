"""Our contenders use the code of a real run, and count examples correctly."""

import dataclasses

import jax
import numpy as np
import pytest

from instrdiv.config.groups import make_groups
from instrdiv.config.pools import RulePools
from instrdiv.runtime.mesh import make_mesh
from instrdiv.tasks.tokens import PAD
from instrdiv.training.members import Trainer
from tests.worlds import tiny
from tools import contenders
from tools.contenders import World
from tools.measuring import Outcome


def world(members=3, **changes):
    return World(tiny(**changes), members, seconds=1e-9)  # chunks of one step


def test_tokens_are_those_of_the_rows_without_padding():
    fixed = world()
    assert fixed.tokens == make_groups(fixed.members)[0].shape.sequence
    ragged = world(input_length_min=4, no_op_fraction=0.5)
    tokens, mask = ragged.rows(256)
    # The input has 4 or 5 letters, and so does the answer.
    assert make_groups(ragged.members)[0].shape.sequence - 2 < ragged.tokens < fixed.tokens
    assert ragged.tokens == pytest.approx((tokens != PAD).sum(1).mean()) and mask.shape == (256, 6)


def test_rows_are_the_training_set_of_the_first_member():
    w = world(examples=16, instructions=4)
    tokens, _ = w.rows(32)
    np.testing.assert_array_equal(tokens[:16], tokens[16:])
    assert len(np.unique(tokens[:16], axis=0)) > 8


def test_chunks_take_part_of_a_sample_and_are_no_longer_than_a_runs():
    setting = tiny(epochs=100.0)
    quick, slow = World(setting, 2, seconds=1e-9), World(setting, 2, seconds=1e9)
    assert quick.trainer(2, 8, "adamw", 1, 1).group.config.chunk_steps == 1
    assert slow.trainer(2, 8, "adamw", 1, 1).group.config.chunk_steps == setting.chunk_steps == 200


def test_idle_members_do_not_count():
    outcome = Outcome(contenders.population(world(3), 8, "adamw", members_per_vmap=2, devices=2))
    outcome.prepare(0.001)
    assert outcome.status == "ok" and outcome.ready.call.__self__.size == 4
    assert outcome.ready.examples == 3 * 8
    assert outcome.compile_seconds > 0.05 and outcome.peak_bytes > 10_000


def test_a_population_trains_as_a_run_does():
    """Two calls of the contender produce the same state as a trainer with the same chunks."""
    w = world(2)
    ready = contenders.population(w, 8, "muon", 1, 2).set_up()
    trained = ready.call.__self__
    ready.call(), ready.call(), ready.wait()
    setting = dataclasses.replace(w.setting, optimizer="muon", reports=w.setting.steps)
    population = World.members_of(setting, 2)
    (group,) = make_groups(population)
    other = Trainer(group, RulePools(population), make_mesh(2))
    other.advance(), other.advance()
    assert trained.step == other.step == 2
    jax.tree.map(np.testing.assert_array_equal, trained.state, other.state)


def test_one_at_a_time_is_a_group_of_one_on_one_device():
    ready = contenders.one_at_a_time(world(3), 16, "adamw").set_up()
    trainer = ready.call.__self__
    assert (trainer.size, trainer.mesh.size, ready.examples) == (1, 1, 16)


def test_sampling_makes_every_example_of_every_step():
    """Its result is the sum of the tokens and masks of the examples that the chunk trains on."""
    w = World(tiny(epochs=4.0), 2, seconds=1e9)  # chunks of 8 steps
    ready = contenders.sampling(w, 8, 1, 2).set_up()
    assert ready.examples == 2 * 8 * 8
    ready.call()
    ready.wait()
    sums = np.asarray(ready.call.__self__._result)
    everything = 0
    trainer = w.trainer(2, 8, "adamw", 1, 2)
    indices = np.asarray(trainer.chunk_arguments()[-1])
    tokens, mask = w.rows(w.setting.examples)
    for row in indices.ravel():
        everything += tokens[row].sum() + mask[row].sum()
    assert sums.shape == (2,) and sums[0] == everything != sums[1]


def test_evaluation_counts_every_test_of_every_member():
    w = world(3)
    ready = contenders.evaluation(w, 1, 2, dev_tests=16, tests=40).set_up()
    ready.call()
    ready.wait()
    counts = np.asarray(ready.call.__self__._result)
    assert ready.examples == 3 * 40 and (counts[:3, 0, 1] == 40).all()
