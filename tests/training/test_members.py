"""The step against plain numpy, the mask, the schedule, the optimizers, frozen members, and compilations."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from instrdiv.config.groups import make_groups
from instrdiv.config.presets import LAPTOP
from instrdiv.config.settings import Member
from instrdiv.models.decoder import make_decoder
from instrdiv.tasks.strings.alphabet import Alphabet
from instrdiv.training.members import exact_matches, predict, train_step
from instrdiv.training.optimizers import decayed_parameters, make_optimizer, optimizer_of, orthogonalize, rate_at
from instrdiv.training.population import training_example
from tests.worlds import members, tiny, trainer


def one_member(**changes):
    """A trainer with a single member, and that member's data and state."""
    run = trainer([Member(tiny(**changes), 1)])
    data, state = (jax.tree.map(lambda leaf: leaf[0], tree) for tree in (run.data, run.state))
    return run.group, run.tables, data, state


def batch_of(group, tables, data, indices):
    return jax.jit(jax.vmap(lambda i: training_example(group, tables, data, i)))(indices)


class TestLoss:
    def test_equals_plain_numpy_on_answer_and_end_tokens(self):
        """Ragged rows: the loss is the mean over exactly the tokens of ``answer$``, found in the text itself."""
        changes = {"pattern_length_min": 1, "replacement_length": 3, "replacement_length_min": 0, "input_length_min": 3}
        group, tables, data, state = one_member(**changes)
        indices = jnp.arange(8)
        _, metrics = jax.jit(lambda s, i: train_step(group, 1, tables, data, s, jnp.int32(0), i))(state, indices)

        batch = batch_of(group, tables, data, indices)
        decoder = make_decoder(group)
        apply = jax.jit(functools.partial(decoder.apply, answer_only=False))
        logits = apply(state.params, batch.tokens[:, :-1], batch.padding)
        log_probability = np.asarray(jax.nn.log_softmax(logits))
        losses = []
        for row, tokens in enumerate(np.asarray(batch.tokens)):
            text = Alphabet(26).decode_tokens(tokens)
            third = [i for i, c in enumerate(text) if c == "#"][2]
            end = text.index("$")
            losses += [-log_probability[row, i - 1, tokens[i]] for i in range(third + 1, end + 1)]
        assert float(metrics.loss) == pytest.approx(np.mean(losses), rel=1e-5)

    def test_nothing_else_is_looked_at(self):
        """Other tokens after the end change neither loss nor gradient; another answer does."""
        group, tables, data, state = one_member(input_length_min=2)
        batch = batch_of(group, tables, data, jnp.arange(8))
        answer = jnp.arange(batch.tokens.shape[1])[None] >= group.shape.prompt
        after_end = answer & ~jnp.pad(batch.loss_mask, ((0, 0), (group.shape.prompt, 0)))
        assert after_end.any()

        @jax.jit
        def loss_and_gradient(tokens):
            def loss(params):
                logits, targets = predict(make_decoder(group), params, batch.replace(tokens=tokens))
                losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
                return jnp.where(batch.loss_mask, losses, 0).sum()

            return jax.value_and_grad(loss)(state.params)

        before = loss_and_gradient(batch.tokens)
        same = loss_and_gradient(jnp.where(after_end, 7, batch.tokens))
        other = loss_and_gradient(jnp.where(answer & ~after_end, 7, batch.tokens))
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(same), strict=True):
            np.testing.assert_array_equal(a, b)
        assert abs(float(before[0]) - float(other[0])) > 1e-3

    def test_targets_are_letters_then_one_end(self):
        group, tables, data, _ = one_member(input_length_min=2)
        batch = batch_of(group, tables, data, jnp.arange(8))
        targets, mask = np.asarray(batch.tokens)[:, group.shape.prompt :], np.asarray(batch.loss_mask)
        assert (targets[mask] >= 2).all() and (targets[~mask] == 0).all()
        assert ((targets == 2) & mask).sum(1).tolist() == [1] * 8

    def test_exact_match_needs_every_token_and_the_end(self):
        targets = jnp.array([[5, 6, 2, 0]] * 4)
        mask = jnp.array([[True, True, True, False]] * 4)
        guesses = jnp.array([[5, 6, 2, 7], [5, 6, 3, 0], [5, 7, 2, 0], [4, 6, 2, 0]])
        assert exact_matches(jax.nn.one_hot(guesses, 9), targets, mask).tolist() == [True, False, False, False]


class TestSchedule:
    def rates(self, **changes):
        config = dataclasses.replace(tiny(), warmup_steps=4, final_rate=0.1, **changes).static
        return np.asarray(jax.vmap(lambda s: rate_at(config, s))(jnp.arange(config.steps + 1))), config

    @pytest.mark.parametrize("schedule", ["linear", "cosine"])
    def test_warms_up_and_decays_to_the_end_of_the_budget(self, schedule):
        rates, config = self.rates(schedule=schedule)
        assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
        assert (np.diff(rates[4:]) < 0).all() and rates[config.steps] == pytest.approx(0.1)
        assert rates[(config.steps + 4) // 2] == pytest.approx(0.55)

    def test_constant_stays(self):
        rates, _ = self.rates(schedule="constant")
        assert (rates[4:] == 1).all()

    @pytest.mark.parametrize("epochs, reports", [(1.0, 1), (2.5, 3), (0.01, 7), (2.5, 100), (20.0, 7)])
    def test_steps_cover_the_budget_in_whole_chunks(self, epochs, reports):
        """The overshoot is less than a chunk, and there are at most as many chunks as reports were asked for."""
        config = dataclasses.replace(tiny(), epochs=epochs, reports=reports, warmup_steps=0)
        needed = -(-epochs * config.examples // config.batch_size)
        assert config.steps == config.chunks * config.chunk_steps and config.chunks <= reports
        assert needed <= config.steps < needed + config.chunk_steps


class TestOptimizers:
    def test_muon_takes_the_four_matrices_of_every_block_and_nothing_else(self):
        (group,) = make_groups([Member(LAPTOP, 0)])
        decoder = make_decoder(group)
        tokens = jnp.zeros((1, decoder.sequence), jnp.int32)
        params = jax.eval_shape(lambda: decoder.init(jax.random.key(0), tokens, jnp.zeros(1, jnp.int32)))
        chosen = jax.tree_util.tree_leaves_with_path(optimizer_of(params))
        names = {"/".join(key.key for key in path[1:]) for path, name in chosen if name == "muon"}
        matrices = ("qkv", "attention_out", "mlp_up", "mlp_down")
        assert names == {f"layer_{i}/{matrix}/kernel" for i in range(3) for matrix in matrices}
        state = jax.eval_shape(lambda p: make_optimizer(LAPTOP.static, 0.0, 0.0, 0.0).init(p), params)
        (momentum,) = [s for s in jax.tree.leaves(state, is_leaf=is_momentum) if is_momentum(s)]
        assert len(jax.tree.leaves(momentum.trace)) == 4 * 3

    @pytest.mark.parametrize("optimizer", ["adamw", "muon"])
    def test_one_update_equals_the_formula(self, optimizer):
        """Adam's first update is lr * sign(g) nearly; Muon's is lr * an orthogonal matrix; both plus lr * decay * p."""
        config = dataclasses.replace(LAPTOP, optimizer=optimizer, clip=1e9).static
        params = {
            "layer_0": {"qkv": {"kernel": jnp.full((8, 8), 0.5)}},
            "head": jnp.full((8, 3), 0.5),
            "scale": jnp.ones(8),
        }
        gradients = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), params)
        tx = make_optimizer(config, jnp.float32(0.1), jnp.float32(0.01), jnp.float32(0.2))
        updates, _ = tx.update(gradients, tx.init(params), params)
        adam_rate = 0.1 if optimizer == "adamw" else 0.01
        sign = jax.tree.map(jnp.sign, gradients)
        np.testing.assert_allclose(updates["head"], -adam_rate * (sign["head"] + 0.2 * 0.5), rtol=1e-3)
        np.testing.assert_allclose(updates["scale"], -adam_rate * sign["scale"], rtol=1e-3)  # not decayed
        kernel = updates["layer_0"]["qkv"]["kernel"] / -0.1 - 0.2 * 0.5
        if optimizer == "adamw":
            np.testing.assert_allclose(kernel, sign["layer_0"]["qkv"]["kernel"], rtol=1e-3)
        else:
            singular = np.linalg.svd(kernel, compute_uv=False)
            assert singular.min() > 0.3 and singular.max() < 1.3

    def test_orthogonalized_together_as_by_optax_one_by_one(self):
        shapes = [(8, 24), (8, 8), (8, 32), (32, 8), (8, 24), (32, 8)]
        matrices = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
        each = [optax.contrib.MuonDimensionNumbers()] * len(matrices)
        alone = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=each)
        expected, _ = alone.update(matrices, alone.init(matrices))
        for ours, theirs in zip(orthogonalize(matrices), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)
        zero = orthogonalize({"a": jnp.zeros((4, 4))})["a"]
        assert not zero.any()

    def test_gradients_are_clipped_by_global_norm(self):
        config = dataclasses.replace(LAPTOP, optimizer="adamw", clip=0.5).static
        params = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(3)}
        gradients = {"a": jnp.full((2, 2), 3.0), "b": jnp.full(3, -4.0)}
        tx = make_optimizer(config, 1.0, 1.0, 0.0)
        _, state = tx.update(gradients, tx.init(params), params)
        (adam,) = [s for s in jax.tree.leaves(state, is_leaf=is_adam_state) if is_adam_state(s)]
        assert float(optax.tree.norm(adam.mu)) == pytest.approx(0.1 * 0.5, rel=1e-4)

    def test_decay_leaves_vectors_alone(self):
        assert decayed_parameters({"w": jnp.zeros((2, 2)), "b": jnp.zeros(2)}) == {"w": True, "b": False}

    def test_members_have_rates_of_their_own(self):
        still, moving = Member(tiny(learning_rate=0.0, adam_learning_rate=0.0), 0), Member(tiny(), 0)
        run = trainer([still, moving])
        before = jax.tree.map(np.asarray, run.state.params)
        run.advance()
        moved = [np.abs(np.asarray(a) - b).reshape(2, -1).max(1) for a, b in
                 zip(jax.tree.leaves(run.state.params), jax.tree.leaves(before), strict=True)]  # fmt: skip
        assert max(m[0] for m in moved) == 0 and min(m[1] for m in moved) > 0


def is_momentum(node):
    return isinstance(node, optax.TraceState)


def is_adam_state(node):
    return isinstance(node, optax.ScaleByAdamState)


def test_a_diverging_member_is_frozen_and_the_others_do_not_notice():
    good = members(3, reports=2)
    absurd = Member(tiny(reports=2, learning_rate=1e30, adam_learning_rate=1e30, clip=1.0), 1)
    alone, beside = trainer(good), trainer([good[0], absurd, *good[1:]])
    for _ in range(2):
        alone.advance(), beside.advance()
    assert np.asarray(beside.state.diverged_at).tolist()[0::2] == [-1, -1]
    assert np.asarray(beside.state.diverged_at)[1] >= 0
    for a, b in zip(jax.tree.leaves(alone.state.params), jax.tree.leaves(beside.state.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b)[[0, 2, 3]])
        assert np.isfinite(np.asarray(b)).all()


def test_training_learns():
    """Sixteen rules on a tiny model: the loss falls well below guessing."""
    run = trainer([Member(tiny(epochs=40.0, reports=8, width=32, instructions=4), 0)])
    losses = [float(run.advance().loss[0]) for _ in range(8)]
    assert losses[0] > 2.0 > 1.5 > losses[-1]


def test_one_compilation_a_group(caplog):
    population = [*members(2), *members(2, width=32)]
    jax.config.update("jax_log_compiles", True)
    try:
        with caplog.at_level(logging.WARNING):
            for group in make_groups(population):
                run = trainer(list(group.members), devices=2)
                for _ in range(3):
                    run.advance()
    finally:
        jax.config.update("jax_log_compiles", False)
    compiled = [r.getMessage() for r in caplog.records if "Finished XLA compilation" in r.getMessage()]
    assert sum("jit(train_chunk)" in message for message in compiled) == 2
