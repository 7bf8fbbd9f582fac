"""Sweeps: grids, and one-line errors for invalid arguments."""

import pytest

from instrdiv.config.sweep import Sweep
from instrdiv.runtime.errors import BadInput
from tests.worlds import TINY


class TestGrid:
    def test_every_combination_is_there_once(self):
        sweep = Sweep.grid(TINY, seeds=2, instructions=range(4, 7), family=("free", "repeated"))
        asked = {(m.setting.instructions, m.setting.family, m.seed) for m in sweep.members}
        assert len(sweep.members) == len(asked) == 3 * 2 * 2

    @pytest.mark.parametrize("values, meant", [({"instructions": 4}, r"\[4\]"), ({"family": "free"}, r"\['free'\]")])
    def test_a_value_where_a_list_is_meant(self, values, meant):
        ((name, value),) = values.items()
        with pytest.raises(BadInput, match=rf"^Sweep\.grid: {name}={value!r} must be a list.* {name}={meant}$"):
            Sweep.grid(TINY, **values)

    def test_a_name_that_is_no_field(self):
        with pytest.raises(BadInput, match=r"^Sweep\.grid: instruction is not a field of Setting; .*instructions, "):
            Sweep.grid(TINY, instruction=[4])
