"""Exact nearest neighbours over the mesh: chunked, sharded, with a running merge of the best."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from vlpjax.errors import UserError
from vlpjax.evaluators.base import unit
from vlpjax.mesh import Layout, constrain
from vlpjax.parallel.ranking import Best, merge_best, nothing_yet, take_best

DISTANCES = ("cosine", "euclidean")


def make_nearest(
    layout: Layout, k: int, *, distance: str = "cosine", chunk: int = 256, block: int = 8192
) -> Callable[[jax.Array, jax.Array, jax.Array], Best]:
    """A function from (queries [Q, E], memory [M, E], real [M]) to the k best scores and their places, [Q, k].

    Scores fall along k; equal ones stand in the order of the memory.  The memory stays where it is sharded: every
    device ranks its own rows, ``block`` at a time, for ``chunk`` queries at a time, and only the k best of each
    device travel.

    Args:
      k: at most the number of real rows; places beyond those have a score of -inf.
      distance: ``"cosine"``, where rows of any length are compared by their direction and the score is the cosine;
        ``"euclidean"``, where the score is minus half the squared distance.
      chunk, block: queries and rows of memory whose scores stand on a device at a time.

    Raises:
      UserError: an unknown distance.
    """
    if distance not in DISTANCES:
        raise UserError(f"The distance of neighbours is {distance!r}; there are {', '.join(DISTANCES)}.")
    axes = layout.spec(("frames",))[0] or ()
    everywhere = PartitionSpec()

    def search(query: jax.Array, memory: jax.Array, real: jax.Array) -> Best:
        """The best of this device's rows of the memory, then the best of all devices' best."""
        scores, places = _best_of_blocks(query, memory, real, k, distance, block)
        if not axes:
            return scores, places
        places = places + jax.lax.axis_index(axes) * memory.shape[0]
        # Devices stand in the order of their rows, so that ties stay in order too.
        every_score = jax.lax.all_gather(scores, axes, axis=1, tiled=True)  # [c, devices k]
        every_place = jax.lax.all_gather(places, axes, axis=1, tiled=True)
        return take_best(every_score, every_place, k)

    sharded = PartitionSpec(axes)
    search_all = jax.shard_map(
        search,
        mesh=layout.mesh,
        in_specs=(everywhere, sharded, sharded),
        out_specs=everywhere,
        check_vma=False,  # what was gathered is the same everywhere, which the checker cannot see
    )

    def nearest(queries: jax.Array, memory: jax.Array, real: jax.Array) -> Best:
        with layout.activate():
            if distance == "cosine":
                queries, memory = unit(queries), unit(memory)
            count, padding = queries.shape[0], -queries.shape[0] % chunk
            chunks = jnp.pad(queries, ((0, padding), (0, 0))).reshape(-1, chunk, queries.shape[1])
            scores, places = jax.lax.map(
                lambda query: search_all(constrain(query, None, None), memory, real), chunks
            )
            if distance == "euclidean":
                scores = scores - 0.5 * jnp.sum(jnp.square(chunks), axis=-1, keepdims=True)
            return scores.reshape(-1, k)[:count], places.reshape(-1, k)[:count]

    return nearest


def count_votes(
    scores: Float[Array, "queries k"],
    labels: Int[Array, "queries k"],
    classes: int,
    temperature: float | None = None,
) -> Float[Array, "queries classes"]:
    """The votes of neighbours for their classes: exp(score / temperature) each, or one each without a temperature."""
    weights = jnp.ones_like(scores)
    if temperature is not None:
        # Relative to the nearest, which changes no order and cannot overflow.
        weights = jnp.exp((scores - scores[:, :1]) / temperature)
    rows = jnp.arange(len(scores))[:, None]
    return jnp.zeros((len(scores), classes)).at[rows, labels].add(weights)


def _best_of_blocks(
    query: Float[Array, "chunk features"],
    memory: Float[Array, "rows features"],
    real: Bool[Array, rows],
    k: int,
    distance: str,
    block: int,
) -> Best:
    """The k best rows of a memory, which is read block after block."""
    block = min(block, memory.shape[0])
    padding = -memory.shape[0] % block
    blocks = jnp.pad(memory, ((0, padding), (0, 0))).reshape(-1, block, memory.shape[1])
    valid = jnp.pad(real, (0, padding)).reshape(-1, block)
    starts = jnp.arange(blocks.shape[0], dtype=jnp.int32) * block

    def merge(best: Best, item: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Best, None]:
        rows, real, start = item
        scores = jnp.einsum("qe,me->qm", query, rows, precision="highest")
        if distance == "euclidean":
            scores = scores - 0.5 * jnp.sum(jnp.square(rows), axis=-1)
        scores = jnp.where(real, scores, -jnp.inf)
        return merge_best(best, scores, start), None

    return jax.lax.scan(merge, nothing_yet(query.shape[0], k), (blocks, valid, starts))[0]
