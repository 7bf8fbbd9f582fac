"""A tiny base model for tests: random weights, as a tree of ours and as a Transformers model."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instrdiv.data.packing import Packed
from instrdiv.models import llama
from instrdiv.models.llama import Adapters, Model
from instrdiv.models.llama_config import ModelConfig, Rope
from instrdiv.models.lora import linear_shapes

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=40,
    width=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    mlp_width=24,
    norm_epsilon=1e-6,
    rope=Rope(),
    max_positions=64,
    windows=(None, None),
)


def weights(config: ModelConfig = CONFIG, seed: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
    """A tree of random weights."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / shape[-2] ** 0.5, dtype)

    kernels = {name: {"kernel": normal(*shape)} for name, shape in linear_shapes(config).items()}
    head = {"lm_head": {"kernel": kernels.pop("lm_head")["kernel"][0]}} if "lm_head" in kernels else {}
    ones = jnp.ones((config.layers, config.width), dtype)
    return {
        "embed": normal(config.vocab_size, config.width),
        "norm": jnp.ones(config.width, dtype),
        "layers": {"input_norm": ones, "post_norm": ones, **kernels},
        **head,
    }


def tokens(rows: int, places: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (rows, places), np.int32)


def rows_of(tokens: np.ndarray) -> llama.Rows:
    """Rows of one segment each."""
    positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    return llama.Rows(jnp.asarray(tokens), jnp.asarray(positions), jnp.ones(tokens.shape, jnp.int32))


def logits(weights, tokens, adapters=None, scale=None) -> np.ndarray:
    """float32 [B, T, V] of ``CONFIG``."""
    added = None if adapters is None else Adapters(jax.tree.map(jnp.asarray, adapters), scale)
    return np.asarray(_logits(Model(CONFIG, weights), rows_of(tokens), added))


@jax.jit
def _logits(model, rows, added):
    return llama.logits(model, llama.hidden(model, rows, added)[0], added)


def transformers_model(seed: int = 0) -> Any:
    """A new Transformers model of ``CONFIG`` with random weights; skips where there is none."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=CONFIG.vocab_size,
        hidden_size=CONFIG.width,
        intermediate_size=CONFIG.mlp_width,
        num_hidden_layers=CONFIG.layers,
        num_attention_heads=CONFIG.heads,
        num_key_value_heads=CONFIG.kv_heads,
        max_position_embeddings=CONFIG.max_positions,
        rms_norm_eps=CONFIG.norm_epsilon,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


def weights_of(model: Any) -> dict[str, Any]:
    """The weights of a Transformers model as our tree: a second, short table of names, for tests alone."""
    state = {name: jnp.asarray(tensor.detach().numpy()) for name, tensor in model.state_dict().items()}

    def stacked(name):
        return jnp.stack([state[f"model.layers.{layer}.{name}.weight"] for layer in range(CONFIG.layers)])

    places = {"self_attn": llama.BLOCK_LINEAR[:4], "mlp": llama.BLOCK_LINEAR[4:]}
    kernels = {n: {"kernel": stacked(f"{place}.{n}").mT} for place, names in places.items() for n in names}
    return {
        "embed": state["model.embed_tokens.weight"],
        "norm": state["model.norm.weight"],
        "lm_head": {"kernel": state["lm_head.weight"].T},
        "layers": {"input_norm": stacked("input_layernorm"), "post_norm": stacked("post_attention_layernorm")}
        | kernels,
    }


def packed(rows: int = 6, places: int = 12, seed: int = 0, source_names: tuple[str, ...] = ("code", "prose")) -> Packed:
    """Random rows: two examples a row, each of a source of its own, its first half a prompt; and some padding."""
    rng = np.random.default_rng([seed, 7])
    fields = {name: np.zeros((rows, places), np.int32) for name in ("tokens", "positions", "segments")}
    mask, sources = np.zeros((rows, places), bool), np.full((rows, places), -1, np.int8)
    for row in range(rows):
        start = 0
        for segment in (1, 2):
            length = int(rng.integers(3, places // 2 + 1))
            part = (row, slice(start, start + length))
            fields["tokens"][part] = rng.integers(0, CONFIG.vocab_size, length)
            fields["positions"][part], fields["segments"][part] = np.arange(length), segment
            mask[row, start + length // 2 : start + length] = True
            sources[part] = rng.integers(len(source_names))
            start += length
    return Packed(**fields, loss_mask=mask, sources=sources, source_names=source_names)
