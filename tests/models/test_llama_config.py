"""config.json of the papers' models is read as Transformers reads it; unsupported ones are refused."""

import dataclasses
import json

import numpy as np
import pytest

from instrdiv.models.llama import frequencies
from instrdiv.models.llama_config import ModelConfig, Rope
from instrdiv.runtime.errors import BadInput

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "num_key_value_heads": 2}
QWEN = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_key_value_heads": 2}
LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_type": "llama3",
}

#: Relevant fields of published models' config.json, on top of a tiny one.
SAID = {
    "llama-2": LLAMA | {"rms_norm_eps": 1e-5, "rope_scaling": None, "pretraining_tp": 1, "torch_dtype": "float16"},
    "llama-2-grouped": LLAMA | {"num_key_value_heads": 1},
    "llama-head-dim": LLAMA | {"head_dim": 16},
    "llama-biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama-3.1": LLAMA | {"rope_scaling": LLAMA3_ROPE, "rope_theta": 500000.0, "eos_token_id": [90, 91]},
    "llama-3.2": LLAMA | {"rope_scaling": LLAMA3_ROPE | {"factor": 32.0}, "tie_word_embeddings": True, "head_dim": 8},
    "llama-3.1-in-5": LLAMA | {"rope_parameters": LLAMA3_ROPE | {"rope_theta": 500000.0}},
    "llama-3.1-short": LLAMA | {"rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if "original" not in k}},
    "mistral-0.1": MISTRAL | {"sliding_window": 16, "rope_theta": 10000.0},
    "mistral-0.3": MISTRAL | {"sliding_window": None, "rope_theta": 1e6},
    "mistral-unsaid": MISTRAL,
    "qwen-null-heads": QWEN | {"num_key_value_heads": None},
    "deepseek-coder": LLAMA | {"rope_scaling": {"factor": 4.0, "type": "linear"}, "rope_theta": 100000},
    "linear-in-5": LLAMA | {"rope_parameters": {"factor": 4.0, "rope_type": "linear"}, "rope_theta": 100000},
    "codeqwen-1.5": QWEN | {"use_sliding_window": False, "sliding_window": 65536, "max_window_layers": 28},
    "qwen-window": QWEN | {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "qwen-window-unsaid": QWEN | {"use_sliding_window": True, "max_window_layers": 0},
    "qwen-window-null": QWEN | {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0},
    "qwen-window-far": QWEN | {"use_sliding_window": True, "sliding_window": 16},
    "qwen-layer-types": QWEN
    | {
        "use_sliding_window": True,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "qwen-tied": QWEN | {"tie_word_embeddings": True, "eos_token_id": 99, "rms_norm_eps": 1e-6},
}


def as_transformers_reads_it(fields):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoConfig.for_model(**fields)


@pytest.mark.parametrize("name", SAID)
def test_it_is_read_as_transformers_reads_it(name):
    theirs, ours = as_transformers_reads_it(SAID[name]), ModelConfig.from_json(SAID[name])
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.head_dim, ours.kv_heads) == (head_dim, theirs.num_key_value_heads)
    assert (ours.norm_epsilon, ours.tied_head) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert ours.architecture == theirs.architectures[0] and ours.max_positions == theirs.max_position_embeddings
    ends = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
    assert ours.end_tokens == tuple(end for end in ends if end is not None)
    assert ours.begin_token == theirs.bos_token_id


@pytest.mark.parametrize("name", SAID)
def test_the_layers_are_those_of_transformers_own_model(name):
    """Biases of linear layers, windows of layers and rotary frequencies, read off the model that Transformers makes."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    theirs, ours = as_transformers_reads_it(SAID[name]), ModelConfig.from_json(SAID[name])
    model = transformers.AutoModelForCausalLM.from_config(theirs)
    for layer, window in zip(model.model.layers, ours.windows, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        layers = {"qkv": attention.q_proj, "output": attention.o_proj, "mlp": mlp.down_proj}
        for which, linear in layers.items():
            assert getattr(ours, f"{which}_bias") == (linear.bias is not None)
        if ours.architecture == "MistralForCausalLM":
            assert window == theirs.sliding_window
        else:
            assert window == getattr(attention, "sliding_window", None)
    rates = model.model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(frequencies(ours.rope, ours.head_dim), rates, rtol=1e-6)


@pytest.mark.parametrize("name", SAID)
def test_what_is_written_is_read_back_by_us_and_by_transformers(tmp_path, name):
    ours = ModelConfig.from_json(SAID[name])
    (tmp_path / "config.json").write_text(json.dumps(ours.to_json()))
    assert ModelConfig.from_json(tmp_path) == ModelConfig.from_json(str(tmp_path / "config.json")) == ours
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    assert ModelConfig.from_json(theirs) == ours


def test_what_an_architecture_lacks_cannot_be_written():
    llama = ModelConfig.from_json(LLAMA)
    with pytest.raises(BadInput, match=r"^windows=\(8, 8, 8\): not supported by LlamaForCausalLM"):
        dataclasses.replace(llama, windows=(8, 8, 8)).to_json()
    with pytest.raises(BadInput, match=r"^output_bias=False: not supported by LlamaForCausalLM"):
        dataclasses.replace(llama, qkv_bias=True).to_json()
    with pytest.raises(BadInput, match="model_type=GPT: is not supported"):
        dataclasses.replace(llama, architecture="GPT").to_json()


def test_a_config_is_hashable_and_equal_by_value():
    assert len({ModelConfig.from_json(dict(fields)) for fields in (LLAMA, dict(LLAMA), MISTRAL)}) == 2
    assert ModelConfig.from_json(LLAMA).rope == Rope()


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"model_type": "gemma2"}, "model_type=gemma2: is not supported; supported are llama, mistral, qwen2"),
        ({"model_type": None}, "lacks the field model_type"),
        ({"model_type": ["llama"]}, 'model_type=["llama"]: is not supported'),
        ({"architectures": ["LlamaForSequenceClassification"]}, 'architectures=["LlamaForSequenceClassification"]'),
        ({"architectures": ["LlamaModel"]}, 'use ["LlamaForCausalLM"]'),
        ({"hidden_act": "gelu"}, "hidden_act=gelu: is not supported"),
        ({"quantization_config": {"load_in_8bit": True}}, 'quantization_config={"load_in_8bit": true}'),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling: type=dynamic: is not supported"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_parameters: rope_type=yarn: is not"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: lacks the field factor"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "rope_scaling: factor=4: must be a positive number"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling: lacks the field low_freq_factor"),
        ({"rope_scaling": LLAMA3_ROPE | {"high_freq_factor": 1.0}}, "high_freq_factor=1.0: must exceed"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "rope_parameters={"),
        ({"rope_scaling": "linear"}, "rope_scaling=linear: must be a flat object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5: is not supported"),
        ({"per_layer_config": {"0": {}}}, "per_layer_config"),
        ({"hidden_size": None}, "lacks the field hidden_size"),
        ({"hidden_size": 33}, "hidden_size=33: must be a multiple of num_attention_heads=4"),
        ({"hidden_size": "32"}, "hidden_size=32: must be a whole number, at least 1"),
        ({"vocab_size": 0}, "vocab_size=0: must be a whole number, at least 1"),
        ({"num_hidden_layers": True}, "num_hidden_layers=true: must be a whole number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3: must divide num_attention_heads=4"),
        ({"head_dim": 7}, "head_dim=7: must be even"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps=-1e-05: must be a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings=yes: must be true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id=</s>: must be a token id"),
        ({"eos_token_id": 10**6}, "eos_token_id=1000000: must be below vocab_size="),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: must be at most 10000"),
        ({"layer_types": ["sliding_attention"] * 3}, "a mixture of layer types is not supported for llama"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path, fields, said):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | fields))
    with pytest.raises(BadInput) as error:
        ModelConfig.from_json(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ") and said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "fields, said",
    [
        (QWEN | {"layer_types": ["sliding_attention"] * 3}, "requires use_sliding_window and sliding_window"),
        (QWEN | {"layer_types": ["full_attention"]}, "must be a list of 3"),
        (QWEN | {"layer_types": ["full_attention", "full_attention", "linear_attention"]}, "must be a list of 3"),
        (QWEN | {"use_sliding_window": True, "sliding_window": 0}, "sliding_window=0: must be a whole number"),
        (MISTRAL | {"sliding_window": 16, "layer_types": ["full_attention"] * 3}, "not supported for mistral"),
        ({k: v for k, v in MISTRAL.items() if k != "num_key_value_heads"}, "num_key_value_heads=8: must divide"),
    ],
)
def test_windows_and_heads_that_cannot_be(fields, said):
    with pytest.raises(BadInput) as error:
        ModelConfig.from_json(fields)
    assert str(error.value).startswith("config.json: ") and said in str(error.value)


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(BadInput, match=r"config\.json: there is no such file; a checkpoint is a directory"):
        ModelConfig.from_json(tmp_path / "config.json")
    for text, said in (("{", "cannot be read as JSON"), ("[]", "must be a JSON object"), ("\xff", "cannot be read")):
        (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(BadInput, match=said):
            ModelConfig.from_json(tmp_path)
