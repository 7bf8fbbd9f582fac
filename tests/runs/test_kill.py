"""A run that is killed again and again, at any instant, leaves the tables of one that was never interrupted."""

import contextlib
import dataclasses
import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest

from instrdiv.runtime.tables import read_cells
from tests.worlds import TINY

pytestmark = pytest.mark.thorough

#: Two groups, so that a kill may also fall between them; a checkpoint at every chunk's end.
GROUPS = [dataclasses.replace(TINY, epochs=4.0, reports=16, width=width) for width in (16, 32)]


def launch(path: str, cache: str) -> None:
    """In a process of its own: one launch, from whatever is there."""
    import jax

    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    from instrdiv.config.layout import Options
    from instrdiv.config.settings import Member
    from instrdiv.config.sweep import Sweep
    from instrdiv.runs.run import run
    from instrdiv.runtime.checkpoints import Schedule

    members = tuple(Member(setting, seed) for setting in GROUPS for seed in range(2))
    sweep = Sweep("killed", members, dev_tests=16, tests=24)
    run(sweep, path, Options(devices=2), progress=False, keep_params=False, schedule=Schedule(minutes=0))


def kill_when(process, path: Path, aim: str, chance: random.Random) -> bool:
    """Kills the process at an instant of the kind aimed at; False if it ended before."""
    begun, delay = time.monotonic(), chance.uniform(0, 6)
    most: dict[str, int] = {}
    while process.is_alive():
        files = files_of_steps(path / "checkpoints")
        saving = any("tmp" in step for step in files)
        deleting = any(count < most.get(step, 0) for step, count in files.items() if "tmp" not in step)
        most |= {step: max(count, most.get(step, 0)) for step, count in files.items()}
        now = {"saving": saving, "deleting": deleting, "anywhere": time.monotonic() - begun > delay}[aim]
        # Past the first sight of it, some of the time: saving and deleting take a few tens of milliseconds.
        if now and chance.random() < 0.3:
            time.sleep(chance.uniform(0, 0.03) if aim == "saving" else 0)
            process.kill()
            process.join()
            return True
        time.sleep(0.0005)
    process.join()
    return False


def files_of_steps(path: Path) -> dict[str, int]:
    """How many files each step's directory holds; what vanishes meanwhile is not there."""
    counts: dict[str, int] = {}
    for folder, _, names in os.walk(path):
        parts = Path(folder).relative_to(path).parts
        if len(parts) >= 2:
            step = "/".join(parts[:2])
            counts[step] = counts.get(step, 0) + len(names)
    return counts


def kill_again_and_again(tmp_path: Path, kills: int, seed: int) -> dict[str, int]:
    """Kills launches at so many instants; every run they belong to must end like one that nobody touched."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["instrdiv.runs.run", "matplotlib"])

    def start(path: Path):
        process = context.Process(target=launch, args=(str(path), str(tmp_path / "cache")))
        process.start()
        return process

    untouched = tmp_path / "untouched"
    process = start(untouched)
    process.join()
    assert process.exitcode == 0
    chance, done, number = random.Random(seed), dict.fromkeys(("anywhere", "saving", "deleting"), 0), 0
    while sum(done.values()) < kills:
        path = tmp_path / f"killed{number}"
        number += 1
        finished = False
        while not finished:
            process = start(path)
            if sum(done.values()) < kills:
                aim = ("anywhere", "saving", "anywhere", "deleting")[sum(done.values()) % 4]
                if kill_when(process, path, aim, chance):
                    done[aim] += 1
                    assert_no_row_twice(path)
                    continue
            process.join()
            assert process.exitcode == 0
            finished = True
        for name in ("results.csv", "metrics.csv", "config.json", "resemblance.csv"):
            assert (path / name).read_bytes() == (untouched / name).read_bytes(), name
        left = {os.path.relpath(p, path) for p in path.rglob("*") if "tmp" in p.name or p.name.startswith(".")}
        assert left == {".lock"}
    return done


def assert_no_row_twice(path: Path) -> None:
    for name, key in (("results", ("member", "step", "split", "slice")), ("metrics", ("member", "step"))):
        rows = read_cells(path / f"{name}.csv")
        assert len({tuple(row[k] for k in key) for row in rows}) == len(rows)


@pytest.mark.parametrize("kills", [8, pytest.param(60, marks=pytest.mark.slow)])
def test_nothing_is_lost_or_doubled(tmp_path, kills):
    done = kill_again_and_again(tmp_path, kills, seed=kills)
    print(done)
    assert sum(done.values()) == kills and min(done.values()) >= kills // 8


@pytest.fixture(autouse=True)
def _no_server_left():
    yield
    with contextlib.suppress(Exception):
        multiprocessing.forkserver._forkserver._stop()
