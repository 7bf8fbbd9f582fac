"""Atomic file writes, and JSON without infinities."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Writes JSON atomically. Infinities are written as the strings "inf" and "-inf"."""
    with replacing(path) as file:
        json.dump(plain(value), file, indent=1)
        file.write("\n")


class replacing:
    """Context manager: a temporary file that replaces ``path`` if the block succeeds; ``mode`` is "w" or "wb"."""

    def __init__(self, path: Path, mode: str = "w"):
        self.path, self.mode = Path(path), mode

    def __enter__(self):
        encoding = None if "b" in self.mode else "utf-8"
        self.file = tempfile.NamedTemporaryFile(
            self.mode, encoding=encoding, dir=self.path.parent, prefix=f".{self.path.name}.", delete=False
        )
        return self.file

    def __exit__(self, kind, error, traceback):
        try:
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())  # or a power cut may leave an empty or truncated file
                os.chmod(self.file.name, 0o644)
                os.replace(self.file.name, self.path)
        finally:
            with contextlib.suppress(OSError):
                self.file.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.file.name)


def plain(value: Any) -> Any:
    """The value with tuples as lists, and infinities and NaN as strings, which JSON can represent."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
