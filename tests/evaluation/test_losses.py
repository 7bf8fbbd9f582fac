"""Held-out rows: how they are chosen, and the losses on them against losses computed by hand from the logits."""

import dataclasses
import hashlib

import jax
import numpy as np
import pytest

from instrdiv.data.held_out import hold_out
from instrdiv.data.schemas import TextRow
from instrdiv.evaluation.losses import held_out_losses
from instrdiv.models import lora
from instrdiv.models.llama import Adapters, Model
from instrdiv.models.lora import Lora
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.mesh import make_mesh
from instrdiv.training.adapter_trainer import place_population
from instrdiv.training.recipe import Recipe
from tests import adapters as worlds

RECIPE = Recipe(steps=1, batch_size=4, microbatch_size=2, precision="float32")


def rows(source, count):
    return [TextRow(f"{source} question {i}", f"answer {i}", source) for i in range(count)]


def test_rows_are_held_out_by_a_keyed_hash_of_what_they_say():
    sources = {"a": rows("a", 30), "b": rows("b", 12)}
    training, held_out = hold_out(sources, 5)

    def place(row):
        text = f"{row.instruction}\n\n{row.response}".encode()
        key = (2**63).to_bytes(8, "little")
        return int.from_bytes(hashlib.blake2b(text, digest_size=8, key=key, salt=bytes(8)).digest(), "little")

    for name, of_source in sources.items():
        assert held_out[name] == sorted(of_source, key=place)[:5]
        assert training[name] == [row for row in of_source if row not in held_out[name]]


def test_more_held_out_rows_contain_fewer_and_other_sources_do_not_matter():
    few = hold_out({"a": rows("a", 30)}, 4)[1]["a"]
    many = hold_out({"b": rows("b", 12), "a": rows("a", 30)[::-1]}, 9)[1]["a"]
    assert many[:4] == few


def test_a_source_must_have_something_left():
    with pytest.raises(BadInput, match="--held_out=12: b has 12 rows after cleaning, and some must be left"):
        hold_out({"a": rows("a", 30), "b": rows("b", 12)}, 12)


def by_hand(data, weights):
    """Mean loss and number of tokens per source: every example alone, without padding."""
    found = [[] for _ in data.source_names]
    for row in range(len(data.tokens)):
        for segment in range(1, data.segments[row].max() + 1):
            places = np.flatnonzero(data.segments[row] == segment)
            tokens = data.tokens[row, places]
            z = np.asarray(worlds.logits(weights, tokens[None])[0], np.float64)
            log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
            for at in range(1, len(tokens)):
                if data.loss_mask[row, places[at]]:
                    found[data.sources[row, places[at]]].append(-log_p[at - 1, tokens[at]])
    return [np.mean(losses) for losses in found], [len(losses) for losses in found]


LORAS = (Lora(2, 4.0, ("q_proj", "down_proj")), Lora(1, 8.0, ("v_proj",)), Lora(3, 3.0, ("lm_head",)))


def adapters():
    """Random adapters with an effect, of the shapes used in training."""
    rng = np.random.default_rng(3)
    blank = jax.device_get(lora.init_adapters(worlds.CONFIG, LORAS, np.arange(3, dtype=np.uint32)))
    own = [
        jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) / 4, lora.adapter_of(blank, row, one))
        for row, one in enumerate(LORAS)
    ]
    return own, lora.stack_adapters(worlds.CONFIG, LORAS, own)


@pytest.mark.parametrize("devices, data_parallel", [(1, 1), (4, 2)])
def test_losses_of_members_and_base_are_those_by_hand(devices, data_parallel):
    weights, data = worlds.weights(), worlds.packed(rows=5)  # not a multiple of the batch size
    mesh = make_mesh(devices, data_parallel)
    placed = jax.device_put(weights, jax.NamedSharding(mesh, jax.P()))
    own, stacked = adapters()
    model = Model(worlds.CONFIG, placed)
    population = place_population(Adapters(stacked, lora.scales(LORAS)), mesh)
    losses, tokens = held_out_losses(model, data, RECIPE, mesh, population)
    assert losses.shape == (3, 2)
    for row, one in enumerate(LORAS):
        merged = lora.merge(weights, one, own[row])
        expected, counts = by_hand(data, merged)
        np.testing.assert_allclose(losses[row], expected, rtol=1e-5)
        assert tokens.tolist() == counts
    of_base, counts = held_out_losses(model, data, RECIPE, mesh)
    np.testing.assert_allclose(of_base, [by_hand(data, weights)[0]], rtol=1e-5)
    assert counts.tolist() == tokens.tolist() and not np.allclose(of_base, losses, rtol=1e-3)


def test_how_many_rows_go_through_at_once_does_not_matter():
    model, data = Model(worlds.CONFIG, worlds.weights()), worlds.packed(rows=7)
    one, _ = held_out_losses(model, data, dataclasses.replace(RECIPE, microbatch_size=1), make_mesh())
    all_, _ = held_out_losses(model, data, Recipe(batch_size=8, precision="float32"), make_mesh())
    np.testing.assert_allclose(one, all_, rtol=1e-6)
