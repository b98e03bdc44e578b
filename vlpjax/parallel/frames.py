"""Visual tokens from the ranks that encoded their frames to the ranks where the decoder wants them.

The frames of a video are dealt out over the sequence ranks, a run of frames to each, and encoded where they lie; the
decoder's tokens lie in a :class:`vlpjax.parallel.order.TokenOrder`.  So nearly every visual token has to move, to one
place.  "LongVILA" (arXiv 2408.10188, section 3.3) deals out frames and then tokens too, but forms the whole row on
every rank in between.

The k-th placeholder of a row takes its k-th visual token.  It gets there in two exchanges among R ranks:

1. Token k goes to rank ``k % R``.  Every rank sends every other as much, whatever the rows say.
2. From there it goes to the rank of its placeholder.  The placeholders of a tile are neighbours in k, so a rank holds
   at most ``ceil(tile / R)`` of them, and sends no more to any tile.

One exchange alone would be uneven: the tokens of a frame all go to the one or two ranks that hold its tile.  After the
first, both have a fixed size which no row can overflow: R of them are hardly more than a rank's own tokens.

Where everything lies follows from how many placeholders each tile has, the one thing that ranks tell one another.  All
steps are gathers, also those of the backward pass, which sends gradients back along the same ways.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from vlpjax.mesh import Layout, used_axes
from vlpjax.parallel.order import TokenOrder
from vlpjax.parallel.sequence import layout_for


def place_tokens(
    visual: Float[Array, "batch visual width"],
    placeholders: Bool[Array, "batch tokens"],
    order: TokenOrder,
    count: int | None = None,
) -> Float[Array, "batch tokens width"]:
    """The visual tokens of each row at its placeholders, and 0 elsewhere.

    Args:
      visual: in the row's own order, cut into as many runs as there are sequence ranks: rank after rank.
      placeholders: in ``order``, each on its token's rank.
      order: how the row's tokens lie over the sequence ranks of the active layout.
      count: how many of the visual tokens there are to take, the first ones; None is all.

    Returns:
      rows in ``order``, of the type of ``visual``; NaN at a placeholder for which there is no visual token.

    Raises:
      UserError: a layout with other sequence ranks than the order's, or a batch or a number of tokens that it does not
        divide.
    """
    plan = _Plan.of(visual, placeholders, order, count)
    return _place(plan, visual, placeholders)


class _Plan(NamedTuple):
    """One exchange.

    Attributes:
      mesh: the devices; ``batch`` and ``sequence`` are its axes of examples, and of tokens, both kinds.
      order: how ``length`` tokens of a row lie over the ranks.
      held: visual tokens of a row that a rank has encoded; ``taken``, how many of all ranks' are taken.
    """

    mesh: Mesh
    batch: tuple[str, ...]
    sequence: tuple[str, ...]
    order: TokenOrder
    length: int
    held: int
    taken: int

    @classmethod
    def of(cls, visual: jax.Array, placeholders: jax.Array, order: TokenOrder, count: int | None) -> _Plan:
        layout: Layout = layout_for(order)
        layout.spec(("batch", "sequence", None), visual.shape, "An array of visual tokens")
        length = placeholders.shape[1]
        order.check(length)
        batch, sequence = (used_axes(layout, name) for name in ("batch", "sequence"))
        held, taken = visual.shape[1] // order.ranks, visual.shape[1] if count is None else count
        return cls(layout.mesh, batch, sequence, order, length, held, taken)

    @property
    def spread(self) -> int:
        """Tokens that a rank sends each other in the first exchange."""
        return -(-self.held // self.order.ranks)

    @property
    def run(self) -> int:
        """Tokens that a rank sends each tile in the second exchange."""
        return -(-self.order.tiles(self.length)[1] // self.order.ranks)

    def on_ranks(self, function: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
        """``function`` of every device's part of [batch, tokens, ...]."""
        place = PartitionSpec(self.batch or None, self.sequence)
        # Gradients are written out by hand.
        run = jax.shard_map(
            function, mesh=self.mesh, in_specs=(place,) * len(arrays), out_specs=place, check_vma=False
        )
        return run(*arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _place(plan: _Plan, visual: jax.Array, placeholders: jax.Array) -> jax.Array:
    return plan.on_ranks(functools.partial(_forward, plan), visual, placeholders)


def _place_forward(plan: _Plan, visual: jax.Array, placeholders: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _place(plan, visual, placeholders), placeholders


def _place_backward(plan: _Plan, placeholders: jax.Array, gradient: jax.Array) -> tuple[jax.Array, None]:
    return plan.on_ranks(functools.partial(_backward, plan), gradient, placeholders), None


_place.defvjp(_place_forward, _place_backward)


def _forward(plan: _Plan, visual: jax.Array, marks: jax.Array) -> jax.Array:
    """A rank's visual tokens [b, held, D] to those at its own placeholders, [b, tokens / R, D]."""
    tiles = _Tiles.of(plan, marks)
    middle = _exchanged(plan, _rows(visual, _leaving(plan)[0]))
    found = _rows(_exchanged(plan, _rows(middle, _turning(plan, tiles)[0])), _arriving(plan, tiles)[0])
    missing = marks & (tiles.numbers.reshape(marks.shape) >= plan.taken)
    return jnp.where(missing[..., None], jnp.asarray(jnp.nan, found.dtype), found)


def _backward(plan: _Plan, gradient: jax.Array, marks: jax.Array) -> jax.Array:
    """The same ways backwards: what came from one place goes back to it."""
    tiles = _Tiles.of(plan, marks)
    middle = _exchanged(plan, _rows(gradient, _arriving(plan, tiles)[1]))
    return _rows(_exchanged(plan, _rows(middle, _turning(plan, tiles)[1])), _leaving(plan)[1])


def _exchanged(plan: _Plan, x: jax.Array) -> jax.Array:
    """Of [b, R n, D] the r-th n rows to rank r; comes back as the n rows of every rank, rank after rank."""
    parts = x.reshape(x.shape[0], plan.order.ranks, -1, x.shape[-1])
    return jax.lax.all_to_all(parts, plan.sequence, split_axis=1, concat_axis=1).reshape(x.shape)


def _rows(x: jax.Array, index: Int[Array, "#b new"]) -> jax.Array:
    """Rows of [b, n, D] by their index, and 0 for an index beyond them."""
    index = jnp.broadcast_to(index, (x.shape[0], index.shape[1]))
    return jax.vmap(lambda rows, at: rows.at[at].get(mode="fill", fill_value=0))(x, index)


class _Tiles(NamedTuple):
    """The placeholders of the tiles of all ranks; n tiles on each of R ranks.

    Attributes:
      first, end: [b, R, n], number of the first placeholder of a tile, and of the first after it.
      ends: [b, n R], the same in the row's order of tiles.
      own: [b, n, tile], which tokens of this rank are placeholders, and ``numbers`` which ones.
      rank: this one.
    """

    first: Int[Array, "b ranks n"]
    end: Int[Array, "b ranks n"]
    ends: Int[Array, "b tiles"]
    own: Bool[Array, "b n tile"]
    numbers: Int[Array, "b n tile"]
    rank: Int[Array, ""]

    @classmethod
    def of(cls, plan: _Plan, marks: jax.Array) -> _Tiles:
        order, rank = plan.order, jax.lax.axis_index(plan.sequence)
        own = marks.reshape(marks.shape[0], *order.tiles(plan.length))
        counts = jax.lax.all_gather(jnp.sum(own, axis=2, dtype=jnp.int32), plan.sequence, axis=2)  # [b, n, R]
        counts = order.turned(counts, 1)
        ends = jnp.cumsum(counts.reshape(len(counts), -1), axis=1, dtype=jnp.int32)
        by_rank = jnp.swapaxes(order.turned(ends.reshape(counts.shape), 1), 1, 2)  # [b, R, n]
        first = by_rank - jnp.swapaxes(order.turned(counts, 1), 1, 2)
        numbers = jnp.take(first, rank, axis=1)[..., None] + jnp.cumsum(own, axis=2, dtype=jnp.int32) - 1
        return cls(first, by_rank, ends, own, numbers, rank)


# Each way is a pair of indices: of what is sent or kept, where it was; and of what there was, where it has gone.  An
# index beyond the rows stands for none.  Token k is the i-th of those that rank s has encoded, k = s held + i.


def _leaving(plan: _Plan) -> tuple[jax.Array, jax.Array]:
    """A rank's own tokens to what it sends each rank in the first exchange, [R, spread]."""
    ranks, start = plan.order.ranks, jax.lax.axis_index(plan.sequence) * plan.held
    to, nth = jnp.arange(ranks)[:, None], jnp.arange(plan.spread)[None]
    there = (to - start) % ranks + nth * ranks  # no token, or i
    i = jnp.arange(plan.held)
    back = (start + i) % ranks * plan.spread + i // ranks
    return there.reshape(1, -1), back[None]


def _turning(plan: _Plan, tiles: _Tiles) -> tuple[jax.Array, jax.Array]:
    """What came from each rank, [R, spread], to what is sent to each tile of each rank, [R, n, run]."""
    ranks, (count, _) = plan.order.ranks, plan.order.tiles(plan.length)
    first, end = tiles.first[..., None], tiles.end[..., None]  # [b, R, n, 1]
    k = first + (tiles.rank - first) % ranks + jnp.arange(plan.run) * ranks  # [b, R, n, run]
    source = k // plan.held
    there = source * plan.spread + (k - source * plan.held) // ranks
    there = jnp.where((k < end) & (k < plan.taken), there, ranks * plan.spread)

    start = jnp.arange(ranks)[:, None] * plan.held
    i = (tiles.rank - start) % ranks + jnp.arange(plan.spread) * ranks  # [R, spread]
    k = (start + i).reshape(-1)
    tile = jax.vmap(lambda ends: jnp.searchsorted(ends, k, side="right"))(tiles.ends)  # [b, R spread]
    known = (i < plan.held).reshape(-1) & (k < tiles.ends[:, -1:]) & (k < plan.taken)
    rank, nth = plan.order.holder(jnp.minimum(tile, count * ranks - 1), plan.length)
    begin = tiles.first[jnp.arange(len(tile))[:, None], rank, nth]
    back = (rank * count + nth) * plan.run + (k - begin) // ranks
    back = jnp.where(known, back, ranks * count * plan.run)
    return there.reshape(len(there), -1), back


def _arriving(plan: _Plan, tiles: _Tiles) -> tuple[jax.Array, jax.Array]:
    """What came from each rank for each tile, [R, n, run], to a rank's tokens, [n, tile]."""
    ranks, (count, tile) = plan.order.ranks, plan.order.tiles(plan.length)
    first = jnp.take(tiles.first, tiles.rank, axis=1)[..., None]  # [b, n, 1]
    k, nth = tiles.numbers, jnp.arange(count)[:, None]
    there = (k % ranks * count + nth) * plan.run + (k - first) // ranks
    there = jnp.where(tiles.own & (k < plan.taken), there, ranks * count * plan.run)

    # The placeholders of a tile, in turn, before its other tokens.
    places = jnp.argsort(~tiles.own, axis=2, stable=True)  # [b, n, tile]
    rank = jnp.arange(ranks)[:, None, None]
    i = (rank - first[:, None]) % ranks + jnp.arange(
        plan.run
    ) * ranks  # [b, R, n, run], of the tile's placeholders
    found = jnp.sum(tiles.own, axis=2)[:, None, :, None]
    known = i < found
    rows = jnp.swapaxes(jnp.minimum(i, tile - 1), 1, 2).reshape(len(i), count, -1)  # [b, n, R run]
    place = jnp.take_along_axis(places, rows, axis=2).reshape(len(i), count, ranks, plan.run)
    back = jnp.swapaxes(place, 1, 2) + nth * tile
    back = jnp.where(known, back, count * tile)
    return there.reshape(len(there), -1), back.reshape(len(back), -1)
