"""A checkpoint's ``config.json`` as a ``ModelConfig``, read as Transformers reads it; unsupported options are rejected.

Fields that Transformers' own class for the model ignores are ignored here, too. So is dropout: it has no effect when
only adapters are trained.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from instrdiv.runtime.errors import BadInput


class _Family(NamedTuple):
    """A model type: its Transformers class, and the defaults that class uses where config.json omits a field."""

    architecture: str
    kv_heads: int | None  # None: same as the number of heads
    begin_token: int | None
    end_token: int | None


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", None, 1, 2),
    "mistral": _Family("MistralForCausalLM", 8, 1, 2),
    "qwen2": _Family("Qwen2ForCausalLM", 32, None, None),
}
_WINDOW = 4096  # Mistral and Qwen2, if they use a window and its length is not given
_FULL, _SLIDING = "full_attention", "sliding_attention"
_SILU = ("silu", "swish")
#: More than any model has; a wrong number would exhaust memory before any weight file is read.
_MOST_LAYERS = 10_000

#: How positions may be scaled.
ROPE_KINDS = ("default", "linear", "llama3")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary positions: how fast each pair of channels rotates (see ``llama.frequencies``).

    Attributes:
      theta: base of the wavelengths.
      kind: one of ``ROPE_KINDS``: unscaled; all pairs slowed by ``factor``; or Llama 3.1's, only slow pairs slowed.
      factor: how much pairs are slowed; linear and llama3.
      low_frequency_factor, high_frequency_factor: llama3; a pair that makes fewer turns than the first within
        ``original_positions`` is slowed by the full ``factor``; one that makes more than the second is not slowed.
      original_positions: llama3; the context length before scaling, in tokens.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_positions: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder of the Llama family. Hashable, because it determines shapes and the compiled program.

    Attributes:
      architecture: its class in Transformers.
      vocab_size, width, layers, heads, kv_heads, head_dim, mlp_width: sizes.
      norm_epsilon: of RMSNorm.
      rope: rotary positions.
      max_positions: the longest row that the model was made for, in tokens.
      windows: per layer, the number of tokens that a token attends to, itself included; None for all earlier ones.
      qkv_bias, output_bias, mlp_bias: whether those linear layers have biases.
      tied_head: the head shares the embedding's weights.
      begin_token: the token that a text starts with; None if the model has none.
      end_tokens: any of these ends an answer.
    """

    architecture: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    norm_epsilon: float
    rope: Rope
    max_positions: int
    windows: tuple[int | None, ...]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tied_head: bool = False
    begin_token: int | None = None
    end_tokens: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any]) -> ModelConfig:
        """Reads a config.json, given its path, its directory, or its content; as written by Transformers 4 or 5.

        Raises:
          BadInput: it cannot be read, or requires something unsupported; names the file and the field.
        """
        if isinstance(source, Mapping):
            return _read(_Fields("config.json", source))
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise BadInput(f"{path}: there is no such file; a checkpoint is a directory with config.json, a tokenizer "
                           "and *.safetensors, as written by save_pretrained") from None  # fmt: skip
        except (OSError, ValueError) as error:
            raise BadInput(f"{path}: cannot be read as JSON ({error}); download it again") from None
        if not isinstance(content, dict):
            raise BadInput(f"{path}: must be a JSON object, as written by save_pretrained")
        return _read(_Fields(str(path), content))

    def to_json(self) -> dict[str, Any]:
        """The config.json of this decoder, readable by Transformers 4 and 5.

        Raises BadInput if the architecture lacks something, such as windows in a Llama.
        """
        families = {family.architecture: name for name, family in _FAMILIES.items()}
        window = next((window for window in self.windows if window is not None), None)
        rope = self.rope
        scaling: dict[str, Any] = {"rope_type": rope.kind, "factor": rope.factor}
        if rope.kind == "llama3":
            scaling |= {
                "low_freq_factor": rope.low_frequency_factor,
                "high_freq_factor": rope.high_frequency_factor,
                "original_max_position_embeddings": rope.original_positions,
            }
        fields: dict[str, Any] = {
            "architectures": [self.architecture],
            "model_type": families.get(self.architecture, self.architecture),
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "intermediate_size": self.mlp_width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": self.norm_epsilon,
            "rope_theta": rope.theta,
            "rope_scaling": None if rope.kind == "default" else scaling,
            "tie_word_embeddings": self.tied_head,
            "bos_token_id": self.begin_token,
            "eos_token_id": None if not self.end_tokens else list(self.end_tokens),
        }
        if len(self.end_tokens) == 1:
            fields["eos_token_id"] = self.end_tokens[0]
        if fields["model_type"] == "llama":
            fields |= {"attention_bias": self.qkv_bias, "mlp_bias": self.mlp_bias}
        elif fields["model_type"] == "mistral":
            fields |= {"sliding_window": window}
        elif fields["model_type"] == "qwen2":
            fields |= {
                "use_sliding_window": window is not None,
                "sliding_window": window,
                "max_window_layers": sum(w is None for w in self.windows),
                "layer_types": [_FULL if w is None else _SLIDING for w in self.windows],
            }
        read = self.from_json(fields)
        lost = [f.name for f in dataclasses.fields(self) if getattr(read, f.name) != getattr(self, f.name)]
        if lost:
            raise BadInput(f"{lost[0]}={getattr(self, lost[0])}: not supported by {self.architecture}; it would be "
                           f"read as {getattr(read, lost[0])}")  # fmt: skip
        return fields


class _Fields:
    """Fields of a JSON object, each checked when it is read."""

    def __init__(self, where: str, fields: Mapping[str, Any]):
        self.where, self.fields = where, fields

    def refuse(self, name: str, remedy: str) -> BadInput:
        value = self.fields.get(name)
        return BadInput(f"{self.where}: {name}={value if isinstance(value, str) else json.dumps(value)}: {remedy}")

    def whole(self, name: str, default: int | None = None, low: int = 1) -> int:
        """A whole number; if missing or null, the default, if there is one."""
        value = self.fields.get(name)
        value = default if value is None else value
        if value is None:
            raise BadInput(f"{self.where}: lacks the field {name}")
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self.refuse(name, f"must be a whole number, at least {low}")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        """A positive number; if missing or null, the default, if there is one."""
        value = self.fields.get(name)
        value = default if value is None else value
        if value is None:
            raise BadInput(f"{self.where}: lacks the field {name}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise self.refuse(name, "must be a positive number")
        return float(value)

    def flag(self, name: str) -> bool:
        """true or false; false if missing or null."""
        value = self.fields.get(name)
        if value not in (None, True, False):
            raise self.refuse(name, "must be true or false")
        return bool(value)


def _read(config: _Fields) -> ModelConfig:
    known = ", ".join(_FAMILIES)
    model_type = config.fields.get("model_type")
    if model_type is None:
        raise BadInput(f"{config.where}: lacks the field model_type, one of {known}")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise config.refuse("model_type", f"is not supported; supported are {known}")
    family = _FAMILIES[model_type]
    if config.fields.get("architectures") not in (None, [family.architecture]):
        raise config.refuse("architectures", f'is not supported; for {model_type}, use ["{family.architecture}"]')
    if config.fields.get("hidden_act") not in (None, *_SILU):
        raise config.refuse("hidden_act", f"is not supported; only {_SILU[0]} is")
    if config.fields.get("quantization_config") is not None:
        raise config.refuse("quantization_config", "quantized checkpoints are not supported; use the original one, "
                            "whose weights can be held in 8 bits")  # fmt: skip
    if config.fields.get("per_layer_config") is not None:
        raise config.refuse("per_layer_config", "layers with different configurations are not supported")

    heads, width = config.whole("num_attention_heads"), config.whole("hidden_size")
    # Transformers treats a missing field and a null one differently.
    kv_heads = config.whole("num_key_value_heads", heads)
    if "num_key_value_heads" not in config.fields and family.kv_heads is not None:
        kv_heads = family.kv_heads
    if heads % kv_heads:
        raise BadInput(f"{config.where}: num_key_value_heads={kv_heads}: must divide num_attention_heads={heads}")
    if config.fields.get("head_dim") is None and width % heads:
        raise config.refuse("hidden_size", f"must be a multiple of num_attention_heads={heads}, or give head_dim")
    head_dim = config.whole("head_dim", width // heads)
    if head_dim % 2:
        raise BadInput(f"{config.where}: head_dim={head_dim}: must be even, because channels are rotated in pairs")
    layers, max_positions = config.whole("num_hidden_layers"), config.whole("max_position_embeddings")
    if layers > _MOST_LAYERS:
        raise config.refuse("num_hidden_layers", f"must be at most {_MOST_LAYERS}")
    attention_bias = model_type == "llama" and config.flag("attention_bias")
    return ModelConfig(
        architecture=family.architecture,
        vocab_size=config.whole("vocab_size"),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_width=config.whole("intermediate_size"),
        norm_epsilon=config.positive("rms_norm_eps", 1e-6),
        rope=_rope(config, max_positions),
        max_positions=max_positions,
        windows=_windows(config, model_type, layers),
        qkv_bias=attention_bias or model_type == "qwen2",
        output_bias=attention_bias,
        mlp_bias=model_type == "llama" and config.flag("mlp_bias"),
        tied_head=config.flag("tie_word_embeddings"),
        begin_token=_token_ids(config, "bos_token_id", family.begin_token)[0],
        end_tokens=tuple(t for t in _token_ids(config, "eos_token_id", family.end_token) if t is not None),
    )


def _rope(config: _Fields, max_positions: int) -> Rope:
    name = "rope_scaling" if config.fields.get("rope_scaling") else "rope_parameters"
    given = config.fields.get(name) or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise config.refuse(name, "must be a flat object; per-layer ropes are not supported")
    scaling = _Fields(f"{config.where}: {name}", given)
    spelling = "rope_type" if "rope_type" in given else "type"
    kind = given.get(spelling, "default")
    if kind not in ROPE_KINDS:
        raise scaling.refuse(spelling, f"is not supported; supported are {', '.join(ROPE_KINDS)}")
    for fields in (scaling, config):
        if fields.positive("partial_rotary_factor", 1.0) != 1.0:
            raise fields.refuse("partial_rotary_factor", "is not supported; must be 1")
    theta = scaling.positive("rope_theta", config.positive("rope_theta", 10_000.0))
    if kind == "default":
        return Rope(theta)
    factor = scaling.positive("factor")
    if kind == "linear":
        return Rope(theta, kind, factor)
    low, high = scaling.positive("low_freq_factor"), scaling.positive("high_freq_factor")
    if high <= low:
        raise scaling.refuse("high_freq_factor", f"must exceed low_freq_factor={low}")
    # The places where Transformers looks, in the same order of precedence.
    original = scaling.whole("original_max_position_embeddings", max_positions)
    original = config.whole("original_max_position_embeddings", original)
    return Rope(theta, kind, factor, low, high, original)


def _windows(config: _Fields, model_type: str, layers: int) -> tuple[int | None, ...]:
    """Per layer, the number of tokens that a token attends to; None for all earlier ones."""
    has_window = model_type == "mistral" or (model_type == "qwen2" and config.flag("use_sliding_window"))
    window = None
    if has_window and config.fields.get("sliding_window", _WINDOW) is not None:
        window = config.whole("sliding_window", _WINDOW)
    full = 0  # layers before the first one with a window
    if model_type == "qwen2":
        full = config.whole("max_window_layers", 28, low=0)
    types = [_FULL if window is None or layer < full else _SLIDING for layer in range(layers)]
    given = config.fields.get("layer_types")
    if given is None or given == types:
        return tuple(None if kind == _FULL else window for kind in types)
    if not isinstance(given, list) or len(given) != layers or not set(given) <= {_FULL, _SLIDING}:
        raise config.refuse("layer_types", f"must be a list of {layers} entries, each {_FULL} or {_SLIDING}")
    if model_type != "qwen2":
        raise config.refuse("layer_types", f"a mixture of layer types is not supported for {model_type}")
    if window is None:
        raise config.refuse("layer_types", f"{_SLIDING} requires use_sliding_window and sliding_window")
    return tuple(None if kind == _FULL else window for kind in given)


def _token_ids(config: _Fields, name: str, default: int | None) -> list[int | None]:
    """The token ids in a field that holds one or several; ``[None]`` for none."""
    given = config.fields.get(name, default)
    ids = given if isinstance(given, list) else [given]
    if not ids or not all(i is None or (isinstance(i, int) and not isinstance(i, bool) and i >= 0) for i in ids):
        raise config.refuse(name, "must be a token id or a list of token ids")
    if any(i is not None and i >= config.whole("vocab_size") for i in ids):
        raise config.refuse(name, f"must be below vocab_size={config.whole('vocab_size')}")
    return ids
