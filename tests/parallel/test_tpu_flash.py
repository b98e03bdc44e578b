"""The TPU kernels' bodies, run as plain JAX, against dense attention: values, gradients, and what is never touched."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlpjax.errors import UserError
from vlpjax.parallel.attention import Interval, attend, causal, intersect, prefix, segments
from vlpjax.parallel.tpu_flash import backward, forward
from vlpjax.parallel.tpu_tiles import Tables, Tiles

SMALL = Tiles(query=128, key=128)
SCALE = 0.2
B, LENGTH, H, G, D = 2, 330, 4, 2, 16
Arrays = tuple[jax.Array, ...]


def packed() -> Interval:
    """Documents of odd lengths, each causal, and padding at the end, which sees nothing."""
    index = np.arange(LENGTH)
    ids = np.stack([np.searchsorted([37, 150, 290, LENGTH - 19], index, "right") + 1] * B)
    ids[:, LENGTH - 19 :] = 0
    ids[1:, :90] = 7
    return intersect(causal(LENGTH), segments(jnp.asarray(ids)))


def blocks() -> Interval:
    """A causal sequence with two blocks that see themselves in both directions, such as images in a text."""
    index = np.arange(LENGTH)
    start, end = np.zeros(LENGTH, int), index + 1
    for first, last in ((20, 140), (200, 290)):
        end[first:last] = last
    start[220:260] = 100  # and some that do not see the beginning
    return Interval(jnp.asarray(start)[None], jnp.asarray(end)[None])


def scattered(queries: int, keys: int, rows: int) -> Interval:
    """Any interval for any query, many of them empty."""
    rng = np.random.default_rng(5)
    return Interval(*(jnp.asarray(rng.integers(0, keys + 1, (rows, queries)), jnp.int32) for _ in range(2)))


MASKS = {
    "causal": lambda: causal(LENGTH),
    "window": lambda: causal(LENGTH, window=100),
    "packed": packed,
    "prefix": lambda: prefix(jnp.array([LENGTH + 3, 7]), LENGTH),
    "blocks": blocks,
    "anything": lambda: scattered(LENGTH, LENGTH, B),
}


def mask(name: str) -> Interval:
    """An interval of its own for each example, so that all masks are run by one program."""
    return Interval(*(jnp.broadcast_to(edge, (B, LENGTH)).astype(jnp.int32) for edge in MASKS[name]()))


def tensors(
    dtype: Any = jnp.float32, queries: int = LENGTH, heads: tuple[int, int] = (H, G), width: int = D
) -> Arrays:
    """Queries, keys, values, and a gradient of the mixed values."""
    rng = np.random.default_rng(0)
    shapes = [
        (B, queries, heads[0], width),
        *[(B, LENGTH, heads[1], width)] * 2,
        (B, queries, heads[0], width),
    ]
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


@functools.partial(jax.jit, static_argnames=("soft_cap",))
def dense(interval: Interval, *arrays: jax.Array, soft_cap: float | None = None) -> Arrays:
    """Values and gradients of the oracle."""
    mixed, pull = jax.vjp(
        lambda *qkv: attend(*qkv, interval, scale=SCALE, soft_cap=soft_cap).mixed, *arrays[:3]
    )
    return (mixed, *pull(arrays[3]))


@functools.partial(jax.jit, static_argnames=("soft_cap", "tiles"))
def ours(
    interval: Interval, *arrays: jax.Array, soft_cap: float | None = None, tiles: Tiles = SMALL
) -> tuple[Arrays, jax.Array]:
    """Values and gradients of the kernels, and the log-sum-exp."""
    options: dict[str, Any] = dict(scale=SCALE, soft_cap=soft_cap, tiles=tiles, interpret=True)
    mixed, lse = forward(*arrays[:3], interval, **options)
    return (mixed, *backward(*arrays[:3], interval, mixed, lse, arrays[3], **options)), lse


@pytest.mark.parametrize("name", MASKS)
def test_values_and_gradients_are_those_of_dense_attention(name: str) -> None:
    for got, expected in zip(ours(mask(name), *tensors())[0], dense(mask(name), *tensors()), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_and_so_with_other_lengths_wide_heads_a_soft_cap_and_one_interval_for_all() -> None:
    interval = scattered(140, LENGTH, 1)
    arrays = tensors(queries=140, heads=(6, 1), width=160)
    got = ours(interval, *arrays, soft_cap=2.0, tiles=Tiles(128, 256, heads=3))[0]  # the group in two parts
    for x, expected in zip(got, dense(interval, *arrays, soft_cap=2.0), strict=True):
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=2e-5)


def test_bfloat16_is_as_near_as_its_rounding() -> None:
    exact = dense(mask("packed"), *tensors())
    got = ours(mask("packed"), *tensors(jnp.bfloat16))[0]
    assert got[0].dtype == jnp.bfloat16
    assert {x.dtype for x in got[1:]} == {jnp.dtype(jnp.float32)}
    for x, expected in zip(got, exact, strict=True):
        np.testing.assert_allclose(x.astype(jnp.float32), expected, rtol=0.05, atol=0.05)


def test_a_query_that_sees_nothing_gets_zero_and_minus_infinity() -> None:
    interval = mask("packed")
    (mixed, d_query, *_), lse = ours(interval, *tensors())
    blind = np.asarray(interval.start >= interval.end)
    assert blind.any()
    assert not np.asarray(mixed)[blind].any()
    assert not np.asarray(d_query)[blind].any()
    assert np.array_equal(np.isneginf(np.asarray(lse)), np.broadcast_to(blind[:, None], lse.shape))
    assert np.isfinite(np.asarray(lse)).sum() == (~blind).sum() * H


def test_parts_of_the_keys_give_their_share_of_the_gradients() -> None:
    """What ring attention does: the log-sum-exp and the values are of all keys, the keys are those at hand."""
    query, key, value, gradient = tensors()
    interval, half = mask("packed"), LENGTH // 2
    (mixed, *whole), lse = ours(interval, query, key, value, gradient)
    run = jax.jit(functools.partial(backward, scale=SCALE, tiles=SMALL, interpret=True))
    parts = []
    for first in (0, half):
        here = slice(first, first + half)
        seen = Interval(*(jnp.clip(edge - first, 0, half) for edge in interval))
        parts.append(run(query, key[:, here], value[:, here], seen, mixed, lse, gradient))
    np.testing.assert_allclose(parts[0][0] + parts[1][0], whole[0], rtol=1e-5, atol=1e-5)
    for index in (1, 2):
        joined = jnp.concatenate([part[index] for part in parts], axis=1)
        np.testing.assert_allclose(joined, whole[index], rtol=1e-5, atol=1e-5)


def test_keys_that_no_tile_sees_are_never_read() -> None:
    """Poison in them would show, as zero times NaN is NaN."""
    query, key, value, gradient = tensors()
    start, end = mask("causal")
    interval = Interval(jnp.maximum(start, 130), end)
    poisoned = [x.at[:, :128].set(jnp.nan) for x in (key, value)]
    arrays, lse = ours(interval, query, *poisoned, gradient)
    assert all(np.isfinite(x).all() for x in arrays)
    assert not np.isnan(lse).any()


@pytest.mark.parametrize("seed", range(3))
def test_tables_hold_what_tiles_see(seed: int) -> None:
    rng = np.random.default_rng(seed)
    queries, keys, tiles = 512, 700, Tiles(128, 256)
    start = np.sort(rng.integers(0, keys, queries))
    end = np.minimum(start + rng.integers(0, 300, queries), keys)
    start[256:384], end[256:384] = 50, 45  # one tile of queries sees nothing
    shown = (np.arange(keys) >= start[:, None]) & (np.arange(keys) < end[:, None])
    cuts = [
        [(slice(q, q + 128), slice(k, k + 256)) for k in range(0, keys, 256)] for q in range(0, queries, 128)
    ]
    seen = np.array([[shown[cut].any() for cut in row] for row in cuts])
    whole = np.array([[shown[cut].all() and cut[1].stop <= keys for cut in row] for row in cuts])
    table = Tables.of(jnp.asarray(np.stack([start, end]))[None], keys, tiles)
    for row, (first, last, whole_first, whole_last) in enumerate(np.asarray(table.queries).reshape(-1, 4)):
        hull = np.flatnonzero(seen[row])
        assert (first, last) == ((hull[0], hull[-1] + 1) if len(hull) else (first, first))
        assert [whole_first <= k < whole_last for k in range(3)] == list(whole[row])
    for row, (first, last) in enumerate(np.asarray(table.keys).reshape(-1, 2)):
        hull = np.flatnonzero(seen[:, row])
        assert (first, last) == ((hull[0], hull[-1] + 1) if len(hull) else (first, first))
    assert table.key_steps == seen.sum(1).max()


def test_the_grid_is_as_long_as_the_longest_document() -> None:
    length, tiles = 2**21, Tiles()
    ids = jnp.arange(length)[None] // 8192 + 1
    table = jax.jit(functools.partial(Tables.of, keys=length, tiles=tiles))(
        jnp.stack(intersect(causal(length), segments(ids)), axis=1)
    )
    assert table.key_steps == 8192 // tiles.key
    assert table.query_steps == 8192 // tiles.query
    assert table.queries.nbytes + table.keys.nbytes <= 2**17  # of a megabyte of scalar memory


def test_short_sequences_take_short_tiles() -> None:
    assert Tiles().within(196, 77) == Tiles(256, 128)
    assert Tiles().within(4096, 4096) == Tiles()
    assert Tiles().within(640, 1280) == Tiles(384, 640)  # 768 and 1,280 rows, not 1,024 and 2,048


def test_bad_sizes_are_named() -> None:
    with pytest.raises(UserError, match=r"Tiles.key is 100; it must be a multiple of 128"):
        Tiles(key=100)
    with pytest.raises(UserError, match=r"at least 1"):
        Tiles(heads=0)
    query, key = jnp.zeros((1, 8, 3, 4)), jnp.zeros((1, 8, 2, 4))
    with pytest.raises(UserError, match=r"3 heads of queries cannot share 2 heads of keys"):
        forward(query, key, key, causal(8), scale=1.0, interpret=True)
