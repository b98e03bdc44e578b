"""The TPU kernels' bodies, run as plain JAX, against dense attention: values, gradients, and what is never touched."""

from __future__ import annotations

import functools

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


def packed(length: int, batch: int = 2) -> Interval:
    """Documents of odd lengths, each causal, and padding at the end, which sees nothing."""
    cuts = [
        np.searchsorted([37, 150, 300, length - 19], np.arange(length), "right") + 1 for _ in range(batch)
    ]
    ids = np.stack(cuts)
    ids[:, length - 19 :] = 0
    ids[1:, :90] = 7
    return intersect(causal(length), segments(jnp.asarray(ids)))


def blocks(length: int) -> Interval:
    """A causal sequence with two blocks that see themselves in both directions, such as images in a text."""
    index = np.arange(length)
    start, end = np.zeros(length, int), index + 1
    for first, last in ((20, 140), (200, 290)):
        end[first:last] = last
    start[220:260] = 100  # and some that see no beginning
    return Interval(jnp.asarray(start)[None], jnp.asarray(end)[None])


def scattered(queries: int, keys: int, batch: int = 2) -> Interval:
    """Any interval for any query, many of them empty."""
    rng = np.random.default_rng(5)
    return Interval(*(jnp.asarray(rng.integers(0, keys + 1, (batch, queries)), jnp.int32) for _ in range(2)))


CASES: dict[str, tuple[int, int, int, int, int, Interval, float | None]] = {
    # queries, keys, heads, groups, head_dim, interval, soft cap
    "causal, uneven": (300, 300, 2, 2, 16, causal(300), None),
    "window": (384, 384, 2, 1, 16, causal(384, window=100), None),
    "packed": (400, 400, 2, 2, 16, packed(400), None),
    "prefix of other keys": (130, 260, 2, 2, 16, prefix(jnp.array([256, 7]), 130), None),
    "blocks, 4 heads to 1": (320, 320, 4, 1, 16, blocks(320), None),
    "anything, 6 heads to 2, capped": (200, 300, 6, 2, 16, scattered(200, 300), 2.0),
    "everything, wide heads": (128, 256, 1, 1, 160, Interval(jnp.zeros((1, 128)), jnp.full((1, 128), 256)), None),
}  # fmt: skip


def tensors(case: str, dtype: jnp.dtype = jnp.float32) -> tuple[jax.Array, ...]:
    queries, keys, heads, groups, head_dim, *_ = CASES[case]
    rng = np.random.default_rng(len(case))
    shapes = [
        (2, queries, heads, head_dim),
        *[(2, keys, groups, head_dim)] * 2,
        (2, queries, heads, head_dim),
    ]
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def dense(case: str, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Values and gradients of the oracle."""
    interval, soft_cap = CASES[case][5:]

    @jax.jit
    def run(query: jax.Array, key: jax.Array, value: jax.Array, gradient: jax.Array) -> tuple[jax.Array, ...]:
        def mix(*qkv: jax.Array) -> jax.Array:
            return attend(*qkv, interval, scale=SCALE, soft_cap=soft_cap).mixed

        mixed, pull = jax.vjp(mix, query, key, value)
        return (mixed, *pull(gradient))

    return run(*arrays)


def ours(case: str, arrays: tuple[jax.Array, ...], tiles: Tiles = SMALL) -> tuple[jax.Array, ...]:
    """Values and gradients of the kernels."""
    interval, soft_cap = CASES[case][5:]
    options = dict(scale=SCALE, soft_cap=soft_cap, tiles=tiles, interpret=True)

    @jax.jit
    def run(query: jax.Array, key: jax.Array, value: jax.Array, gradient: jax.Array) -> tuple[jax.Array, ...]:
        mixed, lse = forward(query, key, value, interval, **options)
        return (mixed, *backward(query, key, value, interval, mixed, lse, gradient, **options))

    return run(*arrays)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_dense_attention(case: str) -> None:
    arrays = tensors(case)
    for got, expected in zip(ours(case, arrays), dense(case, arrays), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_as_near_as_its_rounding() -> None:
    exact = dense("packed", tensors("packed"))
    got = ours("packed", tensors("packed", jnp.bfloat16))
    assert got[0].dtype == jnp.bfloat16
    assert {x.dtype for x in got[1:]} == {jnp.dtype(jnp.float32)}
    for x, expected in zip(got, exact, strict=True):
        np.testing.assert_allclose(x.astype(jnp.float32), expected, rtol=0.05, atol=0.05)


def test_a_group_of_heads_in_parts_gives_the_same() -> None:
    case = "blocks, 4 heads to 1"
    arrays = tensors(case)
    together, apart = (ours(case, arrays, Tiles(128, 128, heads)) for heads in (4, 2))
    for got, expected in zip(apart, together, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_a_query_that_sees_nothing_gets_zero_and_minus_infinity() -> None:
    case = "packed"
    query, key, value, gradient = tensors(case)
    interval = CASES[case][5]
    mixed, lse = forward(query, key, value, interval, scale=SCALE, tiles=SMALL, interpret=True)
    blind = np.asarray(interval.start >= interval.end)
    assert blind.any()
    assert not np.asarray(mixed)[blind].any()
    assert np.array_equal(np.isneginf(np.moveaxis(np.asarray(lse), 1, 2)).all(-1), blind)
    assert np.isfinite(np.asarray(lse)).sum() == (~blind).sum() * query.shape[2]
    d_query, *_ = backward(
        query, key, value, interval, mixed, lse, gradient, scale=SCALE, tiles=SMALL, interpret=True
    )
    assert not np.asarray(d_query)[blind].any()


def test_parts_of_the_keys_give_their_share_of_the_gradients() -> None:
    """What ring attention does: the log-sum-exp and the values are of all keys, the keys are those at hand."""
    case, cut = "packed", 170
    query, key, value, gradient = tensors(case)
    interval = CASES[case][5]
    options = dict(scale=SCALE, tiles=SMALL, interpret=True)
    mixed, lse = forward(query, key, value, interval, **options)
    whole = backward(query, key, value, interval, mixed, lse, gradient, **options)
    parts = []
    for first, last in ((0, cut), (cut, key.shape[1])):
        seen = Interval(*(jnp.clip(edge - first, 0, last - first) for edge in interval))
        part = (query, key[:, first:last], value[:, first:last], seen, mixed, lse, gradient)
        parts.append(backward(*part, **options))
    np.testing.assert_allclose(parts[0][0] + parts[1][0], whole[0], rtol=1e-5, atol=1e-5)
    for index in (1, 2):
        joined = jnp.concatenate([part[index] for part in parts], axis=1)
        np.testing.assert_allclose(joined, whole[index], rtol=1e-5, atol=1e-5)


def test_keys_that_no_tile_sees_are_never_read() -> None:
    """Poison in them would show, as zero times NaN is NaN."""
    length, window = 640, 64
    interval = Interval(*(edge[:, 512:] for edge in causal(length, window)))
    rng = np.random.default_rng(0)
    query, gradient = (jnp.asarray(rng.normal(size=(1, 128, 1, 8)), jnp.float32) for _ in range(2))
    key, value = (jnp.asarray(rng.normal(size=(1, length, 1, 8)), jnp.float32) for _ in range(2))
    key, value = (x.at[:, :384].set(jnp.nan) for x in (key, value))
    options = dict(scale=SCALE, tiles=SMALL, interpret=True)
    mixed, lse = forward(query, key, value, interval, **options)
    found = backward(query, key, value, interval, mixed, lse, gradient, **options)
    assert all(np.isfinite(x).all() for x in (mixed, lse, *found))


@pytest.mark.parametrize("seed", range(3))
def test_tables_hold_what_tiles_see(seed: int) -> None:
    rng = np.random.default_rng(seed)
    queries, keys, tiles = 512, 700, Tiles(128, 256)
    start = np.sort(rng.integers(0, keys, queries))
    end = np.minimum(start + rng.integers(0, 300, queries), keys)
    start[256:384], end[256:384] = 50, 45  # one tile of queries sees nothing
    mask = (np.arange(keys) >= start[:, None]) & (np.arange(keys) < end[:, None])
    seen = np.stack(
        [[mask[q : q + 128, k : k + 256].any() for k in range(0, keys, 256)] for q in range(0, 512, 128)]
    )
    whole = np.stack(
        [[mask[q : q + 128, k : k + 256].all() and k + 256 <= keys for k in range(0, keys, 256)] for q in range(0, 512, 128)]
    )  # fmt: skip
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
