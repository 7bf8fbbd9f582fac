"""Files, table and verdicts of a benchmark, from made-up samples."""

import csv
import dataclasses
import json
import math

import pytest

from instrdiv.config.presets import LAPTOP, PAPER
from tools import targets
from tools.measuring import Contender, Outcome, Sample
from tools.record import COLUMNS, Record

CPU = {"backend": "cpu", "usable_cores": 2, "processor": "a processor", "devices": ["cpu", "cpu"]}
H200 = {"backend": "gpu", "usable_cores": 16, "processor": "a processor", "devices": ["NVIDIA H200"]}


def outcome(kind, *rates, side="ours", members=8, batch_size=64, others=0.0, status="ok", **facts):
    """An outcome with these rates in examples per second, one per round."""
    samples = [Sample(round, 0, 2.0, int(2 * rate), others) for round, rate in enumerate(rates)]
    contender = Contender(kind, side, f"{kind} {batch_size}", batch_size, members, lambda: None, facts)
    return Outcome(contender, status, compile_seconds=5.0, peak_bytes=10**9, calls=3, samples=samples)


def record(setting, *outcomes, machine=CPU, members=8, **more):
    versions = {"versions": {"jax": "1", "torch": None}, "commit": "abc"}
    ceilings = {"matmul_flops": 1e11, "copy_bytes": 1e10}
    command = ["python", "-m", "tools.benchmark", "--preset=laptop"]
    return Record("laptop", setting, members, 25.0, 1e6, command, versions | machine, ceilings, list(outcomes), **more)


def judged(record):
    return {target.what: target.judge(record) for target in targets.TARGETS}


POPULATION = outcome("population", 3000, 4000, 5000, optimizer="muon", members_per_vmap=1)
EAGER = outcome("gpt2_eager_fp32", 1500, 2000, 2500, side="peers")
AGAINST_ONE = "laptop shape, 8 members, against one after another"
AGAINST_TORCH = "the same against PyTorch eager, one after another"


class TestNumbers:
    def test_are_medians_with_extremes(self):
        row = record(LAPTOP, POPULATION).row(POPULATION)
        assert row["examples_per_second"] == 4000 and row["tokens_per_second"] == 100_000
        assert (row["tokens_per_second_low"], row["tokens_per_second_high"]) == (75_000, 125_000)
        assert row["step_milliseconds"] == pytest.approx(16.0)  # 64 examples of one member
        assert row["share_of_matmul_ceiling"] == pytest.approx(0.04)

    def test_are_all_in_the_files(self, tmp_path):
        part = outcome("sampling", 90_000, side="parts")
        missing = outcome("ensemble", side="peers", status="missing: pip install torch")
        made = record(LAPTOP, POPULATION, EAGER, part, missing)
        made.write(tmp_path)
        made.draw(tmp_path / "picture.png")
        found = json.loads((tmp_path / "benchmark.json").read_text())
        assert [c["kind"] for c in found["contenders"]] == ["population", "gpt2_eager_fp32", "sampling", "ensemble"]
        assert [s["seconds"] for s in found["contenders"][0]["samples"]] == [2.0] * 3
        assert found["setting"]["optimizer"] == "muon" and found["contenders"][0]["members_per_vmap"] == 1
        with open(tmp_path / "benchmark.csv") as file:
            rows = list(csv.DictReader(file))
        assert tuple(rows[0]) == COLUMNS and rows[3]["status"] == "missing: pip install torch"
        assert rows[3]["tokens_per_second"] == "" and rows[2]["share_of_matmul_ceiling"] == ""
        assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"

    def test_are_in_the_text_with_what_did_not_run(self):
        failed = outcome("gpt2_compiled_fp32", 100, side="peers", status="failed: MemoryError: out of memory")
        missing = outcome("ensemble", side="peers", status="missing: pip install torch")
        _, *lines = record(LAPTOP, POPULATION, failed, missing).as_text().splitlines()
        assert " ".join(lines[0].split()) == "population 64 100 k (75 k - 125 k) 16 4% 1 GB 5.0 s"
        assert lines[1].startswith("gpt2_compiled_fp32 64  ") and " 2.5 k" in lines[1]
        assert lines[2:] == [
            "gpt2_compiled_fp32 64: failed: MemoryError: out of memory",
            "ensemble 64: missing: pip install torch",
        ]


class TestTargets:
    def test_compare_within_rounds(self):
        slow = outcome("one_at_a_time", 3000, 3000, 3000, optimizer="muon")
        found = judged(record(LAPTOP, POPULATION, EAGER, slow))
        assert found[AGAINST_TORCH] == ("2.00x", "met")
        assert found[AGAINST_ONE] == ("1.33x", "met")
        slow = outcome("one_at_a_time", 3500, 3500, 3500, optimizer="muon")
        assert judged(record(LAPTOP, POPULATION, slow))[AGAINST_ONE] == ("1.14x", "not met")

    def test_compare_equal_optimizers(self):
        other = outcome("one_at_a_time", 1000, optimizer="adamw")
        assert judged(record(LAPTOP, POPULATION, other))[AGAINST_ONE] == ("", "not run")

    def test_are_not_judged_by_a_run_of_something_else(self):
        wider = dataclasses.replace(LAPTOP, width=128)
        assert judged(record(wider, POPULATION, EAGER))[AGAINST_TORCH] == ("", "not run")
        assert judged(record(LAPTOP, POPULATION, EAGER, members=4))[AGAINST_TORCH] == ("", "not run")

    def test_are_not_judged_elsewhere_or_where_others_were_busy(self):
        four = CPU | {"usable_cores": 4}
        reached, status = judged(record(LAPTOP, POPULATION, EAGER, machine=four))[AGAINST_TORCH]
        assert (reached, status) == ("2.00x on 4 CPU cores (a processor)", "not judged")
        busy = outcome("gpt2_eager_fp32", 1500, 2000, 2500, others=1.0)
        reached, status = judged(record(LAPTOP, POPULATION, busy))[AGAINST_TORCH]
        assert (reached, status) == ("2.00x on a machine that other processes were using", "not judged")

    def test_of_an_accelerator(self):
        tokens = 25.0
        population = outcome("population", 7e6 / tokens, optimizer="adamw", members_per_vmap=8, members=48)
        rivals = [
            outcome(kind, rate / tokens, side="peers", batch_size=batch)
            for kind, batch, rate in (
                ("gpt2_compiled_bf16", 64, 2e6),
                ("gpt2_compiled_bf16", 1024, 7e6),
                ("gpt2_graphs_bf16", 1024, 8e6),
                ("gpt2_eager_fp32", 64, 1e6),
            )
        ]
        tests = outcome("evaluation", 60_000, side="parts", members=48)
        made = record(PAPER, population, *rivals, tests, machine=H200, members=48)
        found = judged(made)
        reached, status = found["training, papers' shape, bf16, population"]
        assert status == "met" and reached.startswith("7 million tokens/s, ")
        assert found["the same against PyTorch GPT-2 compiled bf16, batch 64"] == ("3.50x", "met")
        assert found["the same against PyTorch GPT-2 compiled bf16, best batch"] == ("0.88x", "not met")
        assert found["the same against PyTorch eager fp32, batch 64"] == ("7.00x", "met")
        assert found["10^5 unseen examples x 48 members evaluated"][0].startswith("80 s")
        assert found["10^5 unseen examples x 48 members evaluated"][1] == "not met"
        elsewhere = judged(dataclasses.replace(made, machine=made.machine | {"devices": ["NVIDIA H100"]}))
        assert {status for _, status in list(elsewhere.values())[:4]} == {"not judged"}

    def test_of_sampling_is_its_share_of_the_step(self):
        part = outcome("sampling", 200_000, 200_000, 200_000, side="parts", members_per_vmap=1)
        found = judged(record(LAPTOP, POPULATION, part))["sampling inside the step"]
        assert found == ("2.0%", "met")

    def test_of_memory_is_met_where_it_ran_on_the_accelerator(self):
        what = "memory: 48 members of the papers' shape, batch 512"
        compiled, ran = {"program_bytes": 5 * 10**10}, {"program_bytes": 5 * 10**10, "peak_bytes": 6 * 10**10}
        assert judged(record(PAPER, machine=H200, memory=compiled))[what] == ("50 GB on 1 x NVIDIA H200", "not judged")
        assert judged(record(PAPER, machine=H200, memory=ran))[what] == ("60 GB", "met")

    def test_of_the_first_step(self):
        made = record(LAPTOP, POPULATION, startup={"cold": 20.0, "warm": 7.0})
        assert judged(made)["`python -m …` to the first step, warm cache"] == ("7.0 s; cold 20.0 s", "met")

    def test_are_all_in_the_table(self):
        lines = targets.markdown(record(LAPTOP, POPULATION)).splitlines()
        rows = [line for line in lines if line.startswith("| ")]
        assert len(rows) == 1 + len(targets.TARGETS) and all(line.count("|") == 6 for line in rows)
        assert "    python -m tools.benchmark --preset=laptop" in lines
        assert not math.isnan(record(LAPTOP, POPULATION).other_cores)
