"""Peers train on our task, in our shape; a peer that is missing says what to install."""

import dataclasses

import jax
import numpy as np
import pytest

import instrdiv
from instrdiv.config.groups import make_groups
from instrdiv.tasks.strings.alphabet import Alphabet
from instrdiv.training.members import abstract_member
from tests.worlds import tiny
from tools import peers
from tools.contenders import World
from tools.measuring import NotRun, Outcome


def world(members=2, **changes):
    return World(tiny(**changes), members, seconds=0.01)


def prepared(contender):
    outcome = Outcome(contender)
    outcome.prepare(0.01)
    outcome.sample(0, 0)
    return outcome


class TestHostLoader:
    @pytest.mark.parametrize(
        "changes", [{}, {"replacement_length": 4}, {"replacement_length": 1}, {"pattern_length": 3}]
    )
    def test_writes_the_rows_that_ours_does(self, changes):
        w = world(input_length=7, instructions=9, alphabet_size=3 if not changes else 26, **changes)
        shape = make_groups(w.members)[0].shape
        alphabet, letters = Alphabet(shape.alphabet_size), set()
        rules = {w.rules.text(row, alphabet) for row in range(len(w.rules))}
        rows = next(peers.host_batches(shape, w.rules, batch_size=256))
        assert rows.dtype == np.int32 and rows.shape == (256, w.rows(1)[0].shape[1])
        for row in rows:
            text = alphabet.decode_tokens(row).rstrip("_")
            pattern, replacement, string, answer = text.removesuffix("$").split("#")
            assert text.endswith("$") and (pattern, replacement) in rules
            assert pattern in string and answer == instrdiv.rewrite(pattern, replacement, string)
            letters |= {string.find(pattern)}
        assert letters == set(range(7 - shape.pattern + 1))  # planted at every position

    def test_continues_with_other_rows(self):
        w = world()
        loader = peers.host_batches(make_groups(w.members)[0].shape, w.rules, 8)
        assert (next(loader) != next(loader)).any()

    def test_is_not_run_where_rows_differ_in_length(self):
        w = world(input_length_min=4)
        with pytest.raises(NotRun, match=r"^not run: .* one length"):
            next(peers.host_batches(make_groups(w.members)[0].shape, w.rules, 8))


def test_the_flax_loop_trains():
    outcome = prepared(peers.flax_loop(world(), 8))
    assert outcome.status == "ok" and outcome.samples[0].examples == 8 * outcome.calls


def test_a_peer_that_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name == "transformers" else "there")
    for contender in (peers.gpt2(world(), 8, "float32"), peers.ensemble(world(), 8)):
        outcome = Outcome(contender)
        outcome.prepare(0.01)
        assert outcome.status == "missing: pip install transformers"


class TestPyTorch:
    @pytest.fixture(autouse=True)
    def torch(self):
        pytest.importorskip("transformers")
        return pytest.importorskip("torch")

    def test_has_our_shape(self):
        """As many parameters as ours, if ours has GPT-2's norms, biases and head."""
        from transformers import GPT2LMHeadModel

        w = world(norm="layernorm", biases=True, tied_head=True, activation="gelu", layers=2)
        ours = jax.tree.leaves(abstract_member(make_groups(w.members)[0]).params)
        config = peers._gpt2_config(w, "sdpa")
        assert GPT2LMHeadModel(config).num_parameters() == sum(leaf.size for leaf in ours)
        assert config.activation_function == "gelu_new"
        assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0, 0, 0)

    def test_is_asked_for_the_answer_and_nothing_else(self):
        w = world(no_op_fraction=0.5, replacement_length=4)  # answers of two lengths
        prompt = make_groups(w.members)[0].shape.prompt
        tokens, mask = w.rows(peers._BATCHES * 8)
        batches = peers._batches(w, 8)
        assert len(batches) == peers._BATCHES and not mask.all()
        inputs, targets = (np.concatenate([part.numpy() for part in parts]) for parts in zip(*batches, strict=True))
        np.testing.assert_array_equal(inputs, tokens[:, :-1])
        np.testing.assert_array_equal(targets[:, : prompt - 1], -100)
        np.testing.assert_array_equal(targets[:, prompt - 1 :], np.where(mask, tokens[:, prompt:], -100))

    def test_trains_one_at_a_time_and_as_an_ensemble(self):
        outcomes = [prepared(peers.gpt2(world(), 8, "float32")), prepared(peers.ensemble(world(3), 8))]
        assert [outcome.status for outcome in outcomes] == ["ok", "ok"]
        assert [outcome.samples[0].examples / outcome.calls for outcome in outcomes] == [8, 24]

    def test_an_ensemble_of_equals_takes_the_steps_of_one(self, torch, monkeypatch):
        """Two members start with a single model's weights and rows: both keep its parameters throughout training."""
        from transformers import GPT2LMHeadModel

        made, stepped = [], []
        w = world()

        def same_weights(config):
            torch.manual_seed(0)
            made.append(GPT2LMHeadModel(config))
            return made[-1]

        class Watched(torch.optim.AdamW):
            def __init__(self, parameters, **options):
                stepped.append(list(parameters))
                super().__init__(stepped[-1], **options)

        rows = peers._batches(w, 8)[:1]
        monkeypatch.setattr("transformers.GPT2LMHeadModel", same_weights)
        monkeypatch.setattr(torch.optim, "AdamW", Watched)
        monkeypatch.setattr(peers, "_batches", lambda w, size: [tuple(part.repeat(size // 8, 1) for part in rows[0])])
        for contender in (peers.gpt2(w, 8, "float32"), peers.ensemble(w, 8)):
            ready = contender.set_up()
            for _ in range(3):
                ready.call()
        alone, together = stepped
        assert len(alone) == len(together) > 10
        for one, stacked in zip(alone, together, strict=True):
            for member in stacked:
                torch.testing.assert_close(member, one, atol=2e-5, rtol=1e-4)
        torch.manual_seed(0)
        start = GPT2LMHeadModel(peers._gpt2_config(w, "sdpa")).parameters()
        assert all((one - old).abs().max() > 1e-4 for one, old in zip(alone, start, strict=True))

    def test_uncompiled_where_there_is_no_compiler_is_missing(self, monkeypatch):
        monkeypatch.setattr(peers.shutil, "which", lambda name: None)
        outcome = Outcome(peers.gpt2(world(), 8, "float32", "compiled"))
        outcome.prepare(0.01)
        assert outcome.status.startswith("missing: a C++ compiler")


def test_labels_tell_the_contenders_apart():
    w = world()
    every = [peers.gpt2(w, b, p, m) for b in (8, 16) for p in ("float32", "bfloat16") for m in ("eager", "compiled")]
    every += [peers.ensemble(w, 8), peers.flax_loop(w, 8), peers.gpt2(w, 8, "bfloat16", "graphs")]
    assert len({contender.label for contender in every}) == len(every)
    assert len({dataclasses.astuple(c)[:5] for c in every if c.kind.startswith("gpt2")}) == 9
