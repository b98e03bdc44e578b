"""All rows against all columns, some columns at a time: losses over pairs that never hold a row of logits whole.

On a mesh each device keeps its rows, and the columns travel: after as many exchanges with the next device as there are
devices, every row has met every column, and no device ever held more than its share of them (the sigmoid loss's
"chunked" form, arXiv 2303.15343, section 3.3, figure 1).  For the gradient they travel once more, and their own
gradients with them: what the way there would have to remember is all columns on every device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from vlpjax.mesh import active_layout, constrain, devices_along, used_axes
from vlpjax.parallel.passing import Ring

Some = Callable[..., jax.Array]
Join = Callable[[jax.Array, jax.Array], jax.Array]


def against_all(
    some: Some,
    join: Join,
    rows: Any,
    columns: Any,
    shared: tuple[jax.Array, ...],
    *,
    nothing: Sequence[float],
    pieces: int,
) -> Float[Array, "numbers rows"]:
    """Numbers per row, made of what the row has with each column.

    Args:
      some: ``some(rows, columns, *shared)`` gives the numbers [K, rows] of rows with some of the columns.
      join: the numbers with two lots of columns from those with each; associative.  The first number is their sum, and
        the one that has a gradient; the others are for looking at.
      rows, columns: trees of arrays with the examples on the first dimension, B of them in both.
      shared: what all need, such as a scale.
      nothing: the K numbers of a row that has met no column; joined to others, they change nothing.
      pieces: columns are taken in equal pieces of at most ``B / pieces`` (or one by one, if there are fewer).  1 takes
        all at once, gathered; more than 1 sends them around the devices.
    """
    layout = active_layout()
    axes = () if layout is None else used_axes(layout, "frames")
    if pieces == 1:
        placed = jax.tree.map(lambda x: constrain(x, "frames", *[None] * (x.ndim - 1)), rows)
        gathered = jax.tree.map(lambda x: constrain(x, *[None] * x.ndim), columns)
        return constrain(some(placed, gathered, *shared), None, "frames")
    devices = 1 if layout is None else devices_along(layout, "frames")
    held = jax.tree.leaves(columns)[0].shape[0] // devices  # columns per device
    cuts = next(n for n in range(1, held + 1) if held % n == 0 and (n * devices >= pieces or n == held))
    with_held = _in_cuts(some, join, cuts)
    if devices == 1:
        return with_held(rows, columns, shared)
    assert layout is not None
    mine, all_of_it = PartitionSpec(axes), PartitionSpec()
    mapped = jax.shard_map(
        _around(with_held, join, nothing, Ring(axes, devices)),
        mesh=layout.mesh,
        in_specs=(mine, mine, all_of_it),
        out_specs=PartitionSpec(None, axes),
    )
    numbers: jax.Array = mapped(rows, columns, shared)
    return numbers


def _in_cuts(some: Some, join: Join, cuts: int) -> Callable[[Any, Any, Any], jax.Array]:
    """The numbers with one device's columns, cut after cut."""
    remembered = jax.checkpoint(some)  # logits are made again, one cut at a time

    def with_held(rows: Any, columns: Any, shared: tuple[jax.Array, ...]) -> jax.Array:
        parts = jax.tree.map(lambda x: x.reshape(cuts, x.shape[0] // cuts, *x.shape[1:]), columns)
        first = remembered(rows, jax.tree.map(lambda x: x[0], parts), *shared)
        rest = jax.tree.map(lambda x: x[1:], parts)
        return jax.lax.scan(
            lambda total, part: (join(total, remembered(rows, part, *shared)), None), first, rest
        )[0]

    return with_held


def _around(
    with_held: Callable[[Any, Any, Any], jax.Array], join: Join, nothing: Sequence[float], ring: Ring
) -> Callable[[Any, Any, Any], jax.Array]:
    """One device's part: its rows with its own columns, then with those that arrive."""

    def varying(x: jax.Array) -> jax.Array:
        return jax.lax.pcast(x, ring.axes, to="varying")

    @jax.custom_vjp
    def around(rows: Any, columns: Any, shared: Any) -> jax.Array:
        def add(total: jax.Array, _: Any, columns: Any) -> jax.Array:
            return join(total, with_held(rows, columns, shared))

        numbers = jax.eval_shape(with_held, rows, columns, shared)
        start = jnp.broadcast_to(jnp.asarray(nothing, numbers.dtype)[:, None], numbers.shape)
        met: jax.Array = ring.meet(add, varying(start), columns)
        return met

    def forward(rows: Any, columns: Any, shared: Any) -> tuple[jax.Array, Any]:
        return around(rows, columns, shared), (rows, columns, shared)

    def backward(kept: Any, gradient: jax.Array) -> tuple[Any, Any, Any]:
        rows, columns, shared = kept
        # Each device adds up its own part of these gradients; they are added over the devices once, at the end.
        shared = jax.tree.map(varying, shared)

        def add(own: Any, _: Any, columns: Any) -> tuple[Any, Any]:
            """The gradients by floats of rows and of what is shared, and by those of these columns."""
            floats, rest = zip(*(_floats(tree) for tree in (rows, columns, shared)), strict=True)

            def summed(*floats: Any) -> jax.Array:
                return with_held(*(join_up(part) for join_up, part in zip(rest, floats, strict=True)))[0]

            by_rows, by_columns, by_shared = jax.vjp(summed, *floats)[1](gradient[0])
            return jax.tree.map(jnp.add, own, (by_rows, by_shared)), by_columns

        by_rows, by_columns, by_shared = (
            [varying(jnp.zeros(x.shape, x.dtype)) for x in _floats(tree)[0]]
            for tree in (rows, columns, shared)
        )
        (by_rows, by_shared), by_columns = ring.collect(add, (by_rows, by_shared), columns, by_columns)
        by_shared = jax.lax.psum(by_shared, ring.axes)
        return _whole(rows, by_rows), _whole(columns, by_columns), _whole(shared, by_shared)

    around.defvjp(forward, backward)
    return around


def _floats(tree: Any) -> tuple[list[jax.Array], Callable[[list[jax.Array]], Any]]:
    """The leaves of a tree that have gradients, and what makes the tree of them again."""
    leaves, form = jax.tree.flatten(tree)
    real = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]

    def join_up(floats: list[jax.Array]) -> Any:
        given = iter(floats)
        return jax.tree.unflatten(
            form, [next(given) if is_real else leaf for leaf, is_real in zip(leaves, real, strict=True)]
        )

    return [leaf for leaf, is_real in zip(leaves, real, strict=True) if is_real], join_up


def _whole(tree: Any, floats: list[jax.Array]) -> Any:
    """The gradients as a tree like ``tree``; whole numbers have none."""
    leaves, form = jax.tree.flatten(tree)
    given = iter(floats)
    return jax.tree.unflatten(
        form,
        [
            next(given)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            else np.zeros(leaf.shape, jax.dtypes.float0)
            for leaf in leaves
        ],
    )
