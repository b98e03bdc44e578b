"""A key-value cache whose slots lie over the sequence ranks: prompts and tokens are written, one query attends to all.

Slots lie in a block-striped order.  There, the first tokens of a row lie in the first places of each rank however long
the row is, so that a prompt is written without moving anything, and a cache of any size is the same cache, longer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from vlpjax.errors import UserError
from vlpjax.mesh import devices_along, used_axes
from vlpjax.parallel.attention import Interval
from vlpjax.parallel.backends import on_device
from vlpjax.parallel.flash import Flash
from vlpjax.parallel.order import TokenOrder
from vlpjax.parallel.sequence import (
    checked_heads,
    layout_for,
    rows_on_device,
    sequence_attention,
    shared_head,
)

Slots = Float[Array, "batch slots kv_heads head_dim"]


class Read(NamedTuple):
    """What reading tokens into a cache gives: their mixed values, and the cache with them in it."""

    mixed: Float[Array, "batch tokens heads head_dim"]
    key: Slots
    value: Slots


def read_tokens(
    query: Float[Array, "batch tokens heads head_dim"],
    key: Float[Array, "batch tokens kv_heads head_dim"],
    value: Float[Array, "batch tokens kv_heads head_dim"],
    cache: tuple[Slots, Slots],
    interval: Interval,
    start: Int[Array, ""] | int,
    order: TokenOrder,
    *,
    scheme: str,
    scale: float | None = None,
    soft_cap: float | None = None,
    form: Flash | None = None,
) -> Read:
    """Writes tokens into the cache, and attends: a whole prompt into an empty one, or one token after others.

    Args:
      query, key, value: of a prompt whose tokens lie in ``order``, or of one token that all ranks have.
      cache: the slots of keys and of values, in ``order``.
      interval: what each query sees, in slots.
      start: the first token's slot; 0 for a prompt.
      scheme: of a prompt's attention (:func:`vlpjax.parallel.sequence.sequence_attention`).

    Raises:
      UserError: a prompt that starts after other tokens, or what the parts refuse.
    """
    options: dict[str, Any] = dict(scale=scale, soft_cap=soft_cap, form=form)
    if query.shape[1] == 1:
        written = [
            write_token(slots, new, jnp.asarray(start), order)
            for slots, new in zip(cache, (key, value), strict=True)
        ]
        keys, values = (x.astype(query.dtype) for x in written)
        return Read(decode_attention(query, keys, values, interval, order, **options), *written)
    if not isinstance(start, int) or start != 0:
        raise UserError(
            "A prompt is read into a sharded cache from slot 0 on; later tokens follow one by one."
        )
    written = [write_prompt(slots, new, order) for slots, new in zip(cache, (key, value), strict=True)]
    return Read(sequence_attention(query, key, value, interval, order, scheme=scheme, **options), *written)


def decode_attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Slots,
    value: Slots,
    interval: Interval,
    order: TokenOrder,
    *,
    scale: float | None = None,
    soft_cap: float | None = None,
    form: Flash | None = None,
) -> Float[Array, "batch queries heads head_dim"]:
    """Attention of a few queries, which all sequence ranks have, to slots that lie over them.

    Each rank attends to its own slots; the parts are added with their shares of the softmax's sum.  Only the mixed
    values move, never keys.

    Args:
      query: unscaled.
      key, value: the cache's slots, in ``order``.
      interval: what each query sees, in slots.
      scale, soft_cap, form: as in :func:`vlpjax.parallel.sequence.sequence_attention`.

    Raises:
      UserError: no layout with the order's ranks, or slots or heads that cannot be dealt out.
    """
    layout = layout_for(order)
    slots = key.shape[1]
    order.check(slots)
    batch, ranks, tensor = (used_axes(layout, name) for name in ("batch", "sequence", "heads"))
    over, _ = checked_heads(query.shape[2], key.shape[2], devices_along(layout, "heads"), 1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    interval = Interval(*jnp.broadcast_arrays(*interval))
    if form is None:
        sizes = dict(queries=query.shape[1], keys=slots // order.ranks)
        form = on_device(query, key, **sizes, rows=rows_on_device(interval, layout))
    run = form.forward
    rows = PartitionSpec(batch if interval.start.shape[0] > 1 else None)
    heads = PartitionSpec(batch, None, tensor, None)

    def attend(query: jax.Array, key: jax.Array, value: jax.Array, interval: Interval) -> jax.Array:
        own = order.local(interval, jax.lax.axis_index(ranks), slots)
        key, value = (shared_head(x, tensor, over) for x in (key, value))
        mixed, lse = run(query, key, value, own, scale=scale, soft_cap=soft_cap)
        largest = jax.lax.pmax(lse, ranks)
        share = jnp.exp(lse - jnp.where(jnp.isneginf(largest), 0.0, largest))  # [b, h, q]
        by_query = jnp.swapaxes(share, 1, 2)[..., None]
        total, mixed = jax.lax.psum((by_query, mixed.astype(jnp.float32) * by_query), ranks)
        return (mixed / jnp.where(total == 0, 1.0, total)).astype(query.dtype)

    cache = PartitionSpec(batch, ranks, tensor if over == 1 else None, None)
    mapped = jax.shard_map(
        attend,
        mesh=layout.mesh,
        in_specs=(heads, cache, cache, rows),
        out_specs=heads,
        check_vma=False,
    )
    mixed: jax.Array = mapped(query, key, value, interval)
    return mixed


def write_prompt(
    cache: Slots, new: Float[Array, "batch tokens kv_heads head_dim"], order: TokenOrder
) -> Slots:
    """Puts a prompt's keys or values, whose tokens lie in ``order``, into the first slots; nothing moves.

    Raises:
      UserError: an order that is not block-striped, or a prompt or a cache that it cannot split.
    """
    layout = layout_for(order)
    if order.kind != "block_striped":
        raise UserError(f"A sharded cache's order is 'block_striped', not {order.kind!r}.")
    for tokens in (cache.shape[1], new.shape[1]):
        order.check(tokens)
    if new.shape[1] > cache.shape[1]:
        raise UserError(f"The cache has {cache.shape[1]} slots, but the prompt {new.shape[1]} tokens.")
    batch, ranks, tensor = (used_axes(layout, name) for name in ("batch", "sequence", "kv_heads"))
    spec = PartitionSpec(batch, ranks, tensor, None)

    def write(cache: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(cache, new.astype(cache.dtype), 0, axis=1)

    mapped = jax.shard_map(write, mesh=layout.mesh, in_specs=(spec, spec), out_specs=spec, check_vma=False)
    written: jax.Array = mapped(cache, new)
    return written


def write_token(
    cache: Slots,
    new: Float[Array, "batch 1 kv_heads head_dim"],
    slot: Int[Array, ""],
    order: TokenOrder,
) -> Slots:
    """Puts one token's keys or values, which all sequence ranks have, into a slot; the rank that holds it writes."""
    layout = layout_for(order)
    slots = cache.shape[1]
    order.check(slots)
    batch, ranks, tensor = (used_axes(layout, name) for name in ("batch", "sequence", "kv_heads"))
    spec = PartitionSpec(batch, ranks, tensor, None)

    def write(cache: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
        rank = jax.lax.axis_index(ranks)
        place = order.before(slot, rank, slots)
        mine = order.before(slot + 1, rank, slots) > place
        there = jax.lax.dynamic_slice_in_dim(cache, place, 1, axis=1)
        chosen = jnp.where(mine, new.astype(cache.dtype), there)
        return jax.lax.dynamic_update_slice_in_dim(cache, chosen, place, axis=1)

    mapped = jax.shard_map(
        write,
        mesh=layout.mesh,
        in_specs=(spec, PartitionSpec(batch, None, tensor, None), PartitionSpec()),
        out_specs=spec,
        check_vma=False,
    )
    written: jax.Array = mapped(cache, new, jnp.asarray(slot, jnp.int32))
    return written
