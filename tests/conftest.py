"""Every test process simulates eight devices; tests choose how many of them a mesh uses.

What they compile is kept in ``.pytest_cache/jax``: many tests run the same few programs.
"""

from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
