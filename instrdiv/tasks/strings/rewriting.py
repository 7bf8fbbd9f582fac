"""String rewriting: ``pattern -> replacement`` at the leftmost occurrence (P2, arXiv 2410.04717, section 2)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from instrdiv.runtime.fields import STATIC, TABLE, TRACED, between, field, refuse, whole_between
from instrdiv.runtime.tables import Row
from instrdiv.tasks.strings import rules
from instrdiv.tasks.strings.alphabet import LETTERS, Alphabet
from instrdiv.tasks.strings.examples import Knobs, TaskShape, common_shape, make_input, spell
from instrdiv.tasks.strings.families import FAMILIES
from instrdiv.tasks.strings.mistakes import MISTAKES, classify
from instrdiv.tasks.strings.suites import SUITES
from instrdiv.tasks.task import Example, Measure, Task, register

#: Slice -> which tests belong to it. ``relation``, bool [B, 2]: whether the pattern (replacement) was trained on.
SLICES = {
    "all": lambda facts, relation: True,
    "has_op": lambda facts, relation: facts.occurrences > 0,
    "no_op": lambda facts, relation: facts.occurrences == 0,
    "near_miss": lambda facts, relation: facts.near_miss,
    "occurrences=1": lambda facts, relation: facts.occurrences == 1,
    "occurrences>1": lambda facts, relation: facts.occurrences > 1,
    "pattern_seen": lambda facts, relation: relation[..., 0],
    "replacement_seen": lambda facts, relation: relation[..., 1],
}


@register
@dataclasses.dataclass(frozen=True)
class Rewriting(Task):
    """The fields of string rewriting: which rules, and which inputs."""

    name: ClassVar[str] = "rewriting"
    parts: ClassVar[tuple[str, ...]] = ("pattern", "replacement", "input")
    joint: ClassVar[str] = " -> "
    headline: ClassVar[str] = "has_op"
    headline_words: ClassVar[str] = "has-op"
    slices: ClassVar[Mapping[str, Any]] = SLICES
    suites: ClassVar[Mapping[str, Any]] = SUITES
    mistakes: ClassVar[tuple[str, ...]] = MISTAKES
    measures: ClassVar[tuple[Measure, ...]] = (
        Measure("pattern_seen", "pattern\ntrained", percent=True),
        Measure("replacement_seen", "replacement\ntrained", percent=True),
        Measure("rule_seen", "rule\ntrained", percent=True),
        Measure("pattern_distance_mean", "letters from nearest\npattern"),
        Measure("replacement_distance_mean", "letters from nearest\nreplacement"),
        Measure("rule_distance_min", "fewest letters\nfrom any rule", least=True),
    )
    measures_about: ClassVar[str] = (
        "The share of the {held_out:,.0f} rules in unseen whose pattern, replacement or both were trained on; and, for "
        "{compared:,.0f} of them, the number of letters in which the nearest trained one differs."
    )
    site_about: ClassVar[str] = "The leftmost occurrence of the pattern"
    plain_tests: ClassVar[Mapping[str, Any]] = {"no_op_fraction": 0.0}
    first_columns: ClassVar[tuple[str, ...]] = (
        *("instructions", "no_op_fraction", "tail_shape", "family", "k_min", "k_max", "occurrences"),
        *("input_length", "pattern_length"),
    )

    family: str = field(
        "free",
        f"families that patterns and replacements are drawn from, joined by '+': {', '.join(FAMILIES)}",
        kind=TABLE,
    )
    k_min: int = field(
        1,
        "lowest order k of the family: one in k letters of a string is free",
        kind=TABLE,
        bound=lambda k: None if k >= 1 else "must be at least 1",
    )
    k_max: int = field(1, "highest order k of the family (see k_min)", kind=TABLE)
    pattern_length_min: int | None = field(None, "shortest pattern (default: pattern_length)", kind=TABLE)
    replacement_length_min: int | None = field(None, "shortest replacement (default: replacement_length)", kind=TABLE)
    held_out: str = field(
        "pattern_and_replacement",
        "what of a held-out rule is never trained on: both strings, one of them, or only the two together (rule)",
        rules.HELD_OUT_PARTS,
        kind=TABLE,
    )
    held_out_share: float = field(
        0.2, "share of all strings that is reserved for held-out rules", kind=TABLE, bound=between(0.001, 0.999)
    )
    no_op_fraction: float = field(
        0.0, "probability that an example's input lacks the pattern", kind=TRACED, bound=between(0, 1)
    )
    near_miss_fraction: float = field(
        0.0, "share of the no-ops that contain the pattern with one letter changed", kind=TRACED, bound=between(0, 1)
    )
    occurrences: tuple[int, ...] = field(
        (1,), "how often the pattern is planted in an input; drawn uniformly from this list", kind=TRACED
    )
    input_length_min: int | None = field(None, "shortest input (default: input_length)", kind=TRACED)
    alphabet_size: int = field(26, "number of letters", kind=STATIC, bound=whole_between(2, len(LETTERS)))
    input_length: int = field(
        50, "length of the longest input, in letters", kind=STATIC, bound=whole_between(1, 60_000)
    )
    pattern_length: int = field(20, "longest pattern", kind=STATIC, bound=whole_between(1, 250))
    replacement_length: int | None = field(None, "longest replacement (default: pattern_length)", kind=STATIC)

    @property
    def longest_replacement(self) -> int:
        return self.pattern_length if self.replacement_length is None else self.replacement_length

    @property
    def shortest_pattern(self) -> int:
        return self.pattern_length if self.pattern_length_min is None else self.pattern_length_min

    @property
    def shortest_replacement(self) -> int:
        return self.longest_replacement if self.replacement_length_min is None else self.replacement_length_min

    @property
    def shortest_input(self) -> int:
        return self.input_length if self.input_length_min is None else self.input_length_min

    @property
    def alphabet(self) -> Alphabet:
        return Alphabet(self.alphabet_size)

    @property
    def characters(self) -> str:
        return self.alphabet.decode_tokens(range(self.alphabet.vocabulary_size))

    @property
    def source(self) -> rules.RuleSource:
        def strings(shortest: int, longest: int) -> rules.StringFamily:
            families = tuple(self.family.split("+"))
            return rules.StringFamily(self.alphabet_size, families, shortest, longest, self.k_min, self.k_max)

        return rules.RuleSource(
            pattern=strings(self.shortest_pattern, self.pattern_length),
            replacement=strings(self.shortest_replacement, self.longest_replacement),
            split=self.held_out,
            held_out_share=self.held_out_share,
            split_seed=self.split_seed,
        )

    @property
    def shape(self) -> TaskShape:
        growth = max(0, self.longest_replacement - self.shortest_pattern)
        return TaskShape(
            alphabet_size=self.alphabet_size,
            pattern=self.pattern_length,
            replacement=self.longest_replacement,
            input=self.input_length,
            answer=self.input_length + growth,
            planted=max(self.occurrences),
            ragged=(self.shortest_pattern, self.shortest_replacement, self.shortest_input)
            != (self.pattern_length, self.longest_replacement, self.input_length),
        )

    def knobs(self) -> Knobs:
        values: dict[str, Any] = {
            "no_op_fraction": np.float32(self.no_op_fraction),
            "near_miss_fraction": np.float32(self.near_miss_fraction),
            "occurrences": np.array(self.occurrences, np.int32),
            "choices": np.int32(len(self.occurrences)),
            "input_length_min": np.int32(self.shortest_input),
            "input_length_max": np.int32(self.input_length),
        }
        return Knobs(**values)

    common_shape = staticmethod(common_shape)

    @staticmethod
    def make_input(shape: TaskShape, knobs: Knobs, instruction: rules.Rules, key: jax.Array) -> Any:
        return make_input(shape, knobs, instruction, key)

    @staticmethod
    def spell(shape: TaskShape, instruction: rules.Rules, input: Any) -> Example:
        return spell(shape, instruction, *input)

    @staticmethod
    def relation(trained: rules.RuleTable, tested: rules.RuleTable) -> np.ndarray:
        columns = [
            rules.seen_in(trained.patterns, tested.patterns),
            rules.seen_in(trained.replacements, tested.replacements),
        ]
        return np.stack(columns, axis=1)

    @staticmethod
    def testable(trained: rules.RuleTable, instructions: rules.RuleTable) -> rules.RuleTable:
        """The rules that are distinct, were never trained on, and change the text they apply to."""
        return Task.testable(trained, instructions[~rules.same_strings(instructions)])

    @staticmethod
    def resemblance(trained: rules.RuleTable, held_out: rules.RuleTable, compared: int) -> Row:
        return rules.resemblance(trained, held_out, compared)

    @staticmethod
    def classify(instructions: rules.Rules, inputs: Any, right: np.ndarray, decoded: np.ndarray) -> np.ndarray:
        text, length, _ = inputs
        return classify(instructions, text, length, right, decoded)

    @classmethod
    def site(cls, row: Mapping[str, str]) -> tuple[str, str, str]:
        return row["input"].partition(row["pattern"]) if row["pattern"] else (row["input"], "", "")

    @staticmethod
    def fact_words(facts: Any) -> dict[str, str]:
        return {"op": "has_op" if facts.occurrences else "near_miss" if facts.near_miss else "no_op"}

    @staticmethod
    def caption(rows: Sequence[Row]) -> str:
        def values(name: str) -> str:
            return "/".join(f"{value:,}" for value in sorted({row[name] for row in rows}))

        planted = sorted({_planted(row["occurrences"]) for row in rows})
        return (
            f"input {values('input_length')}, pattern {values('pattern_length')}, "
            f"planted {planted[0] if len(planted) == 1 else 'as labeled'}."
        )

    @property
    def about(self) -> str:
        return (
            "It reads `pattern#replacement#input#` and continues with the input after replacing the\n"
            "leftmost occurrence of the pattern, followed by `$`."
        )

    @classmethod
    def idle_fields(cls, settings: Sequence[Any]) -> Iterable[tuple[str, Any, bool, str]]:
        no_ops = any(setting.no_op_fraction > 0 for setting in settings)
        orders = any(set(setting.family.split("+")) != {"free"} for setting in settings)
        return (
            ("near_miss_fraction", 0, no_ops, "there are no no-ops; raise --config.no_op_fraction"),
            ("k_min", 1, orders, "the family free has only order 1; choose another --config.family"),
            ("k_max", 1, orders, "the family free has only order 1; choose another --config.family"),
        )

    def filled_in(self) -> dict[str, Any]:
        return {
            "pattern_length_min": self.shortest_pattern,
            "replacement_length": self.longest_replacement,
            "replacement_length_min": self.shortest_replacement,
            "input_length_min": self.shortest_input,
        }

    def check_task(self) -> None:
        self._check_strings()
        self._check_inputs()

    def _check_strings(self) -> None:
        if self.longest_replacement < 0:
            refuse("replacement_length", self.replacement_length, "must be at least 0")
        if self.longest_replacement > 250:
            refuse("replacement_length", self.longest_replacement, "replacements must have at most 250 letters")
        if not 1 <= self.shortest_pattern <= self.pattern_length:
            refuse("pattern_length_min", self.shortest_pattern, f"must be in 1..{self.pattern_length}")
        if not 0 <= self.shortest_replacement <= self.longest_replacement:
            refuse("replacement_length_min", self.shortest_replacement, f"must be in 0..{self.longest_replacement}")
        if any(name not in FAMILIES for name in self.family.split("+")):
            refuse("family", self.family, f"must be families joined by '+': {', '.join(FAMILIES)}")
        if self.k_max < self.k_min:
            refuse("k_max", self.k_max, f"must be at least --config.k_min={self.k_min}")
        for strings in (self.source.pattern, self.source.replacement):
            try:
                _ = strings.components
            except ValueError as error:
                refuse("k_min", self.k_min, str(error))

    def _check_inputs(self) -> None:
        if not 1 <= self.shortest_input <= self.input_length:
            refuse("input_length_min", self.shortest_input, f"must be in 1..{self.input_length}")
        if self.pattern_length > self.shortest_input:
            refuse("pattern_length", self.pattern_length, f"must not exceed the shortest input, {self.shortest_input}")
        planted = ",".join(map(str, self.occurrences))
        if not self.occurrences or min(self.occurrences) < 1:
            refuse("occurrences", planted, "must be a list of positive numbers")
        room = self.shortest_input // self.pattern_length
        if max(self.occurrences) > room:
            fit = f"at most {room} patterns of length {self.pattern_length} fit into {self.shortest_input} letters"
            refuse("occurrences", planted, fit)
        # No-ops are redrawn until they lack the pattern, so that must not be rare.
        if self.no_op_fraction > 0 and self._absence() < 0.02:
            refuse(
                "no_op_fraction",
                self.no_op_fraction,
                f"{self.input_length} random letters may almost never lack a pattern of {self.shortest_pattern}; "
                "use longer patterns, more letters or shorter inputs",
            )

    def _absence(self) -> float:
        """Probability that the longest input lacks the shortest pattern, for the pattern that is hardest to avoid.

        That is one that cannot overlap itself; the number of strings without it is a(n) = A a(n-1) - a(n-L).
        """
        length, lacking = self.shortest_pattern, [1.0] * self.shortest_pattern
        for n in range(length, self.input_length + 1):
            lacking.append(lacking[n - 1] - lacking[n - length] * self.alphabet_size**-length)
        return lacking[-1]


def _planted(occurrences: str | int) -> str:
    """The setting's list in words: "1+1+1+2" becomes "once (75%) or 2 times (25%)"."""
    counts = Counter(str(occurrences).split("+"))
    words = {count: "once" if count == "1" else f"{count} times" for count in counts}
    total = counts.total()
    return " or ".join(words[count] + f" ({n / total:.0%})" * (len(counts) > 1) for count, n in counts.items())
