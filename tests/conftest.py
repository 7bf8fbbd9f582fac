"""Every test process simulates eight devices; tests choose how many of them a mesh uses.

What they and the commands they start compile is kept in ``.pytest_cache/jax``: many tests run the same few programs.
"""

import os
from pathlib import Path

import jax

from instrdiv.runtime.compile_cache import prune, use_compile_cache

CACHE = Path(__file__).parent.parent / ".pytest_cache" / "jax"

os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)  # of the commands
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_num_cpu_devices", 8)
use_compile_cache()
prune(CACHE)


def pytest_make_parametrize_id(val, argname):
    """Ids are alike in every process, or xdist's workers would not agree on the tests; and they fit into a line.

    Bytes may be made anew (a gzip file has the time in it) and lambdas have no name: pytest numbers them. Long text is
    cut.
    """
    if isinstance(val, bytes) or getattr(val, "__name__", None) == "<lambda>":
        return argname
    if isinstance(val, str) and len(val) > 60:
        return f"{ascii(val)[1:50]}..."
    return None
