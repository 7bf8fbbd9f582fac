"""Performance targets, and their status in one run of the benchmark: met, not met, not judged or not run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from instrdiv.config.presets import LAPTOP, PAPER, Setting
from instrdiv.runtime.units import duration, in_bytes
from tools.measuring import Outcome, ratio
from tools.record import Record

#: Tests and members of the evaluation target.
_TESTS, _MEMBERS = 100_000, 48
#: CPU cores that other processes may keep busy; above this, no target is judged.
QUIET_CORES = 0.2


@dataclasses.dataclass(frozen=True)
class Target:
    """A performance target.

    Attributes:
      what, where, goal: descriptions for the table.
      value: the measured value; NaN if it was not measured.
      met: whether a value reaches the goal.
      words: formats the value for people.
      shape: whether the run trained what the target is about; if it did not, the target counts as not run.
      place: whether it ran on the machine that the target is about; elsewhere the value is shown, but not judged.
    """

    what: str
    where: str
    goal: str
    value: Callable[[Record], float]
    met: Callable[[float], bool]
    words: Callable[[Record, float], str] = lambda record, value: f"{value:.2f}x"
    shape: Callable[[Record], bool] = lambda record: True
    place: Callable[[Record], bool] = lambda record: True

    def judge(self, record: Record) -> tuple[str, str]:
        """The value as text, and ``met``, ``not met``, ``not judged`` or ``not run``."""
        value = self.value(record) if self.shape(record) else math.nan
        if math.isnan(value):
            return "", "not run"
        words = self.words(record, value)
        if not self.place(record):
            return f"{words} on {record.device}", "not judged"
        if record.machine["backend"] == "cpu" and record.other_cores > QUIET_CORES:
            return f"{words} on a machine that other processes were using", "not judged"
        return words, "met" if self.met(value) else "not met"


def markdown(record: Record) -> str:
    """The table of all targets."""
    lines = [
        f"Measured on {record.device}, preset {record.preset}, commit {record.machine['commit']}:",
        "",
        f"    {' '.join(record.command)}",
        "",
        f"Other processes kept {record.other_cores:.2f} CPU cores busy meanwhile.",
        "",
        "| what | where | target | reached | |",
        "|---|---|---|---|---|",
    ]
    for target in TARGETS:
        reached, status = target.judge(record)
        lines.append(f"| {target.what} | {target.where} | {target.goal} | {reached} | {status} |")
    return "\n".join(lines) + "\n"


#: PyTorch's compiled GPT-2, without and with CUDA graphs.
_COMPILED = ("gpt2_compiled_bf16", "gpt2_graphs_bf16")


def _same(one: Setting, other: Setting, *names: str) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in names)


#: Fields that determine the FLOPs per token.
_SHAPE = (
    *("layers", "width", "heads", "mlp_ratio", "activation", "norm", "biases"),
    *("alphabet_size", "input_length", "pattern_length", "replacement_length"),
)


def _papers_shape(record: Record) -> bool:
    return _same(record.setting, PAPER, *_SHAPE)


def _papers(record: Record) -> bool:
    return _papers_shape(record) and _same(record.setting, PAPER, "precision")


def _papers_by_adamw(record: Record) -> bool:
    """The papers' setting, with AdamW, the optimizer of the peers."""
    return _papers(record) and _same(record.setting, PAPER, "optimizer")


def _laptop(record: Record) -> bool:
    return _same(record.setting, LAPTOP, *_SHAPE, "precision", "batch_size") and record.members == 8


def _on_h200(record: Record) -> bool:
    return len(record.machine["devices"]) == 1 and "H200" in record.machine["devices"][0]


def _on_two_cores(record: Record) -> bool:
    return record.machine["backend"] == "cpu" and record.machine["usable_cores"] == 2


def _ours(record: Record) -> Outcome | None:
    """The fastest population with the setting's own optimizer."""
    return record.best("population", optimizer=record.setting.optimizer)


def _tokens_per_second(record: Record) -> float:
    ours = _ours(record)
    return record.tokens_per_second(ours) if ours else math.nan


def _million(record: Record, value: float) -> str:
    ours = _ours(record)
    assert ours
    return f"{value / 1e6:.3g} million tokens/s, {record.share_of_ceiling(ours):.0%} of the matmul ceiling"


def _times(*kinds: str, **facts: int | str) -> Callable[[Record], float]:
    """How many times as fast ours is as the fastest outcome of these kinds."""

    def value(record: Record) -> float:
        ours, others = _ours(record), [record.best(kind, **facts) for kind in kinds]
        values = [ratio(ours, other) for other in others if ours and other]
        return min((value for value in values if not math.isnan(value)), default=math.nan)

    return value


def _times_one_at_a_time(record: Record) -> float:
    return _times("one_at_a_time", optimizer=record.setting.optimizer)(record)


def _sampling_share(record: Record) -> float:
    part = record.best("sampling")
    if not part:
        return math.nan
    facts = {"batch_size": part.contender.batch_size, "optimizer": record.setting.optimizer}
    whole = record.best("population", members_per_vmap=part.contender.facts["members_per_vmap"], **facts)
    return ratio(whole, part) if whole else math.nan


def _evaluation_seconds(record: Record) -> float:
    part = record.best("evaluation")
    return _TESTS * _MEMBERS / part.rate if part else math.nan


def _compile_seconds(record: Record) -> float:
    return max((outcome.compile_seconds for outcome in record.of("population")), default=math.nan)


def _startup_seconds(record: Record) -> float:
    return (record.startup or {}).get("warm", math.nan)


def _memory_bytes(record: Record) -> float:
    """Memory of 48 members at batch 512: measured if they ran; the compiler's estimate if they were only compiled."""
    memory = record.memory or {}
    return memory.get("peak_bytes") or memory.get("program_bytes", math.nan)


TARGETS = (
    Target(
        what="training, papers' shape, bf16, population",
        where="one H200",
        goal="6 million tokens/s; stretch 10 million",
        shape=_papers,
        place=_on_h200,
        value=_tokens_per_second,
        met=lambda value: value >= 6e6,
        words=_million,
    ),
    Target(
        what="the same against PyTorch GPT-2 compiled bf16, batch 64",
        where="one H200",
        goal=">= 3x",
        shape=_papers_by_adamw,
        place=_on_h200,
        value=_times(*_COMPILED, batch_size=64),
        met=lambda value: value >= 3,
    ),
    Target(
        what="the same against PyTorch GPT-2 compiled bf16, best batch",
        where="one H200",
        goal="> 1x",
        shape=_papers_by_adamw,
        place=_on_h200,
        value=_times(*_COMPILED),
        met=lambda value: value > 1,
    ),
    Target(
        what="the same against PyTorch eager fp32, batch 64",
        where="one H200",
        goal=">= 6x",
        shape=_papers_by_adamw,
        place=_on_h200,
        value=_times("gpt2_eager_fp32", batch_size=64),
        met=lambda value: value >= 6,
    ),
    Target(
        what="sampling inside the step",
        where="any",
        goal="<= 3 % of the step",
        value=_sampling_share,
        met=lambda value: value <= 0.03,
        words=lambda record, value: f"{value:.1%}",
    ),
    Target(
        what="10^5 unseen examples x 48 members evaluated",
        where="one H200",
        goal="< 60 s",
        shape=_papers,
        place=_on_h200,
        value=_evaluation_seconds,
        met=lambda value: value < 60,
        words=lambda record, value: f"{duration(value)}, extrapolated from fewer tests",
    ),
    Target(
        what="laptop shape, 8 members, against one after another",
        where="two CPU cores",
        goal=">= 1.2x",
        shape=_laptop,
        place=_on_two_cores,
        value=_times_one_at_a_time,
        met=lambda value: value >= 1.2,
    ),
    Target(
        what="the same against PyTorch eager, one after another",
        where="two CPU cores",
        goal=">= 1.5x",
        shape=_laptop,
        place=_on_two_cores,
        value=_times("gpt2_eager_fp32"),
        met=lambda value: value >= 1.5,
    ),
    Target(
        what="papers' shape, against the better of PyTorch eager and compiled",
        where="two CPU cores",
        goal=">= 1x",
        shape=_papers_shape,
        place=_on_two_cores,
        value=_times("gpt2_eager_fp32", "gpt2_compiled_fp32"),
        met=lambda value: value >= 1,
    ),
    Target(
        what="compile, one program per group",
        where="any",
        goal="< 60 s",
        value=_compile_seconds,
        met=lambda value: value < 60,
        words=lambda record, value: f"{value:.1f} s without a cache",
    ),
    Target(
        what="`python -m …` to the first step, warm cache",
        where="two CPU cores",
        goal="< 8 s",
        shape=lambda record: record.preset == "laptop",
        place=_on_two_cores,
        value=_startup_seconds,
        met=lambda value: value < 8,
        words=lambda record, value: f"{value:.1f} s; cold {(record.startup or {})['cold']:.1f} s",
    ),
    Target(
        what="memory: 48 members of the papers' shape, batch 512",
        where="one H200",
        goal="fits",
        place=lambda record: _on_h200(record) and "peak_bytes" in (record.memory or {}),
        value=_memory_bytes,
        met=lambda value: True,  # without a measurement the value is NaN
        words=lambda record, value: in_bytes(value),
    ),
    Target(
        what="scaling: no collective across members, one reduction per step along data",
        where="1, 2, 4, 8 simulated devices",
        goal="asserted by tests, not here",
        value=lambda record: math.nan,
        met=lambda value: False,
    ),
)
