"""How the tokens of a row lie over the sequence ranks, and how evenly that shares out attention.

Every order cuts a row into tiles of neighbouring tokens and deals the tiles out.  What a rank holds it holds in
ascending order, so an interval of keys stays an interval of the keys of any rank, or of any group of ranks: masks
survive every order exactly.

* ``contiguous``: one piece per rank.  Under a causal mask the last rank works most.
* ``zigzag``: 2R pieces for R ranks; rank r holds the pieces r and 2R - 1 - r.  Even for one causal text a row, not for
  packed texts.  Source: "LongVILA", arXiv 2408.10188, section 3.3.
* ``block_striped``: tiles dealt out in turn, as "Striped Attention" (arXiv 2311.09431) does with single tokens; with
  whole tiles nearly every tile that a kernel visits is full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from vlpjax.errors import UserError
from vlpjax.parallel.attention import Interval

KINDS = ("contiguous", "zigzag", "block_striped")


@dataclass(frozen=True)
class TokenOrder:
    """Which rank holds which tokens.

    Attributes:
      kind: one of :data:`KINDS`.
      ranks: sequence ranks, ring x ulysses; the ranks of one ring place are neighbours.
      tile: tokens per tile of ``block_striped``; the other kinds do not use it.

    Raises:
      UserError: an unknown kind, or a number of ranks or tokens below 1.
    """

    kind: str = "block_striped"
    ranks: int = 1
    tile: int = 512

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(
                f"A token order's kind is {self.kind!r}; there are {', '.join(map(repr, KINDS))}."
            )
        if self.ranks < 1 or self.tile < 1:
            raise UserError(
                f"A token order takes at least 1 rank and tiles of at least 1 token, not {self.ranks} and {self.tile}."
            )

    def check(self, length: int) -> None:
        """Raises a :class:`UserError` if a row of this length cannot be dealt out evenly."""
        unit = {"contiguous": 1, "zigzag": 2, "block_striped": self.tile}[self.kind] * self.ranks
        if length < 1 or length % unit:
            below, above = length // unit * unit, -(-max(length, 1) // unit) * unit
            near = f"{below} or {above}" if below > 0 else f"{above}"
            raise UserError(
                f"A row of {length} tokens cannot be split over {self.ranks} sequence ranks in the order "
                f"{self.kind!r}, which takes multiples of {unit}; the nearest lengths that work are {near}."
            )

    def tiles(self, length: int) -> tuple[int, int]:
        """Tiles that each rank holds of a row, and the tokens of a tile."""
        self.check(length)
        local = length // self.ranks
        tile = {"contiguous": local, "zigzag": local // 2, "block_striped": self.tile}[self.kind]
        return local // tile, tile

    def permutation(self, length: int) -> Int[np.ndarray, " length"]:
        """For every place in the new order, rank after rank, the token (its index in the row) that lies there."""
        count, tile = self.tiles(length)
        index = np.arange(length, dtype=np.int32).reshape(count, self.ranks, tile)
        if self.kind == "zigzag":
            index[1] = index[1, ::-1].copy()
        return np.swapaxes(index, 0, 1).reshape(length)

    def inverse(self, length: int) -> Int[np.ndarray, " length"]:
        """For every token of the row, its place in the new order."""
        return np.argsort(self.permutation(length)).astype(np.int32)

    def positions_of(self, rank: int, length: int) -> Int[np.ndarray, " local"]:
        """The tokens that a rank holds, ascending."""
        return self.permutation(length).reshape(self.ranks, -1)[rank]

    def permute(self, x: jax.Array, axis: int) -> jax.Array:
        """Puts a row's tokens, which lie along ``axis``, into this order.

        Meant for integers (ids, labels, positions, intervals) before they are embedded: on a mesh, everything that a
        token has is moved to its rank.
        """
        x, (count, tile) = jnp.asarray(x), self.tiles(x.shape[axis])
        tiles = x.reshape(*x.shape[:axis], count, self.ranks, tile, *x.shape[axis + 1 :])
        return jnp.swapaxes(self.turned(tiles, axis), axis, axis + 1).reshape(x.shape)

    def unpermute(self, x: jax.Array, axis: int) -> jax.Array:
        """Puts tokens in this order back into the row's."""
        x, (count, tile) = jnp.asarray(x), self.tiles(x.shape[axis])
        tiles = x.reshape(*x.shape[:axis], self.ranks, count, tile, *x.shape[axis + 1 :])
        return self.turned(jnp.swapaxes(tiles, axis, axis + 1), axis).reshape(x.shape)

    def turned(self, tiles: jax.Array, axis: int) -> jax.Array:
        """Turns tiles, by place in a rank (along ``axis``) and then by rank, into the row's order, or back.

        They are in it already, but for zigzag, whose second piece runs backwards over the ranks.
        """
        if self.kind != "zigzag":
            return tiles
        first, second = (jax.lax.slice_in_dim(tiles, place, place + 1, axis=axis) for place in (0, 1))
        return jnp.concatenate([first, jnp.flip(second, axis + 1)], axis)

    def grouped(self, size: int) -> TokenOrder:
        """What groups of ``size`` neighbouring ranks hold together, as an order of its own."""
        return TokenOrder(self.kind, self.ranks // size, self.tile * size)

    def holder(self, tile: Int[Array, "*tiles"], length: int) -> tuple[jax.Array, jax.Array]:
        """Who holds a tile of the row: the rank, and which of the rank's tiles it is."""
        self.check(length)
        nth, rank = tile // self.ranks, tile % self.ranks
        if self.kind == "zigzag":
            rank = jnp.where(nth == 1, self.ranks - 1 - rank, rank)
        return rank, nth

    def before(
        self, index: Int[Array, "*leading"], rank: Int[Array, ""] | int, length: int
    ) -> Int[Array, "*leading"]:
        """How many of a rank's tokens stand before the token ``index`` of the row.

        This turns the ends of intervals into indices of the rank's own keys; it is what a search in
        :meth:`positions_of` would find, in closed form.
        """
        count, tile = self.tiles(length)
        if self.kind == "zigzag":
            last = 2 * self.ranks - 1 - rank
            return jnp.clip(index - rank * tile, 0, tile) + jnp.clip(index - last * tile, 0, tile)
        round_ = self.ranks * tile
        rounds = jnp.clip(index // round_, 0, count)
        return rounds * tile + jnp.clip(index - rounds * round_ - rank * tile, 0, tile)

    def local(self, interval: Interval, rank: Int[Array, ""] | int, length: int) -> Interval:
        """What queries see of a rank's tokens, in indices of these."""
        return Interval(*(self.before(x, rank, length) for x in interval))


def fitting_order(length: int, ranks: int, tile: int = 512) -> TokenOrder:
    """The block-striped order of rows of this length, with the largest tiles up to ``tile`` tokens that fit.

    Raises:
      UserError: a length that the ranks do not divide.
    """
    TokenOrder("contiguous", ranks).check(length)
    local = length // ranks
    return TokenOrder(
        "block_striped", ranks, max(n for n in range(1, min(tile, local) + 1) if local % n == 0)
    )


class Balance(NamedTuple):
    """How uneven the ranks' work is: 1 is even, R is all work on one rank.

    Attributes:
      total: most tiles of logits that a rank computes, over the mean.
      lockstep: the same where the ranks wait for one another after each part of the keys, as in a ring.
    """

    total: float
    lockstep: float


def balance(order: TokenOrder, start: np.ndarray, end: np.ndarray, tile: int) -> Balance:
    """The balance of attention whose queries and keys lie in ``order``, counted in tiles that are not all masked.

    Args:
      start, end: [tokens], the keys that each query sees, in the row's order.
      tile: queries and keys of one tile of a kernel.
    """
    length = len(start)
    places = [order.positions_of(rank, length) for rank in range(order.ranks)]
    live = np.zeros((order.ranks, order.ranks))  # tiles of rank's queries with another's keys
    for rank, queries in enumerate(places):
        for other, keys in enumerate(places):
            first, last = (np.searchsorted(keys, x[queries]) for x in (start, end))
            blocks = [slice(at, at + tile) for at in range(0, len(queries), tile)]
            for block in blocks:
                seen = first[block] < last[block]
                if seen.any():
                    low, high = first[block][seen].min(), last[block][seen].max()
                    live[rank, other] += -(-high // tile) - low // tile
    work = live.sum(axis=1)
    steps = [
        max(live[rank, (rank - step) % order.ranks] for rank in range(order.ranks))
        for step in range(order.ranks)
    ]
    return Balance(float(work.max() / work.mean()), float(sum(steps) / work.mean()))
