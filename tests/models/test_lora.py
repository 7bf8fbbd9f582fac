"""Adapters against PEFT, the oracle, for reading and for writing."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instrdiv.models import lora
from instrdiv.models.llama import BLOCK_LINEAR, Quantized
from instrdiv.models.lora import Lora
from instrdiv.models.weights import quantize
from instrdiv.runtime.errors import BadInput
from tests import adapters as worlds

CONFIG = worlds.CONFIG


def random_adapter(rank, targets, seed=0):
    """An adapter without zeros."""
    rng = np.random.default_rng(seed)
    shapes = lora.linear_shapes(CONFIG)
    return {
        name: {
            "a": rng.normal(size=(shapes[name][0], shapes[name][1], rank)).astype(np.float32),
            "b": rng.normal(size=(shapes[name][0], rank, shapes[name][2])).astype(np.float32),
        }
        for name in targets
    }


def population(*loras):
    adapters = [random_adapter(one.rank, one.targets, seed) for seed, one in enumerate(loras)]
    return lora.stack_adapters(CONFIG, loras, adapters), lora.scales(loras), adapters


ALL = ("all-linear", ("q_proj", "v_proj"), ("gate_proj", "lm_head"))


@pytest.mark.parametrize("targets", ALL)
def test_peft_computes_the_same_with_what_we_write(tmp_path, targets):
    torch, model = pytest.importorskip("torch"), worlds.transformers_model()
    peft = pytest.importorskip("peft")
    chosen = Lora(rank=3, alpha=7.0, targets=targets)
    adapter = random_adapter(3, chosen.targets)
    lora.write_adapter(tmp_path / "adapter", CONFIG, chosen, adapter, base="tiny")
    stacked = lora.stack_adapters(CONFIG, [chosen], [adapter])
    tokens = worlds.tokens(2, 9)
    ours = worlds.logits(worlds.weights_of(model), tokens, stacked, lora.scales([chosen]))
    before = model(torch.tensor(tokens)).logits.detach().numpy()
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")(torch.tensor(tokens)).logits.detach().numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-4)
    assert np.abs(theirs - before).max() > 0.1


@pytest.mark.parametrize("targets", ALL)
@pytest.mark.parametrize("rslora", [False, True])
def test_we_compute_the_same_with_what_peft_writes(tmp_path, targets, rslora):
    torch, model = pytest.importorskip("torch"), worlds.transformers_model()
    peft = pytest.importorskip("peft")
    weights = worlds.weights_of(model)
    asked = targets if isinstance(targets, str) else list(targets)
    peft_config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=asked, use_rslora=rslora, init_lora_weights=False, task_type="CAUSAL_LM"
    )
    theirs = peft.get_peft_model(model, peft_config)
    theirs.save_pretrained(tmp_path)
    read, adapter = lora.read_adapter(tmp_path, CONFIG)
    assert read.targets == Lora(4, 6, targets).targets
    tokens = worlds.tokens(2, 9)
    ours = worlds.logits(weights, tokens, lora.stack_adapters(CONFIG, [read], [adapter]), lora.scales([read]))
    np.testing.assert_allclose(ours, theirs(torch.tensor(tokens)).logits.detach().numpy(), atol=1e-4, rtol=1e-4)


def test_what_is_written_is_read_back_bit_for_bit(tmp_path):
    chosen = Lora(rank=2, alpha=3.5, targets=("lm_head", "o_proj"))
    adapter = random_adapter(2, chosen.targets)
    lora.write_adapter(tmp_path, CONFIG, chosen, adapter)
    read, arrays = lora.read_adapter(tmp_path, CONFIG)
    assert read == chosen
    jax.tree.map(np.testing.assert_array_equal, arrays, adapter)
    lora.write_adapter(tmp_path, CONFIG, Lora(rank=1, targets=("q_proj",)), random_adapter(1, ("q_proj",)))
    assert lora.read_adapter(tmp_path, CONFIG)[0].targets == ("q_proj",)


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_member_of_a_population_computes_as_if_alone_and_as_if_merged(row):
    loras = [Lora(2, 5.0, ("q_proj",)), Lora(5, 4.0, "all-linear"), Lora(1, 2.0, ("lm_head", "down_proj"))]
    adapters, scale, single = population(*loras)
    weights, tokens = worlds.weights(), worlds.tokens(6, 8)
    together = worlds.logits(weights, tokens, adapters, scale)[2 * row : 2 * row + 2]
    alone = lora.stack_adapters(CONFIG, [loras[row]], [single[row]])
    merged = lora.merge(weights, loras[row], lora.adapter_of(adapters, row, loras[row]))
    mine = tokens[2 * row : 2 * row + 2]
    # The compiler chooses the order of sums, and the logits, up to 32, are sensitive: with the last bit of all base
    # weights changed, they move by up to 6e-4. The effect of an adapter is thousands of times as large.
    np.testing.assert_allclose(together, worlds.logits(weights, mine, alone, scale[row : row + 1]), atol=1e-3, rtol=0)
    np.testing.assert_allclose(together, worlds.logits(merged, mine), atol=1e-3, rtol=0)
    assert np.abs(together - worlds.logits(weights, mine)).max() > 1


def test_merging_into_eight_bits_gives_arrays():
    chosen, weights = Lora(2, 4.0, ("q_proj",)), worlds.weights()
    adapter = random_adapter(2, chosen.targets)

    blocks = {n: {"kernel": quantize(p["kernel"])} if n in BLOCK_LINEAR else p for n, p in weights["layers"].items()}
    eight = weights | {"layers": blocks}
    merged = lora.merge(eight, chosen, adapter, jnp.float32)
    assert not any(
        isinstance(leaf, Quantized) for leaf in jax.tree.leaves(merged, is_leaf=lambda x: hasattr(x, "values"))
    )
    tokens = worlds.tokens(2, 8)
    stacked = lora.stack_adapters(CONFIG, [chosen], [adapter])
    expected = worlds.logits(eight, tokens, stacked, lora.scales([chosen]))
    np.testing.assert_allclose(worlds.logits(merged, tokens), expected, atol=1e-4, rtol=1e-4)


def test_initial_adapters_do_not_depend_on_the_others():
    loras = [Lora(2, 1.0, ("q_proj",)), Lora(7, 1.0, "all-linear"), Lora(3, 1.0, ("lm_head", "q_proj"))]
    seeds = np.array([3, 4, 5], np.uint32)
    together = jax.device_get(lora.init_adapters(CONFIG, loras, seeds))
    for row, chosen in enumerate(loras):
        alone = jax.device_get(lora.init_adapters(CONFIG, [chosen], seeds[row : row + 1]))
        for name in together:
            a, b = together[name]["a"][row], together[name]["b"][row]
            assert not b.any()
            assert not a[..., chosen.rank :].any()
            if name not in chosen.targets:
                assert not a.any()
            else:
                np.testing.assert_array_equal(a[..., : chosen.rank], alone[name]["a"][0])
                assert len(np.unique(a[..., : chosen.rank])) > 0.99 * a[..., : chosen.rank].size


def test_initial_adapters_are_spread_as_pefts():
    """Kaiming-uniform with a = sqrt(5) is uniform within 1 / sqrt(inputs)."""
    torch = pytest.importorskip("torch")
    wide = dataclasses.replace(CONFIG, width=64)
    a = np.asarray(lora.init_adapters(wide, [Lora(32)], np.zeros(1, np.uint32))["gate_proj"]["a"])
    reference = torch.nn.init.kaiming_uniform_(torch.empty(4096, 64), a=5**0.5).numpy()
    assert abs(a.std() / reference.std() - 1) < 0.02
    assert abs(np.abs(a).max() / np.abs(reference).max() - 1) < 0.01


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"targets": ("q_proj", "c_attn")}, "--targets=q_proj,c_attn: c_attn is not a linear layer"),
        ({"targets": ()}, "nothing is not a linear layer"),
        ({"rank": 0}, "--rank=0: must be at least 1"),
        ({"alpha": float("nan")}, "--alpha=nan"),
    ],
)
def test_an_adapter_that_cannot_be_is_refused_by_name(values, words):
    with pytest.raises(BadInput, match=words):
        Lora(**values)


def test_a_tied_head_is_refused():
    with pytest.raises(BadInput, match="tie_word_embeddings"):
        Lora(targets=("lm_head",)).validate(dataclasses.replace(CONFIG, tied_head=True))


@pytest.fixture
def written(tmp_path):
    chosen = Lora(2, 4.0, ("q_proj", "down_proj"))
    lora.write_adapter(tmp_path, CONFIG, chosen, random_adapter(2, chosen.targets), base="meta-llama/Llama-2-7b-hf")
    return tmp_path


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"use_dora": True}, "use_dora=true is not supported"),
        ({"bias": "all"}, 'bias="all" is not supported'),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"an_option_of_tomorrow": 1}, "an_option_of_tomorrow=1 is not supported"),
        ({"peft_type": "IA3"}, "peft_type is IA3"),
        ({"r": None}, "r is null; it must be"),
        ({"r": True}, "r is true; it must be"),
        ({"lora_alpha": math.inf}, "lora_alpha is Infinity; it must be"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path is 5; it must be"),
        ({"target_modules": ["q_proj", 3]}, "target_modules is .*; it must be layer names"),
        ({"target_modules": 3}, "target_modules is 3; it must be layer names"),
        ({"r": 3}, "adapter_model.safetensors: .*q_proj.lora_A.weight is .2, 16., not .3, 16. as expected for rank 3"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules names embed_tokens"),
        ({"target_modules": ["q_proj", "v_proj"]}, "has no tensor for v_proj"),
    ],
)
def test_what_is_not_supported_is_named(written, said, words):
    file = written / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    with pytest.raises(BadInput, match=words) as error:
        lora.read_adapter(written, CONFIG)
    assert "\n" not in str(error.value) and str(written) in str(error.value)


def test_an_adapter_for_another_base_is_refused(written):
    lora.read_adapter(written, CONFIG, base="/models/llama-2-7b-hf/")
    with pytest.raises(BadInput, match=r"base_model_name_or_path is meta-llama/Llama-2-7b-hf, not mistralai/Mistral"):
        lora.read_adapter(written, CONFIG, base="mistralai/Mistral-7B-v0.3")
    with pytest.raises(BadInput, match=r"lacks base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"):
        lora.read_adapter(written, dataclasses.replace(CONFIG, layers=3, windows=(None,) * 3))
    with pytest.raises(BadInput, match=r"layers.1.self_attn.q_proj.lora_A.weight does not exist in this base"):
        lora.read_adapter(written, dataclasses.replace(CONFIG, layers=1, windows=(None,)))
    with pytest.raises(BadInput, match=r"down_proj.lora_A.weight is .2, 24., not .2, 48."):
        lora.read_adapter(written, dataclasses.replace(CONFIG, mlp_width=48))


def test_files_that_are_no_adapter(written, tmp_path):
    (written / "adapter_model.safetensors").write_bytes(b"no tensors here")
    with pytest.raises(BadInput, match="is damaged or not a safetensors file"):
        lora.read_adapter(written, CONFIG)
    (written / "adapter_model.safetensors").rename(written / "adapter_model.bin")
    with pytest.raises(BadInput, match=r"no such file; adapter_model.bin is pickled and never read"):
        lora.read_adapter(written, CONFIG)
    (written / "adapter_config.json").write_text("[]")
    with pytest.raises(BadInput, match="cannot be read as an adapter configuration"):
        lora.read_adapter(written, CONFIG)
