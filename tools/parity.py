"""Does our decoder compute what Transformers does? Every family of the papers, on tiny random checkpoints.

    python -m tools.parity
    python -m tools.parity --families=Llama-3.1,CodeQwen1.5 --out=runs/parity

Transformers creates a model with random weights and saves it as a checkpoint, which we read. Both then compute, in
float32, the logits of full and of padded rows, and decode greedily. The table reports the largest difference of any
logit, and how many of the decoded tokens agree. Needs ``pip install -e '.[finetune,transformers]'``.

The results go to ``--out``: ``parity.csv``, and ``parity.json`` with the machine and the versions.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from absl.flags import FlagValues

from instrdiv.launch.flags import ListParser, NameParser, define, start
from instrdiv.models import lora
from instrdiv.models.generation import decode_greedily, left_padded
from instrdiv.models.llama import Adapters, Model, Rows, empty_cache, hidden, logits
from instrdiv.models.llama_config import ModelConfig
from instrdiv.models.weights import read_weights, write_weights
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.files import write_json
from instrdiv.runtime.tables import Row, write_table
from tools import machine

#: Sizes that all families share. Rows are longer than the windows, and than Llama 3's original_max_position_embeddings.
TINY = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_THETA_1M = {"rope_type": "default", "rope_theta": 1e6}

#: name -> Transformers' class, and the fields of config.json that distinguish the family.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-2": ("Llama", {"rms_norm_eps": 1e-5}),
    "Llama-3.1": ("Llama", {"num_key_value_heads": 2, "rope_parameters": _LLAMA3}),
    "Llama-3.2": (
        "Llama",
        {"num_key_value_heads": 1, "rope_parameters": _LLAMA3 | {"factor": 32.0}, "tie_word_embeddings": True},
    ),
    "Llama with biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 16}),
    "Mistral v0.1": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 8}),
    "Mistral v0.3": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None, "rope_parameters": _THETA_1M}),
    "DeepSeek-Coder": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100_000.0}},
    ),
    "CodeQwen1.5": ("Qwen2", {"num_key_value_heads": 1, "rms_norm_eps": 1e-5, "rope_parameters": _THETA_1M}),
    "Qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True, "rope_parameters": _THETA_1M}),
    "Qwen2.5": (
        "Qwen2",
        {"num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
}

ROWS, PLACES, NEW_TOKENS = 4, 48, 64

#: Columns of parity.csv. ``logit_spread`` is the standard deviation of Transformers' logits. ``tokens_equal`` is the
#: smallest number, over rows, of leading greedy tokens that agree, out of ``new_tokens``. Errors are root mean square
#: differences from float32, divided by the spread. The rest are the largest difference of a logit from Transformers';
#: for ``cache``, from ours without a cache.
COLUMNS = (
    *("family", "logit_spread", "logits", "left_padded", "right_padded", "cache", "tokens_equal", "new_tokens"),
    *("peft_read", "peft_written", "int8", "int8_error", "bfloat16_error", "transformers_bfloat16_error"),
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A Transformers model, and ours read from its checkpoint.

    Attributes:
      theirs: the Transformers model, float32.
      path: the checkpoint's directory.
      config, weights: ours, float32.
    """

    theirs: Any
    path: Path
    config: ModelConfig
    weights: Any

    @classmethod
    def make(cls, family: str, path: Path, seed: int = 0, **save: Any) -> Pair:
        """Creates a random model, saves it to ``path`` with ``save_pretrained(path, **save)``, and reads it back."""
        import torch
        import transformers

        kind, fields = FAMILIES[family]
        torch.manual_seed(seed)
        config = getattr(transformers, f"{kind}Config")(**TINY | fields)
        theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
        for name, parameter in theirs.named_parameters():  # no weight is 0 or 1, so none can be ignored
            noise = torch.randn_like(parameter)
            if name.endswith("norm.weight"):
                parameter.data = 1 + 0.3 * noise
            elif "proj" in name and noise.ndim == 2:  # large, the rest small, to vary the output
                parameter.data = 1.3 * noise / parameter.shape[-1] ** 0.5
            else:
                parameter.data = 0.2 * noise
        theirs.save_pretrained(path, **save)
        config = ModelConfig.from_json(path)
        return cls(theirs, path, config, read_weights(path, config))

    def their_logits(self, tokens: np.ndarray, attended: np.ndarray | None = None, model: Any = None) -> np.ndarray:
        """Logits float32 [B, T, V] of ``model`` (default: theirs); ``attended`` bool [B, T] is False at padding."""
        import torch

        attended = np.ones(tokens.shape, bool) if attended is None else attended
        with torch.no_grad():
            said = (model or self.theirs)(
                torch.tensor(tokens),
                attention_mask=torch.tensor(attended).long(),
                position_ids=torch.tensor(_positions(attended)).long(),
            )
        return said.logits.float().numpy()

    def our_logits(
        self,
        tokens: np.ndarray,
        attended: np.ndarray | None = None,
        weights: Any = None,
        precision: str = "float32",
        adapters: Any = None,
        scale: Any = None,
    ) -> np.ndarray:
        """Logits float32 [B, T, V] of our model, with ``weights`` (default: ours)."""
        attended = np.ones(tokens.shape, bool) if attended is None else attended
        weights = self.weights if weights is None else weights
        added = None if adapters is None else Adapters(adapters, scale)
        return np.asarray(_logits(Model(self.config, weights), _rows(tokens, attended), added, precision)[0])

    def our_cached_logits(self, tokens: np.ndarray, pieces: Sequence[int]) -> np.ndarray:
        """Logits float32 [B, T, V], computed piece by piece with a cache longer than needed."""
        rows = _rows(tokens, np.ones(tokens.shape, bool))
        cache, parts, start = empty_cache(self.config, len(tokens), tokens.shape[1] + 3, jnp.float32), [], 0
        for size in pieces:
            piece = Rows(*(array[:, start : start + size] for array in rows))
            part, cache = _logits(Model(self.config, self.weights), piece, None, "float32", cache)
            parts.append(np.asarray(part))
            start += size
        return np.concatenate(parts, axis=1)

    def their_tokens(self, prompts: Sequence[Sequence[int]], new_tokens: int, **options: Any) -> np.ndarray:
        """Greedy tokens [B, new_tokens], padded with 0 if generation stops early."""
        import torch

        rows = left_padded(prompts)
        made = self.theirs.generate(
            torch.tensor(rows.tokens),
            attention_mask=torch.tensor(rows.segments).long(),
            max_new_tokens=new_tokens,
            do_sample=False,
            **options,
        ).numpy()[:, rows.tokens.shape[1] :]
        return np.pad(made, [(0, 0), (0, new_tokens - made.shape[1])])

    def our_tokens(self, prompts: Sequence[Sequence[int]], new_tokens: int, **options: Any) -> np.ndarray:
        """Greedy tokens [B, new_tokens]; 0 after an end token."""
        model = Model(self.config, self.weights)
        return np.asarray(decode_greedily(model, left_padded(prompts), new_tokens=new_tokens, **options)[0])

    def adapted_by_peft(self, folder: Path) -> tuple[Any, lora.Lora, lora.Adapter]:
        """PEFT's model with an adapter that PEFT creates and saves to ``folder``, and the adapter as we read it."""
        import peft
        import torch

        torch.manual_seed(1)
        asked = peft.LoraConfig(r=3, lora_alpha=5, target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(self._loaded(self.path), asked).eval()
        model.save_pretrained(str(folder))
        return model, *lora.read_adapter(folder, self.config)

    def adapted_by_us(self, folder: Path) -> tuple[Any, lora.Lora, lora.Adapter]:
        """PEFT's model with an adapter that we create and write to ``folder``, and that adapter."""
        import peft

        chosen, rng = lora.Lora(3, 5.0, "all-linear"), np.random.default_rng(2)
        shapes = lora.linear_shapes(self.config)
        adapter = {
            name: {
                "a": rng.normal(size=(layers, inputs, 3)).astype(np.float32) / inputs**0.5,
                "b": rng.normal(size=(layers, 3, outputs)).astype(np.float32) / 3,
            }
            for name, (layers, inputs, outputs) in shapes.items()
            if name in chosen.targets
        }
        lora.write_adapter(folder, self.config, chosen, adapter)
        return peft.PeftModel.from_pretrained(self._loaded(self.path), folder).eval(), chosen, adapter

    def in_eight_bits(self, folder: Path) -> tuple[Any, Any]:
        """A Transformers model with our dequantized int8 weights, and those weights."""
        eight = read_weights(self.path, self.config, int8=True)
        write_weights(folder, self.config, eight, "float32")
        return self._loaded(folder), eight

    def their_bfloat16(self) -> Any:
        """Their model in bfloat16."""
        import torch

        return self._loaded(self.path).to(torch.bfloat16)

    def _loaded(self, path: Path) -> Any:
        import torch

        return type(self.theirs).from_pretrained(path, dtype=torch.float32).eval()


@functools.partial(jax.jit, static_argnames="precision")
def _logits(model, rows, adapters, precision, cache=None):
    x, cache = hidden(model, rows, adapters, cache, precision=jnp.dtype(precision))
    return logits(model, x, adapters), cache


def _positions(attended: np.ndarray) -> np.ndarray:
    return np.maximum(attended.cumsum(1, dtype=np.int32) - 1, 0)


def _rows(tokens: np.ndarray, attended: np.ndarray) -> Rows:
    return Rows(*map(jnp.asarray, (tokens.astype(np.int32), _positions(attended), attended.astype(np.int32))))


def random_rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [ROWS, PLACES], and the attended positions if rows are padded on the left, and on the right."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, TINY["vocab_size"], (ROWS, PLACES))
    padding = np.array([0, 5, 17, PLACES - 3])[:, None]
    return tokens, np.arange(PLACES) >= padding, np.arange(PLACES) < PLACES - padding


def random_prompts() -> list[list[int]]:
    """Prompts of different lengths, the longest one longer than the windows."""
    rng = np.random.default_rng(1)
    return [rng.integers(0, TINY["vocab_size"], size).tolist() for size in (3, 7, 12, 1)]


def measure(family: str, folder: Path) -> Row:
    """A row of the table; ``folder`` must be empty."""
    pair = Pair.make(family, folder / "base")
    tokens, left, right = random_rows()
    ours, theirs = pair.our_logits(tokens), pair.their_logits(tokens)
    spread = float(theirs.std())

    def largest(ours: np.ndarray, theirs: np.ndarray) -> float:
        return float(np.abs(ours - theirs).max())

    def padded(attended: np.ndarray) -> float:
        return largest(pair.our_logits(tokens, attended)[attended], pair.their_logits(tokens, attended)[attended])

    def adapted(model: Any, chosen: lora.Lora, adapter: lora.Adapter) -> float:
        adapters = lora.stack_adapters(pair.config, [chosen], [adapter])
        mine = pair.our_logits(tokens, adapters=adapters, scale=lora.scales([chosen]))
        return largest(mine, pair.their_logits(tokens, model=model))

    def error(logits: np.ndarray, exact: np.ndarray) -> float:
        return float(np.sqrt(np.mean((logits - exact) ** 2))) / spread

    prompts = random_prompts()
    same = pair.our_tokens(prompts, NEW_TOKENS) == pair.their_tokens(prompts, NEW_TOKENS)
    eight_theirs, eight = pair.in_eight_bits(folder / "eight")
    in_eight = pair.our_logits(tokens, weights=eight)
    half = read_weights(pair.path, pair.config, "bfloat16")
    return {
        "family": family,
        "logit_spread": spread,
        "logits": largest(ours, theirs),
        "left_padded": padded(left),
        "right_padded": padded(right),
        "cache": largest(pair.our_cached_logits(tokens, [PLACES // 2, *[1] * (PLACES - PLACES // 2)]), ours),
        "tokens_equal": int(same.cumprod(1).sum(1).min()),
        "new_tokens": NEW_TOKENS,
        "peft_read": adapted(*pair.adapted_by_peft(folder / "theirs")),
        "peft_written": adapted(*pair.adapted_by_us(folder / "ours")),
        "int8": largest(in_eight, pair.their_logits(tokens, model=eight_theirs)),
        "int8_error": error(in_eight, ours),
        "bfloat16_error": error(pair.our_logits(tokens, weights=half, precision="bfloat16"), ours),
        "transformers_bfloat16_error": error(pair.their_logits(tokens, model=pair.their_bfloat16()), theirs),
    }


def as_markdown(rows: Sequence[Row]) -> str:
    """The table as Markdown; differences and errors have two digits."""

    def cell(name: str, value: Any) -> str:
        return f"{value:.1e}" if isinstance(value, float) and name != "logit_spread" else f"{value:.3g}"

    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    for row in rows:
        lines.append(" | ".join([row["family"], *(cell(name, row[name]) for name in COLUMNS[1:])]))
    return "\n".join(f"| {line} |" for line in lines)


def main(values: FlagValues) -> None:
    try:
        import peft  # noqa: F401
        import torch  # noqa: F401
        from transformers.utils import logging
    except ModuleNotFoundError as error:
        raise BadInput(f"{error.name} is missing: pip install -e '.[finetune,transformers]'") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    out = Path(values.out)
    out.mkdir(parents=True, exist_ok=True)
    described, rows = machine.describe(), []
    for family in values.families:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(family, Path(folder)))
    write_table(out / "parity.csv", rows, COLUMNS)
    write_json(out / "parity.json", described)
    print(as_markdown(rows))


def define_flags(values: FlagValues) -> None:
    names = ListParser(flags.EnumParser(list(FAMILIES)))
    define(values, names, "families", f"families to compare, of {', '.join(FAMILIES)}", tuple(FAMILIES))
    define(values, NameParser(), "out", "directory for parity.csv and parity.json", "results/finetuning")


if __name__ == "__main__":
    start(main, define_flags, __doc__)
