"""The cost of training a population of adapters: counted in advance, or forecast from two steps."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from instrdiv.models.llama_config import ModelConfig
from instrdiv.models.lora import TARGETS, linear_shapes
from instrdiv.models.weights import leaves
from instrdiv.runtime.memory import program_bytes
from instrdiv.runtime.units import clock
from instrdiv.training.adapter_trainer import AdapterTrainer, Job
from instrdiv.training.recipe import AdapterMember, Recipe


def adapter_plan(config: ModelConfig, members: Sequence[AdapterMember], recipe: Recipe, places: int, int8: bool) -> str:
    """Counts parameters, memory, tokens and FLOPs; ``places`` is the number of tokens per row."""
    shapes = linear_shapes(config)
    base = sum(layers * inputs * outputs for layers, inputs, outputs in shapes.values())
    rank = max(member.lora.rank for member in members)
    targets = [name for name in TARGETS if any(name in member.lora.targets for member in members)]
    adapter = sum(rank * shapes[name][0] * (shapes[name][1] + shapes[name][2]) for name in targets)
    tokens = len(members) * recipe.steps * recipe.batch_size * places
    # Forward pass and gradients of the activations: 2 FLOPs each per parameter; adapters also need weight gradients.
    flops = tokens * (4 * base + 6 * adapter)
    return (
        f"{len(members)} adapters of rank {rank}, {adapter:,} parameters each ({12 * adapter / 1e9:.3g} GB with "
        f"optimizer state), over a frozen base with {base:,} linear parameters "
        f"({_base_bytes(config, recipe, int8) / 1e9:.3g} GB, stored once); "
        f"{recipe.steps:,} steps of {recipe.batch_size} rows of {places} tokens: {tokens:.3g} tokens, {flops:.3g} FLOPs"
    )


def _base_bytes(config: ModelConfig, recipe: Recipe, int8: bool) -> int:
    """Bytes of the base's weights, ignoring the few int8 scales."""
    wide = jnp.dtype(recipe.precision).itemsize
    total = 0
    for leaf in leaves(config):
        total += math.prod(leaf.whole_shape) * (1 if int8 and leaf.is_kernel and leaf.layers else wide)
    return total


def adapter_forecast(job: Job, say: Callable[[str], None]) -> str:
    """Estimates training time from two real steps, and memory from the compiler's own analysis."""
    two_steps = dataclasses.replace(job.recipe, steps=2, reports=2, warmup_steps=0)
    trainer = AdapterTrainer(dataclasses.replace(job, recipe=two_steps))
    say("compiling and running two steps")
    trainer.program = trainer.program.lower(*trainer.chunk_arguments()).compile()
    jax.block_until_ready(trainer.advance())
    started = time.monotonic()
    jax.block_until_ready(trainer.advance())
    took = clock(job.recipe.steps * (time.monotonic() - started))
    size = job.mesh.size
    where = f"{size} {jax.devices()[0].device_kind} device{'s' * (size > 1)}"
    return (
        f"training: about {took} on {where}, estimated from two steps; "
        f"{program_bytes(trainer.program) / 1e9:.3g} GB per device, including the base"
    )
