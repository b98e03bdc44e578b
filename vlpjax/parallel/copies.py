"""Kernels and tables of which every device has a copy of its own, while tokens are dealt out over the devices.

What is used many times before its gradient is complete (the kernel of a loss that goes through chunks of tokens), or at
places that only the tokens know (a table that is looked up), is written with the devices as axes of the arrays.  Each
device then works on its own tokens alone, and the gradients of all copies are summed up once, straight into the pieces
that parameters lie in.  Left to itself, the compiler sums after every chunk, or holds all of what was looked up
everywhere, or sums the whole gradient on every device before it cuts it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from vlpjax.mesh import Layout, active_layout, devices_along, used_axes
from vlpjax.parallel.gathering import gather, gathered, in_pieces, rings, stages

NARROW = 32  # features of a piece of a row, below which a look-up fetches next to nothing


class Devices(NamedTuple):
    """The devices that tokens are dealt out over.

    Attributes:
      over: logical axes of the first dimensions of arrays of tokens.
      counts: devices along each of them.
      place: of arrays [*counts, ...]; None where nothing is dealt out.
    """

    over: tuple[str, ...]
    counts: tuple[int, ...]
    place: NamedSharding | None = None

    @classmethod
    def of(cls, shape: Sequence[int], *over: str) -> Devices:
        """Those of the active layout, if they divide arrays that begin with these sizes; if not, one for all."""
        layout = active_layout()
        together = cls(over, (1,) * len(over))
        if layout is None:
            return together
        counts = tuple(devices_along(layout, name) for name in over)
        if any(size % count for size, count in zip(shape, counts, strict=False)):
            return together
        return cls(over, counts, layout.sharding(*over))

    def split(self, x: jax.Array) -> jax.Array:
        """[batch, tokens, ...] -> [M, N, batch / M, tokens / N, ...]."""
        axes = len(self.counts)
        pairs = (
            part for count, size in zip(self.counts, x.shape, strict=False) for part in (count, size // count)
        )
        x = x.reshape(*pairs, *x.shape[axes:])
        x = jnp.transpose(x, (*range(0, 2 * axes, 2), *range(1, 2 * axes, 2), *range(2 * axes, x.ndim)))
        return x if self.place is None else jax.lax.with_sharding_constraint(x, self.place)

    def join(self, x: jax.Array) -> jax.Array:
        """The inverse of :meth:`split`."""
        axes = len(self.counts)
        order = [place for axis in range(axes) for place in (axis, axes + axis)]
        sizes = [count * size for count, size in zip(self.counts, x.shape[axes:], strict=False)]
        return jnp.transpose(x, (*order, *range(2 * axes, x.ndim))).reshape(*sizes, *x.shape[2 * axes :])

    def copies(self, kernel: jax.Array, names: Sequence[str | None]) -> jax.Array:
        """A whole copy of a kernel for every device, [M, N, *kernel.shape].

        Args:
          kernel: cast to the type that it is used in, which its gradients are summed over the devices in.
          names: of its logical axes, of which the first is ``"embed"``.
        """
        layout = active_layout()
        if layout is None or self.place is None:
            return gathered(kernel, names)[(None,) * len(self.over)]
        at = _Copies.of(layout, names, self.over)
        if not in_pieces(kernel.shape[0], layout) or not set(at.scattered) <= set(at.summed):
            copies = jnp.broadcast_to(gathered(kernel, names), (*self.counts, *kernel.shape))
            return jax.lax.with_sharding_constraint(copies, at.place)
        return _copy(kernel, at)


def look_up(
    table: Float[Array, "rows width"],
    ids: Int[Array, "*shape"],
    *over: str,
    rows: str | None = "vocabulary",
) -> Float[Array, "*shape width"]:
    """The rows of a table with these numbers.

    Args:
      table: cast to the type that its rows are used in.
      ids: below the number of rows.
      over: logical axes of the first dimensions of ``ids``.
      rows: logical axis of the table's rows; that of its features is ``"embed"``.
    """
    layout = active_layout()
    if layout is None or _exchanged(layout, table.shape, ids.size, over):
        return jnp.take(table, ids, axis=0)
    devices = Devices.of(ids.shape, *over)
    copies = jnp.swapaxes(devices.copies(table.T, ("embed", rows)), -1, -2)
    take = functools.partial(jnp.take, axis=0)
    for _ in over:
        take = jax.vmap(take)
    return devices.join(take(copies, devices.split(ids)))


def _exchanged(layout: Layout, table: tuple[int, ...], count: int, over: Sequence[str]) -> bool:
    """Whether devices look up their pieces of all rows, and exchange them, because that is less than the table.

    The compiler does so by itself where one axis of ids is dealt out just as features are, and nowhere else.
    """
    held = [axes for axes in (used_axes(layout, name) for name in over) if axes]
    parts = devices_along(layout, "embed")
    rows, width = table
    return held == [used_axes(layout, "embed")] and count <= rows * parts and width >= NARROW * parts


class _Copies(NamedTuple):
    """Where copies of a kernel lie, and the way back of their gradients.

    Attributes:
      stages: of the kernel, see :func:`vlpjax.parallel.gathering.stages`.
      pieces: the axes that each stage gathers, the last one first.
      held: the axes that copies are counted along; gradients are summed over them.
      place: of the copies.
    """

    stages: tuple[NamedSharding, ...]
    pieces: tuple[tuple[str, ...], ...]
    held: tuple[tuple[str, ...], ...]
    place: NamedSharding

    @classmethod
    def of(cls, layout: Layout, names: Sequence[str | None], over: Sequence[str]) -> _Copies:
        mesh, pieces = rings(layout.mesh, used_axes(layout, "embed"))
        held = tuple(
            tuple(part for axis in used_axes(layout, name) for part in _parts(mesh, axis)) for name in over
        )
        place = PartitionSpec(*(axes or None for axes in held), None, *layout.spec(names[1:]))
        return cls(stages(layout, names), tuple(filter(None, pieces)), held, NamedSharding(mesh, place))

    @property
    def counts(self) -> tuple[int, ...]:
        """Devices along each axis of copies."""
        return tuple(math.prod(self.place.mesh.shape[axis] for axis in axes) for axes in self.held)

    @property
    def summed(self) -> tuple[str, ...]:
        """The axes that gradients are summed over."""
        return tuple(axis for axes in self.held for axis in axes)

    @property
    def scattered(self) -> tuple[str, ...]:
        """The axes that the sum is scattered over."""
        return tuple(axis for axes in self.pieces for axis in axes)


def _parts(mesh: Mesh, axis: str) -> tuple[str, ...]:
    """What an axis has become in the mesh of :func:`vlpjax.parallel.gathering.rings`."""
    return (axis,) if axis in mesh.axis_names else (f"{axis}_outer", f"{axis}_ring")


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _copy(kernel: jax.Array, at: _Copies) -> jax.Array:
    copies = jnp.broadcast_to(gather(kernel, at.stages), (*at.counts, *kernel.shape))
    return jax.lax.with_sharding_constraint(copies, at.place)


def _copy_forward(kernel: jax.Array, at: _Copies) -> tuple[jax.Array, None]:
    return _copy(kernel, at), None


def _copy_backward(at: _Copies, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    others = tuple(axis for axis in at.summed if axis not in at.scattered)

    def to_pieces(own: jax.Array) -> jax.Array:
        own = own.reshape(own.shape[len(at.counts) :])
        # Written out: from a sum over all devices that is cut in stages the compiler makes no sum in stages.  Pieces
        # are an axis of their own, as nothing is scattered along the axis that lies dense in memory.
        for axes in at.pieces:
            count = math.prod(at.place.mesh.shape[axis] for axis in axes)
            own = jax.lax.psum_scatter(own.reshape(count, -1, *own.shape[1:]), axes)
        return jax.lax.psum(own, others) if others else own

    mapped = jax.shard_map(
        to_pieces, mesh=at.place.mesh, in_specs=at.place.spec, out_specs=at.stages[0].spec, check_vma=False
    )
    summed: jax.Array = mapped(gradient)
    return (summed,)


_copy.defvjp(_copy_forward, _copy_backward)
