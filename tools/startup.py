"""Seconds from launching a command to its first training step, with a cold and with a warm compilation cache."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAUNCHER = "experiments.fig2a_instruction_count"


def measure(preset: str, steps: int) -> dict[str, float]:
    """Launches figure 2a twice, sharing a cache directory that is empty at first: ``cold``, then ``warm``.

    ``steps`` is the length of the preset's schedule: with a report for every step, the first one comes after one step.
    """
    with tempfile.TemporaryDirectory() as folder:
        seconds = {}
        for cache in ("cold", "warm"):
            flags = [f"--preset={preset}", f"--config.reports={steps}", f"--run_dir={folder}/{cache}"]
            seconds[cache] = _seconds_to_first_step(flags, Path(folder) / "cache")
        return seconds


def _seconds_to_first_step(flags: list[str], cache: Path) -> float:
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", LAUNCHER, *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    last = ""
    try:
        for last in process.stderr:
            if ", step " in last:
                return time.perf_counter() - started
    finally:
        process.kill()
        process.wait()
    raise RuntimeError(f"{LAUNCHER} ended before its first step: {last.strip()}")
