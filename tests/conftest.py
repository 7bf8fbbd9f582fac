"""Every test process simulates eight devices; tests choose how many of them a mesh uses.

Compiled programs are cached in ``.pytest_cache/jax``, for the commands that tests start, too: many tests run the same
few programs. XLA optimizes little, which halves the time to compile, except for tests marked ``optimized``.
"""

import os
import re
from pathlib import Path

os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of the processes that tests start, too

import jax
import pytest
from jax._src import compiler

from instrdiv.runtime.compile_cache import prune, use_compile_cache

CACHE = Path(__file__).parent.parent / ".pytest_cache" / "jax"

os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)  # of the commands
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_num_cpu_devices", 8)
use_compile_cache()
prune(CACHE)

get_compile_options = compiler.get_compile_options


def quick_to_compile(*args, **kwargs):
    """With XLA's older code generation, which takes half the time; JAX has no setting for it."""
    options = get_compile_options(*args, **kwargs)
    if jax.config.read("jax_disable_most_optimizations"):
        options.env_option_overrides = [*options.env_option_overrides, *OLDER.items()]
    return options


OLDER = {"xla_cpu_use_fusion_emitters": False}
try:
    jax.jit(lambda x: x, compiler_options=OLDER)(0)
    compiler.get_compile_options = quick_to_compile
except jax.errors.JaxRuntimeError:  # jaxlib 0.12 has only the newer one
    pass


@pytest.hookimpl(tryfirst=True)  # before the fixtures, which may compile, too
def pytest_runtest_setup(item):
    optimize = item.get_closest_marker("optimized") is not None
    if optimize and jax.config.read("jax_disable_most_optimizations"):
        jax.clear_caches()  # of programs compiled without
    jax.config.update("jax_disable_most_optimizations", not optimize)


def pytest_make_parametrize_id(val, argname):
    """Makes ids the same in every process, so that xdist's workers agree on the tests, and short enough for one line.

    Bytes may differ between processes (a gzip file contains the time) and lambdas have no name: pytest numbers them.
    Long text is cut.
    """
    if isinstance(val, bytes) or getattr(val, "__name__", None) == "<lambda>":
        return argname
    if isinstance(val, str) and len(val) > 60:
        return f"{ascii(val)[1:50]}..."
    return None


def pytest_terminal_summary(terminalreporter):
    """One line about tests that were skipped for lack of a package."""
    reasons = [report.longrepr[2] for report in terminalreporter.stats.get("skipped", []) if report.longrepr]
    packages = sorted({found[1] for reason in reasons if (found := re.search(r"could not import '(\w+)", reason))})
    if packages:
        terminalreporter.write_line(
            f"Skipped: tests and test files that need {', '.join(packages)} ({len(reasons)}). "
            "`make test-all` installs these packages and runs everything."
        )
