"""The TPU kernels for short sequences, run as plain JAX, against dense attention: values and gradients."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import layout_of
from vlpjax.parallel import attention
from vlpjax.parallel.attention import Interval, causal
from vlpjax.parallel.backends import TpuShort, attend

B, QUERIES, KEYS, H, D = 8, 128, 256, 2, 24
SHORT = TpuShort(interpret=True)


def scattered(queries: int, keys: int, rows: int) -> Interval:
    """Any interval for any query, some of them empty."""
    rng = np.random.default_rng(5)
    return Interval(*(jnp.asarray(rng.integers(0, keys + 1, (rows, queries)), jnp.int32) for _ in range(2)))


def tensors(queries: int, keys: int, dtype: Any = jnp.float32) -> tuple[jax.Array, ...]:
    """Queries, keys, values, and a gradient of the mixed values."""
    rng = np.random.default_rng(0)
    shapes = [(B, length, H, D) for length in (queries, keys, keys, queries)]
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


@functools.partial(jax.jit, static_argnames=("dense",))
def results(arrays: tuple[jax.Array, ...], interval: Interval | None, dense: bool = False) -> Any:
    """Values and gradients."""

    def run(*qkv: jax.Array) -> jax.Array:
        if dense:
            return attention.attend(*qkv, interval, scale=0.2).mixed
        return attend(*qkv, interval, scale=0.2, backend=SHORT).mixed

    mixed, pull = jax.vjp(run, *arrays[:3])
    return (mixed, *pull(arrays[3]))


CASES = {
    "every key is seen": (QUERIES, KEYS, None),
    "both are padded": (200, 250, None),
    "causal": (KEYS, KEYS, causal(KEYS)),
    "anything, for each example": (200, 250, scattered(200, 250, B)),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_dense_attention(case: str) -> None:
    queries, keys, interval = CASES[case]
    arrays = tensors(queries, keys)
    for got, expected in zip(results(arrays, interval), results(arrays, interval, dense=True), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_as_near_as_its_rounding() -> None:
    got = results(tensors(QUERIES, KEYS, jnp.bfloat16), None)
    for x, expected in zip(got, results(tensors(QUERIES, KEYS), None, dense=True), strict=True):
        assert x.dtype == jnp.bfloat16
        np.testing.assert_allclose(x.astype(jnp.float32), expected, rtol=0.05, atol=0.05)


def test_a_mesh_deals_examples_and_heads_out_and_changes_nothing() -> None:
    arrays, interval = tensors(QUERIES, KEYS), scattered(QUERIES, KEYS, B)
    layout = layout_of(8, fsdp=4, tensor=2)
    with layout.activate():
        got = jax.jit(lambda arrays, interval: results(arrays, interval))(arrays, interval)
    for x, expected in zip(got, results(arrays, interval), strict=True):
        np.testing.assert_allclose(x, expected, rtol=1e-6, atol=1e-6)
