"""Mutation testing: do the tests notice a small mistake, made at random somewhere in the package?

    python -m pytest --cov=instrdiv --cov-context=test --cov-report= --durations=0 > durations.txt
    python -m tools.mutants --coverage=.coverage --durations=durations.txt --out=mutants.csv

Mutants are drawn with a fixed seed from all comparisons, numeric and boolean constants, returned values, and index
expressions of ``instrdiv/``. Each is tested, in a copy of the working tree, by the tests that execute its line (fast
ones first) until one fails. The table has one row per mutant; ``killed_by`` names the test that failed. With
``--first=earlier.csv`` the test that killed a mutant in an earlier table runs first. A mutant is identified by its
number among all sites, which stays the same when only comments, docstrings, and messages change.
"""

from __future__ import annotations

import ast
import concurrent.futures
import contextlib
import itertools
import os
import queue
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import app, flags

from instrdiv.runtime.tables import read_table, write_table

ROOT = Path(__file__).parents[1]
COLUMNS = ("site", "file", "line", "kind", "original", "mutated", "result", "killed_by", "tests", "seconds")

#: A single test that takes longer than this is stopped, and counts as failed.
HANGING_SECONDS = 150

_SWAPPED: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
}  # fmt: skip


class Mutant(NamedTuple):
    """One change to one file: ``original``, at bytes ``start`` to ``end``, becomes ``mutated``."""

    site: int
    file: str
    line: int
    kind: str
    start: int
    end: int
    original: str
    mutated: str

    def apply(self, source: bytes) -> bytes:
        return source[: self.start] + self.mutated.encode() + source[self.end :]


class _Sites(ast.NodeVisitor):
    """Collects (kind, node, mutated text) in the order of the syntax tree, without annotations and text."""

    def __init__(self, source: bytes) -> None:
        self.source = source
        self.starts = list(itertools.accumulate(map(len, source.splitlines(keepends=True)), initial=0))
        self.found: list[tuple[str, ast.expr, str]] = []

    def span(self, node: ast.expr) -> tuple[int, int]:
        """First byte of the node, and the byte after its last."""
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.starts[node.lineno - 1] + node.col_offset, self.starts[node.end_lineno - 1] + node.end_col_offset

    def text(self, node: ast.expr) -> str:
        start, end = self.span(node)
        return self.source[start:end].decode()

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Skipped: before Python 3.12, positions inside an f-string are not those of the file."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value:
            self.visit(node.value)

    def visit_arg(self, node: ast.arg) -> None:
        """Skipped: an argument has only an annotation."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for part in (*node.decorator_list, node.args, *node.body):
            self.visit(part)

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1:
            left, right = self.text(node.left), self.text(node.comparators[0])
            self.found.append(("comparison", node, f"({left}) {_SWAPPED[type(node.ops[0])]} ({right})"))
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.found.append(("constant", node, str(not node.value)))
        elif isinstance(node.value, int | float):
            self.found.append(("constant", node, f"({self.text(node)} + 1)"))

    def visit_Return(self, node: ast.Return) -> None:
        if node.value and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self.found.append(("return", node.value, "None"))
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        index = node.slice
        if isinstance(index, ast.Slice):
            for bound in (index.lower, index.upper):
                if bound and not isinstance(bound, ast.Constant):
                    self.found.append(("index", bound, f"({self.text(bound)}) + 1"))
        elif isinstance(index, ast.Name | ast.BinOp | ast.UnaryOp | ast.Call):
            self.found.append(("index", index, f"({self.text(index)}) - 1"))
        self.generic_visit(node)


def sites(root: Path) -> list[Mutant]:
    """Every mutant there is, files in order of their names."""
    found: list[Mutant] = []
    for path in sorted((root / "instrdiv").rglob("*.py")):
        name = path.relative_to(root).as_posix()
        visitor = _Sites(path.read_bytes())
        visitor.visit(ast.parse(visitor.source))
        for kind, node, mutated in visitor.found:
            found.append(Mutant(len(found), name, node.lineno, kind, *visitor.span(node), visitor.text(node), mutated))
    return found


def draw(root: Path, count: int, seed: int) -> list[Mutant]:
    """``count`` mutants, in order; the same for the same sites and seed."""
    return sorted(random.Random(seed).sample(sites(root), count))


class Coverage:
    """Which tests execute a line, the fastest first.

    Args:
      path: of a coverage database with contexts (``--cov-context=test``).
      durations: the output of ``pytest --durations=0``.
      root: the directory that the tests ran in.
    """

    def __init__(self, path: Path, durations: Path, root: Path) -> None:
        self._seconds: dict[str, float] = {}
        for line in durations.read_text().splitlines():
            if match := re.match(r"\s*([\d.]+)s (?:call|setup|teardown)\s+(\S+?)(\[.*)?$", line):
                self._seconds[match[2]] = self._seconds.get(match[2], 0.0) + float(match[1])
        self._database = sqlite3.connect(path, check_same_thread=False)
        self._files = {Path(name).relative_to(root).as_posix(): number
                       for number, name in self._database.execute("select id, path from file")
                       if Path(name).is_relative_to(root)}  # fmt: skip

    def tests(self, file: str, line: int) -> list[str]:
        """Node ids, without parameters."""
        found = set()
        rows = self._database.execute(
            "select context.context, numbits from line_bits join context on context.id = context_id where file_id = ?",
            (self._files.get(file, -1),),
        )
        for context, bits in rows:
            if context and line // 8 < len(bits) and bits[line // 8] >> line % 8 & 1:
                found.add(context.partition("|")[0].partition("[")[0])
        return sorted(found, key=lambda test: (self._seconds.get(test, 0.0), test))


def judge(tree: Path, mutant: Mutant, tests: Sequence[str], minutes: float) -> tuple[str, str]:
    """The result, ``killed``, ``survived``, or ``out of time``, and the test that failed."""
    path = tree / mutant.file
    source = path.read_bytes()
    path.write_bytes(mutant.apply(source))
    options = (
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "-x",
        "-v",
        "-n0",
        "-m",
        "not slow",
        "--no-header",
        "--tb=no",
    )
    hanging = ("-o", f"faulthandler_timeout={HANGING_SECONDS}", "-o", "faulthandler_exit_on_timeout=true")
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    # A test may write into the tree, so its output goes elsewhere.
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "pytest", *options, *hanging, *tests], cwd=tree, env=environment, text=True,
            stdout=output, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(60 * minutes)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            path.write_bytes(source)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        lines = output.read()
    if status is None:
        return "out of time", ""
    if status == 0:
        return "survived", ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+?::[^\s\[]+|\S+)", lines, flags=re.MULTILINE)
    # The last test named is the one that crashed, hung, or could not be collected.
    named = re.findall(r"^(tests/\S+?\.py(?:::[^\s\[]+)?)", lines, flags=re.MULTILINE)
    return "killed", failed[1] if failed else (named[-1] if named else "collection")


@contextlib.contextmanager
def trees(count: int) -> Iterator[queue.SimpleQueue[Path]]:
    """Copies of the working tree, with its cache of compiled programs and without its environments."""
    free: queue.SimpleQueue[Path] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory() as directory:
        for number in range(count):
            tree = Path(directory) / str(number)
            tree.mkdir()
            for path in ROOT.iterdir():
                if path.is_file():
                    shutil.copy(path, tree)
                elif path.name not in ("runs", ".git") and not path.name.startswith(".venv"):
                    shutil.copytree(path, tree / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            free.put(tree)
        yield free


def run(
    mutants: Sequence[Mutant], coverage: Coverage, first: dict[int, str], out: Path, minutes: float, jobs: int
) -> None:
    """Tests the mutants; the table is written again after each."""
    rows: list[dict[str, Any]] = []

    def work(mutant: Mutant, free: queue.SimpleQueue[Path]) -> None:
        tree, start = free.get(), time.monotonic()
        tests = coverage.tests(mutant.file, mutant.line)
        result, killer = ("not covered", "") if not tests else ("", "")
        if (known := first.get(mutant.site)) and (tree / known.partition("::")[0]).exists():
            result, killer = judge(tree, mutant, [known], minutes)
        if tests and result != "killed":
            result, killer = judge(tree, mutant, tests, minutes)
        free.put(tree)
        row = mutant._asdict() | {"result": result, "killed_by": killer, "tests": len(tests)}
        rows.append(row | {"seconds": round(time.monotonic() - start, 1)})
        write_table(out, sorted(rows, key=lambda row: row["site"]), COLUMNS)
        print(f"{len(rows)}/{len(mutants)} {result} {mutant.file}:{mutant.line} {killer}", flush=True)

    with trees(jobs) as free, concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda mutant: work(mutant, free), mutants))


COUNT = flags.DEFINE_integer("count", 60, "Number of mutants to draw.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the draw.")
COVERAGE = flags.DEFINE_string("coverage", ".coverage", "Coverage database, written with --cov-context=test.")
COVERED = flags.DEFINE_string("covered", "", "Directory that the coverage was measured in, if not this one.")
DURATIONS = flags.DEFINE_string("durations", "durations.txt", "Output of pytest --durations=0.")
FIRST = flags.DEFINE_string("first", "", "Earlier table: the test that killed a mutant there runs first.")
OUT = flags.DEFINE_string("out", "mutants.csv", "Table to write.")
MINUTES = flags.DEFINE_float("minutes", 6.0, "Time for the tests of one mutant.", lower_bound=0.1)
JOBS = flags.DEFINE_integer("jobs", 2, "Mutants tested at the same time.", lower_bound=1)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument: {argv[1]}")
    for path in filter(None, (COVERAGE.value, DURATIONS.value, FIRST.value)):
        if not Path(path).is_file():
            raise app.UsageError(f"no such file: {path}")
    earlier = read_table(Path(FIRST.value), text=("killed_by",)) if FIRST.value else []
    first = {row["site"]: row["killed_by"] for row in earlier if row["killed_by"]}
    coverage = Coverage(Path(COVERAGE.value), Path(DURATIONS.value), Path(COVERED.value or ROOT).resolve())
    mutants = draw(ROOT, COUNT.value, SEED.value)
    run(mutants, coverage, first, Path(OUT.value), MINUTES.value, JOBS.value)


if __name__ == "__main__":
    app.run(main)
