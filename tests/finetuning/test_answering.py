"""Answers of a population, against decoding by hand with merged weights."""

import dataclasses

import numpy as np
import pytest

from instrdiv.finetuning import llama
from instrdiv.finetuning.answering import answers, is_right
from instrdiv.finetuning.config import ModelConfig
from instrdiv.finetuning.lora import Lora, linear_shapes, scales, stack_adapters
from instrdiv.finetuning.sources import Row
from instrdiv.finetuning.templates import make_template
from instrdiv.finetuning.tokenizer import Tokenizer, character_tokenizer, write_tokenizer
from instrdiv.finetuning.training import make_mesh
from tests.finetuning import worlds

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


def by_hand(config, weights, tokenizer, prompt):
    """Greedy decoding without a cache, a batch or padding."""
    ids, said = tokenizer.encode(prompt), []
    for _ in range(NEW_TOKENS):
        row = np.array([ids + said], np.int32)
        rows = llama.Rows(row, np.arange(row.shape[1], dtype=np.int32)[None], np.ones_like(row))
        x, _ = llama.hidden(config, weights, rows)
        token = int(llama.logits(config, weights, x)[0, -1].argmax())
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
    shared = [Row("ab" * n, "c") for n in (1, 2, 3, 1, 4)]
    own = [Row(text, "c") for text in ("h", "abc", "gfe", "dddddd", "ha")]
    tests = [shared, own, shared]
    mesh = make_mesh(devices, data_parallel)
    found = answers(config, weights, tokenizer, make_template("plain", tokenizer), tests, NEW_TOKENS, mesh,
                    stack_adapters(config, loras, adapters), scales(loras), at_once=2)  # fmt: skip
    expected = [
        [by_hand(config, merged(weights, adapter, lora.scale), tokenizer, row.instruction) for row in rows]
        for lora, adapter, rows in zip(loras, adapters, tests, strict=True)
    ]
    assert found == expected
    assert len({tuple(of_member) for of_member in found}) == 3, "the members do differ"
    (base,) = answers(config, weights, tokenizer, make_template("plain", tokenizer), [own], NEW_TOKENS, mesh)
    assert base == [by_hand(config, weights, tokenizer, row.instruction) for row in own]
    assert base != found[1]


def test_right_is_the_whole_answer_but_for_space_around_it():
    assert is_right(Row("x", " a b"), "a b ") and is_right(Row("x", "ab"), "ab")
    assert not is_right(Row("x", "ab"), "abc") and not is_right(Row("x", "ab"), "a")
