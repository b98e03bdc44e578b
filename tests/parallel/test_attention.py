"""Dense attention against its formula, written out in NumPy one query at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import assert_trees_close
from vlpjax.parallel.attention import Interval, attend, attention, causal, prefix

B, Q, K, H, D = 2, 5, 7, 3, 4


def inputs(seed: int = 0, queries: int = Q) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(B, length, H, D)).astype(np.float32) for length in (queries, K, K))  # type: ignore[return-value]


def oracle(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, start: np.ndarray, end: np.ndarray
) -> np.ndarray:
    out = np.zeros(query.shape)
    for b, q, h in np.ndindex(*query.shape[:3]):
        first, last = start[b % len(start), q], end[b % len(end), q]
        if first < last:
            logits = key[b, first:last, h].astype(np.float64) @ query[b, q, h] / np.sqrt(D)
            weights = np.exp(logits - logits.max())
            out[b, q, h] = weights / weights.sum() @ value[b, first:last, h]
    return out


def test_without_an_interval_every_query_sees_every_key() -> None:
    query, key, value = inputs()
    everything = oracle(query, key, value, np.zeros((1, Q), int), np.full((1, Q), K))
    np.testing.assert_allclose(attention(query, key, value), everything, rtol=1e-5, atol=1e-6)


def test_causal() -> None:
    query, key, value = inputs(queries=K)
    expected = oracle(query, key, value, np.zeros((1, K), int), np.arange(1, K + 1)[None])
    np.testing.assert_allclose(attention(query, key, value, causal(K)), expected, rtol=1e-5, atol=1e-6)


def test_prefix() -> None:
    query, key, value = inputs()
    expected = oracle(query, key, value, np.zeros((B, Q), int), np.array([[3] * Q, [7] * Q]))
    ours = attention(query, key, value, prefix(jnp.array([3, 7]), Q))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_random_intervals_and_empty_ones(seed: int) -> None:
    query, key, value = inputs(seed)
    rng = np.random.default_rng(seed)
    start, end = rng.integers(0, K, (B, Q)), rng.integers(0, K + 1, (B, Q))
    start[0, 0], end[0, 0] = 4, 4  # empty
    ours = attention(query, key, value, Interval(jnp.asarray(start), jnp.asarray(end)))
    np.testing.assert_allclose(ours, oracle(query, key, value, start, end), rtol=1e-5, atol=1e-6)
    assert not np.any(ours[0, 0])


def test_the_gradient_of_an_empty_interval_is_zero_and_finite() -> None:
    query, key, value = inputs()
    empty = Interval(jnp.zeros((1, Q), jnp.int32), jnp.zeros((1, Q), jnp.int32))
    grads = jax.grad(lambda *qkv: jnp.sum(attention(*qkv, empty)), argnums=(0, 1, 2))(query, key, value)
    assert all(not np.any(grad) for grad in grads)


def test_the_softmax_of_bfloat16_inputs_is_taken_in_float32() -> None:
    # 512 equal keys and one that is a little better: a bfloat16 sum of weights would stop growing at 256.
    query = jnp.ones((1, 1, 1, 1), jnp.bfloat16)
    key = jnp.zeros((1, 512, 1, 1), jnp.bfloat16)
    value = jnp.ones((1, 512, 1, 1), jnp.bfloat16)
    out = attention(query, key, value)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1.0, rtol=1e-2)
    jaxpr = str(jax.make_jaxpr(attention)(query, key, value))
    assert "exp" in jaxpr
    assert not [line for line in jaxpr.splitlines() if " exp " in line and "bf16" in line]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradients_are_those_of_the_formula(groups: int) -> None:
    rng = np.random.default_rng(groups)
    heads = 4
    query, key, value = (
        jnp.asarray(rng.normal(size=(B, length, count, D)), jnp.float32)
        for length, count in ((Q, heads), (K, groups), (K, groups))
    )
    bias = jnp.asarray(rng.normal(size=(1, heads, Q, K)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(B, Q, heads, D)), jnp.float32)
    mask = jnp.asarray(rng.random((B, Q, K)) < 0.6).at[0, 1].set(False)  # one query sees nothing

    def formula(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> jax.Array:
        key, value = (jnp.repeat(x, heads // groups, axis=2) for x in (key, value))
        logits = 3 * jnp.tanh((jnp.einsum("bqhd,bkhd->bhqk", query, key) * D**-0.5 + bias) / 3)
        powers = jnp.where(mask[:, None], jnp.exp(logits), 0)
        shares = powers / jnp.maximum(jnp.sum(powers, axis=-1, keepdims=True), 1e-30)
        return jnp.sum(jnp.einsum("bhqk,bkhd->bqhd", shares, value) * weight)

    def ours(query: jax.Array, key: jax.Array, value: jax.Array, bias: jax.Array) -> jax.Array:
        return jnp.sum(attend(query, key, value, mask=mask, bias=bias, soft_cap=3.0).mixed * weight)

    everything = (query, key, value, bias)
    expected = jax.jit(jax.value_and_grad(formula, argnums=(0, 1, 2, 3)))(*everything)
    assert_trees_close(
        jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2, 3)))(*everything), expected, rtol=1e-4, atol=1e-5
    )


def test_bfloat16_gradients_are_near_those_in_float32() -> None:
    exact = [jnp.asarray(x) for x in inputs(3)]
    rounded = [x.astype(jnp.bfloat16) for x in exact]

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(attention(query, key, value).astype(jnp.float32)))

    for ours, expected in zip(
        *(jax.grad(loss, argnums=(0, 1, 2))(*qkv) for qkv in (rounded, exact)), strict=True
    ):
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(ours, np.float32), expected, rtol=0.05, atol=0.05)
