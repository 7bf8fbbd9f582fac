"""Mutants: what is drawn, which tests execute a line, and the verdict on a small package."""

import ast
import sqlite3

import pytest

from tools.mutants import ROOT, Coverage, draw, judge, sites

SOURCE = '''"""Docs say 7."""

def larger(a: "int | 5", b, most=3):
    x = [a, b, f"{a + 1}"]
    if a < b and True:
        return x[b - a:]
    return None
'''
TESTS = """
from instrdiv.small import larger

def test_branch():
    assert larger(1, 2)

def test_nothing():
    assert larger(2, 1) is None
"""


@pytest.fixture
def tree(tmp_path):
    for folder, name, text in (("instrdiv", "small.py", SOURCE), ("tests", "test_small.py", TESTS)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    return tmp_path


def test_sites_are_comparisons_constants_returns_and_indices_without_text_and_annotations(tree):
    assert [(mutant.kind, mutant.original, mutant.mutated) for mutant in sites(tree)] == [
        ("constant", "3", "(3 + 1)"),
        ("comparison", "a < b", "(a) <= (b)"),
        ("constant", "True", "False"),
        ("return", "x[b - a:]", "None"),
        ("index", "b - a", "(b - a) + 1"),
    ]


def test_every_mutant_of_the_package_is_python_and_a_draw_can_be_repeated():
    sources = {path: path.read_bytes() for path in (ROOT / "instrdiv").rglob("*.py")}
    drawn = draw(ROOT, 40, seed=1)
    assert drawn == draw(ROOT, 40, seed=1) != draw(ROOT, 40, seed=2)
    assert {mutant.kind for mutant in drawn} == {"comparison", "constant", "return", "index"}
    for mutant in drawn:
        mutated = mutant.apply(sources[ROOT / mutant.file])
        assert ast.parse(mutated) and mutated != sources[ROOT / mutant.file], mutant


def test_tests_that_execute_a_line_are_found_the_fastest_first(tmp_path):
    database = sqlite3.connect(tmp_path / "coverage")
    database.executescript("""
        create table file (id integer, path text);
        create table context (id integer, context text);
        create table line_bits (file_id integer, context_id integer, numbits blob);
    """)
    database.execute("insert into file values (1, ?)", (str(tmp_path / "instrdiv/small.py"),))
    contexts = [
        "",
        "tests/a.py::slow[1]|run",
        "tests/a.py::slow[2]|run",
        "tests/b.py::fast|setup",
        "tests/b.py::not|run",
    ]
    database.executemany("insert into context values (?, ?)", enumerate(contexts))
    lines = [{12}, {12}, {12}, {3, 12}, {3, 11, 13}]
    bits = [sum(1 << line for line in of).to_bytes(2, "little") for of in lines]
    database.executemany("insert into line_bits values (1, ?, ?)", enumerate(bits))
    database.commit()
    (tmp_path / "durations").write_text("3.00s call     tests/a.py::slow[1]\n0.10s setup    tests/b.py::fast\n")
    coverage = Coverage(tmp_path / "coverage", tmp_path / "durations", tmp_path)
    assert coverage.tests("instrdiv/small.py", 12) == ["tests/b.py::fast", "tests/a.py::slow"]
    assert coverage.tests("instrdiv/small.py", 4) == coverage.tests("instrdiv/other.py", 12) == []


def test_a_mutant_is_killed_by_the_test_that_fails_or_survives(tree):
    constant, comparison, _, returned, _ = sites(tree)
    tests = ["tests/test_small.py::test_branch", "tests/test_small.py::test_nothing"]
    assert judge(tree, constant, tests, minutes=1) == ("survived", "")
    assert judge(tree, comparison, tests, minutes=1) == ("survived", "")
    assert judge(tree, returned, tests, minutes=1) == ("killed", tests[0])
    assert judge(tree, returned, tests[1:], minutes=1) == ("survived", "")
    assert (tree / "instrdiv" / "small.py").read_text() == SOURCE
