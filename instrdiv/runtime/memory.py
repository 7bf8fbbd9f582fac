"""Memory, as the system, the devices and the compiler account for it."""

from __future__ import annotations

import resource
import sys
from typing import Any

import jax


def peak_host_bytes() -> int:
    """The most memory that this process has had so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def peak_device_bytes() -> int | None:
    """The most memory that one device has had so far; None where the backend does not say (CPU)."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in peaks if peak is not None), default=None)


def program_bytes(program: Any) -> int:
    """What a compiled program needs on one device: arguments, results and temporaries."""
    memory = program.memory_analysis()
    return (memory.argument_size_in_bytes + memory.output_size_in_bytes
            + memory.temp_size_in_bytes - memory.alias_size_in_bytes)  # fmt: skip
