"""Description of the machine, and measured ceilings: its fastest matrix products and memory copies.

The ceilings are measured rather than taken from data sheets: no program reaches a data sheet's peak, and the peak of a
virtual core is unknown.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from instrdiv.runtime.devices import usable_cores
from instrdiv.runtime.mesh import make_mesh
from instrdiv.runtime.provenance import provenance

#: Seconds per measurement of a ceiling, and number of measurements; the best one counts.
_SECONDS, _TRIES = 0.3, 3


def describe() -> dict[str, Any]:
    """Hardware and software versions: what a reader needs to judge the numbers."""
    said = provenance()
    for package in ("torch", "transformers", "peft"):
        try:
            said["versions"][package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            said["versions"][package] = None
    stats = jax.local_devices()[0].memory_stats() or {}
    return {
        **{name: said[name] for name in ("platform", "processor", "devices", "versions", "commit")},
        "backend": jax.default_backend(),
        "usable_cores": usable_cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device_memory_bytes": stats.get("bytes_limit"),  # the most that JAX may allocate
        "load_average": os.getloadavg(),  # before any measurement: how busy the machine already is
        "environment": {name: value for name, value in os.environ.items() if name.startswith(("XLA_", "JAX_"))},
    }


def ceilings(precision: str) -> dict[str, Any]:
    """Matrix products (FLOP/s) in a precision and copies (bytes read and written per second), over all devices."""
    on_cpu = jax.default_backend() == "cpu"
    mesh = make_mesh(jax.device_count())
    sizes = (512, 1024, 2048) if on_cpu else (4096, 8192, 16384)
    products = {size: _matmul_flops(mesh, size, precision) for size in sizes}
    return {
        "precision": precision,
        "devices": mesh.size,
        "matmul_flops": max(products.values()),
        "matmul_flops_by_size": products,
        "copy_bytes": _copy_bytes(mesh, (1 << 26) if on_cpu else (1 << 30)),
    }


def _matmul_flops(mesh: Mesh, size: int, precision: str) -> float:
    x = _random(mesh, (size, size), jnp.dtype(precision))
    product = _on_every_device(mesh, lambda x: x @ x)
    return mesh.size * 2 * size**3 / _seconds_a_call(lambda: product(x))


def _copy_bytes(mesh: Mesh, numbers: int) -> float:
    x = _random(mesh, (numbers,), jnp.float32)
    copy = _on_every_device(mesh, lambda x: x + 1)  # a bare copy may be optimized away
    return mesh.size * 2 * x.dtype.itemsize * numbers / _seconds_a_call(lambda: copy(x))


def _random(mesh: Mesh, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Random numbers [devices, *shape], sharded over the devices; zeros would draw less power than a model does."""
    make = jax.jit(
        lambda: jax.random.normal(jax.random.key(0), (mesh.size, *shape), dtype),
        out_shardings=NamedSharding(mesh, P("member")),
    )
    return make()


def _on_every_device(mesh: Mesh, function: Callable[[jax.Array], jax.Array]) -> Any:
    def local(parts):
        return function(parts[0])[None]

    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("member"), out_specs=P("member")))


def _seconds_a_call(work: Callable[[], jax.Array]) -> float:
    """The minimum over a few measurements: noise can only slow a machine down."""
    jax.block_until_ready(work())
    started = time.perf_counter()
    jax.block_until_ready(work())
    calls = max(1, int(_SECONDS / (time.perf_counter() - started)))

    def measure() -> float:
        started = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(work())  # otherwise the results of all calls would be in memory at once
        return (time.perf_counter() - started) / calls

    return min(measure() for _ in range(_TRIES))
