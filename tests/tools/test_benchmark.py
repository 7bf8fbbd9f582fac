"""The command line, on the smallest preset."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "XLA", "PYTEST"))}
ENVIRONMENT["PYTHONPATH"] = str(ROOT)


def command(*flags):
    arguments = [sys.executable, "-m", "tools.benchmark", "--preset=smoke", *flags]
    return subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


@pytest.mark.thorough
def test_measures_ours_and_peers_in_turns(tmp_path):
    """Without PyTorch, the table lists it as missing."""
    folder = tmp_path / "out"
    done = command("--only=population,sampling,gpt2_eager_fp32", f"--out={folder}")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    names = {path.name for path in folder.iterdir()}
    assert names == {"benchmark.json", "benchmark.csv", "benchmark.png", "targets.md"}
    assert "round 2 of 2" in done.stderr and "| compile, one program per group | any |" in done.stdout

    found = json.loads((folder / "benchmark.json").read_text())
    assert found["machine"]["usable_cores"] == len(found["machine"]["devices"]) == found["ceilings"]["devices"]
    assert found["ceilings"]["matmul_flops"] > 1e8 and found["ceilings"]["copy_bytes"] > 1e8
    ours, eager, part, other = found["contenders"]
    assert [c["kind"] for c in (ours, part, other)] == ["population", "sampling", "population"]
    assert (ours["optimizer"], other["optimizer"]) == ("muon", "adamw")
    measured = [ours, part, other]
    if all(map(importlib.util.find_spec, ("torch", "transformers"))):
        measured.insert(1, eager)
        assert (eager["batch_size"], eager["threads"]) == (32, found["machine"]["usable_cores"])
    else:
        assert eager["status"].startswith("missing: pip install") and not eager["samples"]
    places = [[sample["place"] for sample in contender["samples"]] for contender in measured]
    count = len(measured)
    assert places == [[place, (place - 1) % count] for place in range(count)]  # the second round starts with the second
    assert all(c["status"] == "ok" and c["examples_per_second"] > 0 for c in measured)


@pytest.mark.parametrize(
    "flag, said",
    [
        ("--only=nobody", "--only"),
        ("--only=gpt2_graphs_bf16", "--only=gpt2_graphs_bf16: none of these is measured on cpu"),
        ("--config.batch_size=32,0", "--config.batch_size=0"),
        ("--config.near_miss_fraction=0.5", "--config.near_miss_fraction=0.5: has no effect"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, flag, said):
    done = command(flag, f"--out={tmp_path / 'out'}")
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert said in done.stderr and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
