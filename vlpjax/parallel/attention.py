"""Attention under interval masks: the dense form, which is the oracle for every other form.

A mask is an interval of keys per query, ``[start, end)`` in token order.  Causal attention, padding, packed
documents, prefix-LM, bidirectional image blocks and sliding windows are all intervals, and an interval says
without looking at single tokens which blocks of keys a block of queries can skip.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Interval(NamedTuple):
    """The keys that each query sees: ``start <= key index < end``; both ``[batch or 1, queries]``."""

    start: Int[Array, "#batch queries"]
    end: Int[Array, "#batch queries"]


def causal(length: int) -> Interval:
    """Every token sees itself and what stands before it."""
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    return Interval(jnp.zeros_like(positions), positions + 1)


def prefix(lengths: Int[Array, " batch"], queries: int) -> Interval:
    """Every query sees the first ``lengths[b]`` keys: padding at the end is hidden, nothing else is."""
    end = jnp.broadcast_to(lengths[:, None].astype(jnp.int32), (lengths.shape[0], queries))
    return Interval(jnp.zeros_like(end), end)


def attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    value: Float[Array, "batch keys heads head_dim"],
    interval: Interval | None = None,
) -> Float[Array, "batch queries heads head_dim"]:
    """Scaled dot-product attention; the softmax is taken in float32 whatever the inputs are.

    Args:
      query, key, value: projected tokens, unscaled.
      interval: which keys each query sees; None lets every query see every key.  A query with an empty
        interval returns zeros.

    Source: "Attention Is All You Need", arXiv 1706.03762, equation 1.
    """
    query = query * (query.shape[-1] ** -0.5)
    logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)  # [B, H, Q, K]
    if interval is None:
        weights = jax.nn.softmax(logits, axis=-1)
    else:
        keys = jnp.arange(key.shape[1], dtype=jnp.int32)
        seen = (keys >= interval.start[..., None]) & (keys < interval.end[..., None])  # [B or 1, Q, K]
        logits = jnp.where(seen[:, None], logits, jnp.finfo(jnp.float32).min)
        weights = jnp.where(seen[:, None], jax.nn.softmax(logits, axis=-1), 0.0)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(value.dtype), value)  # [B, Q, H, D]
