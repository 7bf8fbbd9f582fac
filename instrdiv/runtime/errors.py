"""Mistakes of the user's: told in one line, without a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class BadInput(ValueError):
    """Something a user asked for cannot be done. The message is one line: what is wrong, and what would be right."""


@contextlib.contextmanager
def needs(package: str, extra: str, what: str) -> Iterator[None]:
    """Around the import of what comes with an extra: where it is missing, BadInput says how to install it."""
    try:
        yield
    except ModuleNotFoundError:
        raise BadInput(f"{what}: needs the package {package}: pip install -e '.[{extra}]'") from None
