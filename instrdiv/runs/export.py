"""Exports members as Transformers GPT-2 checkpoints.

If the member uses LayerNorm, the tensors are the decoder's own, renamed; biases, which GPT-2 has and the decoder may
lack, are zero. GPT-2 has no RMSNorm, but computes the same function if the residual stream is doubled to ``(x, -x)``:
its mean is 0 and its variance is the mean square of ``x``, so LayerNorm gives ``(x, -x) / rms(x)``. Then

- layers that write to the stream (embeddings, the output matrices of attention and MLP) write ``(w, -w)``;
- the norms scale by ``(g, 0)``, and layers that read the stream read its first half;
- there are twice as many heads, so that head size and softmax scale are unchanged; the added heads are zero.

The first half of every hidden state and the first ``heads`` heads equal the member's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instrdiv.config.groups import Group
from instrdiv.config.settings import Member
from instrdiv.models.decoder import make_decoder, make_norm
from instrdiv.runs.saved import SavedRun
from instrdiv.runtime.errors import BadInput, needs
from instrdiv.runtime.files import plain
from instrdiv.runtime.streams import TEST_STREAM, stream_key
from instrdiv.tasks.tokens import END, PAD

_ACTIVATIONS = {"gelu": "gelu_new", "relu": "relu"}  # Flax's gelu is the tanh form, which Transformers calls gelu_new


def gpt2_checkpoint(group: Group, params: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The content of ``config.json`` and ``model.safetensors``.

    Args:
      group: the group in which the member was trained.
      params: the decoder's parameters of one member (no leading axis), as arrays.

    Returns:
      The configuration, and float32 tensors by their names in Transformers' ``GPT2LMHeadModel``.

    Raises:
      BadInput: the decoder does not use learned positions.
    """
    c, decoder = group.config, make_decoder(group)
    if c.positions != "learned":
        raise BadInput(f"--config.positions={c.positions}: cannot be exported: GPT-2 has learned positions only; "
                       "train with --config.positions=learned")  # fmt: skip
    norm: Any = make_norm(c, "any")
    doubled = c.norm == "rmsnorm"
    copies = 2 if doubled else 1

    def extended(leaf, axis=0):
        """Pads with zeros: layers that read the doubled stream, and the added heads."""
        return np.concatenate([leaf, np.zeros_like(leaf)], axis) if doubled else leaf

    def mirrored(leaf):
        """Appends the negative: layers that write to the doubled stream."""
        return np.concatenate([leaf, -leaf], axis=-1) if doubled else leaf

    def three(leaf):
        """Queries, keys and values, each with the added zero heads."""
        return np.concatenate([extended(part, axis=-1) for part in np.split(leaf, 3, axis=-1)], axis=-1)

    tensors: dict[str, np.ndarray] = {}

    def add_norm(name, layer):
        tensors[f"{name}.weight"] = extended(layer["scale"])
        tensors[f"{name}.bias"] = extended(layer.get("bias", np.zeros_like(layer["scale"])))

    def add_linear(name, layer, inputs, outputs):
        kernel = layer["kernel"]
        tensors[f"{name}.weight"] = outputs(inputs(kernel))
        tensors[f"{name}.bias"] = outputs(layer.get("bias", np.zeros_like(kernel[0])))

    def same(leaf):
        return leaf

    tree = params["params"]
    tensors["transformer.wte.weight"] = mirrored(tree["embedding"])
    tensors["transformer.wpe.weight"] = mirrored(tree["positions"])
    for number in range(c.layers):
        layer, prefix = tree[f"layer_{number}"], f"transformer.h.{number}"
        add_norm(f"{prefix}.ln_1", layer["attention_norm"])
        add_linear(f"{prefix}.attn.c_attn", layer["qkv"], extended, three)
        add_linear(f"{prefix}.attn.c_proj", layer["attention_out"], extended, mirrored)
        add_norm(f"{prefix}.ln_2", layer["mlp_norm"])
        add_linear(f"{prefix}.mlp.c_fc", layer["mlp_up"], extended, same)
        add_linear(f"{prefix}.mlp.c_proj", layer["mlp_down"], same, mirrored)
    add_norm("transformer.ln_f", tree["final_norm"])
    if not c.tied_head:
        tensors["lm_head.weight"] = extended(tree["head"]).T

    config = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": decoder.vocabulary_size,
        "n_positions": decoder.sequence,
        "n_embd": copies * c.width,
        "n_layer": c.layers,
        "n_head": copies * c.heads,
        "n_inner": c.mlp_ratio * c.width,
        "activation_function": _ACTIVATIONS[c.activation],
        "layer_norm_epsilon": norm.epsilon,
        "embd_pdrop": c.dropout,
        "resid_pdrop": c.dropout,
        "attn_pdrop": 0.0,
        "tie_word_embeddings": c.tied_head,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": PAD,
    }
    return config, {name: np.ascontiguousarray(tensor, np.float32) for name, tensor in tensors.items()}


def tokenizer_files(group: Group) -> tuple[dict[str, Any], dict[str, Any]]:
    """The content of ``tokenizer.json`` and ``tokenizer_config.json``: one token per character, with our token ids."""
    characters = group.config.characters
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        # The unknown token is deliberately not in the vocabulary, so a character outside the alphabet is an error.
        "model": {"type": "WordLevel", "vocab": {c: i for i, c in enumerate(characters)}, "unk_token": "unknown"},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": characters[PAD],
        "eos_token": characters[END],
        "padding_side": "left",
        "model_max_length": group.shape.sequence - 1,
        "model_input_names": ["input_ids", "attention_mask"],  # GPT-2 would add token_type_ids to the embeddings
        "clean_up_tokenization_spaces": False,
    }
    return tokenizer, config


def write_checkpoint(out: Path, group: Group, member: Member, params: Any, step: int, diverged_at: int = -1) -> None:
    """Writes a member to a directory that ``from_pretrained`` can load.

    Args:
      out: the directory; created if necessary.
      group, params: see ``gpt2_checkpoint``.
      member: the member that the parameters belong to.
      step: number of steps it was trained for.
      diverged_at: step at which it diverged and was frozen; -1 if it did not.

    Raises:
      BadInput: GPT-2 cannot express the member, safetensors is missing, or ``out`` is not empty or cannot be written.
    """
    config, tensors = gpt2_checkpoint(group, params)
    tokenizer, tokenizer_config = tokenizer_files(group)
    with needs("safetensors", "export", f"--out={out}"):
        from safetensors.numpy import save
    generation = {
        "max_new_tokens": group.shape.answer + 1,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": PAD,
    }
    files = {
        "config.json": _as_json(config),
        "generation_config.json": _as_json(generation),
        "tokenizer.json": _as_json(tokenizer),
        "tokenizer_config.json": _as_json(tokenizer_config),
        "README.md": _readme(group, member, step, diverged_at).encode(),
        "model.safetensors": save(tensors, metadata={"format": "pt"}),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise BadInput(f"--out={out}: is not empty, and nothing is overwritten; name another directory")
        for name, content in files.items():
            (out / name).write_bytes(content)
    except OSError as error:
        raise BadInput(f"--out={out}: cannot be written ({error.strerror}); name another directory") from None


def export_member(
    saved: SavedRun,
    member_id: str,
    out: Path,
    step: int | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Exports a member of a saved run at ``step``, by default its last saved step; see ``write_checkpoint``.

    Returns the step. Raises BadInput as ``write_checkpoint`` and ``SavedRun`` do, and for an unknown member.
    """
    places = {member.id: (group, row) for group in saved.groups for row, member in enumerate(group.members)}
    if member_id not in places:
        raise BadInput(f"--member={member_id}: {saved.path} has no such member; its config.json lists them")
    group, row = places[member_id]
    step, params, diverged_at = saved.params(group, step, say)
    params = jax.tree.map(lambda leaf: leaf[row], params)
    write_checkpoint(out, group, group.members[row], params, step, int(diverged_at[row]))
    return step


def _readme(group: Group, member: Member, step: int, diverged_at: int) -> str:
    setting, c = member.setting, group.config
    notes = [f"Trained for {step} of {c.steps} steps on {setting.instructions} rules, seed {member.seed}."]
    if diverged_at >= 0:
        notes.append(f"**It diverged at step {diverged_at}** and was frozen there.")
    if c.norm == "rmsnorm":
        notes.append(
            "The member uses RMSNorm, which GPT-2 lacks. The residual stream is therefore doubled to (x, -x), whose\n"
            f"LayerNorm is the RMSNorm of x: n_embd is {2 * c.width} instead of {c.width}, and of the {2 * c.heads} "
            f"heads the last {c.heads} are\nzero. The model computes the same function. Only the first {c.width} "
            f"entries of a hidden state and the first {c.heads} heads matter."
        )
    if c.precision != "float32":
        notes.append(
            f"It was trained and tested in {c.precision} arithmetic; its parameters are float32, as in this checkpoint."
        )
    if group.shape.ragged:
        notes.append(
            "Lengths vary. In a batch, pad on the left (as the tokenizer does) and pass `attention_mask` and\n"
            "`position_ids = (attention_mask.cumsum(-1) - 1).clamp(min=0)`; `generate` computes the latter itself."
        )
    paragraphs = "\n\n".join(notes)
    return f"""# {member.id}: a GPT-2 trained on the task {setting.name}

A model trained with `instrdiv`. {setting.about} One token per character; `{setting.characters[PAD]}` is padding.

{paragraphs}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")
prompt = {json.dumps(_example_prompt(group, member))}
print(tokenizer.decode(model.generate(**tokenizer(prompt, return_tensors="pt"))[0]))
```

The setting:

```json
{json.dumps(plain(setting.as_row()), indent=1)}
```
"""


def _as_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _example_prompt(group: Group, member: Member) -> str:
    """The prompt of one test, a held-out instruction and an input, without padding."""
    setting = member.setting
    rule = jax.tree.map(lambda leaf: jax.numpy.asarray(leaf[0]), setting.source.held_out(1).arrays())
    key = setting.test_key(stream_key(TEST_STREAM, 0), jax.numpy.int32(0))
    tokens = np.asarray(setting.example(group.shape, setting.knobs(), rule, key).tokens[: group.shape.prompt])
    return setting.text(tokens[tokens != PAD])
