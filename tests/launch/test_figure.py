"""A figure's launcher, called as a function."""

import dataclasses
import json

from experiments import fig2a_instruction_count as fig2a
from instrdiv.config.settings import _SETTINGS
from instrdiv.launch.figure import launch
from instrdiv.runtime.tables import read_table

FLAGS = ["--preset=smoke", "--seeds=1", "--tests=16", "--dev_tests=16", "--config.epochs=2", "--config.layers=1"]


def test_it_runs_twice_in_one_process_with_other_flags(tmp_path, capsys):
    for instructions in (4, 16):
        run_dir = tmp_path / f"of {instructions}"
        flags = [*FLAGS, f"--config.instructions={instructions}", f"--run_dir={run_dir}"]
        assert launch(fig2a.FIGURE, flags) == 0
        assert {row["instructions"] for row in read_table(run_dir / "results.csv")} == {instructions}
        command = json.loads((run_dir / "provenance.json").read_text())["command"]
        assert command == ["fig2a_instruction_count.py", *flags]
        assert "Not judged" in capsys.readouterr().out
        page = (run_dir / "report.html").read_text()
        assert "python -m experiments.fig2a_instruction_count" in page


def test_a_mistake_and_a_plea_for_help_are_a_status(tmp_path, capsys):
    assert launch(fig2a.FIGURE, [*FLAGS, "--config.instructions=16,16", f"--run_dir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --config.instructions=16,16: lists 16 twice") and said.count("\n") == 1
    assert launch(fig2a.FIGURE, ["--help"]) == 0
    assert capsys.readouterr().out.startswith(fig2a.__doc__.splitlines()[0])
    assert not list(tmp_path.iterdir())


def test_the_flags_are_those_of_the_presets_own_setting(capsys, monkeypatch):
    monkeypatch.setattr("instrdiv.config.settings._SETTINGS", _SETTINGS.copy())  # a subclass takes the task's place

    class Other(type(fig2a.PRESETS["smoke"].base)):
        """Another setting, with the fields of the first."""

    other = {
        name: dataclasses.replace(preset, base=Other(**dataclasses.asdict(preset.base)))
        for name, preset in fig2a.PRESETS.items()
    }
    assert launch(dataclasses.replace(fig2a.FIGURE, presets=other), ["--help"]) == 0
    assert "--config.instructions" in capsys.readouterr().out


def test_a_figure_without_a_preset_laptop_has_its_first_one_by_default(tmp_path, capsys):
    presets = {"tiny": fig2a.PRESETS["smoke"], "other": fig2a.PRESETS["laptop"]}
    figure = dataclasses.replace(fig2a.FIGURE, presets=presets)
    assert launch(figure, [*FLAGS[1:], "--config.instructions=4,4", f"--run_dir={tmp_path}"]) == 2
    assert "lists 4 twice" in capsys.readouterr().err
    assert launch(figure, ["--help"]) == 0
    assert "(default: tiny)" in capsys.readouterr().out
