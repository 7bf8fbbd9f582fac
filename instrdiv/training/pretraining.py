"""A small base model for when no real one is available: a Llama-family decoder trained from random weights.

It is written as a checkpoint with a tokenizer, and then read, adapted and tested by the same code as a model with seven
billion parameters.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from instrdiv.data.packing import Packed, pack, tokenize
from instrdiv.data.templates import make_template
from instrdiv.data.tokenizer import Tokenizer, character_tokenizer, write_tokenizer
from instrdiv.models.llama import Adapters, Model
from instrdiv.models.llama_config import ModelConfig
from instrdiv.models.weights import as_tree, leaves, write_weights
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.files import plain, write_json
from instrdiv.tasks.encrypted import PROMPT_WORDS, EncryptedSetting, plain_rows
from instrdiv.tasks.strings.alphabet import Alphabet
from instrdiv.training.adapters import Batch, response_losses
from instrdiv.training.optimizers import base_optimizer
from instrdiv.training.order import ExampleOrder
from instrdiv.training.recipe import Recipe

Weights = dict[str, Any]

_PAD, _END = "<pad>", "</s>"


@dataclasses.dataclass(frozen=True)
class SmallBase:
    """A small decoder, and how it learns plain rewriting.

    Attributes:
      layers, width, heads, mlp_width: sizes.
      instructions: number of rules to train on; large, so that it follows unseen rules.
      examples: size of its fixed training set.
      recipe, learning_rate, adam_learning_rate: see ``pretrain``.
      seed: of its weights and rules; distinct from the members' seeds, but on the same side of the held-out split.
    """

    layers: int
    width: int
    heads: int
    mlp_width: int
    instructions: int
    examples: int
    recipe: Recipe
    learning_rate: float = 2e-2
    adam_learning_rate: float = 8e-3
    seed: int = 1_000_000

    def config(self, vocab_size: int, end_token: int) -> ModelConfig:
        """The model's configuration, as read from a checkpoint's config.json."""
        return ModelConfig.from_json(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "vocab_size": vocab_size,
                "hidden_size": self.width,
                "intermediate_size": self.mlp_width,
                "num_hidden_layers": self.layers,
                "num_attention_heads": self.heads,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": 512,
                "hidden_act": "silu",
                "bos_token_id": None,
                "eos_token_id": end_token,
            }
        )


def make_base(
    directory: Path, setting: EncryptedSetting, small: SmallBase, mesh: Mesh, say: Callable[[str], None]
) -> None:
    """Trains a small base on plain rewriting and writes it as a checkpoint; does nothing if it already exists.

    Args:
      directory: of the checkpoint, created atomically.
      setting: alphabet, lengths and held-out split of the rewriting task.
      small: the decoder and its training.
      mesh: all its devices train the model together.
      say: called with progress messages.

    Raises:
      BadInput: the directory contains a different base, or something else.
    """
    setting = dataclasses.replace(setting, instructions=small.instructions, examples=small.examples, kept="all")
    needed = (
        "alphabet_size",
        "pattern_length",
        "input_length",
        "no_op_fraction",
        "separator",
        "held_out_share",
        "split_seed",
    )
    asked = plain({"small": dataclasses.asdict(small), **{name: getattr(setting, name) for name in needed}})
    about = directory / "pretraining.json"
    if directory.exists():
        try:
            found = json.loads(about.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise BadInput(f"{directory}: does not contain a base trained by this command; choose another --run_dir "
                           "or delete it") from None  # fmt: skip
        other = [name for name in asked if found.get(name) != asked[name]]
        if other:
            raise BadInput(f"{about}: this base was trained with a different {other[0]}; choose another --run_dir or "
                           f"delete {directory}")  # fmt: skip
        return
    unfinished = directory.with_name(f".{directory.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    tokenizer = make_tokenizer(unfinished, setting)
    rows = plain_rows(setting, small.seed, small.examples)
    examples = list(tokenize(rows, make_template("plain", tokenizer), tokenizer))
    data, _ = pack(examples, max(len(example.tokens) for example in examples), tokenizer.pad_id, several=False)
    config = small.config(tokenizer.vocab_size, tokenizer.end_ids[0])
    weights = pretrain(config, data, small.recipe, small.learning_rate, small.adam_learning_rate, mesh, small.seed, say)
    checkpoint = unfinished / "checkpoint"
    write_weights(checkpoint, config, weights, "float32")
    for path in (unfinished / "tokenizer.json", unfinished / "tokenizer_config.json"):
        path.rename(checkpoint / path.name)
    write_json(checkpoint / "pretraining.json", asked)
    checkpoint.rename(directory)
    shutil.rmtree(unfinished)


def make_tokenizer(directory: Path, setting: EncryptedSetting) -> Tokenizer:
    """Writes a tokenizer with one token per letter and one per word of the prompt, and loads it."""
    letters = Alphabet(setting.alphabet_size).letters + (" " if setting.separator == "space" else "")
    specials = (_PAD, _END, *PROMPT_WORDS, PROMPT_WORDS[1].strip())  # a plain prompt begins with its rule
    tokenizer = character_tokenizer(letters, specials)
    directory.mkdir(parents=True, exist_ok=True)
    write_tokenizer(directory, tokenizer, pad_token=_PAD, eos_token=_END)
    return Tokenizer.load(directory)


def random_weights(config: ModelConfig, seed: int) -> Weights:
    """Initial weights, float32: kernels N(0, 1 / fan in), those that write to the residual stream divided by
    sqrt(2 layers), embeddings N(0, 1/4), norms 1, biases 0."""
    values = {}
    for number, leaf in enumerate(leaves(config)):
        shape, last = leaf.whole_shape, leaf.path[-1]
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), number)
        if leaf.is_kernel:
            scale = leaf.shape[0] ** -0.5
            if leaf.path[-2] in ("o_proj", "down_proj"):
                scale /= math.sqrt(2 * config.layers)
            value = scale * jax.random.normal(key, shape)
        elif last == "embed":
            value = 0.5 * jax.random.normal(key, shape)
        else:
            value = jnp.zeros(shape) if last == "bias" else jnp.ones(shape)
        values[leaf.path] = value
    return as_tree(values)


def pretrain(
    config: ModelConfig,
    data: Packed,
    recipe: Recipe,
    learning_rate: float,
    adam_learning_rate: float,
    mesh: Mesh,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> Weights:
    """Trains all weights of a decoder from random ones, with Muon (the layers' kernels) and Adam (the rest).

    Args:
      config: the model's configuration.
      data: packed rows; the loss is on their response tokens.
      recipe: steps, batch size, schedule, clipping and precision.
      learning_rate, adam_learning_rate: peak rates.
      mesh: the rows of a batch are sharded over all its devices.
      seed: of the initial weights and the order of the rows.
      say: called with a progress message after every chunk.

    Returns:
      float32 weights on the first device.
    """
    shapes = jax.eval_shape(lambda: random_weights(config, seed))
    optimizer = base_optimizer(recipe, learning_rate, adam_learning_rate, shapes)
    scale = jnp.ones(1)

    def step(carry, batch):
        weights, state = carry

        def loss(weights):
            model = Model(config, weights)
            losses, tokens = response_losses(model, recipe, Adapters({}, scale), batch, len(data.source_names))
            return losses.sum() / jnp.maximum(tokens.sum(), 1)

        value, gradients = jax.value_and_grad(loss)(weights)
        updates, state = optimizer.update(gradients, state, weights)
        return (optax.apply_updates(weights, updates), state), value

    everywhere = NamedSharding(mesh, P())
    spread = NamedSharding(mesh, P(None, mesh.axis_names))
    chunk = jax.jit(lambda carry, batches: jax.lax.scan(step, carry, batches), donate_argnums=0)
    weights = jax.device_put(random_weights(config, seed), everywhere)
    carry = (weights, jax.device_put(jax.jit(optimizer.init)(weights), everywhere))
    order = ExampleOrder(len(data.tokens), recipe.batch_size, seed)
    for first in range(0, recipe.steps, recipe.chunk_steps):
        steps = min(recipe.chunk_steps, recipe.steps - first)
        chosen = order.batches(first, steps)
        fields = {f.name: getattr(data, f.name)[chosen] for f in dataclasses.fields(Batch)}
        batches = jax.device_put(Batch(**fields), spread)
        carry, losses = chunk(carry, batches)
        say(f"training the base: step {first + steps} of {recipe.steps}, loss {np.asarray(losses)[-10:].mean():.3f}")
    return jax.device_put(carry[0], jax.devices()[0])
