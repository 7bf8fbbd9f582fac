"""The tests have the same names in every process, at any time: xdist refuses to run them otherwise."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def collect(seed):
    """A process that lists all tests, with a hash seed of its own, as the workers of xdist have."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    arguments = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "--collect-only", "-q"]
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(seed)}
    return subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.thorough
def test_names_of_tests_do_not_depend_on_process_and_time_and_fit_into_a_line():
    first = collect(1)
    time.sleep(2)
    second = collect(2)
    names, others = ([line for line in process.communicate()[0].splitlines() if "::" in line]
                     for process in (first, second))  # fmt: skip
    assert first.returncode == second.returncode == 0
    assert len(names) > 1000 and names == others
    assert [name for name in names if not (name.isascii() and name.isprintable()) or len(name) > 250] == []
    assert [name for name in names if "<lambda>" in name or " at 0x" in name] == []
