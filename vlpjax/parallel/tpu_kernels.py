"""The bodies of the TPU kernels of :mod:`vlpjax.parallel.tpu_flash`: what is computed for one tile of logits.

A tile is ``[query tile, key tile]`` logits of one head.  A grid step holds one tile of keys, and one tile of queries of
all heads that share those keys, so that keys are fetched once for the group.  Tiles that hide nothing are computed
without masks, which would cost the vector unit a third more.

Numbers per query (interval, maximum, sum, log-sum-exp) are rows in memory, [1, queries]; where a kernel needs them as
columns, they are turned once per tile of queries and stand repeated along all 128 lanes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

LANES = 128
HIDDEN = -1e37  # a logit that is not seen: finite, so that differences of two of them are 0 and not NaN


class Bounds(NamedTuple):
    """Where the keys of one tile of queries lie, in tiles of keys; all are half-open."""

    first: jax.Array  # some query sees something from here
    last: jax.Array  # to here
    whole_first: jax.Array  # every query sees everything from here
    whole_last: jax.Array  # to here

    @classmethod
    def read(cls, table: Any, tile: jax.Array) -> Bounds:
        """Those of this tile of queries, from the flat table of all."""
        return cls(*(table[4 * tile + field] for field in range(4)))

    def whole(self, key_tile: jax.Array) -> jax.Array:
        """Whether no logit of the tile is hidden."""
        return (self.whole_first <= key_tile) & (key_tile < self.whole_last)


def steps(first: jax.Array, last: jax.Array) -> jax.Array:
    """Grid steps of a tile that goes with the tiles ``first ... last``: at least one, which writes the result."""
    return jnp.maximum(last - first, 1)


def product(left: jax.Array, right: jax.Array, over: tuple[int, int]) -> jax.Array:
    """A matrix product summed over these dimensions, in float32; exact for float32 inputs."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT
    dimensions = (((over[0],), (over[1],)), ((), ()))
    return lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)


def columns(rows: jax.Array) -> jax.Array:
    """[1, N] as [N, 128], every lane the same."""
    return jnp.transpose(jnp.broadcast_to(rows, (LANES, rows.shape[1])))


def spread(column: jax.Array, width: int) -> jax.Array:
    """[N, 128] with equal lanes as [N, width]."""
    if width % LANES == 0:
        return jnp.tile(column, (1, width // LANES)) if width > LANES else column
    return spread(column, width + LANES - width % LANES)[:, :width]


def each(heads: int, body: Callable[[Any], None]) -> None:
    """Runs ``body`` for each head."""
    if heads == 1:
        body(0)
    else:
        lax.fori_loop(0, heads, lambda head, _: body(head), None)


def masked_and_whole(live: jax.Array, whole: jax.Array, body: Callable[[bool], None]) -> None:
    """Runs ``body(masked)`` for a tile that is live, with masks only where they hide something."""
    pl.when(live & whole)(lambda: body(False))
    pl.when(live & ~whole)(lambda: body(True))


def squash(logits: jax.Array, soft_cap: float | None) -> jax.Array:
    """Logits in (-soft_cap, soft_cap)."""
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits * (1 / soft_cap))


def unsquash(gradient: jax.Array, squashed: jax.Array, soft_cap: float | None) -> jax.Array:
    """The gradient of the logits from that of the squashed ones."""
    if soft_cap is None:
        return gradient
    share = squashed * (1 / soft_cap)
    return gradient * (1 - share * share)


def forward(
    bounds: Any, interval: Any, query: Any, key: Any, value: Any, mixed: Any, lse: Any,
    start: Any, end: Any, maximum: Any, total: Any, sums: Any,
    *, rows: Callable[[jax.Array, jax.Array], jax.Array], soft_cap: float | None,
) -> None:  # fmt: skip
    """Online softmax over tiles of keys ("FlashAttention-2", arXiv 2307.08691, algorithm 1).

    Grid: batch, group of heads, tile of queries, step; ``rows(batch, tile)`` is the tile's place in the tables.
    """
    heads, _, head_dim = query.shape
    width = key.shape[0]
    bound = Bounds.read(bounds, rows(pl.program_id(0), pl.program_id(2)))
    step = pl.program_id(3)
    tile = bound.first + step

    @pl.when(step == 0)
    def _() -> None:
        start[...], end[...] = columns(interval[0:1]), columns(interval[1:2])
        maximum[...] = jnp.full(maximum.shape, HIDDEN, jnp.float32)
        total[...] = jnp.zeros(total.shape, jnp.float32)
        sums[...] = jnp.zeros(sums.shape, jnp.float32)

    def body(masked: bool) -> None:
        def head(index: Any) -> None:
            logits = squash(product(query[index], key[...], (1, 1)), soft_cap)
            if masked:
                logits = jnp.where(_visible(start, end, tile, logits.shape), logits, HIDDEN)
            # A query that sees nothing so far collects nonsense, which the first key that it sees scales to zero.
            before = maximum[index]
            highest = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
            shares = jnp.exp(logits - spread(highest, width))
            decay = jnp.exp(before - highest)
            maximum[index] = highest
            total[index] = total[index] * decay + jnp.sum(shares, axis=1, keepdims=True)
            added = product(shares.astype(value.dtype), value[...], (1, 0))
            sums[index] = sums[index] * spread(decay, head_dim) + added

        each(heads, head)

    masked_and_whole(tile < bound.last, bound.whole(tile), body)

    @pl.when(step == steps(bound.first, bound.last) - 1)
    def _() -> None:
        seen = start[...] < end[...]

        def head(index: Any) -> None:
            factor = jnp.where(seen, 1 / total[index], 0.0)
            mixed[index] = (sums[index] * spread(factor, head_dim)).astype(mixed.dtype)
            column = jnp.where(seen, maximum[index] + jnp.log(total[index]), -jnp.inf)
            lse[index] = jnp.transpose(column)[0:1]

        each(heads, head)


def query_gradient(
    bounds: Any, interval: Any, query: Any, key: Any, value: Any, gradient: Any, lse: Any, inner: Any, out: Any,
    start: Any, end: Any, lse_column: Any, inner_column: Any,
    *, rows: Callable[[jax.Array, jax.Array], jax.Array], soft_cap: float | None, scale: float,
) -> None:  # fmt: skip
    """The gradient of the queries, summed over tiles of keys; the grid of :func:`forward`."""
    heads, width = query.shape[0], key.shape[0]
    bound = Bounds.read(bounds, rows(pl.program_id(0), pl.program_id(2)))
    step = pl.program_id(3)
    tile = bound.first + step

    @pl.when(step == 0)
    def _() -> None:
        start[...], end[...] = columns(interval[0:1]), columns(interval[1:2])
        out[...] = jnp.zeros(out.shape, jnp.float32)

        def head(index: Any) -> None:
            lse_column[index], inner_column[index] = columns(lse[index]), columns(inner[index])

        each(heads, head)

    def body(masked: bool) -> None:
        def head(index: Any) -> None:
            logits = squash(product(query[index], key[...], (1, 1)), soft_cap)
            shares = jnp.exp(logits - spread(lse_column[index], width))
            if masked:
                shares = jnp.where(_visible(start, end, tile, logits.shape), shares, 0.0)
            by_share = product(gradient[index], value[...], (1, 1))
            by_logit = shares * (by_share - spread(inner_column[index], width))
            by_logit = unsquash(by_logit, logits, soft_cap)
            out[index] += product(by_logit.astype(key.dtype), key[...], (1, 0))

        each(heads, head)

    masked_and_whole(tile < bound.last, bound.whole(tile), body)

    @pl.when(step == steps(bound.first, bound.last) - 1)
    def _() -> None:
        out[...] *= scale


def key_value_gradient(
    bounds: Any, key_bounds: Any, interval: Any, query: Any, key: Any, value: Any, gradient: Any, lse: Any, inner: Any,
    key_out: Any, value_out: Any,
    *, rows: Callable[[jax.Array, jax.Array], jax.Array], key_rows: Callable[[jax.Array, jax.Array], jax.Array],
    soft_cap: float | None,
) -> None:  # fmt: skip
    """The gradients of keys and values, summed over tiles of queries and over the heads that share them.

    Grid: batch, head of the keys, tile of keys, part of the group of heads, step.  Logits stand transposed, [keys,
    queries]: no product needs a transposed tile, and the numbers per query stay rows.
    """
    batch, tile = pl.program_id(0), pl.program_id(2)
    part, step = pl.program_id(3), pl.program_id(4)
    row = key_rows(batch, tile)
    query_tile, last = key_bounds[2 * row] + step, key_bounds[2 * row + 1]
    bound = Bounds.read(bounds, rows(batch, jnp.minimum(query_tile, jnp.maximum(last - 1, 0))))

    @pl.when((part == 0) & (step == 0))
    def _() -> None:
        key_out[...] = jnp.zeros(key_out.shape, jnp.float32)
        value_out[...] = jnp.zeros(value_out.shape, jnp.float32)

    def body(masked: bool) -> None:
        def head(index: Any) -> None:
            logits = squash(product(key[...], query[index], (1, 1)), soft_cap)  # [keys, queries]
            shares = jnp.exp(logits - lse[index])
            if masked:
                here = lax.broadcasted_iota(jnp.int32, logits.shape, 0)
                low, high = interval[0:1] - tile * key.shape[0], interval[1:2] - tile * key.shape[0]
                shares = jnp.where((here >= low) & (here < high), shares, 0.0)
            value_out[...] += product(shares.astype(gradient.dtype), gradient[index], (1, 0))
            by_share = product(value[...], gradient[index], (1, 1))
            by_logit = unsquash(shares * (by_share - inner[index]), logits, soft_cap)
            key_out[...] += product(by_logit.astype(query.dtype), query[index], (1, 0))

        each(query.shape[0], head)

    # Between the first and the last tile of queries that see these keys there may be some that do not.
    live = (query_tile < last) & (bound.first <= tile) & (tile < bound.last)
    masked_and_whole(live, bound.whole(tile), body)


def _visible(start: Any, end: Any, tile: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Which logits of [queries, keys] count."""
    here = lax.broadcasted_iota(jnp.int32, shape, 1)
    low, high = start[...] - tile * shape[1], end[...] - tile * shape[1]
    return (here >= spread(low, shape[1])) & (here < spread(high, shape[1]))
