"""Sinkhorn-Knopp: balanced, stable, the same on every mesh, and what the algorithm on matrices gives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny import layout_of
from vlpjax.objectives.assignment import sinkhorn

B, K = 16, 6
SCORES = np.random.default_rng(0).uniform(-1, 1, (B, K)).astype(np.float32)


def reference(scores: np.ndarray, epsilon: float, rounds: int) -> np.ndarray:
    """The algorithm of SwAV: a matrix of prototypes by examples whose rows and columns are scaled in turn."""
    codes = np.exp(scores.astype(np.float64) / epsilon).T
    codes /= codes.sum()
    for _ in range(rounds):
        codes /= codes.sum(axis=1, keepdims=True) * len(codes)
        codes /= codes.sum(axis=0, keepdims=True) * codes.shape[1]
    return (codes * codes.shape[1]).T


@pytest.mark.parametrize(("epsilon", "rounds"), [(0.05, 3), (0.5, 1), (0.05, 50)])
def test_codes_are_those_of_scaling_a_matrix(epsilon: float, rounds: int) -> None:
    np.testing.assert_allclose(
        sinkhorn(SCORES, epsilon, rounds), reference(SCORES, epsilon, rounds), rtol=2e-4, atol=1e-6
    )


def test_examples_sum_to_one_and_prototypes_approach_equal_shares() -> None:
    codes = sinkhorn(SCORES, 0.05, 50)
    np.testing.assert_allclose(codes.sum(axis=1), 1.0, rtol=1e-6)
    np.testing.assert_allclose(codes.sum(axis=0), B / K, rtol=0.05)
    np.testing.assert_allclose(sinkhorn(SCORES, 0.05, 3).sum(axis=1), 1.0, rtol=1e-6)


def test_a_constant_added_to_all_scores_changes_nothing() -> None:
    shifted = sinkhorn(SCORES + np.float32(3.0), 0.05, 3)
    np.testing.assert_allclose(shifted, sinkhorn(SCORES, 0.05, 3), rtol=1e-4, atol=1e-6)


def test_scores_of_any_size_and_type_stay_finite() -> None:
    codes = sinkhorn(jnp.asarray(SCORES * 500, jnp.bfloat16), 0.05, 3)
    assert codes.dtype == jnp.float32
    assert np.all(np.isfinite(codes))
    np.testing.assert_allclose(codes.sum(axis=1), 1.0, rtol=1e-5)


def test_codes_carry_no_gradient() -> None:
    grad = jax.grad(lambda scores: jnp.sum(sinkhorn(scores, 0.05, 3) * SCORES))(SCORES)
    np.testing.assert_array_equal(grad, 0.0)


def test_rows_that_do_not_count_leave_the_others_codes_as_they_are() -> None:
    counted = np.arange(B) % 4 != 1
    codes = sinkhorn(SCORES, 0.05, 3, counted)
    np.testing.assert_allclose(codes[counted], sinkhorn(SCORES[counted], 0.05, 3), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(codes.sum(axis=1), 1.0, rtol=1e-6)
    nobody = sinkhorn(SCORES, 0.05, 3, np.zeros(B, bool))
    np.testing.assert_allclose(nobody, jax.nn.softmax(SCORES / 0.05), rtol=1e-5, atol=1e-7)


def test_the_balance_is_over_all_devices() -> None:
    layout = layout_of(8, replica=2, fsdp=4)

    def run(scores: jax.Array) -> jax.Array:
        with layout.activate():
            return sinkhorn(scores, 0.05, 3)

    spread = jax.jit(run)(jax.device_put(SCORES, layout.sharding("batch", None)))
    np.testing.assert_allclose(spread, sinkhorn(SCORES, 0.05, 3), rtol=1e-5, atol=1e-7)
