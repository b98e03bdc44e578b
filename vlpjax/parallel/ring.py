"""All rows against all columns, some columns at a time: losses over pairs that never hold a row of logits whole.

On a mesh each device keeps its rows, and the columns travel: after as many exchanges with the next device as there are
devices, every row has met every column, and no device ever held more than its share of them (the sigmoid loss's
"chunked" form, arXiv 2303.15343, section 3.3, figure 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from vlpjax.mesh import active_layout, constrain


def against_all(
    some: Callable[..., jax.Array],
    join: Callable[[jax.Array, jax.Array], jax.Array],
    rows: Any,
    columns: Any,
    shared: tuple[jax.Array, ...],
    *,
    pieces: int,
) -> Float[Array, "numbers rows"]:
    """Numbers per row, made of what the row has with each column.

    Args:
      some: ``some(rows, columns, *shared)`` gives the numbers [K, rows] of rows with some of the columns.
      join: the numbers with two lots of columns from those with each; associative.
      rows, columns: trees of arrays with the examples on the first dimension, B of them in both.
      shared: what all need, such as a scale.
      pieces: columns are taken in equal pieces of at most ``B / pieces`` (or one by one, if there are fewer).  1 takes
        all at once, gathered; more than 1 sends them around the devices.
    """
    layout = active_layout()
    axes = () if layout is None else tuple(a for a in layout.rules["frames"] if layout.mesh.shape[a] > 1)
    if pieces == 1:
        placed = jax.tree.map(lambda x: constrain(x, "frames", *[None] * (x.ndim - 1)), rows)
        gathered = jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), columns)
        return constrain(some(placed, gathered, *shared), None, "frames")
    devices = 1 if layout is None else math.prod(layout.mesh.shape[axis] for axis in axes)
    held = jax.tree.leaves(columns)[0].shape[0] // devices  # columns per device
    cuts = next(n for n in range(1, held + 1) if held % n == 0 and (n * devices >= pieces or n == held))

    def with_held(rows: Any, columns: Any, shared: tuple[jax.Array, ...]) -> jax.Array:
        """The numbers with one device's columns, piece after piece."""
        parts = jax.tree.map(lambda x: x.reshape(cuts, held // cuts, *x.shape[1:]), columns)
        first = remembered(rows, jax.tree.map(lambda x: x[0], parts), *shared)
        rest = jax.tree.map(lambda x: x[1:], parts)
        return jax.lax.scan(
            lambda total, part: (join(total, remembered(rows, part, *shared)), None), first, rest
        )[0]

    def ring(rows: Any, columns: Any, shared: tuple[jax.Array, ...]) -> jax.Array:
        """One device's part: its rows with its own columns, then with those that arrive."""
        total = with_held(rows, columns, shared)
        onward = [(index, (index + 1) % devices) for index in range(devices)]

        def pass_on(carry: Any, _: None) -> tuple[Any, None]:
            total, columns = carry
            columns = jax.tree.map(lambda x: jax.lax.ppermute(x, axes, onward), columns)
            return (join(total, with_held(rows, columns, shared)), columns), None

        return jax.lax.scan(pass_on, (total, columns), None, length=devices - 1)[0][0]

    remembered = jax.checkpoint(some)  # logits are made again, one piece at a time
    if devices == 1:
        return with_held(rows, columns, shared)
    assert layout is not None
    mine, all_of_it = PartitionSpec(axes), PartitionSpec()
    mapped = jax.shard_map(
        ring, mesh=layout.mesh, in_specs=(mine, mine, all_of_it), out_specs=PartitionSpec(None, axes)
    )
    numbers: jax.Array = mapped(rows, columns, shared)
    return numbers
