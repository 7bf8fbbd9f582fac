"""The instructions of a sweep on the host: one pool per seed and source, shared by the members that can share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from instrdiv.config.settings import Member
from instrdiv.runtime.errors import BadInput
from instrdiv.tasks.instructions import take


class RulePools:
    """The pools of all members, each as large as its largest member needs."""

    def __init__(self, members: Sequence[Member]):
        """Makes every pool. Raises BadInput where a source has too few instructions."""
        if not jax.config.jax_threefry_partitionable:  # type: ignore[attr-defined]
            raise BadInput("JAX_THREEFRY_PARTITIONABLE=0: examples are defined with JAX's default, 1; unset it")
        needed: dict[Any, int] = {}
        for member in members:
            key = self.key(member)
            needed[key] = max(needed.get(key, 0), member.setting.instructions)
        self._pools = {(seed, source): take(source, size, seed) for (seed, source), size in needed.items()}

    @staticmethod
    def key(member: Member) -> Any:
        """Members with equal keys share a pool."""
        return member.seed, member.setting.source

    def of(self, member: Member) -> Any:
        """The rules of one member, in the order of its counts."""
        return self.whole(member)[: member.setting.instructions]

    def whole(self, member: Member) -> Any:
        """The pool that the member's rules are the first of."""
        return self._pools[self.key(member)]
