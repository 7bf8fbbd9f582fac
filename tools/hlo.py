"""Parser for the HLO text of a compiled program: its kernels, the bytes they move, its loops and its collectives.

A kernel's bytes are those of its operands and results, each counted once: the memory traffic if nothing stays in a
cache. A slice or gather of a large operand counts only the bytes it takes. Names and types are those of XLA's text.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

#: Opcodes that need no kernel; neither do opcodes ending in ``-done``, which only wait.
_FREE = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "add-dependency", "domain"),
    *("partition-id", "replica-id", "opt-barrier", "async-update", "while", "call", "conditional"),
)
_SLICES = ("slice", "dynamic-slice", "gather")
#: Also with the suffix ``-start``.
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")
_NAMED = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction, a line of the text.

    Attributes:
      name: without the ``%``.
      shape: shape of the result, as XLA writes it.
      opcode: ``fusion``, ``dot``, …
      operands: names of the operands.
      attributes: the text after the operands.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def named(self, attribute: str) -> str | None:
        """The computation that an attribute names; None if there is no such attribute."""
        found = re.search(rf"\b{attribute}=%([\w.\-]+)", self.attributes)
        return found.group(1) if found else None

    @property
    def scope(self) -> str:
        """Its origin in the traced function."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    @property
    def trips(self) -> int:
        """The trip count of a loop; 1 if the compiler does not know it."""
        found = re.search(r'known_trip_count":\{"n":"(\d+)"', self.attributes)
        return int(found.group(1)) if found else 1


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel.

    Attributes:
      instruction: its instruction.
      kind: ``product`` (a matrix product, whatever is fused into it), ``fusion``, ``custom call``, ``collective``,
        ``copy`` or ``other``.
      operands: shapes of the operands.
      times: launches per execution of the computation that was passed to ``Program.kernels``.
      bytes: bytes moved per launch.
      flops: FLOPs of its matrix products per launch, by dtype of the factors; empty if the text does not say.
    """

    instruction: Instruction
    kind: str
    operands: tuple[str, ...]
    times: int
    bytes: int
    flops: Mapping[str, float]


def array_bytes(shape: str) -> int:
    """Bytes of an array shape, or of all arrays in a tuple shape, without the layout's padding."""
    total = 0
    for dtype, sizes in _ARRAY.findall(shape):
        bits = _BITS[dtype] if dtype in _BITS else int(re.search(r"\d+", dtype).group())  # type: ignore[union-attr]
        total += math.ceil(math.prod(_sizes(sizes)) * bits / 8)
    return total


def _sizes(text: str) -> list[int]:
    return [int(size.removeprefix("<=")) for size in text.split(",") if size]


def _is_library_product(one: Instruction) -> bool:
    return one.opcode == "custom-call" and "gemm_backend_config" in one.attributes


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: name -> its instructions; the last one is its result.
      entry: name of the entry computation.
    """

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str

    @classmethod
    def parse(cls, text: str) -> Program:
        """Parses ``Compiled.as_text()``. Raises ValueError if the text has no entry."""
        computations: dict[str, tuple[Instruction, ...]] = {}
        name, entry = "", None
        lines: list[Instruction] = []
        for line in text.splitlines():
            if line.endswith("{") and line.startswith(("%", "ENTRY ")) and " -> " in line:
                found = _NAMED.search(line)
                assert found
                name, lines = found.group(1), []
                entry = name if line.startswith("ENTRY ") else entry
            elif line == "}":
                computations[name] = tuple(lines)
            elif line.startswith("  ") and " = " in line:
                lines.append(_instruction(line))
        if entry is None:
            raise ValueError("not the text of a compiled program: it has no ENTRY")
        return cls(computations, entry)

    @functools.cached_property
    def step(self) -> str:
        """The computation of a training step: the longest of the entry and the loop bodies."""
        return max(self.loops(), key=lambda name: sum(1 for _ in self.inlined(name)))

    def loops(self, name: str | None = None) -> list[str]:
        """This computation (default: the entry) and the bodies of the loops in it, at any depth."""
        name = name or self.entry
        bodies = [one.named("body") for one in self.inlined(name) if one.opcode == "while"]
        return [name, *(inner for body in bodies if body for inner in self.loops(body))]

    def inlined(self, name: str) -> Iterator[Instruction]:
        """The instructions of a computation with calls inlined; loops are not entered."""
        for one in self.computations[name]:
            called = one.named("to_apply") if one.opcode == "call" else None
            called = one.named("calls") if one.opcode == "async-start" else called
            if called:
                yield from self.inlined(called)
            else:
                yield one

    def kernels(self, name: str, times: int = 1) -> Iterator[Kernel]:
        """The kernels of a computation and of its loops, with loop bodies counted by their trip counts."""
        for one in self.inlined(name):
            body = one.named("body") if one.opcode == "while" else None
            if body:
                yield from self.kernels(body, times * one.trips)
            elif one.opcode not in _FREE and not one.opcode.endswith("-done"):
                operands = tuple(self._shapes[name] for name in one.operands if name in self._shapes)
                yield Kernel(one, self._kind(one), operands, times, self._moved(one, operands), self._flops(one))

    @functools.cached_property
    def _shapes(self) -> dict[str, str]:
        """Shapes by name; names are unique in a compiled program."""
        return {one.name: one.shape for body in self.computations.values() for one in body}

    def _inner(self, one: Instruction) -> tuple[Instruction, ...]:
        """The instructions fused into this one."""
        return self.computations.get(one.named("calls") or "", ())

    def _kind(self, one: Instruction) -> str:
        opcode = one.opcode.removesuffix("-start")
        if opcode in COLLECTIVES:
            return "collective"
        if any(part.opcode in ("dot", "convolution") for part in (one, *self._inner(one))) or _is_library_product(one):
            return "product"
        return {"fusion": "fusion", "custom-call": "custom call", "copy": "copy"}.get(opcode, "other")

    def _flops(self, one: Instruction) -> dict[str, float]:
        flops: dict[str, float] = {}
        for part in (one, *self._inner(one)):
            if part.opcode != "dot" and not _is_library_product(part):
                continue
            result, factor = _ARRAY.search(part.shape), _ARRAY.search(self._shapes[part.operands[0]])
            contracted = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([^}\]]*)', part.attributes)
            assert result and factor and contracted
            sizes = _sizes(factor.group(2))
            places = [int(place) for place in re.findall(r"\d+", contracted.group(1))]
            count = 2.0 * math.prod(_sizes(result.group(2))) * math.prod(sizes[place] for place in places)
            flops[factor.group(1)] = flops.get(factor.group(1), 0.0) + count
        return flops

    def _moved(self, one: Instruction, operands: tuple[str, ...]) -> int:
        inner = self._inner(one)
        if one.opcode in _SLICES:
            return 2 * array_bytes(one.shape)
        if one.opcode == "dynamic-update-slice":
            return 2 * array_bytes(operands[1])
        if one.opcode != "fusion" or not inner:
            result = _ARRAY.search(one.shape)
            # The second result of a library's product is its workspace.
            shape = result.group() if result and _is_library_product(one) else one.shape
            return array_bytes(shape) + sum(map(array_bytes, operands))
        read = sum(_read(inner, place, array_bytes(shape)) for place, shape in enumerate(operands))
        if inner[-1].opcode == "dynamic-update-slice":  # in place
            return read + array_bytes(self._shapes[inner[-1].operands[1]])
        return read + array_bytes(one.shape)


def _read(inner: tuple[Instruction, ...], place: int, whole: int) -> int:
    """Bytes that a fusion reads of the operand at this index: less than ``whole`` if it only takes slices of it."""
    name = next((one.name for one in inner if one.opcode == "parameter" and one.operands == (str(place),)), None)
    read = 0
    for user in inner:
        if name not in user.operands:
            continue
        if user.opcode in _SLICES and user.operands[0] == name:
            read += array_bytes(user.shape)
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
            read += 0
        else:
            return whole
    return min(read, whole)


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode, _, _ = rest[end:].lstrip().partition("(")
    start = rest.index("(", end)
    stop = _closing(rest, start)
    inside = rest[start + 1 : stop]
    operands = (inside,) if opcode == "parameter" else tuple(_NAMED.findall(inside))
    return Instruction(name.removeprefix("%"), rest[:end], opcode, operands, rest[stop + 1 :])


def _closing(text: str, start: int) -> int:
    """The position of the bracket that closes the one at ``start``."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place
    raise ValueError(f"unclosed bracket: {text[:80]}")
