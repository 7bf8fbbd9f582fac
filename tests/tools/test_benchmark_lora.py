"""The command line, on the smallest preset."""

import importlib.util
import json
import subprocess
import sys

import pytest

from tests.tools.test_benchmark import ENVIRONMENT, ROOT


def command(*flags):
    arguments = [sys.executable, "-m", "tools.benchmark_lora", "--preset=smoke", *flags]
    return subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@pytest.mark.thorough
def test_measures_a_population_and_its_rivals_in_turns(tmp_path):
    """Without PyTorch or PEFT, the table lists that peer as missing."""
    done = command(f"--out={tmp_path / 'out'}")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"benchmark.json", "benchmark.csv", "benchmark.png"}
    assert "2 adapters together over one float32 base of" in done.stdout

    found = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    kinds = ["population", "one_at_a_time", "peft", "population_int8", "one_at_a_time_int8"]
    assert [contender["kind"] for contender in found["contenders"]] == kinds
    has_peer = all(map(importlib.util.find_spec, ("torch", "transformers", "peft")))
    for contender in found["contenders"]:
        if contender["kind"] != "peft" or has_peer:
            assert contender["status"] == "ok" and len(contender["samples"]) == 2
        else:
            assert contender["status"].startswith("missing: pip install")

    # There is one copy of the base, however many members: on the device, and among the arguments of the program.
    memory = found["memory"]
    together, alone = memory["population"], memory["one_at_a_time"]
    assert together["state"] == 2 * alone["state"]
    for account in (together, alone):
        assert account["state"] <= account["added"] < account["state"] + memory["base"] / 4
    assert together["arguments"] - alone["arguments"] < alone["state"] + memory["base"] / 4
    assert memory["base_int8"] < memory["base"]


def test_a_mistake_is_one_line(tmp_path):
    done = command("--places=100", f"--out={tmp_path / 'out'}")
    assert done.returncode == 2 and "--places=100: the base has 64 positions" in done.stderr
    assert not list(tmp_path.iterdir())
