"""Settings and presets of string rewriting: string sizes combined with each of the sizes in ``sizes.py``."""

from __future__ import annotations

import dataclasses
from typing import Any

from instrdiv.config import sizes
from instrdiv.config.settings import TaskSetting
from instrdiv.config.sizes import DEV_TESTS
from instrdiv.tasks.strings.rewriting import Rewriting

__all__ = ["BASES", "DEV_TESTS", "GPU", "LAPTOP", "PAPER", "SETTING_COLUMNS", "SMOKE", "Setting"]


@dataclasses.dataclass(frozen=True)
class Setting(Rewriting, TaskSetting):
    """All settings of a member that learns string rewriting, except its seed. See ``TaskSetting``."""


#: Columns that describe a setting in every table.
SETTING_COLUMNS = Setting.columns()


def _sized(size: TaskSetting, **strings: Any) -> Setting:
    return size.with_task(Rewriting(**strings))


#: 3-letter rules on 8-letter inputs; in a quarter of them the pattern is planted twice, so that *leftmost* matters.
LAPTOP = _sized(sizes.LAPTOP, input_length=8, pattern_length=3, occurrences=(1, 1, 1, 2))
SMOKE = _sized(sizes.SMOKE, input_length=6, pattern_length=2, occurrences=(1, 1, 1, 2))
PAPER = _sized(sizes.PAPER, input_length=50, pattern_length=20)
GPU = _sized(sizes.GPU, input_length=50, pattern_length=20)

BASES = {"smoke": SMOKE, "laptop": LAPTOP, "gpu": GPU, "paper": PAPER}
