"""A task for the tests, written as a user would write one: sort a word by a given order of the letters.

``cadb # abcd # cadb $``: the order, the word, and the word sorted. Words may vary in length.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from instrdiv.analysis import plots
from instrdiv.config import sizes
from instrdiv.launch.figure import Figure, Preset, launch
from instrdiv.runtime.fields import STATIC, TABLE, TRACED, between, field, refuse, whole_between
from instrdiv.runtime.tables import Row
from instrdiv.tasks.task import Example, Instructions, Sizes, Task, register
from instrdiv.tasks.tokens import SPECIAL, answer_tokens, prompt_tokens


@dataclasses.dataclass(frozen=True)
class Orders(Instructions):
    """Orders of the letters, uint8 [N, letters]."""

    letters: np.ndarray


@register
@dataclasses.dataclass(frozen=True)
class LetterOrder(Task):
    """Sort a word by a given order of the letters."""

    name = "letter_order"
    parts = ("order", "word")
    slices: ClassVar = {
        "all": lambda facts, relation: True,
        "repeats": lambda facts, relation: facts["repeats"] > 0,
        "no_repeats": lambda facts, relation: facts["repeats"] == 0,
    }

    letters: int = field(6, "number of letters", kind=STATIC, bound=whole_between(2, 26))
    longest: int = field(5, "letters of the longest word", kind=STATIC, bound=whole_between(1, 50))
    shortest: int | None = field(None, "letters of the shortest word (default: longest)", kind=TRACED)
    same_share: float = field(0.0, "share of the words that are one letter", kind=TRACED, bound=between(0, 1))
    backward: bool = field(False, "orders are drawn among those that end with the first letter", kind=TABLE)

    @property
    def least(self) -> int:
        return self.longest if self.shortest is None else self.shortest

    @property
    def shape(self) -> Sizes:
        prompt = self.letters + self.longest + 2
        return Sizes(3 + self.letters, prompt, self.longest, self.least < self.longest, self.letters)

    @property
    def characters(self) -> str:
        return SPECIAL + "abcdefghijklmnopqrstuvwxyz"[: self.letters]

    def draw(self, words: np.ndarray) -> Orders:
        words = words[:, : self.letters].copy()
        if self.backward:
            words[:, 0] = 2**64 - 1
        return Orders(np.argsort(words, axis=1, kind="stable").astype(np.uint8))

    def knobs(self) -> dict[str, Any]:
        return {"same_share": np.float32(self.same_share), "least": np.int32(self.least)}

    def filled_in(self) -> dict[str, Any]:
        return {"shortest": self.least}

    @staticmethod
    def make_input(shape: Sizes, knobs: Any, instruction: Any, key: jax.Array) -> Any:
        of_word, of_length, of_same = jax.random.split(key, 3)
        word = jax.random.randint(of_word, (shape.answer,), 0, instruction["letters"].shape[0])
        same = jax.random.uniform(of_same) < knobs["same_share"]
        length = jax.random.randint(of_length, (), knobs["least"], shape.answer + 1)
        return jnp.where(same, word[0], word), length

    @staticmethod
    def spell(shape: Sizes, instruction: Any, input: Any) -> Example:
        order, (word, length) = instruction["letters"].astype(jnp.int32), input
        prompt, padding = prompt_tokens((order, word), (len(order), length) if shape.ragged else None)
        place = jnp.where(jnp.arange(shape.answer) < length, jnp.argsort(order)[word], len(order))
        answer = order[jnp.minimum(jnp.sort(place), len(order) - 1)]
        tokens, loss_mask = answer_tokens(answer, length)
        repeats = (jnp.sort(place)[1:] == jnp.sort(place)[:-1]) & (jnp.sort(place)[1:] < len(order))
        tokens = jnp.concatenate([prompt, tokens]).astype(jnp.int32)
        return Example(tokens, padding, loss_mask, {"repeats": repeats.sum()})

    @staticmethod
    def fact_words(facts: Any) -> dict[str, str]:
        return {"repeats": str(int(facts["repeats"]))}

    def check_task(self) -> None:
        if not 1 <= self.least <= self.longest:
            refuse("shortest", self.least, f"must be in 1..{self.longest}")


PRESETS = {
    "smoke": Preset(
        sizes.SMOKE.with_task(LetterOrder()), {"instructions": (4, 16)}, seeds=1, dev_tests=16, tests=16, judged=False
    )
}


def draw(results: Sequence[Row], path_stem: Path) -> None:
    plots.instruction_curve(results, path_stem, title="Orders that were never trained on", slice=LetterOrder.headline)


FIGURE = Figure("letter_order", PRESETS, draw)

if __name__ == "__main__":
    launch(FIGURE)
