"""``TrainState``: everything that a step changes, and how it is laid out on the mesh."""

from __future__ import annotations

import math
from typing import Any

import jax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from vlpjax.mesh import Layout
from vlpjax.rules import map_with_names, tree_names


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
