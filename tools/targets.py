"""The targets, and what became of each in one run of the benchmark: met, not met, or not run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from instrdiv.planning import duration, in_bytes
from instrdiv.presets import LAPTOP, PAPER
from instrdiv.settings import Setting
from tools.measuring import Outcome, ratio
from tools.record import Record

#: The evaluation that a target names.
_TESTS, _MEMBERS = 100_000, 48


@dataclasses.dataclass(frozen=True)
class Target:
    """Something that was set out to be reached.

    Attributes:
      what, where, goal: in words.
      shape: whether a run trained what the target is about; a run that did not says nothing about it.
      place: whether it was on the machine that the target is about; elsewhere its value is shown, but not judged.
      value: what was reached; NaN where it was not measured.
      met: whether a value is good enough.
      words: the value for people.
    """

    what: str
    where: str
    goal: str
    shape: Callable[[Record], bool]
    place: Callable[[Record], bool]
    value: Callable[[Record], float]
    met: Callable[[float], bool]
    words: Callable[[Record, float], str]

    def judge(self, record: Record) -> tuple[str, str]:
        """What was reached, and ``met``, ``not met`` or ``not run``."""
        value = self.value(record) if self.shape(record) else math.nan
        if math.isnan(value):
            return "", "not run"
        words = self.words(record, value)
        if not self.place(record):
            return f"{words}, on {record.device}", "not run"
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


def _anything(record: Record) -> bool:
    return True


def _same(one: Setting, other: Setting, *names: str) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in names)


def _papers_shape(record: Record) -> bool:
    names = ("layers", "width", "heads", "mlp_ratio", "alphabet_size", "input_length", "pattern_length")
    return _same(record.setting, PAPER, *names)


def _papers(record: Record) -> bool:
    return _papers_shape(record) and _same(record.setting, PAPER, "precision")


def _laptop(record: Record) -> bool:
    names = ("layers", "width", "heads", "mlp_ratio", "alphabet_size", "input_length", "pattern_length", "batch_size")
    return _same(record.setting, LAPTOP, *names) and record.members == 8


def _on_h200(record: Record) -> bool:
    return len(record.machine["devices"]) == 1 and "H200" in record.machine["devices"][0]


def _on_two_cores(record: Record) -> bool:
    return record.machine["backend"] == "cpu" and record.machine["usable_cores"] == 2


def _ours(record: Record) -> Outcome | None:
    """The fastest population with the setting's own optimiser."""
    return record.best("population", optimizer=record.setting.optimizer)


def _tokens_per_second(record: Record) -> float:
    ours = _ours(record)
    return record.tokens_per_second(ours) if ours else math.nan


def _million(record: Record, value: float) -> str:
    ours = _ours(record)
    assert ours
    return f"{value / 1e6:.3g} million tokens/s, {record.share_of_ceiling(ours):.0%} of the matmul ceiling"


def _times(kind: str, **facts: int | str) -> Callable[[Record], float]:
    """How many times as fast ours is as the fastest outcome of this kind."""

    def value(record: Record) -> float:
        ours, other = _ours(record), record.best(kind, **facts)
        return ratio(ours, other) if ours and other else math.nan

    return value


def _times_one_at_a_time(record: Record) -> float:
    return _times("one_at_a_time", optimizer=record.setting.optimizer)(record)


def _times_pytorch(record: Record) -> float:
    """Against the faster of eager and compiled float32."""
    values = [_times(kind)(record) for kind in ("gpt2_eager_fp32", "gpt2_compiled_fp32")]
    return min((value for value in values if not math.isnan(value)), default=math.nan)


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
    """Of 48 members at batch 512: measured where they ran; where they were only compiled, the compiler's account."""
    memory = record.memory or {}
    return memory.get("peak_bytes") or memory.get("program_bytes", math.nan)


def _multiple(record: Record, value: float) -> str:
    return f"{value:.2f}x"


TARGETS = (
    Target(
        "training, papers' shape, bf16, population",
        "one H200",
        "6 million tokens/s; stretch 10 million",
        *(_papers, _on_h200, _tokens_per_second, lambda value: value >= 6e6, _million),
    ),
    Target(
        "the same against PyTorch GPT-2 compiled bf16, batch 64",
        "one H200",
        ">= 3x",
        *(_papers, _on_h200, _times("gpt2_compiled_bf16", batch_size=64), lambda value: value >= 3, _multiple),
    ),
    Target(
        "the same against it at its best batch",
        "one H200",
        "> 1x",
        *(_papers, _on_h200, _times("gpt2_compiled_bf16"), lambda value: value > 1, _multiple),
    ),
    Target(
        "the same against PyTorch eager fp32, batch 64, one model at a time",
        "one H200",
        ">= 6x",
        *(_papers, _on_h200, _times("gpt2_eager_fp32", batch_size=64), lambda value: value >= 6, _multiple),
    ),
    Target(
        "sampling inside the step",
        "any",
        "<= 3 % of the step",
        *(_anything, _anything, _sampling_share, lambda value: value <= 0.03),
        lambda record, value: f"{value:.1%}",
    ),
    Target(
        "10^5 unseen examples x 48 members evaluated",
        "one H200",
        "< 60 s",
        *(_papers, _on_h200, _evaluation_seconds, lambda value: value < 60),
        lambda record, value: f"{duration(value)}, from the rate of {len(record.of('evaluation')[0].samples)} samples",
    ),
    Target(
        "laptop shape, 8 members, against one after another",
        "two CPU cores",
        ">= 1.2x",
        *(_laptop, _on_two_cores, _times_one_at_a_time, lambda value: value >= 1.2, _multiple),
    ),
    Target(
        "laptop shape, 8 members, against PyTorch eager one after another",
        "two CPU cores",
        ">= 1.5x",
        *(_laptop, _on_two_cores, _times("gpt2_eager_fp32"), lambda value: value >= 1.5, _multiple),
    ),
    Target(
        "papers' shape",
        "two CPU cores",
        "at least PyTorch's rate",
        *(_papers_shape, _on_two_cores, _times_pytorch, lambda value: value >= 1, _multiple),
    ),
    Target(
        "compile: one program a group, its cache off",
        "any",
        "< 60 s",
        *(_anything, _anything, _compile_seconds, lambda value: value < 60),
        lambda record, value: f"{value:.1f} s",
    ),
    Target(
        "`python -m …` to the first step, warm cache",
        "two CPU cores",
        "< 8 s",
        *(lambda record: record.preset == "laptop", _on_two_cores, _startup_seconds, lambda value: value < 8),
        lambda record, value: f"{value:.1f} s (cold: {(record.startup or {})['cold']:.1f} s)",
    ),
    Target(
        "memory: 48 members of the papers' shape, batch 512",
        "one H200",
        "fits",
        *(_anything, lambda record: _on_h200(record) and "peak_bytes" in (record.memory or {}), _memory_bytes),
        lambda value: True,
        lambda record, value: in_bytes(value),
    ),
    Target(
        "scaling: no collective across members, one reduction a step along data",
        "1, 2, 4, 8 simulated devices",
        "asserted",
        *(_anything, _anything, lambda record: math.nan, lambda value: True),
        lambda record, value: "",
    ),
)
