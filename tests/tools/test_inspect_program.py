"""The inspector's output for a tiny group, and its errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from instrdiv.runtime.errors import BadInput
from tests.worlds import tiny
from tools.inspect_program import as_text, devices_of, group_of, inspect

pytestmark = pytest.mark.optimized

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def found():
    return inspect(group_of(tiny(layers=2), 2), members_per_vmap=1, devices=4, data_parallel=2)


def test_arithmetic_is_what_was_counted(found):
    """Nothing is computed twice or left uncounted, up to small differences of the optimizer and the last layer."""
    (products,) = found["flops"]["products"].values()
    assert products == pytest.approx(found["flops"]["counted"], rel=0.15)
    assert found["tokens"] == 4 * (2 + 2 + 5 + 5 + 4)  # half a batch of `p # r # input # answer $`


def test_the_one_reduction_is_seen_and_placed(found):
    (reduction,) = found["collectives"]
    assert reduction["opcode"] == "all-reduce" and reduction["in_step"] and len(reduction["operands"]) > 10
    assert "all-reduce in the step" in as_text(found)


def test_a_step_is_more_than_its_parts_that_are_listed(found):
    assert 0 < sum(row["bytes"] for row in found["largest_fusions"]) < found["bytes"]["kernels"]
    parts = found["parts"]
    assert sum(part["bytes"] for part in parts.values()) == found["bytes"]["kernels"]
    assert sum(part["launches"] for part in parts.values()) == found["step"]["launches"]
    assert min(parts[name]["bytes"] for name in ("forward", "backward", "examples", "update")) > 0
    assert found["step"]["launches"] >= sum(found["step"]["kernels"].values()) > 50
    assert found["memory"]["peak"] > found["memory"]["arguments"] > 0


@pytest.mark.parametrize(
    "target, why",
    [
        ("gpu", "--target=gpu: must be here, cuda:FILE"),
        ("cuda:", "--target=cuda:: must be here"),
    ],
)
def test_a_target_that_there_is_not_is_refused(target, why):
    with pytest.raises(BadInput, match=why):
        devices_of(target, 1)


def test_the_command_writes_what_it_says(tmp_path):
    flags = ("--preset=smoke", "--members=1", "--config.layers=1", "--config.optimizer=adamw")
    done = command(*flags, f"--out={tmp_path / 'found.json'}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert as_text(found) == done.stdout.rstrip() and found["setting"]["layers"] == 1 and found["target"] == "here"


@pytest.mark.parametrize(
    "flag, why",
    [
        ("--data_parallel=3", "--data_parallel=3: must divide --devices=1 and --config.batch_size=32"),
        ("--config.width=33", "--config.heads=2: must divide --config.width=33"),
        ("--target=cuda:nowhere.txtpb", "nowhere.txtpb: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line(flag, why):
    done = command("--preset=smoke", flag)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr == f"error: {why}\n"


def command(*flags):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "XLA", "PYTEST"))}
    environment["PYTHONPATH"] = str(ROOT)
    arguments = [sys.executable, "-m", "tools.inspect_program", *flags]
    return subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
