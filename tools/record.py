"""The output of a benchmark: the contents of its JSON file, the rows of its table, and its figure."""

from __future__ import annotations

import dataclasses
import math
import statistics
import textwrap
from pathlib import Path
from typing import Any

from instrdiv.analysis.plots import BAND, SEEN, UNSEEN, new_figure
from instrdiv.runtime.files import write_json
from instrdiv.runtime.tables import Row, write_table
from instrdiv.runtime.units import in_bytes
from tools.measuring import Outcome

#: Columns of benchmark.csv, one row per contender. A rate is the median over rounds; ``low``, ``high``: the extremes.
COLUMNS = (
    *("kind", "side", "label", "members", "batch_size", "tokens_per_second", "tokens_per_second_low"),
    *("tokens_per_second_high", "examples_per_second", "step_milliseconds", "share_of_matmul_ceiling"),
    *("peak_bytes", "compile_seconds", "samples", "status"),
)


@dataclasses.dataclass
class Record:
    """All measurements of one benchmark run.

    Attributes:
      preset, setting, members: what was trained; a setting has ``as_row()``, ``layers``, ``width`` and ``precision``.
      tokens, flops: per example.
      command: the command that was run.
      machine, ceilings: see ``machine.py``.
      outcomes: one per contender, in order of importance.
      startup: seconds to the first step, by ``cold`` and ``warm`` compilation cache; or ``failed``, with the reason;
        None if it was not requested.
      memory: memory of 48 members of the papers' shape, see ``contenders.memory``; or ``failed``, or None, likewise.
      device_peak_bytes: JAX's peak memory on one device, over all contenders; None if unknown.
    """

    preset: str
    setting: Any
    members: int
    tokens: float
    flops: float
    command: list[str]
    machine: dict[str, Any]
    ceilings: dict[str, Any]
    outcomes: list[Outcome] = dataclasses.field(default_factory=list)
    startup: dict[str, Any] | None = None
    memory: dict[str, Any] | None = None
    device_peak_bytes: int | None = None

    @property
    def other_cores(self) -> float:
        """CPU cores that other processes kept busy while samples were taken, on average; NaN if unknown."""
        samples = [sample for outcome in self.outcomes for sample in outcome.samples]
        return statistics.fmean(sample.other_cores for sample in samples) if samples else math.nan

    @property
    def device(self) -> str:
        """A short description of the machine's devices."""
        if self.machine["backend"] == "cpu":
            return f"{self.machine['usable_cores']} CPU cores ({self.machine['processor']})"
        kinds = self.machine["devices"]
        return f"{len(kinds)} x {kinds[0]}"

    def of(self, kind: str, **facts: Any) -> list[Outcome]:
        """The outcomes of this kind that have samples and match these facts (or batch size, or members)."""
        return [
            outcome
            for outcome in self.outcomes
            if outcome.contender.kind == kind and outcome.samples and facts.items() <= _facts(outcome).items()
        ]

    def best(self, kind: str, **facts: Any) -> Outcome | None:
        """The one of them with the highest median rate; None if there is none."""
        return max(self.of(kind, **facts), key=lambda outcome: outcome.rate, default=None)

    def tokens_per_second(self, outcome: Outcome) -> float:
        return outcome.rate * self.tokens

    def share_of_ceiling(self, outcome: Outcome) -> float:
        """Training FLOP/s over the matmul ceiling, counted for our model; a peer does more for the same tokens."""
        return outcome.rate * self.flops / self.ceilings["matmul_flops"]

    def row(self, outcome: Outcome) -> Row:
        """A row of benchmark.csv."""
        rates = [rate * self.tokens for rate in outcome.rates.values()]
        return {
            **{name: value for name, value in _facts(outcome).items() if name in COLUMNS},
            "tokens_per_second": self.tokens_per_second(outcome),
            "tokens_per_second_low": min(rates, default=math.nan),
            "tokens_per_second_high": max(rates, default=math.nan),
            "examples_per_second": outcome.rate,
            "step_milliseconds": 1000 * outcome.contender.batch_size / outcome.rate,
            "share_of_matmul_ceiling": math.nan if _is_part(outcome) else self.share_of_ceiling(outcome),
            "peak_bytes": math.nan if outcome.peak_bytes is None else outcome.peak_bytes,
            "compile_seconds": outcome.compile_seconds,
            "samples": len(outcome.samples),
            "status": outcome.status,
        }

    def as_json(self) -> dict[str, Any]:
        """The whole record, including every sample."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        contenders = [
            {
                **_facts(outcome),
                **self.row(outcome),
                "calls": outcome.calls,
                "samples": [dataclasses.asdict(sample) for sample in outcome.samples],
            }
            for outcome in self.outcomes
        ]
        del fields["outcomes"]
        return fields | {"setting": self.setting.as_row(), "contenders": contenders}

    def as_text(self) -> str:
        """The table for a terminal, followed by the contenders that are not in it or failed midway, and why."""
        head = ("", "tokens/s", "(min - max)", "ms/step", "of matmul", "memory", "compile")
        lines = [head, *(self._cells(outcome) for outcome in self.outcomes if outcome.samples)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
        said = [f"{o.contender.label}: {o.status}" for o in self.outcomes if o.status != "ok" or not o.samples]
        return "\n".join([*table, *said])

    def _cells(self, outcome: Outcome) -> tuple[str, ...]:
        row = self.row(outcome)
        low, high = (_thousands(row[f"tokens_per_second_{end}"]) for end in ("low", "high"))
        return (
            row["label"],
            _thousands(row["tokens_per_second"]),
            f"({low} - {high})",
            f"{row['step_milliseconds']:.3g}",
            "" if _is_part(outcome) else f"{row['share_of_matmul_ceiling']:.0%}",
            "" if outcome.peak_bytes is None else in_bytes(outcome.peak_bytes),
            f"{outcome.compile_seconds:.1f} s",
        )

    def write(self, folder: Path) -> None:
        """Writes benchmark.json and benchmark.csv, each atomically."""
        write_json(folder / "benchmark.json", self.as_json())
        write_table(folder / "benchmark.csv", map(self.row, self.outcomes), COLUMNS)

    def draw(self, path: Path) -> None:
        """Draws the figure: one bar per contender, a whisker from the slowest to the fastest round, and the ceiling."""
        measured = [outcome for outcome in self.outcomes if outcome.samples]
        shown = [outcome for side in ("ours", "peers") for outcome in measured if outcome.contender.side == side]
        figure = new_figure(8, 1.9 + 0.36 * len(shown), "Training throughput, measured in turns")
        axes = figure.add_subplot()
        for place, outcome in enumerate(shown):
            row = self.row(outcome)
            rate, low, high = (row[f"tokens_per_second{end}"] for end in ("", "_low", "_high"))
            axes.barh(place, rate, color=UNSEEN if outcome.contender.side == "ours" else SEEN, height=0.66)
            axes.errorbar(rate, place, xerr=[[rate - low], [high - rate]], color="black", capsize=3, elinewidth=1)
            axes.text(high, place, f"  {_thousands(rate)}", va="center", fontsize=8.5)
        axes.set_yticks(range(len(shown)), [outcome.contender.label for outcome in shown], fontsize=8.5)
        axes.invert_yaxis()
        fastest = max((self.row(outcome)["tokens_per_second_high"] for outcome in shown), default=1.0)
        ceiling = self.ceilings["matmul_flops"] / self.flops * self.tokens
        edge = 1.22 * fastest
        label = f"matrix products at {self.ceilings['matmul_flops'] / 1e12:.3g} TFLOP/s: {_thousands(ceiling)} tokens/s"
        if ceiling < 2.5 * fastest:
            edge = max(edge, 1.05 * ceiling)
            axes.axvline(ceiling, color=BAND, ls="--", lw=1.2, label=label)
        else:
            axes.plot([], [], " ", label=label + ", off the right edge")
        axes.set_xlim(0, edge)
        axes.xaxis.set_major_formatter(lambda value, _: _thousands(value) if value else "0")
        axes.set_xlabel("useful tokens per second")
        axes.grid(axis="x", alpha=0.25)
        axes.set_axisbelow(True)
        axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), fontsize=8, frameon=False)
        figure.supxlabel(self._caption(), fontsize=8.5, color="#444444", x=0.02, ha="left")
        figure.savefig(path, dpi=150, metadata={"Software": None})

    def _caption(self) -> str:
        rounds = max((len(outcome.samples) for outcome in self.outcomes), default=0)
        versions, s = self.machine["versions"], self.setting
        text = (
            f"Blue: instrdiv; orange: peers. Median, slowest and fastest of {rounds} rounds in one process; "
            f"{self.device}. "
            f"{s.layers} layers, width {s.width}, {self.tokens:.0f} tokens per example, {s.precision}; "
            f"jax {versions['jax']}, torch {versions['torch']}. "
            f"Other processes kept {self.other_cores:.2f} cores busy meanwhile."
        )
        return textwrap.fill(text, 125)


def _facts(outcome: Outcome) -> dict[str, Any]:
    """What is known about a contender before it is measured."""
    contender = outcome.contender
    names = ("kind", "side", "label", "members", "batch_size")
    return {name: getattr(contender, name) for name in names} | contender.facts


def _is_part(outcome: Outcome) -> bool:
    return outcome.contender.side == "parts"


def _thousands(number: float) -> str:
    """Three significant digits and a unit: 12,300 becomes ``12.3 k``."""
    for unit in ("", " k", " M"):
        if number < 999.5 or unit == " M":
            return f"{number:.3g}{unit}" if number < 999.5 else f"{number:,.0f}{unit}"
        number /= 1000
    raise AssertionError
