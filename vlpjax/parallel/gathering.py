"""Parameters at use: every device fetches the kernel it multiplies with, and returns a part of the gradient's sum.

Parameters lie in pieces over the mesh axes of ``"embed"`` (FSDP, "ZeRO", arXiv 1910.02054).  Where a kernel is used it
is gathered, in the type that it is multiplied in and not in float32, and its gradient is summed up and scattered in
that type too.  Both are said here, with sharding constraints, because a compiler that is left to itself sums the whole
gradient up on every device first.

A torus of three dimensions takes two stages.  TPUs gather and scatter natively along one or two dimensions of their
torus; across all three the compiler fills the missing pieces with zeros and sums over all devices, which moves
twice the bytes.  So the first stage gathers along the ring that the mesh axis' neighbours form, and the second along
the two other dimensions.  The first moves little: :func:`vlpjax.mesh.make_layout` gives it the shortest side.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlpjax.mesh import Layout, active_layout, devices_along, used_axes

NATIVE_DIMENSIONS = 2  # of a torus, along which TPUs gather and scatter


def gathered(kernel: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """The kernel, whole along its ``"embed"`` axis on every device; its gradient comes back in pieces.

    The result can be saved or computed again by the name ``"kernel"``.

    Args:
      kernel: cast to the type that it is used in.
      names: of its logical axes.
    """
    layout = active_layout()
    place = names.index("embed") if "embed" in names else None
    if layout is not None and place is not None and in_pieces(kernel.shape[place], layout):
        # Pieces stand on the first axis: what is scattered along the axis that lies dense in memory is summed up whole.
        first = ("embed", *names[:place], *names[place + 1 :])
        kernel = jnp.moveaxis(gather(jnp.moveaxis(kernel, place, 0), stages(layout, first)), 0, place)
    return checkpoint_name(kernel, "kernel")


def in_pieces(size: int, layout: Layout) -> bool:
    """Whether a kernel of this size lies in pieces; one that cannot be divided is whole already."""
    return size % devices_along(layout, "embed") == 0


def stages(layout: Layout, names: Sequence[str | None]) -> tuple[NamedSharding, ...]:
    """Where an array with these logical axes lies before, between and after the stages of its gathering."""
    mesh, pieces = rings(layout.mesh, used_axes(layout, "embed"))
    kept = [
        tuple(piece for group in pieces[:count] for piece in group) for count in range(len(pieces), -1, -1)
    ]

    def place(own: tuple[str, ...]) -> NamedSharding:
        entries: list[tuple[str, ...] | None] = []
        for name, entry in zip(names, layout.spec(names), strict=True):
            entries.append((own or None) if name == "embed" else entry)
        return NamedSharding(mesh, PartitionSpec(*entries))

    return tuple(place(own) for own in kept)


@functools.lru_cache
def rings(mesh: Mesh, axes: tuple[str, ...]) -> tuple[Mesh, tuple[tuple[str, ...], ...]]:
    """The mesh with an axis cut in two where a stage ends, and the axes that each stage gathers, the last one first."""
    others = [index for index, name in enumerate(mesh.axis_names) if name not in axes]
    lines = np.transpose(mesh.devices, [mesh.axis_names.index(axis) for axis in axes] + others)
    line = lines.reshape(math.prod(mesh.shape[axis] for axis in axes), -1)[:, 0]
    ring = _ring(line)
    if ring is None:
        return mesh, (axes,)
    inner: list[str] = []
    for place in range(len(axes) - 1, -1, -1):  # axes from the fastest on, until they make the ring
        axis, size = axes[place], mesh.shape[axes[place]]
        if ring % size == 0:
            inner, ring = [axis, *inner], ring // size
            if ring == 1:
                return mesh, (axes[:place], tuple(inner))
        elif size % ring == 0:
            index = mesh.axis_names.index(axis)
            cut = (f"{axis}_outer", f"{axis}_ring")
            shape, names = list(mesh.devices.shape), list(mesh.axis_names)
            shape[index : index + 1], names[index : index + 1] = [size // ring, ring], cut
            fine = Mesh(mesh.devices.reshape(shape), tuple(names), axis_types=(AxisType.Auto,) * len(names))
            return fine, ((*axes[:place], cut[0]), (cut[1], *inner))
        else:
            break
    return mesh, (axes,)


def _ring(line: np.ndarray) -> int | None:
    """How many neighbours of a line of devices lie along one side of a torus; None if nothing has to be cut there."""
    if not all(getattr(device, "coords", None) is not None for device in line):
        return None
    places = np.array([device.coords for device in line])
    if np.sum(np.ptp(places, axis=0) > 0) <= NATIVE_DIMENSIONS:
        return None
    moved = places != places[0]
    fastest = int(np.argmax(moved[int(np.argmax(moved.any(axis=1)))]))
    away = np.delete(moved, fastest, axis=1).any(axis=1)
    return int(np.argmax(away))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(kernel: jax.Array, places: tuple[NamedSharding, ...]) -> jax.Array:
    """An array that lies at the first of :func:`stages`, at the last of them; its gradient goes the way back."""
    for place in places:
        kernel = jax.lax.with_sharding_constraint(kernel, place)
    return kernel


def _gather_forward(kernel: jax.Array, places: tuple[NamedSharding, ...]) -> tuple[jax.Array, None]:
    return gather(kernel, places), None


def _gather_backward(places: tuple[NamedSharding, ...], _: None, gradient: jax.Array) -> tuple[jax.Array]:
    for place in reversed(places[:-1]):
        gradient = jax.lax.with_sharding_constraint(gradient, place)
    return (gradient,)


gather.defvjp(_gather_forward, _gather_backward)
