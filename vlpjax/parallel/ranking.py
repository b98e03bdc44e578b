"""The best of many scores, found a block of columns at a time, so that they never stand in memory together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Best = tuple[
    Float[Array, "queries k"], Int[Array, "queries k"]
]  # scores, which fall along k, and their columns


def nothing_yet(queries: int, k: int) -> Best:
    """What a search for the k best begins with: scores of -inf."""
    return jnp.full((queries, k), -jnp.inf), jnp.zeros((queries, k), jnp.int32)


def merge_best(best: Best, scores: Float[Array, "queries block"], start: Int[Array, ""]) -> Best:
    """The k best of those so far and of the columns from ``start`` on; equal scores keep their order."""
    places = jnp.broadcast_to(start + jnp.arange(scores.shape[1], dtype=jnp.int32), scores.shape)
    # What came before stands before, and top_k takes the first of equal scores.
    joined = (jnp.concatenate([best[0], scores], axis=1), jnp.concatenate([best[1], places], axis=1))
    return take_best(*joined, best[0].shape[1])


def take_best(scores: Float[Array, "queries columns"], places: Int[Array, "queries columns"], k: int) -> Best:
    """The k best scores of every row, and their places."""
    best, where = jax.lax.top_k(scores, k)
    return best, jnp.take_along_axis(places, where, axis=1)
