"""Attention under interval masks: the dense form, which is the oracle for every other form.

A mask is an interval of keys per query, ``[start, end)`` in token order.  Causal attention, padding, packed
documents, prefix-LM, bidirectional image blocks and sliding windows are all intervals, and an interval says
without looking at single tokens which blocks of keys a block of queries can skip.  The few masks that are not
one interval are given in full, as booleans.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class Interval(NamedTuple):
    """The keys that each query sees: ``start <= key index < end``; both ``[batch or 1, queries]``."""

    start: Int[Array, "#batch queries"]
    end: Int[Array, "#batch queries"]

    def mask(self, keys: int) -> Bool[Array, "#batch queries {keys}"]:
        """The same, written out."""
        index = jnp.arange(keys, dtype=jnp.int32)
        return (index >= self.start[..., None]) & (index < self.end[..., None])


def causal(length: int, window: int | None = None) -> Interval:
    """Every token sees itself and what stands before it, of that the last ``window`` tokens."""
    positions = jnp.arange(length, dtype=jnp.int32)[None]
    end = positions + 1
    start = jnp.zeros_like(end) if window is None else jnp.maximum(end - window, 0)
    return Interval(start, end)


def prefix(lengths: Int[Array, " batch"], queries: int) -> Interval:
    """Every query sees the first ``lengths[b]`` keys: padding at the end is hidden, nothing else is."""
    end = jnp.broadcast_to(lengths[:, None].astype(jnp.int32), (lengths.shape[0], queries))
    return Interval(jnp.zeros_like(end), end)


def segments(ids: Int[Array, "batch tokens"]) -> Interval:
    """Every token sees the tokens of its own segment; tokens of segment 0 are padding and see nothing.

    Args:
      ids: segment per token; a segment is a run of equal ids (packed documents, packed images).
    """
    count = ids.shape[1]
    index = jnp.arange(count, dtype=jnp.int32)[None]
    new = jnp.concatenate([jnp.ones_like(ids[:, :1], bool), ids[:, 1:] != ids[:, :-1]], axis=1)
    start = jax.lax.cummax(jnp.where(new, index, 0), axis=1)
    last = jnp.concatenate([new[:, 1:], jnp.ones_like(new[:, :1])], axis=1)
    end = jax.lax.cummin(jnp.where(last, index + 1, count), axis=1, reverse=True)
    return Interval(jnp.where(ids == 0, 0, start), jnp.where(ids == 0, 0, end))


def intersect(first: Interval, second: Interval) -> Interval:
    """The keys that both let a query see."""
    return Interval(jnp.maximum(first.start, second.start), jnp.minimum(first.end, second.end))


class Attended(NamedTuple):
    """What attention gives: ``mixed`` values, and the ``weights`` if they were asked for."""

    mixed: Float[Array, "batch queries heads head_dim"]
    weights: Float[Array, "batch heads queries keys"] | None


def attend(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    interval: Interval | None = None,
    *,
    mask: Bool[Array, "#batch queries keys"] | None = None,
    bias: Float[Array, "#batch heads queries keys"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    weights: bool = False,
) -> Attended:
    """Scaled dot-product attention; the softmax is taken in float32 whatever the inputs are.

    Args:
      query, key, value: projected tokens, unscaled.  Keys and values may have fewer heads than queries, which
        then share them in groups ("GQA", arXiv 2305.13245).
      interval: which keys each query sees; None lets every query see every key.  A query that sees no key
        returns zeros.
      mask: the same as booleans, for masks that are no interval; both together let through what both let.
      bias: added to the scaled logits (relative positions, arXiv 1910.10683).
      scale: of the logits; ``head_dim ** -0.5`` by default.
      soft_cap: squashes logits into (-soft_cap, soft_cap) by tanh ("Gemma 2", arXiv 2408.00118).
      weights: also return the softmax, in float32.

    Source: "Attention Is All You Need", arXiv 1706.03762, equation 1.
    """
    batch, queries, heads, head_dim = query.shape
    groups, keys = key.shape[2], key.shape[1]
    # Heads stand before tokens, and those that share keys and values are rows of one product: both products are then
    # plain batched matrix products, forward and backward.
    query = jnp.swapaxes(query * (head_dim**-0.5 if scale is None else scale), 1, 2)
    query = query.reshape(batch, groups, heads // groups * queries, head_dim)
    key, value = jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2)  # [B, G, K, D]
    logits = jnp.einsum("bgqd,bgkd->bgqk", query, key, preferred_element_type=jnp.float32)
    logits = logits.reshape(batch, heads, queries, keys)
    if bias is not None:
        logits = logits + bias
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    if interval is not None:
        seen = interval.mask(keys)  # [B or 1, Q, K]
        mask = seen if mask is None else mask & seen
    if mask is not None:
        logits = jnp.where(mask[:, None], logits, jnp.finfo(jnp.float32).min)
    rows = logits.reshape(batch, groups, heads // groups * queries, keys)
    mixed = jnp.swapaxes(_mix(rows, value).reshape(batch, heads, queries, -1), 1, 2)  # [B, Q, H, D]
    if mask is not None:
        mixed = jnp.where(jnp.any(mask, axis=-1)[..., None, None], mixed, 0)
    if not weights:
        return Attended(mixed, None)
    softmax = jax.nn.softmax(logits, axis=-1)  # [B, H, Q, K]
    return Attended(mixed, softmax if mask is None else jnp.where(mask[:, None], softmax, 0.0))


def attention(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys heads head_dim"],
    value: Float[Array, "batch keys heads head_dim"],
    interval: Interval | None = None,
) -> Float[Array, "batch queries heads head_dim"]:
    """:func:`attend` where only the mixed values matter."""
    return attend(query, key, value, interval).mixed


@jax.custom_vjp
def _mix(
    logits: Float[Array, "batch groups queries keys"], value: Float[Array, "batch groups keys head_dim"]
) -> Float[Array, "batch groups queries head_dim"]:
    """``softmax(logits) @ value``, divided by the softmax's sum after the product, where there is less to divide.

    Its gradient takes the row sums of the softmax's own gradient from the output ("FlashAttention", arXiv 2205.14135,
    appendix B.2), so that of the logits' size one array is kept, in the type of the values.
    """
    return _mix_forward(logits, value)[0]


def _mix_forward(logits: jax.Array, value: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    exponentials = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    total = jnp.sum(exponentials, axis=-1, keepdims=True)  # [B, G, Q, 1]
    shares = exponentials.astype(value.dtype)
    mixed = jnp.einsum("bgqk,bgkd->bgqd", shares, value, preferred_element_type=jnp.float32) / total
    mixed = mixed.astype(value.dtype)
    return mixed, (shares, total, value, mixed)


def _mix_backward(kept: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    shares, total, value, mixed = kept
    gradient = gradient / total  # [B, G, Q, D], float32
    inner = jnp.sum(gradient * mixed, axis=-1, keepdims=True)
    gradient = gradient.astype(value.dtype)
    by_share = jnp.einsum("bgqd,bgkd->bgqk", gradient, value, preferred_element_type=jnp.float32)
    return shares * (by_share - inner), jnp.einsum("bgqk,bgqd->bgkd", shares, gradient)


_mix.defvjp(_mix_forward, _mix_backward)
