"""Every test process simulates four devices; tests choose how many of them a mesh uses."""

import jax

jax.config.update("jax_num_cpu_devices", 4)
