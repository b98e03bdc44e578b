"""How attention under interval masks is cut into tiles for the TPU kernels: layouts, tables, and who meets whom when.

What is neither computed nor fetched is decided per tile of queries from two pairs of numbers: which tiles of keys some
query of the tile sees, and which of them all of its queries see whole.  The tables are small (16 bytes per tile of
queries, 64 KB for two million tokens), are made once outside of the kernels and lie in scalar memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from vlpjax.errors import UserError
from vlpjax.parallel.attention import Interval
from vlpjax.parallel.tpu_kernels import LANES, Bounds

NOWHERE = 2**30  # a key index past all others


@dataclass(frozen=True)
class Tiles:
    """Sizes of a tile of logits.

    Attributes:
      query, key: tokens; multiples of 128.  Shorter sequences take smaller tiles.
      heads: most heads of a group that are computed with one fetch of their keys.
    """

    query: int = 512
    key: int = 1024
    heads: int = 8

    def __post_init__(self) -> None:
        for name, size in (("query", self.query), ("key", self.key)):
            if size < 1 or size % LANES:
                raise UserError(f"Tiles.{name} is {size}; it must be a multiple of {LANES}, such as 512.")
        if self.heads < 1:
            raise UserError(f"Tiles.heads is {self.heads}; it must be at least 1.")

    def within(self, queries: int, keys: int) -> Tiles:
        """The same, but no larger than sequences of these lengths need."""

        def smaller(tile: int, length: int) -> int:
            whole = -(-length // LANES) * LANES
            if whole <= tile:
                return whole
            # Padding costs more than a smaller tile: 1,280 tokens are not padded to 2,048.
            return min(range(tile, tile // 2, -LANES), key=lambda size: -(-length // size) * size)

        return Tiles(smaller(self.query, queries), smaller(self.key, keys), self.heads)


class Tables(NamedTuple):
    """What every grid step looks up.

    Attributes:
      queries: per tile of queries the four numbers of :class:`vlpjax.parallel.tpu_kernels.Bounds`, flat.
      keys: per tile of keys the first tile of queries that sees it, and the one after the last, flat.
      key_steps: the longest range of tiles of keys that a tile of queries goes with.
      query_steps: the longest range of tiles of queries that a tile of keys goes with.
    """

    queries: Int[Array, " flat"]
    keys: Int[Array, " flat"]
    key_steps: Int[Array, ""]
    query_steps: Int[Array, ""]

    @classmethod
    def of(cls, interval: Int[Array, "rows 2 queries"], keys: int, tiles: Tiles) -> Tables:
        """Those of intervals within ``0 ... keys``; queries are a whole number of tiles."""
        start, end = (x.reshape(x.shape[0], -1, tiles.query) for x in (interval[:, 0], interval[:, 1]))
        empty = start >= end
        first = jnp.min(jnp.where(empty, NOWHERE, start), axis=2) // tiles.key  # [rows, tiles of queries]
        last = -(-jnp.max(jnp.where(empty, 0, end), axis=2) // tiles.key)
        first = jnp.minimum(first, last)
        whole_first = -(-jnp.max(jnp.where(empty, NOWHERE, start), axis=2) // tiles.key)
        whole_last = jnp.min(jnp.where(empty, 0, end), axis=2) // tiles.key
        queries = jnp.stack([first, last, whole_first, whole_last], axis=-1)

        tile = jnp.arange(-(-keys // tiles.key), dtype=jnp.int32)[None, :, None]
        seen = (first[:, None] <= tile) & (tile < last[:, None])  # [rows, tiles of keys, tiles of queries]
        index = jnp.arange(first.shape[1], dtype=jnp.int32)
        key_last = jnp.max(jnp.where(seen, index + 1, 0), axis=2)
        key_first = jnp.minimum(jnp.min(jnp.where(seen, index, NOWHERE), axis=2), key_last)

        return cls(
            queries.reshape(-1).astype(jnp.int32),
            jnp.stack([key_first, key_last], axis=-1).reshape(-1).astype(jnp.int32),
            jnp.maximum(jnp.max(last - first), 1).astype(jnp.int32),
            jnp.maximum(jnp.max(key_last - key_first), 1).astype(jnp.int32),
        )


class Place(NamedTuple):
    """Which blocks a grid step works on."""

    batch: Any
    part: Any
    query_tile: Any
    group: Any
    key_tile: Any


class Specs(NamedTuple):
    """The blocks that a grid step sees of each kind of array."""

    interval: pl.BlockSpec
    query: pl.BlockSpec
    row: pl.BlockSpec
    key: pl.BlockSpec


@dataclass(frozen=True)
class Work:
    """Attention of given sizes in tiles.

    Heads of queries that share keys are a group; a group is computed in ``parts`` of ``heads`` each.

    Attributes:
      batch, queries, keys, groups, parts, heads, head_dim: sizes.
      tiles: no larger than the sequences need.
      shared: one interval serves the whole batch.
    """

    batch: int
    queries: int
    keys: int
    groups: int
    parts: int
    heads: int
    head_dim: int
    tiles: Tiles
    shared: bool

    @classmethod
    def of(cls, query: jax.Array, key: jax.Array, interval: Interval, tiles: Tiles) -> Work:
        """What these arrays ask for."""
        (batch, queries, heads, head_dim), (_, keys, groups, _) = query.shape, key.shape
        if heads % groups:
            raise UserError(f"{heads} heads of queries cannot share {groups} heads of keys evenly.")
        sharing = heads // groups
        together = max(count for count in range(1, min(sharing, tiles.heads) + 1) if sharing % count == 0)
        shared = max(interval.start.shape[0], interval.end.shape[0]) == 1
        tiles = tiles.within(queries, keys)
        return cls(batch, queries, keys, groups, sharing // together, together, head_dim, tiles, shared)

    @property
    def query_tiles(self) -> int:
        return -(-self.queries // self.tiles.query)

    @property
    def key_tiles(self) -> int:
        return -(-self.keys // self.tiles.key)

    @property
    def query_shape(self) -> tuple[int, ...]:
        """Of queries in the kernels' layout."""
        rows = self.query_tiles * self.tiles.query
        return (self.batch, self.groups * self.parts, self.heads, rows, self.head_dim)

    @property
    def key_shape(self) -> tuple[int, ...]:
        """Of keys and values in the kernels' layout."""
        return (self.batch, self.groups, self.key_tiles * self.tiles.key, self.head_dim)

    def row(self, batch: Any, tile: Any) -> Any:
        """Where a tile of queries stands in the tables."""
        return tile if self.shared else batch * self.query_tiles + tile

    def key_row(self, batch: Any, tile: Any) -> Any:
        """Where a tile of keys stands in the tables."""
        return tile if self.shared else batch * self.key_tiles + tile

    def pack_interval(self, interval: Interval) -> Int[Array, "#batch 2 rows"]:
        """Start and end, within the keys; rows that are padding see nothing."""
        both = jnp.stack(jnp.broadcast_arrays(interval.start, interval.end), axis=1).astype(jnp.int32)
        return _pad(jnp.clip(both, 0, self.keys), 2, self.tiles.query)

    def pack_queries(self, x: Float[Array, "batch queries all_heads head_dim"]) -> jax.Array:
        """As [batch, groups * parts, heads, rows, head_dim]."""
        return jnp.swapaxes(_pad(x, 1, self.tiles.query), 1, 2).reshape(self.query_shape)

    def unpack_queries(self, x: Float[Array, "batch parts heads rows head_dim"]) -> jax.Array:
        """The opposite of :meth:`pack_queries`."""
        return jnp.swapaxes(x.reshape(self.batch, -1, *x.shape[3:]), 1, 2)[:, : self.queries]

    def pack_rows(self, x: Float[Array, "batch all_heads queries"]) -> jax.Array:
        """Numbers per query as [batch, groups * parts, heads, 1, rows]."""
        return _pad(x, 2, self.tiles.query).reshape(*self.query_shape[:3], 1, -1)

    def unpack_rows(self, x: Float[Array, "batch parts heads 1 rows"]) -> jax.Array:
        """The opposite of :meth:`pack_rows`."""
        return x.reshape(self.batch, -1, x.shape[-1])[:, :, : self.queries]

    def pack_keys(self, x: Float[Array, "batch keys groups head_dim"]) -> jax.Array:
        """As [batch, groups, rows, head_dim]."""
        return jnp.swapaxes(_pad(x, 1, self.tiles.key), 1, 2)

    def unpack_keys(self, x: Float[Array, "batch groups rows head_dim"]) -> jax.Array:
        """The opposite of :meth:`pack_keys`."""
        return jnp.swapaxes(x, 1, 2)[:, : self.keys]

    def by_query(self, batch: Any, part: Any, tile: Any, step: Any, bounds: Any) -> Place:
        """The grid that sums over keys.  Past the last tile of keys it stays there, and nothing new is fetched."""
        bound = Bounds.read(bounds, self.row(batch, tile))
        key_tile = jnp.minimum(bound.first + step, jnp.maximum(bound.last - 1, 0))
        return Place(batch, part, tile, jax.lax.div(part, np.int32(self.parts)), key_tile)

    def by_key(
        self, batch: Any, group: Any, tile: Any, part: Any, step: Any, _: Any, key_bounds: Any
    ) -> Place:
        """The grid that sums over queries and over the heads of a group; it stays past the last as well."""
        row = self.key_row(batch, tile)
        query_tile = jnp.minimum(key_bounds[2 * row] + step, jnp.maximum(key_bounds[2 * row + 1] - 1, 0))
        return Place(batch, group * self.parts + part, query_tile, group, tile)

    def specs(self, grid: Callable[..., Place]) -> Specs:
        """The blocks of the grid :meth:`by_query` or :meth:`by_key`."""

        def spec(shape: tuple[int | None, ...], index: Callable[[Place], tuple[Any, ...]]) -> pl.BlockSpec:
            return pl.BlockSpec(shape, lambda *at: index(grid(*at)))

        tiles, head_dim = self.tiles, self.head_dim
        return Specs(
            spec((None, 2, tiles.query), lambda at: (0 if self.shared else at.batch, 0, at.query_tile)),
            spec(
                (None, None, self.heads, tiles.query, head_dim),
                lambda at: (at.batch, at.part, 0, at.query_tile, 0),
            ),
            spec(
                (None, None, self.heads, 1, tiles.query), lambda at: (at.batch, at.part, 0, 0, at.query_tile)
            ),
            spec((None, None, tiles.key, head_dim), lambda at: (at.batch, at.group, at.key_tile, 0)),
        )


def _pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Zeros at the end of an axis, up to a multiple."""
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if index == axis else 0) for index in range(x.ndim)])
