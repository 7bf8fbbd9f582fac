"""Commands, as a user types them: in this process where they can be, which saves their start, or in one of their own.

``python -m`` takes a second and more to import everything, and compiles again what this process has compiled already.
"""

import contextlib
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]

#: Of a user: nothing of what the tests tell JAX, except where to cache compiled programs and to optimize little.
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "XLA", "PYTEST"))}
ENVIRONMENT |= {"PYTHONPATH": str(ROOT), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
ENVIRONMENT |= {"JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"]}

#: Devices that a command finds; the test process simulates more of them.
DEVICES = 2


def command(module: str, *flags: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m module flags`` in this process, on ``DEVICES`` devices, and returns what it printed."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        with _like_a_process([module, *flags], cwd or ROOT, out, err):
            try:
                runpy.run_module(module, run_name="__main__", alter_sys=True)
                status = 0
            except SystemExit as ended:
                status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
            except BaseException:
                status = 1
                traceback.print_exc()
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess([module, *flags], status, out.read(), err.read())


@contextlib.contextmanager
def _like_a_process(argv: list[str], cwd: Path, out, err) -> Iterator[None]:
    """What a process has of its own: its arguments, directory, and output."""
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch("jax.device_count", lambda *_: DEVICES),
        mock.patch("faulthandler.enable"),
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        yield


def process(module: str, *flags: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m module flags`` in a process of its own."""
    arguments = [sys.executable, "-m", module, *flags]
    return subprocess.run(arguments, cwd=cwd or ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
