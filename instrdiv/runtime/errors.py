"""User errors, reported in one line without a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class BadInput(ValueError):
    """A request that cannot be fulfilled. The message is one line: what is wrong, and what would be right."""


@contextlib.contextmanager
def needs(package: str, extra: str, what: str) -> Iterator[None]:
    """Wraps imports from an optional extra: if the package is missing, raises BadInput with the install command."""
    try:
        yield
    except ModuleNotFoundError:
        raise BadInput(f"{what}: needs the package {package}: pip install -e '.[{extra}]'") from None
