"""All figures in turn: one that fails or is stopped, and, end to end, the smoke of everything."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from experiments import all as everything
from instrdiv.config.presets import BASES
from instrdiv.launch.figure import Figure
from instrdiv.launch.flags import STOPPED
from instrdiv.runtime.interruption import Interrupted
from instrdiv.runtime.tables import read_table
from tests.commands import ROOT, command
from tests.reports.test_report import Page

QUESTIONS = {"first": "What is first?", "second": "What is second?", "third": "What is third?"}


def make_commands(directory, **codes):
    """A command a figure: notes in ``ran`` that it runs, then runs the code given for it."""
    note = f"import sys; open({str(directory / 'ran')!r}, 'a').write(sys.argv[1] + ' '); "
    return {name: ["-c", note + codes.get(name, ""), name] for name in QUESTIONS}


def ran(directory):
    return (directory / "ran").read_text().split()


def test_every_launcher_of_a_figure_is_named():
    """By its assignment of FIGURE, so that one that is forgotten is found."""
    found = set()
    for path in Path(everything.__file__).parent.glob("*.py"):
        assigned = [node.targets[0] for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)]
        if "FIGURE" in [target.id for target in assigned if isinstance(target, ast.Name)]:
            found.add(path.stem)
    found.remove("jsonl_instructions")  # asks nothing without a file of the user's
    assert found == set(everything.FIGURES) and len(found) == len(everything.FIGURES)
    for name in everything.FIGURES:
        module = importlib.import_module(f"experiments.{name}")
        assert isinstance(module.FIGURE, Figure) and module.FIGURE.name == name
        assert set(module.FIGURE.presets) == set(BASES)  # --preset is the same for all
        assert everything.question(name) == module.__doc__.splitlines()[0] and "?" in everything.question(name)


def test_one_that_fails_does_not_stop_the_others(tmp_path, capfd):
    failing = "print('out of luck', file=sys.stderr); sys.exit(2)"
    entries = everything.run_all(make_commands(tmp_path, second=failing), QUESTIONS, tmp_path)
    assert ran(tmp_path) == ["first", "second", "third"]
    assert [entry.status for entry in entries] == ["not run", "failed", "not run"]
    log = (tmp_path / "second.log").read_text().splitlines()
    assert log[0].startswith("python -c ") and log[1:] == ["out of luck", "exit status 2"]
    said = capfd.readouterr().out
    assert re.findall(r"^\[.*", said, re.M) == ["[1/3] first", "[2/3] second", "[3/3] third"] and "out of luck" in said
    assert "out of luck" in Page((tmp_path / "index.html").read_text()).text
    entries = everything.run_all(make_commands(tmp_path), QUESTIONS, tmp_path)
    assert not (tmp_path / "second.log").exists() and "failed" not in [entry.status for entry in entries]


def test_one_that_was_stopped_stops_the_others_and_has_not_failed(tmp_path):
    with pytest.raises(Interrupted, match=r"second \(2 of 3\)\. Rerun the same command"):
        everything.run_all(make_commands(tmp_path, second=f"sys.exit({STOPPED})"), QUESTIONS, tmp_path)
    assert ran(tmp_path) == ["first", "second"] and not list(tmp_path.glob("*.log"))
    assert (tmp_path / "index.html").exists()


@pytest.mark.parametrize("status", [STOPPED, 130, 0])
def test_a_signal_to_all_stops_the_one_that_runs_and_the_rest(tmp_path, status):
    """Whatever the launcher makes of it; once it was stopped it has not failed."""
    stop = f"import os, signal, time; signal.signal(15, lambda *_: sys.exit({status})); "
    stop += "os.kill(os.getppid(), 15); time.sleep(60)"
    with pytest.raises(Interrupted):
        everything.run_all(make_commands(tmp_path, second=stop), QUESTIONS, tmp_path)
    assert ran(tmp_path) == ["first", "second"] and not list(tmp_path.glob("*.log"))


@pytest.mark.parametrize(
    "flags, parts",
    [
        (["--only=fig9"], ["--only=fig9", *everything.FIGURES]),
        (["--preset=huge"], ["--preset=huge", "smoke|laptop|gpu|paper"]),
        (["--run_dir=/proc/nowhere"], ["--run_dir=/proc/nowhere", "name another"]),
        (["--run_dir=/dev/null"], ["--run_dir=/dev/null", "name another"]),
        ([f"--run_dir={ROOT / 'docs'}"], ["--run_dir=", "is not empty and holds no figures' runs"]),
    ],
)
def test_a_mistake_is_one_clear_line(flags, parts, tmp_path):
    done = command("experiments.all", "--preset=smoke", *flags, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and not list(tmp_path.iterdir())
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and all(part in line for part in parts)


@pytest.mark.thorough
def test_smoke_of_everything(tmp_path):
    """All figures, one that fails among them: its directory holds something else."""
    directory, (*works, fails) = tmp_path / "all", everything.FIGURES
    (directory / fails).mkdir(parents=True)
    (directory / fails / "thesis.tex").write_text("precious")
    done = command("experiments.all", "--preset=smoke", f"--run_dir={directory}")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"{fails} failed; error: --run_dir=") and "holds no run" in line
    assert line.endswith(str(directory / f"{fails}.log")) and (directory / f"{fails}.log").exists()
    page = Page((directory / "index.html").read_text())
    assert [row[:2] for row in page.table("figure", "verdict")] == [
        *([name, "not judged"] for name in works), [fails, "failed"]
    ]  # fmt: skip
    (directory / fails / "thesis.tex").unlink()
    again = command("experiments.all", "--preset=smoke", f"--run_dir={directory}")
    assert again.returncode == 0 and again.stderr == "" and again.stdout.count("already finished") == len(works)
    assert "(1 of " not in again.stdout, "tests of a figure's own are not made twice"
    for name in everything.FIGURES:
        assert (directory / name / "report.html").exists() and (directory / name / "figure.pdf").exists()
    found = {name: (directory / name / "results.csv").read_text() for name in everything.FIGURES}
    assert ",unseen,no_op/near_miss," in found["fig2b_no_ops"] and ",seen_by_share," in found["fig3_long_tail"]
    assert found["table1_occurrences"].count(",unseen,occurrences_tested=1+2/has_op,") == 2 * 3
    assert {row["factor"] for row in read_table(directory / "threshold_scaling" / "figure.csv")} == {"width", "rate"}
