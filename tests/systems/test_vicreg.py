"""VICReg: its three terms at their known values, both forms of the covariance, and what the variance term is for."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
import scipy.linalg

from tests.objectives.rig import compared, gradients_of, head_variables, new_state, run_config, views
from tests.systems.toy import train
from tests.tiny import assert_trees_close, layout_of
from vlpjax.config import spec
from vlpjax.objectives.vicreg import VICReg, off_diagonal_covariance, variance_hinge

B, D = 16, 6
FEATURES = {"student": np.random.default_rng(0).normal(size=(B, 2, D)).astype(np.float32)}


def terms(z: np.ndarray, other: np.ndarray) -> float:
    """The loss of the paper's code."""
    value = 25 * np.mean((z - other) ** 2)
    for x in (z, other):
        value += 25 * np.mean(np.maximum(0, 1 - np.sqrt(x.var(axis=0, ddof=1) + 1e-4))) / 2
        covariance = np.cov(x.T)
        value += np.sum((covariance - np.diag(np.diag(covariance))) ** 2) / x.shape[1]
    return float(value)


@pytest.mark.parametrize("width", [5, 24])  # fewer and more dimensions than examples
def test_the_loss_is_that_of_the_formula(width: int) -> None:
    objective = VICReg(projector=(width,))
    heads = head_variables(objective, FEATURES)
    layer = heads["params"]["loss_projector"]["layer_0"]
    z = FEATURES["student"].astype(np.float64) @ (0.3 * layer["kernel"])
    layer["kernel"] = np.asarray(0.3 * layer["kernel"])
    ours = compared(objective, FEATURES, heads)
    np.testing.assert_allclose(ours.loss.value, terms(z[:, 0], z[:, 1]), rtol=1e-4)


def test_constant_embeddings_cost_almost_one_and_unit_variance_nothing() -> None:
    np.testing.assert_allclose(variance_hinge(np.full((B, D), 3.0, np.float32)), 1 - 0.01, rtol=1e-5)
    x = np.random.default_rng(1).normal(size=(B, D))
    unit_variance = (x - x.mean(axis=0)) / x.std(axis=0, ddof=1)
    np.testing.assert_allclose(variance_hinge(unit_variance.astype(np.float32)), 0.0, atol=1e-6)


def test_orthogonal_dimensions_have_no_covariance_at_all() -> None:
    hadamard = scipy.linalg.hadamard(16).astype(np.float32)[:, 1:]
    assert off_diagonal_covariance(hadamard[:, :7]) == 0.0
    assert off_diagonal_covariance(np.concatenate([hadamard, -hadamard])[:, :15]) == 0.0


@pytest.mark.parametrize("shape", [(32, 6), (6, 32)])
def test_both_forms_of_the_covariance_are_the_sum_off_the_diagonal(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    covariance = np.cov(x.astype(np.float64).T)
    expected = (np.sum(covariance**2) - np.sum(np.diag(covariance) ** 2)) / shape[1]
    np.testing.assert_allclose(off_diagonal_covariance(x), expected, rtol=1e-4)


def test_eight_devices_share_their_statistics() -> None:
    objective = VICReg(projector=(8, 24))
    one, eight = compared(objective, FEATURES), compared(objective, FEATURES, layout=layout_of(8))
    assert_trees_close(eight.loss.value, one.loss.value, rtol=1e-5)
    assert_trees_close(eight.features, one.features, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_no_device_holds_the_larger_matrix_or_its_gradient(shape: tuple[int, int]) -> None:
    layout = layout_of(8)

    def run(x: jax.Array) -> Any:
        with layout.activate():
            return jax.value_and_grad(off_diagonal_covariance)(x)

    x = np.random.default_rng(3).normal(size=shape).astype(np.float32)
    compiled = jax.jit(run).lower(jax.device_put(x, layout.sharding("batch"))).compile()
    text, smaller = compiled.as_text(), min(shape)
    assert f"f32[{smaller // 8},{smaller}]" in text
    assert not any(f"f32[{rows},40]" in text for rows in (40, 5))
    if shape[0] == smaller:
        assert f"f32[{smaller},{smaller}]" not in text
    one = jax.value_and_grad(off_diagonal_covariance)(x)
    assert_trees_close(compiled(jax.device_put(x, layout.sharding("batch"))), one, rtol=1e-4, atol=1e-6)


def test_micro_batches_give_the_gradient_of_the_whole_batch() -> None:
    config, batch = run_config(spec(VICReg, projector=(16, 8))), views()
    state = new_state(config, batch)
    whole, grads = gradients_of(config, state, batch)
    for accumulate in (2, 4, 8):
        config.accumulate = accumulate
        parts, accumulated = gradients_of(config, state, batch)
        np.testing.assert_allclose(parts.value, whole.value, rtol=1e-5)
        assert_trees_close(accumulated, grads, rtol=1e-3, atol=1e-5)


def test_without_the_variance_term_embeddings_shrink_to_a_point() -> None:
    whole = train(spec(VICReg, projector=(64, 32)), steps=300)
    without = train(spec(VICReg, projector=(64, 32), variance=0.0), steps=300)
    assert whole.last("loss/deviation") > 0.6
    assert without.last("loss/deviation") < 0.1
    assert jax.tree.all(jax.tree.map(lambda x: bool(np.isfinite(x).all()), without.state.params))
