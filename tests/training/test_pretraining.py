"""The small base that is trained here."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from instrdiv.data.packing import pack, tokenize
from instrdiv.data.templates import make_template
from instrdiv.data.tokenizer import Tokenizer
from instrdiv.models import llama
from instrdiv.models.llama import Model
from instrdiv.models.llama_config import ModelConfig
from instrdiv.models.weights import read_weights
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.mesh import make_mesh
from instrdiv.tasks.encrypted import PROMPT_WORDS, EncryptedSetting, plain_rows
from instrdiv.training.pretraining import SmallBase, make_base, pretrain, random_weights
from instrdiv.training.recipe import Recipe

SETTING = EncryptedSetting(
    examples=64, instructions=8, keys=2, alphabet_size=6, pattern_length=2, input_length=4, separator="none"
)
SMALL = SmallBase(
    layers=2,
    width=16,
    heads=2,
    mlp_width=24,
    instructions=16,
    examples=64,
    recipe=Recipe(steps=24, batch_size=16, precision="float32", reports=3, adam_b2=0.98),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "base"
    said = []
    make_base(path, SETTING, SMALL, make_mesh(), said.append)
    return path, said


def test_it_learns_and_says_so(base):
    _, said = base
    losses = [float(line.rsplit(" ", 1)[1]) for line in said]
    assert len(losses) == 3 and losses[-1] < losses[0] - 0.3


def test_it_is_a_checkpoint_that_is_read_like_any(base):
    path, _ = base
    config, tokenizer = ModelConfig.from_json(path), Tokenizer.load(path)
    assert (config.layers, config.width, config.vocab_size) == (2, 16, tokenizer.vocab_size)
    prompt = plain_rows(SETTING, 0, 1)[0].instruction
    ids = tokenizer.encode(prompt)
    assert len(ids) == 2 + 2 + 4 + len(PROMPT_WORDS) - 1, "a letter is a token, and so is each of the prompt's words"
    assert tokenizer.decode(ids) == prompt
    assert config.end_tokens == tokenizer.end_ids
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    assert transformers.AutoTokenizer.from_pretrained(path)(prompt)["input_ids"] == ids
    with torch.no_grad():
        theirs = model(torch.tensor([ids])).logits.numpy()
    weights, tokens = read_weights(path, config), np.array([ids], np.int32)
    rows = llama.Rows(tokens, np.arange(len(ids), dtype=np.int32)[None], np.ones_like(tokens))
    x, _ = llama.hidden(Model(config, weights), rows)
    np.testing.assert_allclose(llama.logits(Model(config, weights), x), theirs, atol=1e-4)


def test_what_is_there_is_not_made_again_and_not_mistaken(base):
    path, _ = base
    before = (path / "model.safetensors").stat().st_mtime_ns
    said = []
    make_base(path, dataclasses.replace(SETTING, instructions=3, keys=3), SMALL, make_mesh(), said.append)
    assert not said and (path / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(BadInput, match="a different alphabet_size"):
        make_base(path, dataclasses.replace(SETTING, alphabet_size=7), SMALL, make_mesh(), said.append)
    with pytest.raises(BadInput, match="a different small"):
        make_base(path, SETTING, dataclasses.replace(SMALL, seed=5), make_mesh(), said.append)
    with pytest.raises(BadInput, match="does not contain a base trained by this command"):
        make_base(path.parent, SETTING, SMALL, make_mesh(), said.append)


def test_a_launch_that_is_stopped_leaves_no_base(tmp_path):
    def stop(line):
        raise KeyboardInterrupt

    path = tmp_path / "base"
    with pytest.raises(KeyboardInterrupt):
        make_base(path, SETTING, SMALL, make_mesh(), stop)
    assert not path.exists()
    make_base(path, SETTING, SMALL, make_mesh(), lambda line: None)
    assert json.loads((path / "pretraining.json").read_text())["alphabet_size"] == 6
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_devices_share_a_batch_and_change_nothing(base):
    path, _ = base
    config, tokenizer = ModelConfig.from_json(path), Tokenizer.load(path)
    examples = list(tokenize(plain_rows(SETTING, 1, 32), make_template("plain", tokenizer), tokenizer))
    data, _ = pack(examples, max(len(e.tokens) for e in examples), tokenizer.pad_id, several=False)
    recipe = dataclasses.replace(SMALL.recipe, steps=3)
    one, four = (pretrain(config, data, recipe, 1e-2, 1e-2, make_mesh(devices)) for devices in (1, 4))
    for ours, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-4)
    start = random_weights(config, 0)
    moved = [bool((a != b).any()) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(start), strict=True)]
    assert all(moved), "everything is trained"
