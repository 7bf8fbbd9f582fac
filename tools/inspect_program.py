"""Inspect a group's compiled program without running it: FLOPs, bytes, memory, kernels, collectives.

    python -m tools.inspect_program --preset=laptop --members=8
    python -m tools.inspect_program --preset=paper --target=cuda:tools/h200.txtpb --members_per_vmap=8 --out=h200.json
    python -m tools.inspect_program --preset=paper --target=tpu:v5e:2x2 --devices=4 --data_parallel=2

The chunk of ``--members`` seeds is compiled at full size from shapes alone, for this machine or for one that is only
described: a GPU by its properties (needs JAX's CUDA packages, no GPU), a TPU by its topology (needs libtpu, no TPU).
All numbers are for one step of one block of members on one device. For a described GPU the compiler cannot autotune:
matrix products use cuBLAS, and XLA gives no cost analysis.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl.flags import FlagValues

from instrdiv.config.groups import Group, make_groups
from instrdiv.config.layout import ATTENTION
from instrdiv.config.pools import RulePools
from instrdiv.config.presets import BASES, Setting
from instrdiv.config.settings import Member
from instrdiv.launch.flags import (
    NameParser,
    NumberParser,
    define,
    define_enum,
    define_preset_flag,
    define_setting_flags,
    setting_flags,
    start,
)
from instrdiv.runs.planning import flops_per_example
from instrdiv.runtime.devices import use_cpu_cores
from instrdiv.runtime.errors import BadInput
from instrdiv.runtime.memory import program_bytes
from instrdiv.runtime.mesh import make_mesh
from instrdiv.runtime.units import in_bytes
from instrdiv.training.members import chunk_program, chunk_shapes
from tools.hlo import Kernel, Program

#: Options for compiling without a GPU to autotune on: untuned, Triton's matrix products fail at some of our shapes.
DESCRIBED_GPU = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}

#: Parts of a step, by a substring of their kernels' scopes; the first match counts.
PARTS = {"backward": "transpose(jvp(", "forward": "jvp(", "examples": "examples", "update": "update", "other": ""}


def devices_of(target: str, count: int) -> tuple[Sequence[jax.Device], dict[str, Any]]:
    """The devices to compile for, and the compiler's options. Raises BadInput for an invalid or unavailable target."""
    kind, _, described = target.partition(":")
    if target == "here":
        use_cpu_cores(count)
        return jax.devices(), {}
    if kind not in ("cuda", "tpu") or not described:
        raise BadInput(f"--target={target}: must be here, cuda:FILE (tools/h200.txtpb) or tpu:TOPOLOGY (v5e:2x2)")
    from jax.experimental.topologies import get_topology_desc

    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU to query for metadata
    arguments = {}
    if kind == "cuda":
        arguments = {"target_config": Path(described).read_text(), "topology": f"1x1x{count}"}
    try:
        topology = get_topology_desc("" if arguments else described, platform=kind, **arguments)
    except (RuntimeError, NotImplementedError) as error:
        packages = f"needs the packages of instrdiv[{kind}]"
        raise BadInput(f"--target={target}: {packages}; error: {str(error).splitlines()[0]}") from None
    return topology.devices, DESCRIBED_GPU if kind == "cuda" else {}


def inspect(
    group: Group,
    members_per_vmap: int,
    devices: int = 1,
    data_parallel: int = 1,
    available: Sequence[jax.Device] | None = None,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Compiles the chunk of a group and analyzes the program; ``available`` and ``options`` are from ``devices_of``."""
    mesh = make_mesh(devices, data_parallel, available=available)
    shapes = chunk_shapes(group, RulePools(group.members), mesh, members_per_vmap)
    clock = [time.monotonic()]
    traced = chunk_program(group, mesh, members_per_vmap).trace(*shapes)
    clock.append(time.monotonic())
    lowered = traced.lower()
    clock.append(time.monotonic())
    compiled = lowered.compile(compiler_options=options or None)
    clock.append(time.monotonic())

    program = Program.parse(compiled.as_text())
    kernels = list(program.kernels(program.step))
    analysis = compiled.cost_analysis() or {}
    examples = members_per_vmap * group.config.batch_size // data_parallel
    tokens = examples * group.shape.sequence
    moved = sum(kernel.times * kernel.bytes for kernel in kernels)
    products: dict[str, float] = defaultdict(float)
    parts = {part: {"bytes": 0, "launches": 0} for part in PARTS}
    for kernel in kernels:
        for dtype, flops in kernel.flops.items():
            products[dtype] += kernel.times * flops
        part = next(parts[name] for name, scope in PARTS.items() if scope in kernel.instruction.scope)
        part["bytes"] += kernel.times * kernel.bytes
        part["launches"] += kernel.times
    memory = compiled.memory_analysis()
    in_step = {kernel.instruction.name for kernel in kernels}
    everywhere = [kernel for kernel in program.kernels(program.entry) if kernel.kind == "collective"]
    return {
        "seconds": dict(zip(("trace", "lower", "compile"), np.diff(clock).tolist(), strict=True)),
        "tokens": tokens,
        "flops": {
            "counted": flops_per_example(group) * examples,
            "cost_analysis": analysis.get("flops"),
            "products": dict(products),
        },
        "bytes": {
            "kernels": moved,
            "cost_analysis": analysis.get("bytes accessed"),
            "kernels_a_token": moved / tokens,
        },
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "peak": program_bytes(compiled),
        },
        "parts": parts,
        "step": {
            "kernels": dict(Counter(kernel.kind for kernel in kernels)),
            "launches": sum(kernel.times for kernel in kernels),
            "loops": len(program.loops(program.step)) - 1,
        },
        "largest_fusions": largest(kernel for kernel in kernels if kernel.kind == "fusion"),
        "largest_products": largest(kernel for kernel in kernels if kernel.kind == "product"),
        "collectives": [
            {
                "name": kernel.instruction.name,
                "opcode": kernel.instruction.opcode,
                "operands": kernel.operands,
                "replica_groups": replica_groups(kernel),
                "in_step": kernel.instruction.name in in_step,
            }
            for kernel in everywhere
        ],
    }


def largest(kernels: Iterable[Kernel], count: int = 10) -> list[dict[str, Any]]:
    """The kernels that move the most bytes; the same kernel in several layers counts as one."""
    alike = defaultdict(list)
    for kernel in kernels:
        scope = re.sub(r"layer_\d+", "layer_*", kernel.instruction.scope)
        shape, *operands = (re.sub(r"\{[^}]*\}", "", shape) for shape in (kernel.instruction.shape, *kernel.operands))
        alike[scope.split("closed_call/")[-1], shape, tuple(operands)].append(kernel)
    rows: list[dict[str, Any]] = [
        {
            "scope": scope,
            "result": result,
            "operands": operands,
            "times": sum(kernel.times for kernel in some),
            "bytes": sum(kernel.times * kernel.bytes for kernel in some),
        }
        for (scope, result, operands), some in alike.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])[:count]


def replica_groups(kernel: Kernel) -> str:
    """The groups of devices that communicate, as XLA writes them."""
    found = re.search(r"replica_groups=(.*?)(?:, \w+=|$)", kernel.instruction.attributes)
    return found.group(1) if found else ""


def as_text(found: dict[str, Any]) -> str:
    """A readable summary."""
    flops, moved, step, tokens = found["flops"], found["bytes"], found["step"], found["tokens"]

    def number(value: float | None, unit: str = "") -> str:
        return "unknown" if value is None else f"{value:.4g}{unit}"

    def share(part: dict[str, int]) -> str:
        return f"{100 * part['bytes'] / moved['kernels']:.3g} % in {part['launches']}"

    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in found["seconds"].items())
    products = ", ".join(f"{number(value)} in {dtype}" for dtype, value in flops["products"].items()) or "unknown"
    lines = [
        f"{seconds}",
        f"FLOPs per step: {number(flops['counted'])} counted; {number(flops['cost_analysis'])} by XLA's cost analysis; "
        f"in matrix products: {products}",
        f"bytes per step: {in_bytes(moved['kernels'])} by kernels, {in_bytes(moved['kernels_a_token'])} per token; "
        f"{number(moved['cost_analysis'])} by XLA's cost analysis",
        "  launches: " + ", ".join(f"{name} {share(part)}" for name, part in found["parts"].items()),
        f"peak memory: {in_bytes(found['memory']['peak'])}, of which arguments are "
        f"{in_bytes(found['memory']['arguments'])}",
        f"per step: {step['launches']} launches ({', '.join(f'{n} {kind}' for kind, n in step['kernels'].items())}; "
        f"{step['loops']} loops); {tokens} tokens",
    ]
    for title in ("fusions", "products"):
        lines.append(f"largest {title}:")
        for row in found[f"largest_{title}"]:
            shapes = f"{row['result']} <- {', '.join(row['operands'])}"
            lines.append(f"  {in_bytes(row['bytes']):>8} in {row['times']:>4}  {row['scope']}  {shapes}")
    for row in found["collectives"]:
        where = "in the step" if row["in_step"] else "outside the step"
        lines.append(f"{row['opcode']} {where}: {len(row['operands'])} operands among {row['replica_groups']}")
    return "\n".join([*lines, "" if found["collectives"] else "no collectives"]).rstrip()


def group_of(setting: Setting, members: int, attention: str = "plain") -> Group:
    setting.validate()
    (group,) = make_groups([Member(setting, seed) for seed in range(members)], attention=attention)
    return group


def main(values: FlagValues) -> None:
    setting = dataclasses.replace(BASES[values.preset], **setting_flags(values, Setting))
    group = group_of(setting, values.members, values.attention)
    if values.attention == "cudnn" and not (values.target.startswith("cuda") and setting.precision == "bfloat16"):
        raise BadInput("--attention=cudnn: needs --target=cuda:FILE and --config.precision=bfloat16")
    if values.devices % values.data_parallel or setting.batch_size % values.data_parallel:
        raise BadInput(
            f"--data_parallel={values.data_parallel}: must divide --devices={values.devices} "
            f"and --config.batch_size={setting.batch_size}"
        )
    available, options = devices_of(values.target, values.devices)
    if len(available) < values.devices:
        raise BadInput(f"--devices={values.devices}: --target={values.target} has only {len(available)}")
    found = inspect(group, values.members_per_vmap, values.devices, values.data_parallel, available, options)
    names = ("preset", "members", "devices", "data_parallel", "members_per_vmap", "attention", "target")
    asked = {name: values[name].value for name in names}
    found = {**asked, "device": available[0].device_kind, "jax": jax.__version__, "compiler_options": options,
             "setting": setting.as_row(), **found}  # fmt: skip
    print(as_text(found))
    if values.out:
        Path(values.out).write_text(json.dumps(found, indent=1) + "\n")


def define_flags(values: FlagValues) -> None:
    define_preset_flag(values, BASES)
    define_setting_flags(values, Setting)
    whole = NumberParser(int, low=1)
    define(values, whole, "members", "members of the group, one per seed", 8)
    define(values, NumberParser(int, low=1, high=256), "devices", "devices to compile for", 1)
    define(values, whole, "data_parallel", "devices that share one member's batch", 1)
    define(values, whole, "members_per_vmap", "members vectorized together", 1)
    define_enum(values, "attention", ATTENTION, "how attention is computed", "plain")
    define(values, NameParser(), "target", "machine to compile for: here, cuda:FILE or tpu:TOPOLOGY", "here")
    define(values, NameParser(), "out", "JSON file to write the results to (default: none)")


if __name__ == "__main__":
    start(main, define_flags, __doc__)
