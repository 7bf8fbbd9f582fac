"""The notebook runs as it stands, on a tiny sweep: what a reader copies from it works."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import pytest

import instrdiv
from tests.worlds import TINY

NOTEBOOK = Path(__file__).parents[2] / "docs" / "example.ipynb"


@pytest.fixture(scope="module")
def cells():
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


@pytest.mark.thorough
def test_the_cells_run(cells, monkeypatch, capsys):
    """In plain Python, in order; only the base setting is smaller."""
    tiny = dataclasses.replace(TINY, instructions=16, examples=4096, epochs=8 / 4096, reports=1, warmup_steps=0)
    monkeypatch.setattr(instrdiv.presets, "LAPTOP", tiny)
    monkeypatch.setattr(instrdiv, "use_cpu_cores", lambda: None)  # tests have simulated devices already
    names: dict = {}
    for cell in cells:
        exec(compile(source(cell), NOTEBOOK.name, "exec"), names)
    assert {row["instructions"] for row in names["run"].results} == {16, 128, 512, 4096}
    assert "martissippi" in capsys.readouterr().out


def test_the_first_example_has_less_than_ten_lines_and_all_names_are_public(cells):
    assert len([line for line in source(cells[0]).splitlines() if line.strip()]) < 10
    for node in ast.walk(ast.parse("\n".join(map(source, cells)))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "instrdiv":
            assert node.attr in instrdiv.__all__
        assert not (isinstance(node, ast.Attribute) and node.attr.startswith("_"))


def test_it_is_executed_shows_the_step_and_is_small(cells):
    """As committed: every cell ran, in order, without an error; the picture is in it; nothing tells of a machine."""
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} <= {"stream", "execute_result"}
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.get("name") == "stderr" for output in outputs)
    text = "".join("".join(output.get("text", "")) for output in outputs)
    shown = {
        (int(count.replace(",", "")), split): float(value)
        for count, split, value in re.findall(r"I = +([\d,]+) +(\w+) rules: ([\d.]+)", text)
    }
    assert shown[16, "unseen"] < 0.1 < 0.9 < shown[4096, "unseen"] and shown[16, "seen"] > 0.9
    raw = NOTEBOOK.read_text()
    assert len(raw) < 200_000 and not re.search(r"/(tmp|home|root|usr|work)/", raw)
