"""The seam holds: string rewriting is deleted, and other tasks go through the same code as before.

In a copy of the repository without ``instrdiv/tasks/strings`` and what rests on it, a task of one's own and a file of
JSON lines are planned, trained, resumed, evaluated, decoded, reported and exported.
"""

import ast
import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from instrdiv.runtime.tables import read_cells
from instrdiv.tasks.strings.rewriting import Rewriting
from instrdiv.tasks.task import Task
from tests.commands import ENVIRONMENT, ROOT

#: What is string rewriting itself, and goes first.
REMOVED = ("instrdiv.tasks.strings", "instrdiv.tasks.encrypted")
#: What may know string rewriting, and so goes with it. Nothing else may: not the evaluation, the runs, the reports.
EXCEPTIONS = {
    "instrdiv.config.presets": "the settings and sizes of string rewriting",
    "instrdiv.training.pretraining": "the small base learns plain rewriting before its adapters learn encrypted rules",
    "instrdiv.launch.finetuning": "makes that base",
    "experiments.fig2a_instruction_count": "a figure about string rewriting",
    "experiments.fig2b_no_ops": "a figure about string rewriting",
    "experiments.fig3_long_tail": "a figure about string rewriting",
    "experiments.table1_occurrences": "a figure about string rewriting",
    "experiments.threshold_scaling": "a figure about string rewriting",
    "experiments.diversity_report": "starts from a preset of string rewriting",
    "experiments.finetune_encrypted": "adapters that learn encrypted rewriting",
    "experiments.finetune_mixtures": "its presets mix plain and encrypted rewriting",
    "experiments.all": "runs the figures above",
}
#: Of ``instrdiv/__init__.py``, the names that string rewriting brings.
PUBLIC_NAMES = {"presets", "Setting", "MarkovAlgorithm", "rewrite"}

OF_REWRITING = {f.name for f in dataclasses.fields(Rewriting)} - {f.name for f in dataclasses.fields(Task)}

IMPORTS = """
import importlib, json, pathlib
paths = [path.with_suffix("") for room in ("instrdiv", "experiments") for path in pathlib.Path(room).rglob("*.py")]
names = sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)
failed = {}
for name in names:
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = [type(error).__name__, getattr(error, "name", None) or str(error)]
print(json.dumps([names, failed]))
"""

SCENARIO = """
import json, pathlib, shutil, sys

import experiments.evaluate, experiments.export, experiments.show_data
import instrdiv
from instrdiv.launch import figure
from instrdiv.reports.report import write_report
from instrdiv.runs.run import run
from instrdiv.runs.saved import SavedRun
from instrdiv.tasks.known import load_file

task_file, *flags = sys.argv[1:]
FIGURE = load_file(task_file).FIGURE
here, exported = pathlib.Path("run"), pathlib.Path("exported")
flags = ["--preset=smoke", "--seeds=1", f"--run_dir={here}", "--checkpoint_steps=16", "--devices=1", *flags]
flags += ["--config.layers=1", "--config.width=16"]
KEPT = ("results.csv", "metrics.csv", "errors.csv", "samples.csv", "resemblance.csv")

def tables():
    return {name: (here / name).read_bytes() for name in KEPT}

assert figure.launch(FIGURE, flags) == 0
whole, saved = tables(), SavedRun(here)
steps = saved.steps(saved.groups[0])
assert len(steps) > 1, steps
for name in ("results.csv", "errors.csv", "samples.csv", "resemblance.csv", "report.html", "figure.png"):
    (here / name).unlink()
shutil.rmtree(here / "checkpoints" / "g0" / str(steps[-1]))
assert figure.launch(FIGURE, flags) == 0
assert tables() == whole, "resumed, the tables differ"
assert (here / "figure.png").exists()

which = [f"--run_dir={here}", f"--task={task_file}"]
assert experiments.evaluate.launch([*which, "--suite=all", "--show=2", "--devices=1"]) == 0
assert "rule_blanked" in write_report(here).read_text()
member = saved.sweep.members[0].id
assert experiments.export.launch([*which, f"--member={member}", f"--out={exported}"]) == 0
for split in ("train", "unseen"):
    told = [flag for flag in flags if flag.startswith("--config.") and "," not in flag]
    told += ["--config.instructions=4", f"--split={split}", "--num=2", f"--task={task_file}"]
    assert experiments.show_data.launch(["--preset=smoke", *told]) == 0

again = run(saved.sweep, here, progress=False)
assert instrdiv.plan(saved.sweep).groups[0].steps == saved.sweep.members[0].setting.steps
assert set(again.params) == {member.id for member in saved.sweep.members}
assert again.headline == "all" and again.threshold().text
in_memory = run(saved.sweep, progress=False, options=instrdiv.Options(devices=1))
def scores(rows):
    keys = ("member", "split", "slice", "exact_match", "tests")
    return [[row[key] for key in keys] for row in rows if "/" not in row["slice"]]

assert scores(in_memory.results) == scores(again.results)
assert not [name for name in sys.modules if name.startswith("instrdiv.tasks.strings")]
"""


def without_rewriting(source: str) -> str:
    """``instrdiv/__init__.py`` without the names that string rewriting brings."""
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            node.names = [alias for alias in node.names if alias.name not in PUBLIC_NAMES]
    tree.body = [node for node in tree.body if not isinstance(node, ast.ImportFrom) or node.names]
    return ast.unparse(tree)


def python(root: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = ENVIRONMENT | {"PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd or root, env=environment, capture_output=True, text=True, timeout=600
    )


def module_path(root: Path, module: str) -> Path:
    return root / (module.replace(".", "/") + ".py")


@pytest.fixture(scope="module")
def stripped(tmp_path_factory) -> Path:
    """A copy of library and launchers without string rewriting; the exceptions are still there."""
    root = tmp_path_factory.mktemp("stripped")
    for name in ("instrdiv", "experiments"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(root / "instrdiv" / "tasks" / "strings")
    module_path(root, "instrdiv.tasks.encrypted").unlink()
    init = root / "instrdiv" / "__init__.py"
    init.write_text(without_rewriting(init.read_text()))
    shutil.copy(ROOT / "tests" / "tasks" / "letter_order.py", root)
    return root


@pytest.fixture(scope="module")
def bare(stripped) -> Path:
    """The same without the exceptions; made once the imports have been looked at."""
    done = python(stripped, "-c", IMPORTS)
    assert done.returncode == 0, done.stderr
    (stripped / "imports.json").write_text(done.stdout.splitlines()[-1])
    for module in EXCEPTIONS:
        module_path(stripped, module).unlink()
    return stripped


def test_only_the_exceptions_need_string_rewriting(bare):
    """No more than those, and none of them without need."""
    names, failed = json.loads((bare / "imports.json").read_text())
    assert {"instrdiv.runs.run", "instrdiv.launch.figure", "experiments.evaluate"} <= set(names)
    assert failed.keys() == EXCEPTIONS.keys()
    for kind, what in failed.values():
        assert kind == "ModuleNotFoundError" and what.startswith(REMOVED), failed


def table_of_json_lines(path: Path) -> Path:
    rows = [
        {"instruction": f"say {a}{b} before", "input": word, "answer": f"{a}{b}{word}"}
        for a in "abcdefghijklé"
        for b in "xyzw"
        for word in ("u", "vv", "uv", "vuv")
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.thorough
@pytest.mark.parametrize("task", ["letter_order", "jsonl"])
def test_another_task_goes_through_all_of_it(bare, tmp_path, task):
    if task == "jsonl":
        data = table_of_json_lines(tmp_path / "rows.jsonl")
        flags = [str(bare / "experiments" / "jsonl_instructions.py"), f"--config.data={data}"]
        flags += ["--tests=8", "--dev_tests=4"]
    else:
        flags = [str(bare / "letter_order.py"), "--config.shortest=2"]
    done = python(bare, "-c", SCENARIO, *flags, cwd=tmp_path)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    for word in ("Not judged", "group g0: resuming from step 16", "held_out/all", "decoded  "):
        assert word in done.stdout + done.stderr, done.stdout + done.stderr

    here = tmp_path / "run"
    results, samples = read_cells(here / "results.csv"), read_cells(here / "samples.csv")
    assert len(OF_REWRITING) > 10 and not OF_REWRITING & set(results[0])
    assert not {"pattern", "replacement"} & set(samples[0])
    assert json.loads((here / "config.json").read_text())["task"] == task
    assert {row["split"] for row in results} == {"unseen_dev", "unseen", "seen"}
    assert {"all", "held_out/all", "rule_blanked/all"} <= {row["slice"] for row in results}
    if task == "letter_order":
        assert {"repeats", "no_repeats", "rules_shuffled/all"} <= {row["slice"] for row in results}
        for row in samples:
            assert row["answer"] == "".join(sorted(row["word"], key=row["order"].index))
    else:
        for row in samples:
            assert row["answer"] == row["instruction"][4:6] + row["input"]
    page = (here / "report.html").read_text()
    assert not any(word in page for word in ("has-op", "has_op", "pattern", "no_op")), "rewriting's words in a report"
    assert task in (tmp_path / "exported" / "README.md").read_text()
