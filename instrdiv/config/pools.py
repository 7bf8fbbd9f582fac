"""Instruction pools of a sweep, on the host: one per seed and source, shared by all members that have both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from instrdiv.config.settings import Member
from instrdiv.runtime.errors import BadInput
from instrdiv.tasks.instructions import take


class RulePools:
    """The pools of all members, each large enough for the largest of its members."""

    def __init__(self, members: Sequence[Member]):
        """Builds every pool. Raises BadInput if a source has too few instructions."""
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
        """The instructions of one member, in the order of its counts."""
        return self.whole(member)[: member.setting.instructions]

    def whole(self, member: Member) -> Any:
        """The whole pool, of which the member's instructions are the first ones."""
        return self._pools[self.key(member)]
