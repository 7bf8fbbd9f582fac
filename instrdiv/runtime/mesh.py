"""The device mesh: which devices hold which members, and how arrays get there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from instrdiv.runtime.errors import BadInput


def make_mesh(
    devices: int = 1,
    data_parallel: int = 1,
    tensor_parallel: int = 1,
    available: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A ('member', 'data', 'tensor') mesh over the first ``devices`` devices.

    ``data_parallel`` devices share a member's batch, ``tensor_parallel`` devices share every matrix product of a base
    model, and the remaining axis holds different members. ``available`` lists all devices, by default those of this
    machine (it may list those of a machine that is only described). Raises BadInput if there are too few devices or the
    sizes do not divide evenly.
    """
    available = jax.devices() if available is None else available
    if devices > len(available):
        raise BadInput(f"--devices={devices}: this machine has {len(available)} ({jax.default_backend()})")
    if devices % (data_parallel * tensor_parallel):
        raise BadInput(f"--devices={devices}: must be a multiple of --data_parallel={data_parallel} times "
                       f"--tensor_parallel={tensor_parallel}")  # fmt: skip
    grid = np.array(available[:devices]).reshape(-1, data_parallel, tensor_parallel)
    return Mesh(grid, ("member", "data", "tensor"))


#: Number of programs of one kind that a process keeps, so that the next run of the same shape need not compile again.
PROGRAMS = 16


def padded_size(members: int, mesh: Mesh, members_per_vmap: int) -> int:
    """Number of members including idle ones: a multiple of the mesh's member axis times ``members_per_vmap``."""
    unit = mesh.shape["member"] * members_per_vmap
    return math.ceil(members / unit) * unit


def put(tree: Any, mesh: Mesh, spec: P) -> Any:
    """Puts host arrays on the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, spec))


def over_members(
    name: str, function: Any, mesh: Mesh, members_per_vmap: int, in_specs: Any, donate: tuple[int, ...] = ()
) -> Any:
    """Compiles ``function``, written for one member, for the members of a group.

    Args:
      name: the program's name in logs and profiles.
      function: takes the arguments of one member and returns a tree for one member.
      mesh: from ``make_mesh``.
      members_per_vmap: number of members vectorized together; the blocks run one after another.
      in_specs: one PartitionSpec per argument; arguments whose spec starts with 'member' have a leading axis M, the
        others are passed unchanged to every member (as local shards, if sharded over 'data').
      donate: indices of the arguments whose buffers may be reused.

    Returns:
      A jitted function of the stacked arguments; its results have a leading axis M. Members never communicate; the
      function itself may reduce over 'data'.
    """
    mapped = [len(spec) > 0 and spec[0] == "member" for spec in in_specs]

    def local(*args):
        def one(stacked):
            stacked = iter(stacked)
            return function(*(next(stacked) if m else arg for m, arg in zip(mapped, args, strict=True)))

        stacked = tuple(arg for m, arg in zip(mapped, args, strict=True) if m)
        return jax.lax.map(one, stacked, batch_size=members_per_vmap if members_per_vmap > 1 else None)

    # check_vma=False: the only reduction over 'data' is written explicitly, in the training step.
    sharded = jax.shard_map(local, mesh=mesh, in_specs=tuple(in_specs), out_specs=P("member"), check_vma=False)
    sharded.__name__ = name
    return jax.jit(sharded, donate_argnums=donate, out_shardings=NamedSharding(mesh, P("member")))
