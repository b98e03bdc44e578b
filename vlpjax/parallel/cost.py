"""What attention over sequence ranks costs by scheme, on paper: bytes, time on the links, memory; and the cheapest.

For one layer's attention on one chip, forward and backward.  Compute is counted at a stated share of the chip's peak.
What has to arrive before a kernel can start (gathered keys, exchanged heads) is exposed in full; in a ring, the next
step's keys travel while this step's are used, and what takes longer than that is exposed.

On a torus, an axis of the mesh is taken to be a ring of chips along one dimension: a gather and a reduce-scatter use
the links of both directions, a ring of keys uses those of one, and an exchange of heads takes a quarter of the time of
a gather of the same array (https://jax-ml.github.io/scaling-book/sharding/).  On a switch every chip sends at its own
rate, within the domain that the switch joins, and at the network's rate beyond it.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import NamedTuple

import jax

from vlpjax.errors import UserError
from vlpjax.hardware import Chip, chip_of
from vlpjax.mesh import active_layout, devices_along
from vlpjax.parallel.sequence import SCHEMES, checked_heads

log = logging.getLogger("vlpjax.parallel")

EFFICIENCY = 0.5  # of the peak that attention kernels reach; flash attention's own range is 0.4 to 0.7
BACKWARD = 3.5  # products of the backward pass over those of the forward pass: seven against two, logits come up twice
NEAR = 0.02  # schemes whose times differ by this share are equally fast
MEMORY_SHARE = 0.25  # of a chip's memory that one layer's attention may take for a moment
UNKNOWN = "gather"  # on devices without figures: any mask, any heads, one collective


@dataclass(frozen=True)
class Problem:
    """Attention of one layer, as a group of sequence and tensor ranks shares it.

    Attributes:
      batch: rows that the group works on.
      length: tokens of a row.
      heads, kv_heads, head_dim: of the layer, all tensor ranks together.
      ring, ulysses, tensor: sizes of the mesh axes.
      seen: share of all pairs of query and key that the masks let through; half if causal.
      item: bytes of an element of queries, keys and values.
    """

    batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    ring: int = 1
    ulysses: int = 1
    tensor: int = 1
    seen: float = 0.5
    item: int = 2


class Estimate(NamedTuple):
    """What a scheme costs a chip, per layer, forward and backward together; seconds and bytes.

    Attributes:
      moved: bytes that arrive from other chips.
      compute: of the kernels, and of adding up what they give in parts.
      links: all time on links; ``exposed`` is what of it nothing hides.
      memory: most that is held for a moment, beside what every scheme holds.
      refused: why the scheme cannot be used, or None.
    """

    scheme: str
    moved: float = 0.0
    compute: float = 0.0
    links: float = 0.0
    exposed: float = 0.0
    memory: float = 0.0
    refused: str | None = None

    @property
    def time(self) -> float:
        """Compute, and what is not hidden behind it."""
        return self.compute + self.exposed


def estimate(problem: Problem, scheme: str, chip: Chip, efficiency: float = EFFICIENCY) -> Estimate:
    """The cost of a scheme.

    Args:
      efficiency: share of the chip's peak that kernels reach.

    Raises:
      UserError: an unknown scheme.
    """
    if scheme not in SCHEMES:
        raise UserError(f"The sequence scheme is {scheme!r}; there are {', '.join(map(repr, SCHEMES))}.")
    ranks = problem.ring * problem.ulysses
    inner = {"ulysses": ranks, "gather": 1, "ring": 1}.get(scheme, problem.ulysses)
    outer = ranks // inner
    try:
        over, again = checked_heads(problem.heads, problem.kv_heads, problem.tensor, inner)
    except UserError as why:
        return Estimate(scheme, refused=str(why))
    # Elements that a chip holds of queries; of keys with values, before and after heads are repeated for the exchange.
    tokens = problem.batch * problem.length / ranks
    query = tokens * problem.heads / problem.tensor * problem.head_dim
    pair = 2 * tokens * problem.kv_heads * over / problem.tensor * problem.head_dim
    repeated = pair * again if inner > 1 else pair
    parts = [_exchange(problem, chip, inner, query, repeated)]
    spread = _Axis.outside(problem, chip, inner, outer)
    if outer > 1 and scheme.endswith("ring"):
        parts.append(_ring(problem, chip, spread, efficiency, query, repeated))
    elif outer > 1:
        parts.append(_gather(problem, spread, repeated))
    total = functools.reduce(lambda one, two: _Part(*(a + b for a, b in zip(one, two, strict=True))), parts)
    compute = (1 + BACKWARD) * _kernel_time(problem, chip, efficiency) + total.adding
    return Estimate(scheme, total.moved, compute, total.links, total.exposed, total.memory)


def estimates(problem: Problem, chip: Chip, efficiency: float = EFFICIENCY) -> tuple[Estimate, ...]:
    """The costs of all schemes; those that would do the same thing on this mesh are listed once."""
    same = {"ulysses_ring", "ulysses_gather"} if problem.ulysses == 1 or problem.ring == 1 else set()
    return tuple(estimate(problem, scheme, chip, efficiency) for scheme in SCHEMES if scheme not in same)


def choose(
    problem: Problem, chip: Chip, *, memory: float | None = None, efficiency: float = EFFICIENCY
) -> Estimate:
    """The fastest scheme whose buffers fit, or of those as fast the one that moves least; if none fits, the smallest.

    What a ring hides behind its kernels is not free: parameters are gathered over the same links meanwhile.

    Args:
      memory: bytes that a layer's attention may take for a moment; :data:`MEMORY_SHARE` of the chip's by default.

    Raises:
      UserError: heads that fit no scheme.
    """
    memory = MEMORY_SHARE * chip.hbm_bytes / chip.devices if memory is None else memory
    possible = [found for found in estimates(problem, chip, efficiency) if found.refused is None]
    if not possible:
        raise UserError(str(estimate(problem, "gather", chip).refused))
    fitting = [found for found in possible if found.memory <= memory]
    if not fitting:
        return min(possible, key=lambda found: found.memory)
    limit = min(found.time for found in fitting) * (1 + NEAR)
    return min((found for found in fitting if found.time <= limit), key=lambda found: found.moved)


def table(
    problem: Problem, chip: Chip, *, memory: float | None = None, efficiency: float = EFFICIENCY
) -> str:
    """The costs of all schemes in lines to be printed; the one that :func:`choose` picks is marked."""
    picked = choose(problem, chip, memory=memory, efficiency=efficiency).scheme
    lines = [
        f"attention of {problem.length:,} tokens on {chip.name}: ring={problem.ring} ulysses={problem.ulysses} "
        f"tensor={problem.tensor}, kernels at {efficiency:.0%} of peak, per layer and chip, forward and backward",
        f"  {'scheme':<15}{'moved GB':>10}{'links ms':>10}{'exposed ms':>12}{'compute ms':>12}{'time ms':>10}"
        f"{'buffers GiB':>13}",
    ]
    for found in estimates(problem, chip, efficiency):
        mark = "*" if found.scheme == picked else " "
        if found.refused is not None:
            lines.append(f"{mark} {found.scheme:<15} {found.refused}")
            continue
        lines.append(
            f"{mark} {found.scheme:<15}{found.moved / 1e9:>10.3f}{found.links * 1e3:>10.2f}"
            f"{found.exposed * 1e3:>12.2f}{found.compute * 1e3:>12.2f}{found.time * 1e3:>10.2f}"
            f"{found.memory / 2**30:>13.2f}"
        )
    return "\n".join(lines)


def pick_scheme(query: jax.Array, key: jax.Array) -> str:
    """The scheme for queries and keys of these shapes on the active layout; logged once, with the costs of all.

    Args:
      query, key: [batch, tokens, heads, head_dim] of the global batch; causal attention is assumed.
    """
    layout = active_layout()
    if layout is None:
        return UNKNOWN
    sizes = layout.mesh.shape
    rows = query.shape[0] // devices_along(layout, "batch")
    problem = Problem(
        max(rows, 1), query.shape[1], query.shape[2], key.shape[2], query.shape[3],
        sizes["ring"], sizes["ulysses"], sizes["tensor"], item=query.dtype.itemsize,
    )  # fmt: skip
    return _picked(problem, layout.mesh.devices.flat[0].device_kind)


@functools.cache
def _picked(problem: Problem, device_kind: str) -> str:
    chip = chip_of(device_kind)
    if chip is None:
        log.info("Sequence scheme %r: there are no figures of %r to choose by.", UNKNOWN, device_kind)
        return UNKNOWN
    picked = choose(problem, chip).scheme
    log.info("Sequence scheme %r:\n%s", picked, table(problem, chip))
    return picked


class _Part(NamedTuple):
    """What a stage of a scheme costs: bytes, seconds on links, exposed ones, of adding up parts, bytes of buffers."""

    moved: float = 0.0
    links: float = 0.0
    exposed: float = 0.0
    adding: float = 0.0
    memory: float = 0.0


class _Axis(NamedTuple):
    """Chips that exchange something: how many, the rate of one direction, and whether they stand in a ring."""

    size: int
    bandwidth: float
    torus: bool

    @classmethod
    def of(cls, problem: Problem, chip: Chip, size: int, stride: int) -> _Axis:
        """``size`` chips, each ``stride`` chips from the next."""
        within = chip.torus_dims > 0 or size * stride <= chip.domain
        return cls(size, chip.ici_bandwidth if within else chip.dcn_bandwidth, chip.torus_dims > 0)

    @classmethod
    def outside(cls, problem: Problem, chip: Chip, inner: int, outer: int) -> _Axis:
        return cls.of(problem, chip, outer, problem.tensor * inner)

    def gather(self, size: float) -> float:
        """Seconds until every chip has all of an array of ``size`` bytes, or the sum of its own part of one."""
        return size * (self.size - 1) / self.size / (self.bandwidth * (2 if self.torus else 1))

    def exchange(self, size: float) -> float:
        """Seconds of an all-to-all of an array of ``size`` bytes, all chips' parts together."""
        if self.torus:
            return self.gather(size) / 4
        return size / self.size * (self.size - 1) / self.size / self.bandwidth


def _kernel_time(problem: Problem, chip: Chip, efficiency: float) -> float:
    """Seconds of the forward kernels."""
    pairs = problem.batch * problem.length**2 * problem.seen / (problem.ring * problem.ulysses)
    products = 4 * pairs * problem.heads / problem.tensor * problem.head_dim
    return products / (chip.bf16_flops / chip.devices * efficiency)


def _exchange(problem: Problem, chip: Chip, inner: int, query: float, pair: float) -> _Part:
    """Tokens against heads: queries, keys, values and mixed values; then all again with their gradients."""
    if inner == 1:
        return _Part()
    axis = _Axis.of(problem, chip, inner, problem.tensor)
    forward = (2 * query + pair) * problem.item
    backward = (4 * query + 2 * pair) * problem.item
    links = axis.exchange((forward + backward) * inner)
    return _Part((forward + backward) * (inner - 1) / inner, links, links, 0.0, max(forward, backward))


def _gather(problem: Problem, axis: _Axis, pair: float) -> _Part:
    """Keys and values to all, twice, and their float32 gradients back."""
    everything = pair * axis.size
    sizes = (everything * problem.item, everything * problem.item, everything * 4)
    links = sum(axis.gather(size) for size in sizes)
    moved = sum(sizes) * (axis.size - 1) / axis.size
    return _Part(moved, links, links, 0.0, everything * (problem.item + 4))


def _ring(problem: Problem, chip: Chip, axis: _Axis, efficiency: float, query: float, pair: float) -> _Part:
    """Keys and values around, twice, and their float32 gradients behind them."""
    step = _kernel_time(problem, chip, efficiency) / axis.size
    keys, sums = pair * problem.item, pair * 4
    steps = axis.size - 1
    ahead, around = keys / axis.bandwidth, (keys + sums) / axis.bandwidth
    # The gradients take two steps more than the keys: one with nothing in them yet, and the last one home.
    home = sums / axis.bandwidth
    links = steps * (ahead + around) + 2 * home
    exposed = steps * (max(ahead - step, 0) + max(around - BACKWARD * step, 0)) + home
    # Each step's mixed values, and gradients of queries, are read, added to the float32 sum and written.
    adding = axis.size * 2 * query * (problem.item + 2 * 4) / (chip.hbm_bandwidth / chip.devices)
    memory = 2 * keys + 2 * sums + 4 * query
    return _Part(steps * (2 * keys + sums) + 2 * sums, links, exposed, adding, memory)
