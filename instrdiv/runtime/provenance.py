"""Provenance of a run: versions, devices, commit and command, and the same for earlier launches."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from instrdiv.runtime.directories import clear_errors
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.files import write_json


def provenance(**facts: Any) -> dict[str, Any]:
    """Provenance of this launch: versions, devices, commit and command, plus ``facts``."""
    import jax

    packages = ("instrdiv", "jax", "jaxlib", "flax", "optax", "numpy", "orbax-checkpoint")
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "processor_cores": os.cpu_count(),
        "devices": [device.device_kind for device in jax.devices()],
        "commit": _commit(),
        **facts,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's name, if the system reports it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _commit() -> str | None:
    """The commit of the source tree this package is imported from (``-dirty`` if it differs); None outside git."""
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(git, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


class Provenance:
    """provenance.json of a run directory: the provenance of this launch, followed by the earlier launches."""

    def __init__(self, path: Path):
        self.path, self._earlier = path, []
        with contextlib.suppress(OSError, ValueError, AttributeError):  # ignore it if it cannot be read
            last = json.loads((path / "provenance.json").read_text())
            self._earlier = [*last.pop("earlier_launches", []), last]

    def write(self, **facts: Any) -> None:
        with clear_errors(self.path):
            write_json(self.path / "provenance.json", provenance(**facts) | {"earlier_launches": self._earlier})


def read_provenance(path: Path) -> dict[str, Any]:
    """Reads a provenance.json. Raises BadInput if it cannot be read."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from None
    missing = [name for name in ("command", "versions", "devices") if not isinstance(said, dict) or name not in said]
    if missing:
        raise BadInput(f"{path} lacks {missing[0]!r}; it was not written by a run")
    return said
