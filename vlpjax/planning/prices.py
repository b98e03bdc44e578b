"""What a chip and its links take for what the compiler does not time: collectives, attention kernels, host copies.

Collectives take what their bytes take at the links' bandwidth, in the way that fills a torus: rings in both directions
along every torus axis that the group of chips lies on ("How to Scale Your Model", chapter "Sharded matrices",
https://jax-ml.github.io/scaling-book/sharding).  A group that does not close to a ring has half of the bandwidth: on an
axis without a link from its end to its start, or on a part of an axis.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from vlpjax.planning.hlo import Computation, Instruction, Shape
from vlpjax.planning.kernels import Core

# Seconds that a message takes to the next chip, whatever its size (the same source).
HOP_SECONDS = 1e-6
# Rate between the two devices of a chip, over that of a link (https://docs.cloud.google.com/tpu/docs/tpu7x).
DIE_TO_DIE = 6
# Matrix products over all pairs of queries and keys that a kernel does, by what its name holds; the first match counts.
PRODUCTS = (
    ("query_gradient|dq", 3),  # logits, gradient of the weights, gradient of the queries
    ("key_value_gradient|dkv", 4),  # logits, gradients of the weights, the values and the keys
    ("backward|bwd", 5),
    ("forward|fwd|flash|splash|attention", 2),  # logits and weighted values
)


@dataclass(frozen=True)
class Links:
    """The chips of a slice, by their number in the program, and what joins them.

    Attributes:
      mesh: axis name -> size, slow to fast.
      coordinates: [devices, axes], where each device stands in the torus.
      slices: [devices], the slice of each device.
      bandwidth: of one link in one direction, bytes per second.
      network: of a device to other slices, bytes per second.
      rings: per torus axis, the number of chips along it if they close to a ring, otherwise 0.
    """

    mesh: dict[str, int]
    coordinates: np.ndarray
    slices: np.ndarray
    bandwidth: float
    network: float
    rings: tuple[int, ...]

    @classmethod
    def of(
        cls, mesh: Any, bandwidth: float, network: float, closes: Callable[[Sequence[int]], Sequence[bool]]
    ) -> Links:
        """Those of a device mesh.

        Args:
          closes: which axes of a torus with these sizes are rings.
        """
        devices = mesh.devices.flatten()
        coordinates = np.array([device.coords for device in devices])
        slices = np.array([getattr(device, "slice_index", None) or 0 for device in devices])
        sizes = tuple(int(size) for size in np.ptp(coordinates, axis=0) + 1)
        rings = tuple(size * closed for size, closed in zip(sizes, closes(sizes), strict=True))
        return cls(dict(mesh.shape), coordinates, slices, bandwidth, network, rings)

    def axes(self, group: Sequence[int]) -> str:
        """The mesh axes along which a group of devices lies, such as ``"fsdp"`` or ``"ring+ulysses"``."""
        places = np.array(np.unravel_index(np.asarray(group), tuple(self.mesh.values())))
        names = [name for name, row in zip(self.mesh, places, strict=True) if len(set(row.tolist())) > 1]
        return "+".join(names) or "one chip"

    def seconds(self, kind: str, size: int, groups: Sequence[Sequence[int]]) -> float:
        """What an exchange of ``size`` bytes per device takes within each group, all at the same time.

        ``size`` is that of :class:`vlpjax.planning.schedule.Timeline`: the larger side.
        """
        group = np.asarray(groups[0])
        if kind == "collective-permute":
            return self._permute(size, groups)
        if len(set(self.slices[group].tolist())) > 1:
            return self._between_slices(kind, size, group)
        twice = 2 if kind == "all-reduce" else 1
        extents = self._extents(self.coordinates[group])
        if not extents:  # the devices of one chip
            return twice * size * (1 - 1 / len(group)) / (DIE_TO_DIE * self.bandwidth)
        bandwidth = self.bandwidth / self._sharing(group)
        hops = sum(extent // 2 if ways == 2 else extent - 1 for extent, _, ways in extents)
        latency = HOP_SECONDS * hops
        if kind in ("all-to-all", "ragged-all-to-all"):
            # Half of what half of the devices have crosses the middle of the longest axis.
            chips = math.prod(extent for extent, _, _ in extents)
            return latency + max(
                size * len(group) / chips * extent / (4 * bandwidth * ways) * stride
                for extent, stride, ways in extents
            )
        rate = sum(bandwidth * ways / stride for _, stride, ways in extents)
        once = size * (1 - 1 / len(group)) / rate
        return (once + latency) * twice

    def _extents(self, places: np.ndarray) -> list[tuple[int, int, int]]:
        """Per torus axis on which a group lies: its length, the distance of neighbours within it, and the links.

        Links are those through which a chip receives, at its worst place: 2 on a ring, otherwise 1.
        """
        found = []
        for axis, ring in enumerate(self.rings):
            values = sorted(set(places[:, axis].tolist()))
            if len(values) > 1:
                stride = min(b - a for a, b in itertools.pairwise(values))
                found.append((len(values), stride, 2 if len(values) * stride == ring else 1))
        return found

    def _sharing(self, group: np.ndarray) -> float:
        """Groups that use the same links at the same time, each with its own device of every chip."""
        places = np.column_stack([self.slices, self.coordinates])
        per_chip = len(places) / len(np.unique(places, axis=0))
        return per_chip * len(np.unique(places[group], axis=0)) / len(group)

    def _permute(self, size: int, pairs: Sequence[Sequence[int]]) -> float:
        """All messages travel along the torus at the same time; the longest way decides."""
        if any(self.slices[source] != self.slices[target] for source, target in pairs):
            return size / self.network + HOP_SECONDS
        rings = np.array(self.rings)
        distance = 0
        for source, target in pairs:
            steps = np.abs(self.coordinates[source] - self.coordinates[target])
            steps = np.where(rings > 0, np.minimum(steps, rings - steps), steps)
            distance = max(distance, int(steps.max()))
        if not distance:  # to the other device of a chip
            return size / (DIE_TO_DIE * self.bandwidth)
        sharing = self._sharing(np.asarray(pairs[0][:1]))
        return distance * (size * sharing / self.bandwidth + HOP_SECONDS)

    def _between_slices(self, kind: str, size: int, group: np.ndarray) -> float:
        """Slices exchange over the data-centre network what each device has after its own slice is done."""
        slices = len(set(self.slices[group].tolist()))
        within = group[self.slices[group] == self.slices[group[0]]]
        inner = self.seconds(kind, size, [within.tolist()]) if len(within) > 1 else 0.0
        # What is sent to one device alone cannot be sent by its neighbours in their parts.
        senders = 1 if kind in ("all-to-all", "ragged-all-to-all") else len(within)
        share = size / senders * (1 - 1 / slices)
        return inner + share / self.network * (2 if kind == "all-reduce" else 1)


@dataclass(frozen=True)
class ChipPrices:
    """The prices of one device (a chip, or a core of a chip that shows as two devices).

    Attributes:
      clock: cycles per second of the compute units.
      peak: FLOPs per second of bfloat16 products.
      memory_bandwidth, host_bandwidth: bytes per second.
      links: to the other chips.
      efficiency: share of the peak that attention kernels reach whose schedule is not known.
      attention_share: share of the pairs of queries and keys that masks let through; kernels skip the others.
      core: the schedules of our kernels, or None.
    """

    clock: float
    peak: float
    memory_bandwidth: float
    host_bandwidth: float
    links: Links
    efficiency: float
    attention_share: float
    core: Core | None = None

    def compute(self, cycles: int) -> float:
        return cycles / self.clock

    def collective(self, kind: str, size: int, groups: tuple[tuple[int, ...], ...]) -> tuple[str, float]:
        groups = groups or (tuple(range(len(self.links.slices))),)
        if kind == "collective-permute":
            axes = next((self.links.axes(pair) for pair in groups if pair[0] != pair[1]), "one chip")
        else:
            axes = self.links.axes(groups[0])
        return axes, self.links.seconds(kind, size, groups)

    def kernel(self, instruction: Instruction, computation: Computation) -> tuple[str, float, float]:
        """An attention kernel by its schedule or at the stated efficiency; any other at the memory's bandwidth."""
        path = [part for part in instruction.op_name.split("/") if part and part != "pallas_call"]
        name = path[-1] if path else re.sub(r"\.\d+$", "", instruction.name)
        operands = computation.operand_shapes(instruction)
        work = attention_work(f"{name} {instruction.name}", operands)
        if work is not None:
            flops = work.flops * self.attention_share
            cycles = None
            if self.core is not None:
                rate = self.peak / self.clock
                cycles = self.core.cycles(f"{name} {instruction.name}", *work, self.attention_share, rate)
            return (
                name,
                flops,
                flops / (self.peak * self.efficiency) if cycles is None else cycles / self.clock,
            )
        stated = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.attributes)
        flops = float(stated[1]) if stated else 0.0
        moved = instruction.bytes + sum(shape.bytes for shape in operands)
        return name, flops, max(flops / (self.peak * self.efficiency), moved / self.memory_bandwidth)

    def host(self, size: int) -> float:
        return size / self.host_bandwidth

    def memory(self, size: int) -> float:
        return size / self.memory_bandwidth


class Work(NamedTuple):
    """What an attention kernel computes.

    Attributes:
      products: per pair of query and key.
      pairs: of queries and keys in all heads, hidden ones too.
      keys, head_dim: of a row.
    """

    products: int
    pairs: float
    keys: int
    head_dim: int

    @property
    def flops(self) -> float:
        return 2.0 * self.products * self.pairs * self.head_dim


def attention_work(name: str, operands: Sequence[Shape]) -> Work | None:
    """The work of an attention kernel, or None if it is none.

    Of the operands, the first two of floating-point numbers with three or more dimensions are the queries
    ``[..., queries, head_dim]`` and the keys ``[..., keys, head_dim]``; queries of heads that share keys may lie in
    more dimensions than keys do.
    """
    products = next((count for pattern, count in PRODUCTS if re.search(pattern, name)), 0)
    arrays = [shape for shape in operands if len(shape.sizes) >= 3 and shape.dtype in ("bf16", "f32", "f16")]
    if not products or len(arrays) < 2 or arrays[0].sizes[-1] != arrays[1].sizes[-1]:
        return None
    query, key = arrays[0].sizes, arrays[1].sizes
    return Work(products, float(math.prod(query[:-1])) * key[-2], key[-2], key[-1])
