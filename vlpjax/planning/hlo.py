"""Reads the text of an optimised XLA program: computations, instructions, loops, collectives.

XLA's text format is described at https://openxla.org/xla/operation_semantics; what the TPU compiler adds stands in
each instruction's ``backend_config``.  Only what adds up to time and bytes is read.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vlpjax.errors import UserError

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "f4e2m1fn": 4,
    "f8e4m3": 8, "f8e4m3fn": 8, "f8e5m2": 8, "f8e4m3b11fnuz": 8, "f8e4m3fnuz": 8, "f8e5m2fnuz": 8, "f8e3m4": 8,
    "f8e8m0fnu": 8,
}  # fmt: skip
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
)
HOST_MEMORY = "S(5)"  # how the TPU compiler marks arrays that lie in the host's memory

_SHAPE = re.compile(r"\b(" + "|".join(sorted(BITS, key=len, reverse=True)) + r")\[([\d,<=]*)\]")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")


@dataclass(frozen=True)
class Shape:
    """An array's element type and sizes, such as ``bf16[8,128]``."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.sizes) * BITS[self.dtype] // 8


def shapes_in(text: str) -> tuple[Shape, ...]:
    """The arrays of a type, which may be a tuple, in order."""
    return tuple(
        Shape(dtype, tuple(int(size.removeprefix("<=")) for size in sizes.split(",") if size))
        for dtype, sizes in _SHAPE.findall(text)
    )


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: without the percent sign.
      opcode: such as ``"fusion"``.
      type: of the result, as it is written.
      operands: names, in order.
      attributes: everything after the operands, as it is written; for a constant or parameter, its value or number.
    """

    name: str
    opcode: str
    type: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool = False

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The arrays of the result."""
        return shapes_in(self.type)

    @property
    def bytes(self) -> int:
        """Size of the result."""
        return sum(shape.bytes for shape in self.shapes)

    @functools.cached_property
    def cycles(self) -> int | None:
        """The compiler's estimate of how long one execution takes, or None where it gives none."""
        found = re.search(r'"estimated_cycles":"?(\d+)', self.attributes)
        return int(found[1]) if found else None

    def attribute(self, name: str) -> str | None:
        """The word after ``name=``, without the percent sign or the quotation mark."""
        found = re.search(rf"\b{name}=[%\"]?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that a call, fusion or conditional names."""
        found = re.search(r"\bbranch_computations=\{([^}]*)\}", self.attributes)
        if found:
            return tuple(name.strip().lstrip("%") for name in found[1].split(","))
        names = ("true_computation", "false_computation", "calls", "to_apply")
        return tuple(value for value in map(self.attribute, names) if value)

    @property
    def op_name(self) -> str:
        """The path of the function that was traced to it, such as ``"jit(step)/blocks/attention/dot_general"``."""
        found = re.search(r'\bop_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


@dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they are scheduled, by name."""

    name: str
    instructions: Mapping[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(item for item in self.instructions.values() if item.is_root)

    def operand_shapes(self, instruction: Instruction) -> tuple[Shape, ...]:
        """The arrays that an instruction reads."""
        found = [self.instructions[name] for name in instruction.operands if name in self.instructions]
        return tuple(shape for item in found for shape in item.shapes)


@dataclass(frozen=True)
class Program:
    """A whole program: its computations by name, and the name of the one that runs first."""

    computations: Mapping[str, Computation]
    entry: str

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]

    def trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """How often a ``while`` runs its body; None where the program's text does not tell."""
        found = re.search(r'known_trip_count":?\{"?n"?:"?(\d+)', loop.attributes)
        if found:
            return int(found[1])
        return self._compared_count(computation, loop)

    def _compared_count(self, computation: Computation, loop: Instruction) -> int | None:
        """The count of a loop over an index that is compared with a constant and grows by another one."""
        condition = self[loop.attribute("condition") or ""]
        compare, inside = condition.root, condition
        values = {name: _constant(item) for name, item in condition.instructions.items()}
        if compare.opcode == "fusion" and compare.called:
            inside = self[compare.called[0]]
            outer = [condition.instructions[name] for name in compare.operands]
            parameters = {
                name: outer[int(item.attributes.partition(")")[0])]
                for name, item in inside.instructions.items()
                if item.opcode == "parameter"
            }
            compare = inside.root
            values = {name: _constant(item) for name, item in inside.instructions.items()}
            values |= {name: _constant(item) for name, item in parameters.items()}
            elements = parameters
        else:
            elements = dict(condition.instructions)
        direction = compare.attribute("direction")
        if compare.opcode != "compare" or direction not in ("LT", "LE", "GT", "GE"):
            return None
        first, second = compare.operands
        if direction in ("GT", "GE"):
            first, second, direction = second, first, {"GT": "LT", "GE": "LE"}[direction]
        bound, index = values.get(second), elements.get(first)
        if bound is None or index is None or index.opcode != "get-tuple-element":
            return None
        place = int(index.attribute("index") or 0)
        start, step = self._initial(computation, loop, place), self._step(loop, place)
        return max(0, -(-(bound - start + (direction == "LE")) // step))

    def _step(self, loop: Instruction, index: int) -> int:
        """By how much an element of a loop's state grows in a turn; 1 where that is no constant."""
        body = self[loop.attribute("body") or ""]
        if body.root.opcode != "tuple" or index >= len(body.root.operands):
            return 1
        item = body.instructions[body.root.operands[index]]
        while item.opcode in ("copy", "bitcast") and item.operands:
            item = body.instructions[item.operands[0]]
        constants = (
            [_constant(body.instructions[name]) for name in item.operands] if item.opcode == "add" else []
        )
        return max([1, *(value for value in constants if value)])

    def _initial(self, computation: Computation, loop: Instruction, index: int) -> int:
        """The value with which an element of a loop's state begins; 0 where it is no constant."""
        state = computation.instructions.get(loop.operands[0])
        if state is None or state.opcode != "tuple":
            return 0
        item = computation.instructions.get(state.operands[index])
        while item is not None and item.opcode in ("copy", "bitcast") and item.operands:
            item = computation.instructions.get(item.operands[0])
        return (None if item is None else _constant(item)) or 0


def _constant(item: Instruction) -> int | None:
    if item.opcode != "constant":
        return None
    found = re.match(r"(-?\d+)\)", item.attributes)
    return int(found[1]) if found else None


def read_program(text: str) -> Program:
    """Reads ``compiled.as_text()``.

    Raises:
      UserError: a text that holds no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    current: dict[str, Instruction] | None = None
    pending: list[str] = []

    def finish() -> None:
        if pending and current is not None:
            item = _instruction("\n".join(pending))
            current[item.name] = item
        pending.clear()

    for line in text.splitlines():
        if current is None:
            header = _COMPUTATION.match(line)
            if header:
                current = {}
                computations[header[2]] = Computation(header[2], current)
                entry = header[2] if header[1] else entry
        elif line == "}" or line.startswith("}, execution_thread="):
            finish()
            current = None
        elif _INSTRUCTION.match(line):
            finish()
            pending.append(line)
        elif pending:
            pending.append(line)  # attributes may run over several lines
    if not entry:
        raise UserError("This text holds no XLA program: no computation begins with ENTRY.")
    return Program(computations, entry)


def _instruction(text: str) -> Instruction:
    head = _INSTRUCTION.match(text)
    assert head is not None
    rest = text[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    if opcode in ("constant", "parameter"):  # what stands in parentheses is a value
        return Instruction(head[2], opcode, kind, (), rest, bool(head[1]))
    end = _closing("(" + rest, 0) - 1
    names = tuple(re.findall(r"%([\w.\-]+)", rest[:end]))
    return Instruction(head[2], opcode, kind, names, rest[end + 1 :], bool(head[1]))


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at ``start`` closes."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.start()
    return len(text)


def device_groups(instruction: Instruction) -> tuple[tuple[int, ...], ...]:
    """The groups of devices that exchange data with one another, in any of the forms that XLA writes.

    Pairs of source and target are groups of two.  No groups at all means that all devices are one group.
    """
    text = instruction.attributes
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        return _listed(pairs[1])
    found = re.search(r"replica_groups=", text)
    if not found:
        return ()
    rest = text[found.end() :]
    if mesh := re.match(rf"mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))?\s*\{{([^}}]*)\}}", rest):
        devices = _iota(mesh[2], mesh[3]) if mesh[2] else None
        return _of_mesh(mesh[1], re.findall(r"'([^']+)'", mesh[4]), devices)
    if iota := re.match(rf"\[([\d,]+)\]<={_IOTA}", rest):
        rows = _iota(iota[2], iota[3]).reshape(-1, _numbers(iota[1])[-1])
        return tuple(tuple(map(int, row)) for row in rows)
    listed = re.match(r"\{(\{.*?\})\}", rest)
    return _listed(listed[1]) if listed else ()


def _iota(base: str, order: str | None) -> np.ndarray:
    """All devices' numbers, in the order that ``[base]T(order)`` stands for."""
    sizes = _numbers(base)
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(_numbers(order) if order else None).ravel()


def _of_mesh(axes: str, along: Sequence[str], devices: np.ndarray | None) -> tuple[tuple[int, ...], ...]:
    """Groups along some axes of a mesh that is written as ``'axis'=size,...``, of these devices or of all in order."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    names = list(sizes)
    devices = np.arange(math.prod(sizes.values())) if devices is None else devices
    grid = devices.reshape(tuple(sizes.values()))
    last = [names.index(name) for name in along]
    first = [index for index in range(len(names)) if index not in last]
    width = math.prod(sizes[name] for name in along)
    return tuple(tuple(map(int, row)) for row in grid.transpose(*first, *last).reshape(-1, width))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part.strip())


def _listed(text: str) -> tuple[tuple[int, ...], ...]:
    return tuple(_numbers(group) for group in re.findall(r"\{([\d,\s]*)\}", text))
