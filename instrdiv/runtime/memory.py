"""Memory use, as reported by the system, the devices and the compiler."""

from __future__ import annotations

import resource
import sys
from typing import Any

import jax


def peak_host_bytes() -> int:
    """Peak memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_device_bytes() -> int | None:
    """Peak memory of any one device so far; None if the backend does not report it (CPU)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in peaks if peak is not None), default=None)


def program_bytes(program: Any) -> int:
    """Memory that a compiled program needs on one device: arguments, results and temporaries."""
    memory = program.memory_analysis()
    return (memory.argument_size_in_bytes + memory.output_size_in_bytes
            + memory.temp_size_in_bytes - memory.alias_size_in_bytes)  # fmt: skip
