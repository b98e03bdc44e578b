"""``TrainState``: everything that a step changes, and how it is laid out on the mesh."""

from __future__ import annotations

import math
from typing import Any

import jax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from vlpjax.errors import UserError
from vlpjax.mesh import Layout, devices_along, used_axes
from vlpjax.rules import map_with_names, tree_names

# Of the parameters' bytes, the share that every device may hold a copy of; and what is too little to matter.
MOST_REPLICATED = 0.02
LITTLE = 64 * 2**20


@struct.dataclass
class TrainState:
    """The state between two steps.

    Attributes:
      step: number of finished steps, int32.
      params: of the towers, ``{tower: {...}}``, float32.
      optimizer: the optimizer's state.
      teachers: per teacher, a tree of tower parameters.
      objectives: per objective, its own state.
      statistics: running statistics of normalisation layers (Flax's ``batch_stats``).
    """

    step: jax.Array
    params: Any
    optimizer: Any
    teachers: Any
    objectives: Any
    statistics: Any


def state_shardings(abstract: TrainState, param_shardings: Any, layout: Layout) -> TrainState:
    """A sharding for every leaf of the state.

    Whatever mirrors a parameter (an optimizer's moment, a teacher's copy) is found by its name, which ends
    in the parameter's, and by its shape, and lies where the parameter lies.  What lacks one dimension of it (a
    factored moment) lies where the others lie.  Everything else is replicated.
    """
    by_name = dict(zip(tree_names(param_shardings), jax.tree.leaves(param_shardings), strict=True))
    shapes = {
        name: leaf.shape
        for name, leaf in zip(tree_names(abstract.params), jax.tree.leaves(abstract.params), strict=True)
    }

    def place(name: str, leaf: Any) -> NamedSharding:
        parts = name.split("/")
        for start in range(len(parts)):
            parameter = "/".join(parts[start:])
            if parameter in by_name and shapes[parameter] == leaf.shape:
                return by_name[parameter]
            if parameter in by_name and len(shapes[parameter]) == len(leaf.shape) + 1:
                return _without_one(by_name[parameter], shapes[parameter], leaf.shape)
        return layout.replicated

    return map_with_names(place, abstract)


def _without_one(sharding: NamedSharding, whole: tuple[int, ...], shape: tuple[int, ...]) -> NamedSharding:
    """Where an array lies that lacks a dimension of another; the smallest share per device, if two could lack."""
    entries = tuple(sharding.spec) + (None,) * (len(whole) - len(sharding.spec))
    candidates = [
        NamedSharding(sharding.mesh, PartitionSpec(*entries[:axis], *entries[axis + 1 :]))
        for axis in range(len(whole))
        if whole[:axis] + whole[axis + 1 :] == shape
    ]
    replicated = NamedSharding(sharding.mesh, PartitionSpec())
    return min(candidates, key=lambda one: math.prod(one.shard_shape(shape)), default=replicated)


def replicated_share(abstract: Any, shardings: Any) -> float:
    """Share of the state's bytes of which every device of the mesh holds a full copy."""
    total = copied = 0
    for leaf, sharding in zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True):
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        total += size
        copied += size if sharding.is_fully_replicated and sharding.mesh.size > 1 else 0
    return copied / max(total, 1)


def check_replicated(params: Any, shardings: Any, layout: Layout) -> None:
    """Parameters that are meant to be sharded must not be held whole by every device.

    Raises:
      UserError: copies of more than :data:`MOST_REPLICATED` of the bytes, where there are axes to shard them over.
    """
    axes = used_axes(layout, "embed")
    share = replicated_share(params, shardings)
    sizes = [math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)]
    if not axes or share <= MOST_REPLICATED or share * sum(sizes) <= LITTLE:
        return
    whole = [sharding.is_fully_replicated for sharding in jax.tree.leaves(shardings)]
    named = zip(sizes, tree_names(params), jax.tree.leaves(params), whole, strict=True)
    size, name, leaf, _ = max((item for item in named if item[-1]), key=lambda item: item[0])
    raise UserError(
        f"Every device would hold a copy of {share:.1%} of the parameters' bytes, first of all of {name} of shape "
        f"{'x'.join(map(str, leaf.shape))} ({size / 1e6:,.0f} MB); name its axes (nn.with_logical_partitioning), or "
        f"give it a dimension that {'x'.join(axes)}={devices_along(layout, 'embed')} divides."
    )
