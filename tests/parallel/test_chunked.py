"""Attention in chunks against the dense form: value, every gradient, uneven chunks, and keys that come in parts."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import assert_trees_close
from vlpjax.parallel import chunked
from vlpjax.parallel.attention import Interval, attend

B, Q, K, H, D = 2, 13, 22, 4, 8
SCALE = 0.4


def inputs(groups: int, seed: int = 0, dtype: jnp.dtype = jnp.float32) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(seed)
    shapes = ((B, Q, H, D), (B, K, groups, D), (B, K, groups, D), (B, Q, H, D))
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def intervals(kind: str) -> Interval:
    """What queries see: empty for some, beyond the last key for others; one row for all examples, or one each."""
    rng = np.random.default_rng(7)
    if kind == "all":
        start, end = np.zeros((1, Q)), np.full((1, Q), K + 9)
    elif kind == "causal":
        start, end = np.zeros((1, Q)), np.arange(1, Q + 1)[None]
    elif kind == "window":
        end = np.arange(1, Q + 1)[None]
        start = np.maximum(end - 3, 0)
    else:
        start, end = rng.integers(0, K, (B, Q)), rng.integers(0, K + 1, (B, Q))
        start[0, :3], end[0, :3] = 5, 5
    return Interval(jnp.asarray(start, jnp.int32), jnp.asarray(end, jnp.int32))


def dense(interval: Interval, soft_cap: float | None, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Mixed values and gradients by the dense form."""
    *qkv, gradient = arrays
    mixed, pull = jax.vjp(lambda *qkv: attend(*qkv, interval, scale=SCALE, soft_cap=soft_cap).mixed, *qkv)
    return mixed, *pull(gradient)


@functools.partial(jax.jit, static_argnames=("chunk", "soft_cap"))
def both(
    interval: Interval, *arrays: jax.Array, chunk: int, soft_cap: float | None
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Mixed values and gradients: in chunks, and by the dense form."""
    *qkv, gradient = arrays
    options = dict(scale=SCALE, soft_cap=soft_cap, chunk=chunk)
    mixed, lse = chunked.forward(*qkv, interval, **options)
    gradients = chunked.backward(*qkv, interval, mixed, lse, gradient, **options)
    return (mixed, *gradients), dense(interval, soft_cap, *arrays)


@pytest.mark.parametrize("kind", ["all", "causal", "window", "random"])
@pytest.mark.parametrize(("groups", "chunk", "soft_cap"), [(4, 5, None), (2, 8, 2.0), (1, 64, None)])
def test_value_and_gradients_are_those_of_the_dense_form(
    kind: str, groups: int, chunk: int, soft_cap: float | None
) -> None:
    ours, expected = both(intervals(kind), *inputs(groups), chunk=chunk, soft_cap=soft_cap)
    assert_trees_close(ours, expected, rtol=1e-5, atol=2e-6)


def test_the_log_of_the_sum_is_that_of_the_seen_logits() -> None:
    query, key, value, _ = inputs(2)
    interval = intervals("random")
    lse = chunked.forward(query, key, value, interval, scale=SCALE, chunk=6)[1]
    assert lse.dtype == jnp.float32
    for b, h, q in np.ndindex(B, H, Q):
        start, end = int(interval.start[b, q]), int(interval.end[b, q])
        logits = np.asarray(key[b, start:end, h // 2] @ query[b, q, h] * SCALE, np.float64)
        expected = np.log(np.sum(np.exp(logits))) if start < end else -np.inf
        np.testing.assert_allclose(lse[b, h, q], expected, rtol=1e-5, atol=1e-6)


def test_a_query_that_sees_nothing_gets_zeros_and_gives_none() -> None:
    query, key, value, gradient = inputs(2)
    nothing = Interval(jnp.full((1, Q), 3, jnp.int32), jnp.full((1, Q), 3, jnp.int32))
    mixed, lse = chunked.forward(query, key, value, nothing, scale=SCALE)
    assert not np.any(mixed)
    assert np.all(np.isneginf(lse))
    gradients = chunked.backward(query, key, value, nothing, mixed, lse, gradient, scale=SCALE)
    assert all(not np.any(x) for x in gradients)  # NaN counts as something


def test_parts_of_the_keys_add_up_to_the_gradients_of_all() -> None:
    # What ring attention does: the values and sums of all keys, and the gradients of a part at a time.
    query, key, value, gradient = inputs(2)
    whole = intervals("random")
    mixed, lse = chunked.forward(query, key, value, whole, scale=SCALE)
    expected = chunked.backward(query, key, value, whole, mixed, lse, gradient, scale=SCALE)
    total, parts = 0, []
    for first, last in ((0, 9), (9, K)):
        local = Interval(*(jnp.clip(x - first, 0, last - first) for x in whole))
        some = key[:, first:last], value[:, first:last]
        d_query, *rest = chunked.backward(query, *some, local, mixed, lse, gradient, scale=SCALE, chunk=4)
        total += d_query
        parts.append(rest)
    d_key, d_value = (jnp.concatenate(x, axis=1) for x in zip(*parts, strict=True))
    assert_trees_close((total, d_key, d_value), expected, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_summed_in_float32() -> None:
    exact, interval = inputs(2), intervals("random")
    rounded = [x.astype(jnp.bfloat16) for x in exact]
    mixed, lse = chunked.forward(*rounded[:3], interval, scale=SCALE, chunk=8)
    assert (mixed.dtype, lse.dtype) == (jnp.bfloat16, jnp.float32)
    gradients = chunked.backward(*rounded[:3], interval, mixed, lse, rounded[3], scale=SCALE, chunk=8)
    assert {x.dtype for x in gradients} == {jnp.dtype(jnp.float32)}
    expected = dense(interval, None, *(x.astype(jnp.float32) for x in rounded))
    for ours, theirs in zip((mixed, *gradients), expected, strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, rtol=0.03, atol=0.03)


def test_memory_does_not_hold_all_logits() -> None:
    shape = jax.ShapeDtypeStruct((1, 4096, 1, 8), jnp.float32)
    interval = Interval(*[jax.ShapeDtypeStruct((1, 4096), jnp.int32)] * 2)
    run = functools.partial(chunked.forward, scale=SCALE)
    program = jax.jit(run).lower(shape, shape, shape, interval).compile()
    assert program.memory_analysis().temp_size_in_bytes < 4096 * 4096  # a quarter of the logits
