"""The command as a user types it, on the smallest preset."""

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


def benchmark(folder, *kinds):
    """What benchmark.json says of these contenders; besides, checks what every run leaves."""
    done = command(f"--only={','.join(kinds)}", f"--out={folder}")
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert {path.name for path in folder.iterdir()} == {f"benchmark.{end}" for end in ("json", "csv", "png")} | {
        "targets.md"
    }
    assert "round 2 of 2" in done.stderr and "| compile, one program a group | any |" in done.stdout
    return json.loads((folder / "benchmark.json").read_text())


def test_measures_ours_and_says_on_what(tmp_path):
    found = benchmark(tmp_path / "out", "population", "sampling", "flax_loop")
    assert found["machine"]["usable_cores"] == len(found["machine"]["devices"]) == found["ceilings"]["devices"]
    assert found["ceilings"]["matmul_flops"] > 1e8 and found["ceilings"]["copy_bytes"] > 1e8
    kinds = [contender["kind"] for contender in found["contenders"]]
    assert kinds == ["population", "sampling", "population", "flax_loop"]
    assert [found["contenders"][place]["optimizer"] for place in (0, 2)] == ["muon", "adamw"]
    for contender in found["contenders"]:
        assert contender["status"] == "ok" and contender["examples_per_second"] > 0
        assert [sample["round"] for sample in contender["samples"]] == [0, 1]
    first = [min(c["samples"], key=lambda s: s["place"])["place"] for c in found["contenders"]]
    assert first == [0, 0, 1, 2]  # the second round begins with the second contender


def test_measures_pytorch(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    found = benchmark(tmp_path / "out", "gpt2_eager_fp32")
    (eager,) = found["contenders"]
    assert (eager["status"], eager["batch_size"], eager["threads"]) == ("ok", 32, found["machine"]["usable_cores"])


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
