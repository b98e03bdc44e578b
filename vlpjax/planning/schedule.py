"""Plays a compiled program's schedule on paper: what it computes, moves and waits for, loop by loop.

The text of an optimised TPU program is in the order in which a chip runs it.  Two clocks follow it, that of the
compute units and that of the links.  An instruction moves the first on by the compiler's own estimate; a collective
that is started and finished in two instructions runs on the second from its start on (one at a time), and the first
waits for it only where the schedule asks for its result; one that is a single instruction stops both until it is done.
What the compute units wait is the exposed part of the communication, the rest is hidden.  A loop is its body, times
how often it runs.  Of the branches of a conditional the longest counts.

Two things count no time: copies that are started and finished in two instructions between a chip's memory and its fast
memory, and calls on the cores for sparse work.  Both go on beside the compute units, and the compiler starts them as
early as it takes to hide them by its own estimate, which it does not tell.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from vlpjax.planning.hlo import (
    COLLECTIVES,
    HOST_MEMORY,
    Computation,
    Instruction,
    Program,
    device_groups,
)
from vlpjax.planning.products import product_flops

# Instructions that take no time of their own worth a figure.
_FREE = frozenset(
    (
        "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
        "iota", "opt-barrier", "domain", "add-dependency", "copy-start", "slice-start", "dynamic-slice-start",
        "dynamic-update-slice-start", "async-update", "call-start", "call-done",
    )
)  # fmt: skip
# Copies that are started and finished in two instructions: of an array, from a stack of arrays, into one.
_COPIES = ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start")
_COPIED = tuple(name.replace("-start", "-done") for name in _COPIES)
# Custom calls that only mark or reserve something; any other without an estimate is said to have none.
_MARKS = frozenset(
    (
        "AllocateBuffer", "AssumeGatherIndicesInBound", "AsyncCollectiveStart", "AsyncCollectiveDone",
        "PrepareAsyncCallStart", "PrepareAsyncCallDone",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Total:
    """A sum over executions of one kind of thing: ``count`` of them, ``amount`` (bytes or FLOPs) and ``seconds``."""

    count: int = 0
    amount: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Total) -> Total:
        return Total(self.count + other.count, self.amount + other.amount, self.seconds + other.seconds)

    def __mul__(self, times: int) -> Total:
        return Total(self.count * times, self.amount * times, self.seconds * times)


Totals = Mapping[tuple[str, str], Total]


class Prices(Protocol):
    """What a chip and its links take for things that the compiler does not time."""

    def compute(self, cycles: int) -> float:
        """Seconds for these cycles."""

    def collective(self, kind: str, size: int, groups: tuple[tuple[int, ...], ...]) -> tuple[str, float]:
        """Mesh axes along which the groups lie, and seconds to exchange ``size`` bytes per chip."""

    def kernel(self, instruction: Instruction, computation: Computation) -> tuple[str, float, float]:
        """Name, FLOPs and seconds of a custom kernel."""

    def host(self, size: int) -> float:
        """Seconds to copy bytes to or from the host's memory."""

    def memory(self, size: int) -> float:
        """Seconds to read or write bytes."""


@dataclass
class Timeline:
    """What one execution of a computation takes on one chip.

    Attributes:
      seconds: until everything is done.
      cycles: the compiler's estimates, summed.
      compute: seconds of those cycles.
      flops: of matrix products and convolutions; kernels have their own.
      collectives: (kind, mesh axes) -> count, bytes, seconds.  Bytes are those of the larger side: what an all-gather
        returns, what a reduce-scatter takes, what the others take.
      kernels: (name, "") -> count, FLOPs, seconds.
      host: (direction, "") -> count, bytes, seconds of copies between the chip's and the host's memory.
      untimed: (opcode, and target of a custom call, "") -> count, bytes and seconds of instructions for which there is
        no estimate: their result is taken to be read and written once.
      endless: loops whose number of turns the program does not tell; they count as one turn.
    """

    seconds: float = 0.0
    cycles: int = 0
    compute: float = 0.0
    flops: float = 0.0
    collectives: dict[tuple[str, str], Total] = field(default_factory=dict)
    kernels: dict[tuple[str, str], Total] = field(default_factory=dict)
    host: dict[tuple[str, str], Total] = field(default_factory=dict)
    untimed: dict[tuple[str, str], Total] = field(default_factory=dict)
    endless: int = 0

    @property
    def kernel_seconds(self) -> float:
        return sum(total.seconds for total in self.kernels.values())

    @property
    def untimed_seconds(self) -> float:
        return sum(total.seconds for total in self.untimed.values())

    @property
    def transfer_seconds(self) -> float:
        """Of all collectives, and copies to and from the host."""
        return sum(total.seconds for group in (self.collectives, self.host) for total in group.values())

    @property
    def exposed(self) -> float:
        """Seconds in which the compute units wait for data."""
        return max(0.0, self.seconds - self.compute - self.kernel_seconds - self.untimed_seconds)

    def include(self, other: Timeline, times: int = 1) -> None:
        """Adds another timeline, ``times`` over, to all sums but ``seconds``."""
        self.cycles += other.cycles * times
        self.compute += other.compute * times
        self.flops += other.flops * times
        self.endless += other.endless
        for name in ("collectives", "kernels", "host", "untimed"):
            own = getattr(self, name)
            for key, total in getattr(other, name).items():
                own[key] = own.get(key, Total()) + total * times


def play(program: Program, prices: Prices) -> Timeline:
    """The timeline of a whole program on one chip."""
    return _Player(program, prices).play(program.entry)


@dataclass
class _Player:
    program: Program
    prices: Prices
    known: dict[str, Timeline] = field(default_factory=dict)

    def play(self, name: str) -> Timeline:
        if name not in self.known:
            self.known[name] = self._play(self.program[name])
        return self.known[name]

    def _play(self, computation: Computation) -> Timeline:
        line = Timeline()
        links = host = 0.0  # until when they are busy
        running: dict[str, float] = {}  # what was started -> when it is done
        for item in computation.instructions.values():
            exchange = self._exchange(item, computation)
            if exchange is not None:
                step, key, kind, inside, owner = exchange
                if step == "done":
                    line.seconds = max(line.seconds, running.pop(key, 0.0))
                    continue
                seconds = self._move(line, kind, inside, owner)
                links = max(links, line.seconds) + seconds
                if step == "start":
                    running[key] = links
                else:
                    line.seconds = links
                if item.cycles is not None:
                    line.seconds += self._run(line, item, computation)
            elif item.opcode in _COPIES and HOST_MEMORY in item.type:
                host = max(host, line.seconds) + self._copy(line, item, computation)
                running[item.name] = host
            elif item.opcode in _COPIED:
                line.seconds = max(line.seconds, running.pop(item.operands[0], 0.0))
            else:
                line.seconds += self._run(line, item, computation)
        line.seconds = max(line.seconds, *running.values()) if running else line.seconds
        return line

    def _run(self, line: Timeline, item: Instruction, computation: Computation) -> float:
        """Adds an instruction that computes to the sums; returns its seconds."""
        if item.opcode == "while":
            body = self.play(item.attribute("body") or "")
            turns = self.program.trip_count(computation, item)
            if turns is None:
                line.endless += 1
            line.include(body, 1 if turns is None else turns)
            return body.seconds * (1 if turns is None else turns)
        if item.opcode in ("conditional", "call") and item.called:
            branch = max(map(self.play, item.called), key=lambda one: one.seconds)
            line.include(branch)
            return branch.seconds
        if item.opcode == "custom-call" and item.attribute("custom_call_target") == "tpu_custom_call":
            name, flops, seconds = self.prices.kernel(item, computation)
            line.kernels[name, ""] = line.kernels.get((name, ""), Total()) + Total(1, flops, seconds)
            return seconds
        cycles = item.cycles
        line.flops += product_flops(self.program, computation, item)
        if cycles is None and item.opcode in ("fusion", "async-start") and item.called:
            inside = self.play(item.called[0])
            if inside.cycles or inside.kernels:
                line.include(dataclasses.replace(inside, untimed={}, flops=0.0))
                return inside.compute + inside.kernel_seconds
        if cycles is None:
            return self._untimed(line, item, computation)
        seconds = self.prices.compute(cycles)
        line.cycles += cycles
        line.compute += seconds
        return seconds

    def _untimed(self, line: Timeline, item: Instruction, computation: Computation) -> float:
        """Adds an instruction without an estimate to the sums; returns its seconds."""
        target = item.attribute("custom_call_target") or ""
        small = all(math.prod(shape.sizes) == 1 for shape in item.shapes)
        if small or item.opcode in _FREE or target in _MARKS:
            return 0.0
        size = item.bytes
        if item.opcode == "dynamic-update-slice":  # in place: only the update is written
            size = computation.instructions[item.operands[1]].bytes
        seconds = self.prices.memory(2 * size)
        key = f"{item.opcode} {target}".rstrip(), ""
        line.untimed[key] = line.untimed.get(key, Total()) + Total(1, size, seconds)
        return seconds

    def _move(self, line: Timeline, kind: str, item: Instruction, computation: Computation) -> float:
        """Adds a collective to the sums; returns its seconds."""
        size = sum(shape.bytes for shape in computation.operand_shapes(item))
        if kind == "all-gather":
            # The start of an asynchronous one returns its operand and its result.
            size = max(item.bytes - size if item.opcode.endswith("-start") else item.bytes, size)
        groups = device_groups(item)
        if groups and max(map(len, groups)) == 1:
            return 0.0
        axes, seconds = self.prices.collective(kind, size, groups)
        line.collectives[kind, axes] = line.collectives.get((kind, axes), Total()) + Total(1, size, seconds)
        return seconds

    def _copy(self, line: Timeline, item: Instruction, computation: Computation) -> float:
        """Adds a copy to or from the host's memory to the sums; returns its seconds."""
        if item.opcode == "copy-start":  # returns its target first
            size, there = item.shapes[0].bytes, HOST_MEMORY in item.type.partition("}")[0]
        elif item.opcode == "dynamic-update-slice-start":  # a stack, and what is put into it
            size, there = computation.instructions[item.operands[1]].bytes, True
        else:  # returns its operands, the slice, and a mark
            inputs = len(computation.operand_shapes(item))
            size, there = max(shape.bytes for shape in item.shapes[inputs:]), False
        direction = "to the host" if there else "from the host"
        seconds = self.prices.host(size)
        line.host[direction, ""] = line.host.get((direction, ""), Total()) + Total(1, size, seconds)
        return seconds

    def _exchange(
        self, item: Instruction, computation: Computation
    ) -> tuple[str, str, str, Instruction, Computation] | None:
        """What an instruction is in the life of a collective, or None if it is no part of one.

        Returns:
          ``"start"``, ``"done"`` or ``"whole"``; what start and end have in common; the kind; the collective itself and
          the computation in which it stands (a fusion's, where the compiler has put it into one).
        """
        base, _, step = item.opcode.rpartition("-")
        if item.opcode in COLLECTIVES:
            return "whole", item.name, item.opcode, item, computation
        if base in COLLECTIVES and step == "start":
            return "start", item.name, base, item, computation
        if base in COLLECTIVES and step == "done":
            return "done", item.operands[0], base, item, computation
        if item.opcode == "async-done":
            return "done", self._first(item, computation), "", item, computation
        if item.opcode not in ("fusion", "async-start") or not item.called:
            return None
        inside = self.program[item.called[0]]
        found = next((one for one in inside.instructions.values() if one.opcode in COLLECTIVES), None)
        if found is None:
            return None
        kind = found.opcode
        smaller = item.bytes < sum(shape.bytes for shape in inside.operand_shapes(found))
        if kind == "all-reduce" and smaller:
            kind = "reduce-scatter"  # the sum, of which every chip keeps a part
        if item.opcode == "async-start":
            return "start", item.name, kind, found, inside
        targets = {one.attribute("custom_call_target") for one in inside.instructions.values()}
        chain = f"channel {found.attribute('channel_id')}"
        if "AsyncCollectiveStart" in targets:
            return "start", chain, kind, found, inside
        if "AsyncCollectiveDone" in targets:
            return "done", chain, kind, found, inside
        # Between the two, fusions compute while the collective goes on.
        goes_on = "async_collective_fusion_config" in found.attributes
        return None if goes_on else ("whole", item.name, kind, found, inside)

    @staticmethod
    def _first(item: Instruction, computation: Computation) -> str:
        """The ``async-start`` that an ``async-done`` belongs to."""
        while item.opcode in ("async-update", "async-done") and item.operands:
            item = computation.instructions[item.operands[0]]
        return item.name
