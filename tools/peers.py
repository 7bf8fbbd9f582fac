"""Peers, the common ways to train such models: PyTorch and Transformers, ``torch.func``, and a plain Flax loop.

Where it is cheap to do so, questions of fairness are decided in the peers' favor:

- same vocabulary, rows, layers, width, heads, MLP width and activation; dropout 0; loss on the answer alone;
- their rows are on the device before timing starts, so PyTorch pays neither for making nor for loading them (the Flax
  loop does: it shows the cost of that);
- no clipping, no schedule, no metrics, no reading of the loss, all of which our step has;
- fused AdamW; PyTorch has as many threads as this process has cores; float32 products on a GPU are TF32.

To their disadvantage: GPT-2 always has LayerNorm, biases and a tied head, and computes its last layer and the head at
all positions, where ours is limited to the answer; so it does somewhat more arithmetic for the same tokens, as it does
for any user of GPT-2. And no peer runs one process per core: part of the gain of a population on CPU is that each
member has its own core.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from instrdiv.config.groups import make_groups
from instrdiv.models.decoder import make_decoder
from instrdiv.runtime.devices import usable_cores
from instrdiv.runtime.streams import INIT_STREAM, stream_key
from instrdiv.tasks.strings.examples import TaskShape
from instrdiv.tasks.strings.rules import RuleTable
from instrdiv.tasks.tokens import END, FIRST_TOKEN, PAD, SEPARATOR
from tools.contenders import World
from tools.measuring import Contender, NotRun, Ready

#: Number of different batches that PyTorch cycles through.
_BATCHES = 8
#: Maximum number of ensemble members: without fused attention its activations are large.
_ENSEMBLE = 8


def gpt2(world: World, batch_size: int, precision: str, mode: str = "eager") -> Contender:
    """``transformers.GPT2LMHeadModel``, one model at a time.

    Args:
      world: what it is trained on.
      batch_size: examples per step.
      precision: ``float32``, or ``bfloat16`` by autocast; parameters are float32.
      mode: ``eager``; ``compiled`` by torch.compile as one full graph; or ``graphs``, compiled and replayed as a CUDA
        graph.
    """
    short = {"float32": "fp32", "bfloat16": "bf16"}[precision]
    words = {"eager": "eager", "compiled": "compiled", "graphs": "compiled, CUDA graphs,"}[mode]

    def set_up() -> Ready:
        import torch
        from transformers import GPT2LMHeadModel

        if mode != "eager" and torch_device() == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            raise NotRun("missing: a C++ compiler (install g++) for torch.compile on CPU")
        before, device = allocated(), torch_device()
        model: Any = GPT2LMHeadModel(_gpt2_config(world, "sdpa"))
        model.to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
        batches = itertools.cycle(_batches(world, batch_size))

        def loss_of(inputs: Any, targets: Any) -> Any:
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
                return _loss(model(input_ids=inputs, use_cache=False).logits, targets)

        if mode != "eager":
            # fullgraph: fail rather than silently run part of it uncompiled.
            how = "reduce-overhead" if mode == "graphs" else "default"
            loss_of = torch.compile(loss_of, fullgraph=True, dynamic=False, mode=how)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            loss_of(*next(batches)).backward()
            optimizer.step()

        return Ready(step, wait, batch_size, peak_bytes=lambda: peak_since(before))

    return Contender(
        kind=f"gpt2_{mode}_{short}",
        side="peers",
        label=f"PyTorch GPT-2, {words} {short}, batch {batch_size}",
        batch_size=batch_size,
        members=1,
        set_up=with_torch(set_up),
        facts={"optimizer": "adamw", "precision": precision, "attention": "sdpa", "threads": usable_cores()},
    )


def ensemble(world: World, batch_size: int) -> Contender:
    """An ensemble of ``GPT2LMHeadModel``: ``torch.func`` stacks the parameters, and vmaps the gradient over members.

    Attention is written out: vmap of ``scaled_dot_product_attention`` would be a loop over the members. AdamW is
    elementwise, so one fused update of the stacked parameters updates every member as it would alone.
    """
    members, precision = min(len(world.members), _ENSEMBLE), world.setting.precision

    def set_up() -> Ready:
        import torch
        from torch.func import functional_call, grad, stack_module_state, vmap
        from transformers import GPT2LMHeadModel

        before, device = allocated(), torch_device()
        models: list[Any] = [GPT2LMHeadModel(_gpt2_config(world, "eager")) for _ in range(members)]
        params, _ = stack_module_state([model.to(device) for model in models])
        parameters = {name: torch.nn.Parameter(value.detach()) for name, value in params.items()}
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0.0, fused=True)
        rows = itertools.cycle(
            (inputs.unflatten(0, (members, batch_size)), targets.unflatten(0, (members, batch_size)))
            for inputs, targets in _batches(world, members * batch_size)
        )

        def loss_of(parameters, inputs, targets):
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
                out = functional_call(models[0], parameters, (), {"input_ids": inputs, "use_cache": False})
                return _loss(out.logits, targets)

        gradient = vmap(grad(loss_of))

        def step() -> None:
            gradients = gradient(parameters, *next(rows))
            for name, parameter in parameters.items():
                # Contiguous: the fused update reads memory in order, ignoring the layout of a gradient.
                parameter.grad = gradients[name].detach().contiguous()
            optimizer.step()

        return Ready(step, wait, members * batch_size, peak_bytes=lambda: peak_since(before))

    return Contender(
        kind="ensemble",
        side="peers",
        label=f"PyTorch torch.func ensemble of {members}, batch {batch_size}",
        batch_size=batch_size,
        members=members,
        set_up=with_torch(set_up),
        facts={"optimizer": "adamw", "attention": "written out", "precision": precision, "threads": usable_cores()},
    )


def flax_loop(world: World, batch_size: int) -> Contender:
    """Our decoder in a plain training loop: one dispatch of a jitted step per batch, from a loader on the host."""

    def set_up() -> Ready:
        (group,) = make_groups(world.members[:1])
        decoder, shape = make_decoder(group), group.shape
        loader = host_batches(shape, world.rules, batch_size)  # type: ignore[arg-type]
        optimizer = optax.adamw(1e-3, weight_decay=0.0)
        padding_B = jnp.zeros(batch_size, jnp.int32)

        def loss_of(params: Any, tokens_BxT: jax.Array) -> jax.Array:
            logits: Any = decoder.apply(params, tokens_BxT[:, :-1], padding_B)
            targets = tokens_BxT[:, shape.prompt :]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return losses.mean(where=targets != PAD)

        def train_step(params: Any, state: Any, tokens_BxT: jax.Array) -> tuple[Any, Any]:
            updates, state = optimizer.update(jax.grad(loss_of)(params, tokens_BxT), state, params)
            return optax.apply_updates(params, updates), state

        program = jax.jit(train_step, donate_argnums=(0, 1))
        first = next(loader)
        params = jax.jit(decoder.init)(stream_key(INIT_STREAM, 0), jnp.asarray(first[:, :-1]), padding_B)
        current = (params, optimizer.init(params))

        def step() -> None:
            nonlocal current
            current = program(*current, next(loader))

        return Ready(step, lambda: jax.block_until_ready(current), batch_size)

    return Contender(
        kind="flax_loop",
        side="peers",
        label=f"plain Flax loop, batches made on the host, batch {batch_size}",
        batch_size=batch_size,
        members=1,
        set_up=set_up,
        facts={"optimizer": "adamw", "precision": world.setting.precision, "devices": 1},
    )


def host_batches(shape: TaskShape, rules: RuleTable, batch_size: int) -> Iterator[np.ndarray]:
    """Yields rows int32 [B, T] forever, made by vectorized NumPy: random rules, each planted once in random letters.

    Raises NotRun if rows differ in length.
    """
    P, R, L = shape.pattern, shape.replacement, shape.input
    if shape.ragged or R == 0:
        raise NotRun("not run: its loader makes rows of one length only")
    rng = np.random.default_rng(0)
    separator = np.full((batch_size, 1), SEPARATOR)
    # Positions in the answer.
    place = np.arange(L - P + R)
    while True:
        chosen = rng.integers(len(rules), size=batch_size)
        patterns, replacements = rules.patterns[chosen], rules.replacements[chosen]
        inputs = rng.integers(shape.alphabet_size, size=(batch_size, L), dtype=np.uint8)
        planted = rng.integers(L - P + 1, size=(batch_size, 1))
        np.put_along_axis(inputs, planted + np.arange(P), patterns, axis=1)
        windows = np.lib.stride_tricks.sliding_window_view(inputs, P, axis=1)
        leftmost = (windows == patterns[:, None]).all(-1).argmax(1)[:, None]
        kept = np.where(place < leftmost, place, np.maximum(place - R + P, 0))
        written = place - leftmost
        answers = np.where(
            (written >= 0) & (written < R),
            np.take_along_axis(replacements, np.clip(written, 0, R - 1), axis=1),
            np.take_along_axis(inputs, kept, axis=1),
        )
        parts = [patterns, replacements, inputs, answers]
        letters = [part.astype(np.int32) + FIRST_TOKEN for part in parts]
        end = np.full((batch_size, 1), END)
        rows = [column for part in letters[:3] for column in (part, separator)] + [letters[3], end]
        padding = np.full((batch_size, shape.answer - len(place)), PAD)
        yield np.concatenate([*rows, padding], axis=1, dtype=np.int32)


def with_torch(set_up: Callable[[], Ready], packages: Sequence[str] = ("torch", "transformers")) -> Callable[[], Ready]:
    """Wraps a set-up: raises NotRun if a package, or PyTorch's support for this machine's device, is missing."""

    def checked() -> Ready:
        absent = [name for name in packages if not importlib.util.find_spec(name)]
        if absent:
            raise NotRun(f"missing: pip install {' '.join(absent)}")
        import torch

        if torch_device() not in ("cpu", "cuda") or (torch_device() == "cuda" and not torch.cuda.is_available()):
            raise NotRun(f"missing: a PyTorch that can use this machine's {jax.default_backend()}")
        torch.set_num_threads(usable_cores())
        if torch_device() == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32, JAX's default
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return set_up()

    return checked


def torch_device() -> str:
    """PyTorch's name for JAX's device."""
    return {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())


def wait() -> None:
    """Waits for all of PyTorch's pending work."""
    if torch_device() == "cuda":
        import torch

        torch.cuda.synchronize()


def allocated() -> int:
    """Bytes that PyTorch has allocated on the GPU; 0 on CPU."""
    import torch

    return torch.cuda.memory_allocated() if torch_device() == "cuda" else 0


def peak_since(before: int) -> int | None:
    """PyTorch's peak memory in bytes since its set-up, minus ``before``; None on CPU, where it is unknown."""
    import torch

    return torch.cuda.max_memory_allocated() - before if torch_device() == "cuda" else None


def _gpt2_config(world: World, attention: str) -> Any:
    """A GPT-2 of the setting's shape, with its activation, so that a cheaper activation benefits both."""
    from transformers import GPT2Config

    setting = world.setting
    (group,) = make_groups(world.members[:1])
    decoder = make_decoder(group)
    make: Any = GPT2Config
    return make(
        vocab_size=decoder.vocabulary_size,
        n_positions=decoder.sequence,
        n_embd=setting.width,
        n_layer=setting.layers,
        n_head=setting.heads,
        n_inner=setting.mlp_ratio * setting.width,
        activation_function={"gelu": "gelu_new", "relu": "relu"}[setting.activation],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=END,
        eos_token_id=END,
        attn_implementation=attention,
    )


def _batches(world: World, batch_size: int) -> list[tuple[Any, Any]]:
    """Inputs and targets int64 [B, T - 1] on the device; targets are -100 (ignored) where there is no loss."""
    import torch

    tokens, mask = world.rows(_BATCHES * batch_size)
    targets = tokens[:, 1:].copy()
    answer = targets[:, -mask.shape[1] :]  # a view
    answer[~mask] = -100
    targets[:, : -mask.shape[1]] = -100
    inputs, targets = (
        torch.from_numpy(part.astype(np.int64)).to(torch_device()).split(batch_size)
        for part in (tokens[:, :-1], targets)
    )
    return list(zip(inputs, targets, strict=True))


def _loss(logits: Any, targets: Any) -> Any:
    import torch

    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100)
