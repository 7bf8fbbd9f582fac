"""Answers of a population, against decoding by hand with merged weights."""

import dataclasses

import jax
import numpy as np
import pytest

from instrdiv.data.schemas import TextRow
from instrdiv.data.templates import make_template
from instrdiv.data.tokenizer import Tokenizer, character_tokenizer, write_tokenizer
from instrdiv.evaluation.answers import answers, is_right
from instrdiv.models import llama
from instrdiv.models.llama import Adapters, Model
from instrdiv.models.llama_config import ModelConfig
from instrdiv.models.lora import Lora, linear_shapes, scales, stack_adapters
from instrdiv.runtime.mesh import make_mesh
from instrdiv.training.adapter_trainer import place_population
from tests import adapters as worlds

LETTERS = "abcdefgh"
NEW_TOKENS = 5


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    specials = ("<pad>", "</s>")
    write_tokenizer(path, character_tokenizer(LETTERS, specials), pad_token="<pad>", eos_token="</s>")
    return Tokenizer.load(path)


def random_adapter(config: ModelConfig, lora: Lora, seed: int):
    rng = np.random.default_rng(seed)
    shapes = {name: linear_shapes(config)[name] for name in lora.targets}
    return {
        name: {
            "a": rng.normal(size=(layers, inputs, lora.rank)).astype(np.float32),
            "b": rng.normal(size=(layers, lora.rank, outputs)).astype(np.float32) / 4,
        }
        for name, (layers, inputs, outputs) in shapes.items()
    }


def merged(weights, adapter, scale):
    layers = dict(weights["layers"])
    for name, pair in adapter.items():
        layers[name] = {"kernel": layers[name]["kernel"] + scale * pair["a"] @ pair["b"]}
    return weights | {"layers": layers}


@jax.jit
def logits_of(model, rows):
    return llama.logits(model, llama.hidden(model, rows)[0])


def by_hand(config, weights, tokenizer, prompt):
    """Greedy decoding without a cache, a batch or padding."""
    ids, said = tokenizer.encode(prompt), []
    for _ in range(NEW_TOKENS):
        row = np.array([ids + said], np.int32)
        rows = llama.Rows(row, np.arange(row.shape[1], dtype=np.int32)[None], np.ones_like(row))
        token = int(logits_of(Model(config, weights), rows)[0, -1].argmax())
        if token in tokenizer.end_ids:
            break
        said.append(token)
    return tokenizer.decode(said)


@pytest.mark.parametrize("devices,data_parallel", [(1, 1), (4, 2)])
def test_each_member_answers_its_own_tests(tokenizer, devices, data_parallel):

    config = dataclasses.replace(worlds.CONFIG, vocab_size=tokenizer.vocab_size)
    weights = worlds.weights(config)
    loras = [Lora(2, 4.0, ("q_proj", "down_proj")), Lora(3, 3.0, ("v_proj",)), Lora(1, 1.0)]
    adapters = [random_adapter(config, lora, seed) for seed, lora in enumerate(loras)]
    shared = [TextRow("ab" * n, "c") for n in (1, 2, 3, 1, 4)]
    own = [TextRow(text, "c") for text in ("h", "abc", "gfe", "dddddd", "ha")]
    tests = [shared, own, shared]
    mesh = make_mesh(devices, data_parallel)
    model = Model(config, weights)
    population = place_population(Adapters(stack_adapters(config, loras, adapters), scales(loras)), mesh)
    found = answers(model, tokenizer, make_template("plain", tokenizer), tests, NEW_TOKENS, mesh, population, at_once=2)
    expected = [
        [by_hand(config, merged(weights, adapter, lora.scale), tokenizer, row.instruction) for row in rows]
        for lora, adapter, rows in zip(loras, adapters, tests, strict=True)
    ]
    assert found == expected
    assert len({tuple(of_member) for of_member in found}) == 3, "the members must differ"
    (base,) = answers(model, tokenizer, make_template("plain", tokenizer), [own], NEW_TOKENS, mesh)
    assert base == [by_hand(config, weights, tokenizer, row.instruction) for row in own]
    assert base != found[1]


def test_right_is_the_whole_answer_but_for_space_around_it():
    assert is_right(TextRow("x", " a b"), "a b ") and is_right(TextRow("x", "ab"), "ab")
    assert not is_right(TextRow("x", "ab"), "abc") and not is_right(TextRow("x", "ab"), "a")
