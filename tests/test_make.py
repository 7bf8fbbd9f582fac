"""The Makefile installs what is missing, and only that; and the user's environment stays out of it."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")

#: An interpreter that writes down what it is asked for; installing fails where there is a file ``broken``.
PYTHON = """#!/bin/sh
case "$*" in
  "-I -c "*) echo "{name}" ;;
  "-c "*) exit {too_old} ;;
  "-m venv "*) echo "venv {name}" >> log; rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  "-m pip "*) for last; do :; done; echo "pip $last" >> log; test ! -e broken ;;
  *) echo "run $2${{PYTHONPATH+ PYTHONPATH}}${{PIP_TARGET+ PIP_TARGET}} $PIP_CONSTRAINT" >> log ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    """Runs make; returns its exit status and what was asked for."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "pyproject.toml").touch()
    for name, too_old in (("python3", 0), ("other", 0), ("old", 1)):
        (tmp_path / name).write_text(PYTHON.format(name=name, too_old=too_old))
        (tmp_path / name).chmod(0o755)
    user = {"PYTHONPATH": "old", "PIP_TARGET": "elsewhere", "PIP_CONSTRAINT": "constraints"}
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **user}

    def run(*arguments):
        log = tmp_path / "log"
        log.write_text("")
        done = subprocess.run(["make", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        return done.returncode, log.read_text().splitlines()

    return run


DEMO, TEST = "run experiments.fig2a_instruction_count constraints", "run pytest constraints"


def test_what_is_there_is_not_installed_again(make):
    assert make("demo") == (0, ["venv python3", "pip .", DEMO])
    assert make("demo") == (0, [DEMO])
    assert make("test") == (0, ["pip .[test]", TEST])
    assert make("test") == make("test", "PYTHON=python3") == (0, [TEST])
    assert make("demo") == (0, [DEMO])


def test_other_extras_are_installed_and_another_interpreter_recreates_it(make):
    make("test")
    assert make("test", "EXTRAS=test, export") == (0, ["pip .[test, export]", TEST])
    assert make("test", "EXTRAS=test,export") == make("test") == (0, [TEST])
    assert make("demo", "PYTHON=other") == (0, ["venv other", "pip .", DEMO])
    assert make("demo") == (0, [DEMO])  # keeps the one that was named
    assert make("test", "EXTRAS=test,export") == (0, ["pip .[test,export]", TEST])
    status, asked = make("test", "PYTHON=old")
    assert status != 0 and asked == []
    assert make("demo") == (0, [DEMO])


def test_everything_is_tested_with_the_packages_it_is_compared_to(make, tmp_path):
    """Linters and type checker, then the tests: the fast ones and the thorough ones."""
    status, asked = make("test-all")
    assert status != 0 and asked == ["venv python3", "pip .", "pip .[test,transformers]"]  # there is no linter
    for tool in ("ruff", "mypy"):
        shutil.copy(tmp_path / "python3", tmp_path / ".venv" / "bin" / tool)
    status, asked = make("test-all")
    assert status == 0 and asked[-2:] == [TEST, TEST]


def test_a_changed_pyproject_is_installed_again(make, tmp_path):
    make("test")
    for made in (tmp_path / ".venv").iterdir():  # an hour ago: two files of the same tick of the clock look alike
        os.utime(made, (time.time() - 3600,) * 2)
    assert make("test") == (0, ["pip .", "pip .[test]", TEST])
    assert make("test") == (0, [TEST])


def test_what_failed_is_tried_again(make, tmp_path):
    make("demo")
    (tmp_path / "broken").touch()
    status, asked = make("test")
    assert status != 0 and asked == ["pip .[test]"]
    status, asked = make("demo", "PYTHON=other")
    assert status != 0 and asked == ["venv other", "pip ."]
    (tmp_path / "broken").unlink()
    assert make("test") == (0, ["pip .", "pip .[test]", TEST])
