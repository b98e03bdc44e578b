"""The device mesh, and the one table that says which logical axis lies on which mesh axis.

Modules name the axes of their parameters and activations (``"embed"``, ``"mlp"``, ``"batch"``); what those
names mean on a machine is decided here.  A mesh always has all six axes, slow to fast, most of them often of
size 1, so that no code asks which axes exist.

Where the devices are several slices (TPU slices, or the NVLink domains of GPUs), the slow axes go from slice to
slice over the data-centre network, and the fast ones stay inside a slice.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlpjax.errors import UserError
from vlpjax.rules import map_with_names

AXES = ("replica", "fsdp", "ring", "ulysses", "tensor", "expert")

# The axes that may go from slice to slice, those that send least first.  The others exchange activations in every
# layer, which only the links inside a slice are fast enough for.
ACROSS_SLICES = ("replica", "fsdp", "ring")

# Parameters are sharded over fsdp, both sequence axes and expert, so that no rank of these holds copies.  Neighbours
# along fsdp hold neighbouring pieces, which are put together first (:mod:`vlpjax.parallel.gathering`): fsdp has sides
# of a torus to itself, while ring and ulysses together make whole sides.
RULES: dict[str, tuple[str, ...]] = {
    # activations
    "batch": ("replica", "fsdp", "expert"),  # examples, and everything that is one per example
    "frames": (
        "replica",
        "fsdp",
        "ring",
        "ulysses",
        "expert",
    ),  # images and video frames: a frame is never split
    "sequence": ("ring", "ulysses"),  # tokens of a decoder
    "activation": (),  # features of an activation
    # parameters
    "embed": ("ring", "ulysses", "fsdp", "expert"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocabulary": ("tensor",),
    "experts": ("expert",),  # of a layer that chooses among experts
    "expert_embed": ("ring", "ulysses", "fsdp"),  # their "embed"
    "head_dim": (),
    "joint": (),  # the space that towers share
    "position": (),
    "layers": (),
}


@dataclass(frozen=True)
class Layout:
    """A mesh together with the rules that place logical axes on it.

    Attributes:
      mesh: the devices.
      rules: logical axis -> mesh axes.
      slices: mesh axis -> into how many slices it is cut; an axis that is not named lies within a slice.
    """

    mesh: Mesh
    rules: Mapping[str, tuple[str, ...]]
    slices: Mapping[str, int] = field(default_factory=dict)

    def spec(
        self, names: Sequence[str | None], shape: Sequence[int] | None = None, what: str = "array"
    ) -> PartitionSpec:
        """Where an array with these logical axes lies.

        Args:
          names: one logical axis name, or None, per dimension.
          shape: sizes, to check that they can be divided; None skips the check.
          what: the array's name, for messages.

        Raises:
          UserError: an unknown logical axis, two dimensions on one mesh axis, or an indivisible size.
        """
        entries: list[tuple[str, ...] | None] = []
        taken: dict[str, str] = {}
        for dimension, name in enumerate(names):
            if name is not None and name not in self.rules:
                raise UserError(
                    f"{what} names the logical axis {name!r}; the sharding rules know {sorted(self.rules)}."
                )
            axes = used_axes(self, name) if name else ()
            for axis in axes:
                if axis in taken:
                    raise UserError(
                        f"{what}: both {taken[axis]!r} and {name!r} lie on the mesh axis {axis!r}."
                    )
                taken[axis] = str(name)
            parts = math.prod(self.mesh.shape[axis] for axis in axes)
            if shape is not None and shape[dimension] % parts:
                size = shape[dimension]
                below, above = size // parts * parts, -(-size // parts) * parts
                near = f"{below} or {above}" if below else f"{above}"
                raise UserError(
                    f"{what} has {size} along {name!r}, which {'x'.join(axes)}={parts} does not divide; "
                    f"the nearest sizes that work are {near}."
                )
            entries.append(axes or None)
        return PartitionSpec(*entries)

    def sharding(self, *names: str | None) -> NamedSharding:
        """The sharding of an array with these logical axes."""
        return NamedSharding(self.mesh, self.spec(names))

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def shard_parameters(self, boxed: Any) -> Any:
        """Shardings of a tree of parameters that may carry logical axis names.

        A parameter whose module names no axes (a user's plain ``nn.Dense``) is sharded along its largest
        dimension that ``embed``'s mesh axes divide, and replicated if there is none.
        """

        def place(name: str, leaf: Any) -> NamedSharding:
            if isinstance(leaf, nn.LogicallyPartitioned):
                return NamedSharding(self.mesh, self.spec(leaf.names, leaf.value.shape, name))
            return NamedSharding(self.mesh, self._largest_dimension(leaf.shape))

        return map_with_names(place, boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))

    def _largest_dimension(self, shape: Sequence[int]) -> PartitionSpec:
        axes, parts = used_axes(self, "embed"), devices_along(self, "embed")
        fitting = [(size, -index) for index, size in enumerate(shape) if len(shape) > 1 and size % parts == 0]
        if parts == 1 or not fitting:
            return PartitionSpec()
        index = -max(fitting)[1]
        return PartitionSpec(*(axes if position == index else None for position in range(len(shape))))

    @contextlib.contextmanager
    def activate(self) -> Iterator[None]:
        """Makes :func:`constrain` place activations on this mesh while a function is traced."""
        token = _ACTIVE.set(self)
        try:
            yield
        finally:
            _ACTIVE.reset(token)


def used_axes(layout: Layout, name: str) -> tuple[str, ...]:
    """The mesh axes of a logical axis that have more than one device."""
    return tuple(axis for axis in layout.rules[name] if layout.mesh.shape[axis] > 1)


def devices_along(layout: Layout, name: str) -> int:
    """How many devices share a logical axis."""
    return math.prod(layout.mesh.shape[axis] for axis in layout.rules[name])


_ACTIVE: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


def constrain(array: jax.Array, *names: str | None) -> jax.Array:
    """Pins an activation to where its logical axes lie; outside a layout it does nothing.

    Raises:
      UserError: a size that cannot be divided, which XLA would pad in silence.
    """
    layout = _ACTIVE.get()
    if layout is None or layout.mesh.size == 1:
        return array
    what = f"an activation of shape {'x'.join(map(str, array.shape))}"
    place = NamedSharding(layout.mesh, layout.spec(names, array.shape, what))
    return jax.lax.with_sharding_constraint(array, place)


def active_layout() -> Layout | None:
    """The layout whose ``activate`` surrounds what is traced now; None outside, and on a single device."""
    layout = _ACTIVE.get()
    return None if layout is None or layout.mesh.size == 1 else layout


def active_platform() -> str:
    """``"cpu"``, ``"gpu"`` or ``"tpu"``: what the traced program will run on, which may be a machine elsewhere."""
    layout = _ACTIVE.get()
    return jax.default_backend() if layout is None else str(layout.mesh.devices.flat[0].platform)


def constrain_blocks(array: jax.Array, *, gathered: bool = False) -> jax.Array:
    """Pins blocks of examples, [blocks, rows, ...], to the devices that hold their examples.

    The devices of ``"frames"`` are split into as many groups of neighbours as there are blocks; within a group each
    device has its own rows, or all rows of the block if ``gathered``: what is gathered never leaves a group.  With more
    blocks than devices, each device has whole blocks.

    Raises:
      UserError: a number of blocks that neither divides the number of devices nor is a multiple of it.
    """
    layout = active_layout()
    if layout is None:
        return array
    devices, blocks = devices_along(layout, "frames"), array.shape[0]
    if devices % blocks and blocks % devices:
        raise UserError(
            f"{blocks} blocks of examples do not lie evenly on {devices} devices; one number must divide the other."
        )
    groups = min(blocks, devices)
    order = [AXES.index(axis) for axis in layout.rules["frames"]]
    order += [index for index in range(len(AXES)) if index not in order]
    grid = np.transpose(layout.mesh.devices, order).reshape(groups, devices // groups, -1)
    mesh = Mesh(grid, ("block", "row", "copy"), axis_types=(AxisType.Auto,) * 3)
    spec = PartitionSpec("block", None if gathered else "row")
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))


def make_layout(
    sizes: Mapping[str, int],
    rules: Mapping[str, str | Sequence[str]] | None = None,
    devices: Sequence[Any] | None = None,
) -> Layout:
    """The mesh with these axis sizes, and the default rules with ``rules`` put over them.

    Args:
      sizes: size per axis name; axes that are not named are 1; at most one may be -1 and takes the rest.
      rules: logical axis name -> mesh axes (or the name of one), replacing or adding to :data:`RULES`.
      devices: all devices by default.

    Raises:
      UserError: an unknown axis, sizes that do not multiply out to the number of devices, more than one -1, or slices
        that the sizes do not fit.
    """
    devices = list(jax.devices() if devices is None else devices)
    unknown = [name for name in sizes if name not in AXES]
    if unknown:
        raise UserError(f"config.mesh names {unknown[0]!r}; the mesh axes are {', '.join(AXES)}.")
    shape = {axis: sizes.get(axis, 1) for axis in AXES}
    free = [axis for axis in AXES if shape[axis] == -1]
    fixed = math.prod(size for size in shape.values() if size != -1)
    written = ", ".join(f"{axis}={size}" for axis, size in shape.items() if size != 1) or "all sizes 1"
    if len(free) > 1:
        raise UserError(f"config.mesh has {written}; only one axis can take the rest (-1).")
    if fixed < 1 or len(devices) % fixed or (not free and fixed != len(devices)):
        raise UserError(
            f"config.mesh has {written}, but there are {len(devices)} devices; the sizes must multiply to "
            f"{len(devices)}, and one of them may be -1 to take the rest."
        )
    if free:
        shape[free[0]] = len(devices) // fixed
    own = {name: (axes,) if isinstance(axes, str) else tuple(axes) for name, axes in (rules or {}).items()}
    table = {**RULES, **own}
    for name, axes in table.items():
        wrong = [axis for axis in axes if axis not in AXES]
        if wrong:
            raise UserError(
                f"The sharding rule {name!r} names the mesh axis {wrong[0]!r}; there are {', '.join(AXES)}."
            )
    across = slices_per_axis(shape, _count_slices(devices), len(devices))
    grid = _arrange(devices, shape, across)
    mesh = Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return Layout(mesh, table, {axis: parts for axis, parts in across.items() if parts > 1})


def slices_per_axis(shape: Mapping[str, int], slices: int, devices: int) -> dict[str, int]:
    """Into how many slices each mesh axis is cut: as few as will do of ``fsdp`` and ``ring``.

    Raises:
      UserError: slices that cannot be told apart by :data:`ACROSS_SLICES` alone.
    """
    across, left = dict.fromkeys(AXES, 1), slices
    for axis in ACROSS_SLICES:
        across[axis] = math.gcd(shape[axis], left)
        left //= across[axis]
    if left == 1:
        return across
    inside = {axis: size for axis, size in shape.items() if axis not in ACROSS_SLICES and size > 1}
    written = " x ".join(f"{axis}={size}" for axis, size in inside.items()) or "what is left"
    raise UserError(
        f"The {devices} devices are {slices} slices of {devices // slices}, and {written} must lie within a slice; "
        f"replica x fsdp x ring is {math.prod(shape[axis] for axis in ACROSS_SLICES)} and must be a multiple of "
        f"{slices}, such as config.mesh.replica={slices}."
    )


def _count_slices(devices: Sequence[Any]) -> int:
    """How many slices the devices are; machines that have none are one.

    Raises:
      UserError: slices of different sizes.
    """
    counts = collections.Counter(getattr(device, "slice_index", 0) or 0 for device in devices)
    if len(set(counts.values())) > 1:
        held = ", ".join(f"{count} in slice {index}" for index, count in sorted(counts.items()))
        raise UserError(
            f"The {len(devices)} devices are slices of different sizes ({held}); a mesh needs equal ones."
        )
    return len(counts)


def _arrange(devices: Sequence[Any], shape: Mapping[str, int], across: Mapping[str, int]) -> np.ndarray:
    """The devices as an array with a dimension per axis, in which neighbours on fast links are neighbours."""
    from jax.experimental import mesh_utils

    inner = tuple(shape[axis] // across[axis] for axis in AXES)
    outer = tuple(across[axis] for axis in AXES)
    if math.prod(outer) > 1:
        return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)
    if devices[0].platform == "tpu" and len(devices) > 1:
        # The physical torus decides which order makes neighbours of neighbours.
        grid = mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
        return _shortest_side_last(devices).reshape(inner) if max(inner) == len(devices) else grid
    return np.asarray(devices).reshape(inner)


def _shortest_side_last(devices: Sequence[Any]) -> np.ndarray:
    """All devices of a torus in one line, whose neighbours are neighbours along its shortest side.

    What is gathered along the line in stages, see :mod:`vlpjax.parallel.gathering`, is smallest in the first one.
    """
    places = np.array([device.coords for device in devices])
    sides = np.ptp(places, axis=0)
    sides = np.where(sides == 0, np.max(sides) + 1, sides)  # what is no side comes first
    order = np.lexsort(places[:, np.argsort(sides, kind="stable")].T)
    return np.array(devices, dtype=object)[order]


def pick_rule(rules: Sequence[tuple[str, Any]], hardware: str) -> Any | None:
    """The value of the first of ``config.mesh_rules`` whose expression matches all of ``hardware``.

    ``hardware`` reads ``"tpu-TPU v5p-256"``: platform, device kind and number of devices.
    """
    return next((value for pattern, value in rules if re.fullmatch(pattern, hardware)), None)


def hardware_name(devices: Sequence[Any] | None = None) -> str:
    """``"platform-kind-count"`` of the devices, which ``config.mesh_rules`` are matched against."""
    devices = jax.devices() if devices is None else devices
    return f"{devices[0].platform}-{devices[0].device_kind}-{len(devices)}"
