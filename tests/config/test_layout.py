"""Layout of a run: options resolve to a layout, or to a one-line error."""

import dataclasses
import math

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instrdiv.config.groups import make_groups
from instrdiv.config.layout import Layout, Options
from instrdiv.config.settings import Member
from instrdiv.runtime.errors import BadInput
from tests.worlds import members, tiny

DEVICES = 8  # simulated in the tests


def test_the_tests_have_the_devices_that_they_count_on():
    assert jax.device_count() == DEVICES and jax.default_backend() == "cpu"


@pytest.mark.parametrize("count, devices", [(1, 1), (3, 3), (8, 8), (9, 8), (40, 8)])
def test_as_many_devices_as_the_members_keep_busy(count, devices):
    assert Options().resolve(members(count)) == Layout(devices, 1, 1, "plain")


def test_the_largest_group_counts():
    several = [*members(3), *(Member(tiny(width=32), seed) for seed in range(5))]
    assert [len(group.members) for group in make_groups(several)] == [3, 5]
    assert Options().resolve(several).devices == 5


@given(st.integers(1, 12), st.sampled_from([None, 1, 2, 4, 6, 8]), st.sampled_from([1, 2, 4]),
       st.sampled_from([None, 1, 2, 3, 5]))  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_what_is_asked_for_is_kept_and_the_rest_fits(count, devices, data_parallel, block):
    options = Options(devices, data_parallel, block)
    if devices is not None and devices % data_parallel:
        with pytest.raises(BadInput, match=f"^--data_parallel={data_parallel}: must divide --devices={devices}"):
            options.resolve(members(count))
        return
    layout = options.resolve(members(count))
    assert layout.data_parallel == data_parallel and layout.members_per_vmap == (block or 1)
    assert layout.devices == layout.rows * data_parallel <= DEVICES and layout.attention == "plain"
    if devices is None:
        assert layout.rows == min(DEVICES // data_parallel, math.ceil(count / layout.members_per_vmap))
    else:
        assert layout.devices == devices
    assert Options(**dataclasses.asdict(layout)).resolve(members(count)) == layout, "a layout resolves to itself"
    layout.check(members(count))


@pytest.mark.parametrize(
    "count, layout", [(3, (3, 1, 1)), (20, (7, 1, 3)), (64, (8, 1, 8)), (72, (8, 1, 5)), (100, (8, 1, 7))]
)
def test_on_an_accelerator_small_members_are_put_together(monkeypatch, count, layout):
    """Blocks of at most eight, of equal size: 100 members on 8 devices are two blocks of 7 per device."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert Options().leaves_block_to_probe and not Options(members_per_vmap=2).leaves_block_to_probe
    found = Options().resolve(members(count, instructions=4))
    assert (found.devices, found.data_parallel, found.members_per_vmap) == layout


def test_on_cpus_nothing_hangs_on_a_clock():
    assert not Options().leaves_block_to_probe


REFUSED = [
    ({"devices": 0}, "--devices=0: must be at least 1"),
    ({"data_parallel": 0}, "--data_parallel=0: must be at least 1"),
    ({"members_per_vmap": 0}, "--members_per_vmap=0: must be at least 1"),
    ({"devices": 9}, "--devices=9: this machine has 8 (cpu)"),
    ({"devices": 4, "data_parallel": 3}, "--data_parallel=3: must divide --devices=4"),
    ({"devices": 2, "data_parallel": 4}, "--data_parallel=4: must divide --devices=2"),
    ({"data_parallel": 16}, "--data_parallel=16: must divide the 8 devices of this machine"),
    ({"devices": 6, "data_parallel": 6}, "--data_parallel=6: must divide --config.batch_size=8"),
    ({"attention": "flash"}, "--attention=flash: must be one of plain, cudnn"),
    ({"attention": "cudnn"}, "--attention=cudnn: needs an NVIDIA GPU; the backend is cpu"),
]


@pytest.mark.parametrize("asked, message", REFUSED)
def test_what_does_not_fit_is_one_line_that_names_the_flag(asked, message):
    with pytest.raises(BadInput) as error:
        Options(**asked).resolve(members(3))
    assert str(error.value) == message


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "needs --config.precision=bfloat16"),
        ({"precision": "bfloat16", "input_length_min": 4}, "needs prompts of one fixed length"),
        ({"precision": "bfloat16", "width": 24}, "needs a head size of 8, 16, … or 128, not 12; it is --config.width"),
        ({"precision": "bfloat16", "width": 512}, "needs a head size of 8, 16, … or 128, not 256"),
        ({"precision": "bfloat16"}, None),
    ],
)
def test_the_kernel_of_cudnn_has_its_needs(monkeypatch, changes, message):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    asked = Options(attention="cudnn", members_per_vmap=1)
    if message is None:
        assert asked.resolve(members(2, **changes)).attention == "cudnn"
        return
    with pytest.raises(BadInput, match=r"^--attention=cudnn: ") as error:
        asked.resolve(members(2, **changes))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "layout, message",
    [
        (Layout(16, 1, 1, "plain"), "--devices=16: this machine has 8 (cpu)"),
        (Layout(4, 1, 1, "cudnn"), "--attention=cudnn: needs an NVIDIA GPU; the backend is cpu"),
        (Layout(8, 2, 5, "plain"), None),
    ],
)
def test_a_layout_is_checked_against_this_machine(layout, message):
    if message is None:
        layout.check(members(3))
        return
    with pytest.raises(BadInput) as error:
        layout.check(members(3))
    assert str(error.value) == message


def test_rows_are_sets_of_devices():
    assert [Layout(8, parallel, 1, "plain").rows for parallel in (1, 2, 4, 8)] == [8, 4, 2, 1]
