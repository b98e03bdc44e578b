"""Attention under interval masks in plain JAX, some queries against some keys at a time: logits never stand whole.

The forward pass keeps, beside the mixed values, the logarithm of the softmax's sum for every query.  With both of them
the backward pass is a sum over chunks of keys, whichever device holds them: this is what ring attention needs, where
``key`` and ``value`` are one part of all keys.  Chunks that no query of a chunk sees are not computed.

Sources: "FlashAttention", arXiv 2205.14135, algorithms 1 and 4; "Ring Attention", arXiv 2310.01889.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlpjax.parallel.attention import Interval

CHUNK = 512  # queries and keys of one product; 1 MB of float32 logits per head


def forward(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    interval: Interval,
    *,
    scale: float,
    soft_cap: float | None = None,
    chunk: int = CHUNK,
) -> tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch heads queries"]]:
    """Attention to these keys.

    Args:
      query, key, value: unscaled; heads of queries share those of keys in groups ("GQA", arXiv 2305.13245).
      interval: what each query sees, in indices of these keys.
      scale, soft_cap: of the logits, as in :func:`vlpjax.parallel.attention.attend`.
      chunk: most queries and most keys of one product.

    Returns:
      the mixed values, in the query's type, zeros where a query sees no key; and the logarithm of the sum of the
      exponentiated logits, float32, ``-inf`` there.
    """
    keys = _Keys.of(key, value, chunk)

    def rows(part: tuple[jax.Array, Interval]) -> tuple[jax.Array, jax.Array]:
        """All keys for one chunk of queries."""
        some, seen = part  # [B, G, R, C, D]
        empty = jnp.zeros(some.shape[:-1], jnp.float32)
        start = _Sums(jnp.zeros(some.shape, jnp.float32), empty, empty - jnp.inf)

        def add(sums: _Sums, columns: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[_Sums, None]:
            some_keys, some_values, first = columns

            def attend_to_chunk(sums: _Sums) -> _Sums:
                mask = _mask(seen, first, some_keys.shape[2])
                logits = _logits(some, some_keys, scale, soft_cap)
                return sums.add(jnp.where(mask, logits, -jnp.inf), some_values)

            live = _live(seen, first, some_keys.shape[2])
            return jax.lax.cond(live, attend_to_chunk, lambda sums: sums, sums), None

        sums = jax.lax.scan(add, start, keys)[0]
        return sums.mixed().astype(query.dtype), sums.log_sum()

    parts = (_pieces(query, key.shape[2], chunk), _interval_pieces(interval, key.shape[1], chunk))
    mixed, lse = jax.lax.map(rows, parts)
    return _joined(mixed, query.shape[1]), jnp.swapaxes(_joined(lse[..., None], query.shape[1])[..., 0], 1, 2)


def backward(
    query: Float[Array, "batch queries heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    interval: Interval,
    mixed: Float[Array, "batch queries heads head_dim"],
    lse: Float[Array, "batch heads queries"],
    gradient: Float[Array, "batch queries heads head_dim"],
    *,
    scale: float,
    soft_cap: float | None = None,
    chunk: int = CHUNK,
) -> tuple[
    Float[Array, "batch queries heads head_dim"],
    Float[Array, "batch keys kv_heads head_dim"],
    Float[Array, "batch keys kv_heads head_dim"],
]:
    """What these keys contribute to the gradients, all three in float32.

    Args:
      mixed, lse: of :func:`forward` over all keys, of which ``key`` and ``value`` may be a part.
      gradient: of ``mixed``.
    """
    groups, count = key.shape[2], query.shape[1]
    keys = _Keys.of(key, value, chunk)
    inner = jnp.sum(gradient.astype(jnp.float32) * mixed.astype(jnp.float32), axis=-1, keepdims=True)
    zeros = jnp.zeros(keys.key.shape, jnp.float32)
    index = jnp.arange(keys.key.shape[0], dtype=jnp.int32)

    def rows(
        carry: tuple[jax.Array, jax.Array], part: _Rows
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        """All keys for one chunk of queries."""

        def add(sums: _Gradients, columns: tuple[jax.Array, _Keys]) -> tuple[_Gradients, None]:
            place, chunk_of_keys = columns
            width = chunk_of_keys.key.shape[2]

            def differentiate() -> _Gradients:
                return part.gradients(chunk_of_keys, scale, soft_cap)

            def nothing() -> _Gradients:
                none = jnp.zeros(chunk_of_keys.key.shape, jnp.float32)
                return _Gradients(jnp.zeros(part.query.shape, jnp.float32), none, none)

            live = _live(part.interval, chunk_of_keys.first, width)
            found = jax.lax.cond(live, differentiate, nothing)
            return _Gradients(
                sums.query + found.query,
                sums.key.at[place].add(found.key),
                sums.value.at[place].add(found.value),
            ), None

        sums = _Gradients(jnp.zeros(part.query.shape, jnp.float32), *carry)
        sums = jax.lax.scan(add, sums, (index, keys))[0]
        return (sums.key, sums.value), sums.query

    parts = _Rows(
        _pieces(query, groups, chunk),
        _interval_pieces(interval, key.shape[1], chunk),
        # A query that sees nothing has no gradient; any finite number keeps its masked exponentials finite.
        _pieces(jnp.swapaxes(jnp.where(jnp.isneginf(lse), 0.0, lse), 1, 2)[..., None], groups, chunk),
        _pieces(inner, groups, chunk),
        _pieces(gradient.astype(query.dtype), groups, chunk),
    )
    (d_key, d_value), d_query = jax.lax.scan(rows, (zeros, zeros), parts)
    d_key, d_value = (_joined(x[:, :, :, None], key.shape[1]) for x in (d_key, d_value))
    return _joined(d_query, count), d_key, d_value


class _Sums(NamedTuple):
    """A softmax that is not finished: sums relative to the largest logit so far."""

    values: Float[Array, "batch groups shared queries head_dim"]
    total: Float[Array, "batch groups shared queries"]
    largest: Float[Array, "batch groups shared queries"]

    def add(self, logits: jax.Array, value: jax.Array) -> _Sums:
        """With more keys; logits of -inf are masked."""
        largest = jnp.maximum(self.largest, jnp.max(logits, axis=-1))
        base = jnp.where(jnp.isneginf(largest), 0.0, largest)
        shares, shrink = jnp.exp(logits - base[..., None]), jnp.exp(self.largest - base)
        mixed = jnp.einsum(
            "bgrqk,bgkd->bgrqd", shares.astype(value.dtype), value, preferred_element_type=jnp.float32
        )
        return _Sums(
            self.values * shrink[..., None] + mixed, self.total * shrink + jnp.sum(shares, axis=-1), largest
        )

    def mixed(self) -> jax.Array:
        return self.values / jnp.where(self.total == 0, 1.0, self.total)[..., None]

    def log_sum(self) -> jax.Array:
        return self.largest + jnp.log(jnp.where(self.total == 0, 1.0, self.total))


class _Gradients(NamedTuple):
    query: jax.Array
    key: jax.Array
    value: jax.Array


class _Keys(NamedTuple):
    """Keys and values in chunks, and the index of each chunk's first key."""

    key: Float[Array, "chunks batch groups keys head_dim"]
    value: Float[Array, "chunks batch groups keys head_dim"]
    first: Int[Array, " chunks"]

    @classmethod
    def of(cls, key: jax.Array, value: jax.Array, chunk: int) -> _Keys:
        groups = key.shape[2]
        parts = [_pieces(x, groups, chunk)[:, :, :, 0] for x in (key, value)]
        first = jnp.arange(parts[0].shape[0], dtype=jnp.int32) * parts[0].shape[3]
        return cls(parts[0], parts[1], first)


class _Rows(NamedTuple):
    """What the backward pass needs of a chunk of queries."""

    query: Float[Array, "batch groups shared queries head_dim"]
    interval: Interval
    lse: Float[Array, "batch groups shared queries 1"]
    inner: Float[Array, "batch groups shared queries 1"]
    gradient: Float[Array, "batch groups shared queries head_dim"]

    def gradients(self, keys: _Keys, scale: float, soft_cap: float | None) -> _Gradients:
        """The share that a chunk of keys has in the gradients of queries, and its own."""

        def product(terms: str, left: jax.Array, right: jax.Array) -> jax.Array:
            return jnp.einsum(terms, left, right, preferred_element_type=jnp.float32)

        logits = _logits(self.query, keys.key, scale, soft_cap)
        mask = _mask(self.interval, keys.first, keys.key.shape[2])
        shares = jnp.exp(jnp.where(mask, logits - self.lse, -jnp.inf))
        d_value = product("bgrqk,bgrqd->bgkd", shares.astype(self.gradient.dtype), self.gradient)
        d_logits = shares * (product("bgrqd,bgkd->bgrqk", self.gradient, keys.value) - self.inner)
        if soft_cap is not None:
            d_logits = d_logits * (1 - jnp.square(logits / soft_cap))
        d_logits = (d_logits * scale).astype(self.query.dtype)
        return _Gradients(
            product("bgrqk,bgkd->bgrqd", d_logits, keys.key),
            product("bgrqk,bgrqd->bgkd", d_logits, self.query),
            d_value,
        )


def _logits(query: jax.Array, key: jax.Array, scale: float, soft_cap: float | None) -> jax.Array:
    logits = jnp.einsum("bgrqd,bgkd->bgrqk", query, key, preferred_element_type=jnp.float32) * scale
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def _mask(interval: Interval, first: jax.Array, keys: int) -> Bool[Array, "#batch 1 1 queries keys"]:
    return Interval(interval.start - first, interval.end - first).mask(keys)[:, None, None]


def _live(interval: Interval, first: jax.Array, keys: int) -> Bool[Array, ""]:
    """Whether any query sees any of the keys ``first, first + 1, ...``."""
    start, end = jnp.maximum(interval.start, first), jnp.minimum(interval.end, first + keys)
    return jnp.any(start < end)


def _pieces(x: Float[Array, "batch tokens heads width"], groups: int, chunk: int) -> jax.Array:
    """Chunks of tokens with the heads of a group together: [chunks, B, G, R, C, D]; the last is filled with zeros."""
    batch, tokens, heads, width = x.shape
    chunk = max(min(chunk, tokens), 1)
    count = max(-(-tokens // chunk), 1)
    x = jnp.pad(x, ((0, 0), (0, count * chunk - tokens), (0, 0), (0, 0)))
    return jnp.transpose(x.reshape(batch, count, chunk, groups, heads // groups, width), (1, 0, 3, 4, 2, 5))


def _joined(x: Float[Array, "chunks batch groups shared tokens width"], tokens: int) -> jax.Array:
    """Undoes :func:`_pieces`."""
    count, batch, groups, shared, chunk, width = x.shape
    x = jnp.transpose(x, (1, 0, 4, 2, 3, 5)).reshape(batch, count * chunk, groups * shared, width)
    return x[:, :tokens]


def _interval_pieces(interval: Interval, keys: int, chunk: int) -> Interval:
    """The interval of every chunk of queries, [chunks, B or 1, C]; what fills the last chunk sees nothing."""
    queries = interval.start.shape[1]
    chunk = max(min(chunk, queries), 1)
    count = max(-(-queries // chunk), 1)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, count * chunk - queries)))
        return jnp.swapaxes(x.reshape(x.shape[0], count, chunk), 0, 1)

    # Keys that fill the last chunk are no keys.
    return Interval(split(interval.start), split(jnp.minimum(interval.end, keys)))
