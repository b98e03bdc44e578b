"""TPU slices as Google Cloud names them: which topologies exist, and how many hosts one has.

Source: https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus (topologies, node labels, chips per machine).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from vlpjax.config import suggest
from vlpjax.errors import UserError

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SMALL_TORI = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4")
CUBE = 4  # larger tori are made of cubes of 4 x 4 x 4 chips


@dataclass(frozen=True)
class Generation:
    """A kind of TPU.

    Attributes:
      label: of GKE's nodes, under ``cloud.google.com/gke-tpu-accelerator``.
      accelerator: what an accelerator type begins with.
      torus: whether a slice has three dimensions.
      most: chips of the largest slice.
    """

    label: str
    accelerator: str
    torus: bool
    most: int


GENERATIONS = {
    "v4": Generation("tpu-v4-podslice", "v4", True, 4096),
    "v5e": Generation("tpu-v5-lite-podslice", "v5litepod", False, 256),
    "v5p": Generation("tpu-v5p-slice", "v5p", True, 6144),
    "v6e": Generation("tpu-v6e-slice", "v6e", False, 256),
    "tpu7x": Generation("tpu7x", "tpu7x", True, 9216),
}


@dataclass(frozen=True)
class Slice:
    """A slice, such as ``v5p:4x4x8``.

    Attributes:
      kind: a key of :data:`GENERATIONS`.
      shape: chips per dimension.
    """

    kind: str
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Slice:
        """Reads ``KIND:AxB`` or ``KIND:AxBxC``.

        Raises:
          UserError: another form, an unknown kind, or a topology that does not exist, with those nearest to it.
        """
        kind, colon, topology = text.lower().partition(":")
        if kind not in GENERATIONS:
            raise UserError(
                f"There is no TPU {kind!r}{suggest(kind, GENERATIONS)}; write KIND:TOPOLOGY, v5p:4x4x8."
            )
        parts = topology.split("x")
        if not colon or not all(part.isdigit() and int(part) for part in parts):
            raise UserError(
                f"The topology {text!r} is not of the form {kind}:{next(iter(topologies(kind)))}."
            )
        shape = tuple(map(int, parts))
        if topology not in topologies(kind):
            wanted = math.prod(shape)
            near = sorted(
                topologies(kind), key=lambda known: abs(math.log(math.prod(_chips(known)) / wanted))
            )
            raise UserError(
                f"There is no slice {topology} of {kind}; slices near to its {wanted} chips are "
                f"{', '.join(near[:3])}."
            )
        return cls(kind, shape)

    @property
    def generation(self) -> Generation:
        return GENERATIONS[self.kind]

    @property
    def topology(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def chips_per_host(self) -> int:
        return min(self.chips, 4)

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_per_host


def topologies(kind: str) -> tuple[str, ...]:
    """All topologies of a generation, from the smallest."""
    generation = GENERATIONS[kind]
    if not generation.torus:
        return FLAT
    return (*SMALL_TORI, *sorted(_tori(generation.most), key=lambda known: math.prod(_chips(known))))


def _tori(most: int) -> Iterator[str]:
    """Ascending multiples of the cube's side with more chips than a cube."""
    sides = range(CUBE, most // CUBE**2 + 1, CUBE)
    for a in sides:
        for b in (b for b in sides if b >= a and a * b * b <= most):
            for c in (c for c in sides if c >= b and CUBE**3 < a * b * c <= most):
                yield f"{a}x{b}x{c}"


def _chips(topology: str) -> tuple[int, ...]:
    return tuple(map(int, topology.split("x")))
