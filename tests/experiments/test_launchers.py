"""The commands as a user types them: smoke runs, dry runs, data, and one clear line for every mistake."""

import json
import re
import subprocess
import sys

import pytest

from instrdiv.launch import figure as launcher
from instrdiv.runtime.errors import BadInput
from tests.commands import ENVIRONMENT, ROOT, command
from tests.worlds import tiny

FIG2A = "experiments.fig2a_instruction_count"


def test_smoke_runs_and_the_same_command_again_reads_it_back(tmp_path):
    flags = ("--preset=smoke", f"--run_dir={tmp_path / 'run'}")
    first = command(FIG2A, *flags)
    assert first.returncode == 0, first.stderr
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"figure.png", "figure.pdf", "results.csv", "metrics.csv", "provenance.json", "config.json"} <= names
    assert "Not judged" in first.stdout and "examples/s" in first.stderr and "Traceback" not in first.stderr
    results = (tmp_path / "run" / "results.csv").read_bytes()
    (tmp_path / "run" / "figure.png").unlink()
    again = command(FIG2A, *flags)
    assert again.returncode == 0 and (tmp_path / "run" / "figure.png").exists()
    assert (tmp_path / "run" / "results.csv").read_bytes() == results and "step" not in again.stderr


@pytest.mark.thorough
def test_a_signal_stops_with_a_status_of_its_own_and_the_same_command_resumes(tmp_path):
    flags = ("--preset=smoke", "--config.epochs=50", "--config.reports=40", f"--run_dir={tmp_path / 'run'}")
    arguments = [sys.executable, "-m", FIG2A, *flags]
    running = subprocess.Popen(arguments, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    for line in running.stderr:
        if ", step " in line:
            running.terminate()
            break
    *_, said = running.stderr.read().splitlines()
    assert running.wait() == launcher.STOPPED == 75
    found = re.fullmatch(r"Checkpoint saved at group g0, step (\d+) of 800. Rerun the same command to resume.", said)
    assert found and 0 < int(found[1]) < 800, said
    again = command(FIG2A, *flags)
    assert again.returncode == 0 and f"group g0: resuming from step {found[1]}" in again.stderr
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    "preset",
    [
        "smoke",
        pytest.param("laptop", marks=pytest.mark.thorough),
        *(pytest.param(p, marks=pytest.mark.slow) for p in ("gpu", "paper")),
    ],
)
def test_dry_run_plans_and_writes_nothing(tmp_path, preset):
    done = command(FIG2A, f"--preset={preset}", "--dry_run", f"--run_dir={tmp_path / 'run'}")
    assert done.returncode == 0 and not list(tmp_path.iterdir())
    for word in ("members in 1 group(s)", "parameters each", "FLOPs", "at the peak", "ETA", "from a short probe"):
        assert word in done.stdout


def test_help_tells_what_the_launcher_does():
    done = command(FIG2A, "--help")
    assert done.returncode == 0 and "Figure 2a" in done.stdout
    shown = {}  # flag -> what is said of it, on one line
    for text in re.split(r"\n  --", done.stdout)[1:]:
        name, _, rest = text.partition(":")
        shown[name.removeprefix("[no]")] = " ".join(rest.split())
    assert {"config.width", "run_dir", "dry_run", "seeds"} <= set(shown)
    assert "(one of layernorm, rmsnorm)" in shown["config.norm"]
    for name, text in shown.items():
        assert text.count("(default: ") == 1, f"{name}: {text}"


class TestShowData:
    def test_jsonl_rows_are_those_of_the_contract(self):
        done = command(
            "experiments.show_data", "--preset=smoke", "--num=40", "--format=jsonl", "--config.no_op_fraction=0.5"
        )
        rows = [json.loads(line) for line in done.stdout.splitlines()]
        assert len(rows) == 40 and {row["op"] for row in rows} == {"has_op", "no_op"}
        for row in rows:
            assert list(row) == ["pattern", "replacement", "input", "answer", "op", "rule_id", "split"]
            assert row["answer"] == row["input"].replace(row["pattern"], row["replacement"], 1)
            assert (row["pattern"] in row["input"]) == (row["op"] == "has_op")

    def test_rules_are_those_of_the_run(self):
        """The unseen rows are the first of the run's ``unseen`` tests; rule_id is the place in the pool."""
        from experiments.show_data import rows
        from instrdiv.config.pools import RulePools
        from instrdiv.config.presets import SMOKE
        from instrdiv.config.settings import Member
        from instrdiv.evaluation.test_sets import held_out_rules
        from instrdiv.tasks.strings.alphabet import Alphabet

        held_out, pool = held_out_rules(SMOKE.source, 64, 128), RulePools([Member(SMOKE, 1)]).of(Member(SMOKE, 1))
        for split in ("unseen_dev", "unseen", "seen", "train"):
            for place, row in enumerate(rows(SMOKE, split, 5, seed=1, dev_tests=64)):
                if split.startswith("unseen"):
                    expected = held_out[split].text(place, Alphabet(26))
                    assert row["rule_id"] == place + (64 if split == "unseen" else 0)
                else:
                    expected = pool.text(row["rule_id"], Alphabet(26))
                assert (row["pattern"], row["replacement"]) == expected

    def test_empty_replacements_can_be_shown(self):
        done = command(
            "experiments.show_data", "--preset=smoke", "--config.replacement_length=0", "--config.held_out=pattern"
        )
        assert done.returncode == 0 and len(done.stdout.splitlines()) == 11, done.stderr

    def test_more_than_there_are_is_one_line(self):
        done = command("experiments.show_data", "--preset=smoke", "--num=100000")
        assert done.returncode == 2 and done.stderr == "error: --num=100000: --split=train has 512 examples\n"

    def test_a_reader_that_stops_early_is_no_error(self):
        flags = "--preset=smoke --num=512 --config.input_length=200"  # more than a pipe holds
        shell = f"{sys.executable} -m experiments.show_data {flags} | head -1"
        done = subprocess.run(shell, shell=True, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.stdout.startswith("pattern") and len(done.stdout.splitlines()) == 1 and done.stderr == ""

    def test_text_is_a_table(self):
        done = command("experiments.show_data", "--preset=smoke", "--num=3", "--split=unseen")
        lines = done.stdout.splitlines()
        assert len(lines) == 4 and lines[0].split() == [
            "pattern",
            "replacement",
            "input",
            "answer",
            "op",
            "rule_id",
            "split",
        ]


def test_a_flag_without_effect_on_some_settings_of_a_sweep_is_welcome():
    given = {"near_miss_fraction": 0.5, "k_max": 2}
    both = [tiny(**given, no_op_fraction=share, family=name) for share, name in ((0, "free"), (0.2, "free+repeated"))]
    launcher.refuse_idle_flags(both, given)
    with pytest.raises(BadInput, match=r"^--config\.near_miss_fraction=0\.5: has no effect"):
        launcher.refuse_idle_flags(both[:1], given)
    given.clear()  # the preset may say what it likes
    launcher.refuse_idle_flags(both[:1], given)
