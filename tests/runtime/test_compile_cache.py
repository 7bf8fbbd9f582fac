"""Compiled programs are kept where they should be, give the same results when read, and never get in the way."""

import json
import logging
import os
import re
import subprocess
import sys

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from instrdiv.config.layout import Options
from instrdiv.config.sweep import Sweep
from instrdiv.evaluation import decoding, exact_match
from instrdiv.runs.run import run
from instrdiv.runtime import compile_cache
from instrdiv.runtime.compile_cache import prune
from instrdiv.training import members
from tests.commands import ENVIRONMENT, ROOT
from tests.worlds import TINY

#: Says what was asked of the cache, and where that is; then compiles one program.
SCRIPT = """
import json, sys
import jax
from instrdiv import use_compile_cache
events = []
jax.monitoring.register_event_listener(lambda name, **rest: events.append(name.rpartition("/")[2]))
said = []
use_compile_cache(said.append)
print(jax.jit(lambda x: 2 * x + 1)(20))
directory = jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None
print(json.dumps([said, directory, events.count("cache_hits"), events.count("cache_misses")]))
"""


def compile_one(**variables):
    """In a new process: (what it said, the directory, hits, misses). Nothing may come on standard error."""
    environment = {k: v for k, v in ENVIRONMENT.items() if not k.startswith(("JAX", "XDG"))} | variables
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    result, facts = done.stdout.splitlines()
    assert result == "41"
    said, directory, hits, misses = json.loads(facts)
    return said, directory, hits, misses


@pytest.fixture
def cache(tmp_path):
    """An empty cache of this process, for one test."""
    before = jax.config.jax_compilation_cache_dir

    def use(directory):
        jax.config.update("jax_compilation_cache_dir", directory)
        compilation_cache.reset_cache()

    use(str(tmp_path / "cache"))
    yield tmp_path / "cache"
    use(before)


SLOW = pytest.mark.slow


@pytest.mark.thorough
@pytest.mark.optimized
@pytest.mark.parametrize(
    "devices, data_parallel", [(2, 2), pytest.param(1, 1, marks=SLOW), pytest.param(2, 1, marks=SLOW)]
)
def test_a_program_that_is_read_gives_the_bytes_of_one_that_was_compiled(
    cache, tmp_path, caplog, devices, data_parallel
):
    sweep = Sweep.grid(TINY, seeds=1, dev_tests=16, tests=24, instructions=[4, 16])

    def tables(name):
        """As a new process would, without the programs that this one holds."""
        for programs in (members._chunk_program, members._init_program, exact_match._program, decoding._program):
            programs.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.DEBUG, "jax._src.compiler"):
            run(sweep, tmp_path / name, Options(devices, data_parallel), progress=False, keep_params=False)
        hits = [re.match(r"Persistent compilation cache hit for '(?:jit_)?(\w+)'", line) for line in caplog.messages]
        return {hit[1] for hit in hits if hit}, [
            (tmp_path / name / f"{table}.csv").read_bytes() for table in ("metrics", "results", "errors", "samples")
        ]

    hits, compiled = tables("compiled")
    assert not hits
    hits, read = tables("read")
    assert {"init_members", "train_chunk", "evaluate", "decode"} <= hits
    assert read == compiled


def test_programs_are_kept_and_one_that_is_damaged_is_replaced(tmp_path):
    directory = tmp_path / "instrdiv"
    said, used, hits, misses = compile_one(XDG_CACHE_HOME=str(tmp_path))
    assert (said, used, hits) == ([], str(directory), 0) and misses > 0
    assert compile_one(XDG_CACHE_HOME=str(tmp_path)) == ([], str(directory), misses, 0)
    entries = {path: path.read_bytes() for path in directory.glob("*-cache")}
    assert len(entries) == misses
    for path, content in entries.items():  # as a kill or a full disk leaves them; one is empty after a power cut
        path.write_bytes(content[: len(content) // 2] if path != min(entries) else b"")
    assert compile_one(XDG_CACHE_HOME=str(tmp_path)) == ([], str(directory), 0, misses)
    assert compile_one(XDG_CACHE_HOME=str(tmp_path)) == ([], str(directory), misses, 0)


@pytest.mark.parametrize("off", [{"JAX_COMPILATION_CACHE_DIR": ""}, {"JAX_ENABLE_COMPILATION_CACHE": "false"}])
def test_it_can_be_turned_off(tmp_path, off):
    assert compile_one(XDG_CACHE_HOME=str(tmp_path), **off) == ([], None, 0, 0)
    assert not list(tmp_path.iterdir())


def test_another_directory_can_be_named(tmp_path):
    said, used, _, misses = compile_one(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"), XDG_CACHE_HOME="/nowhere")
    assert (said, used) == ([], str(tmp_path / "mine"))
    assert len(list((tmp_path / "mine").glob("*-cache"))) == misses > 0


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"])
def test_where_nothing_can_be_kept_one_line_says_so(tmp_path, variable):
    (tmp_path / "file").write_text("")
    (line,), used, hits, misses = compile_one(**{variable: str(tmp_path / "file")})
    assert line.endswith("(not writable); set JAX_COMPILATION_CACHE_DIR to use another directory") and "\n" not in line
    assert (used, hits, misses) == (None, 0, 0)


def test_commands_use_it(tmp_path):
    environment = ENVIRONMENT | {"XDG_CACHE_HOME": str(tmp_path)}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    shown = [sys.executable, "-m", "experiments.show_data", "--preset=smoke", "--num=1"]
    subprocess.run(shown, cwd=ROOT, env=environment, capture_output=True, check=True)
    assert list((tmp_path / "instrdiv").glob("*-cache"))


def test_what_was_not_used_for_longest_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "MOST_BYTES", 1000)
    (tmp_path / "xla").mkdir()
    for age, name in enumerate(["new", "xla/read_lately", "old", "older"]):
        (tmp_path / name).write_bytes(bytes(240))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - (100 if "read" in name else age)))
    prune(tmp_path)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 4  # 960 bytes are not too many
    (tmp_path / "newest").write_bytes(bytes(240))
    prune(tmp_path)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"newest", "new", "read_lately"}
    prune(tmp_path / "nowhere")
