"""NT-Xent against a loop over pairs, its value at a collapse, and its rows on many devices."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from tests.objectives.rig import compared, gradients_of, new_state, run_config, views
from tests.tiny import assert_trees_close, layout_of, unit
from vlpjax.config import spec
from vlpjax.objectives.ntxent import NTXent

B, E = 16, 6
FEATURES = {"student": np.random.default_rng(0).normal(size=(B, 2, E)).astype(np.float32)}
LINEAR = NTXent(temperature=0.3, projector=(5,))


def brute_force(features: np.ndarray, kernel: np.ndarray, bias: np.ndarray, temperature: float) -> float:
    """The sum over both views of an image, and the mean over images, of -log of the softmax over the others."""
    z = unit(np.concatenate([features[:, 0], features[:, 1]]).astype(np.float64) @ kernel + bias)  # [2B, E]
    total = 0.0
    for view in range(2 * B):
        others = [np.exp(z[view] @ z[other] / temperature) for other in range(2 * B) if other != view]
        total -= z[view] @ z[(view + B) % (2 * B)] / temperature - np.log(sum(others))
    return total / B


def variables(seed: int = 1) -> Any:
    rng = np.random.default_rng(seed)
    kernel, bias = rng.normal(size=(E, 5)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    return {"params": {"loss_projector": {"layer_0": {"kernel": kernel, "bias": bias}}}}


def test_value_and_gradient_are_those_of_a_loop_over_pairs() -> None:
    heads = variables()
    ours = compared(LINEAR, FEATURES, heads)
    layer = heads["params"]["loss_projector"]["layer_0"]
    kernel, bias = layer["kernel"].astype(np.float64), layer["bias"].astype(np.float64)
    features = FEATURES["student"].astype(np.float64)
    np.testing.assert_allclose(ours.loss.value, brute_force(features, kernel, bias, 0.3), rtol=1e-5)
    step, rng = 1e-5, np.random.default_rng(2)
    along, turn = rng.normal(size=features.shape), rng.normal(size=kernel.shape)
    ends = [brute_force(features + sign * step * along, kernel, bias, 0.3) for sign in (1, -1)]
    slope = np.sum(ours.features["student"] * along)
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-3)
    ends = [brute_force(features, kernel + sign * step * turn, bias, 0.3) for sign in (1, -1)]
    slope = np.sum(ours.heads["loss_projector"]["layer_0"]["kernel"] * turn)
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-3)


def test_identical_embeddings_cost_the_logarithm_of_the_other_views_per_direction() -> None:
    same = {"student": np.ones((B, 2, E), np.float32)}
    np.testing.assert_allclose(
        compared(LINEAR, same, variables()).loss.value, 2 * np.log(2 * B - 1), rtol=1e-5
    )


def test_devices_compare_their_rows_with_all_views() -> None:
    objective = NTXent(projector=(8, 5))  # BatchNorm over the global batch
    one, many = compared(objective, FEATURES), compared(objective, FEATURES, layout=layout_of(8))
    assert_trees_close(many.loss.value, one.loss.value, rtol=1e-5)
    assert_trees_close(many.features, one.features, rtol=1e-4, atol=1e-5)
    assert_trees_close(many.heads, one.heads, rtol=1e-4, atol=1e-5)


def test_no_device_holds_all_logits_or_their_gradient() -> None:
    layout, towers = layout_of(8), variables()

    def run(features: Any) -> Any:
        ours = compared(LINEAR, features, towers, layout=layout)
        return ours.loss.value, ours.features, ours.heads

    text = jax.jit(run).lower(FEATURES).compile().as_text()
    assert f"f32[{B // 8},{B}]" in text
    assert not any(f"f32[{rows},{columns}]" in text for rows in (B, 2 * B) for columns in (B, 2 * B))


def test_finding_every_other_view_is_an_accuracy_of_one() -> None:
    first = np.random.default_rng(3).normal(size=(B, E)).astype(np.float32)
    twins = {"student": np.stack([first, first], axis=1)}
    assert compared(LINEAR, twins, variables()).loss.metrics["accuracy"] == 1.0
    assert compared(LINEAR, FEATURES, variables()).loss.metrics["accuracy"] < 0.5


@pytest.mark.parametrize("accumulate", [2, 4, 8])
def test_accumulation_compares_the_whole_batch(accumulate: int) -> None:
    config, batch = run_config(spec(NTXent, projector=(16, 8))), views()
    state = new_state(config, batch)
    whole, grads = gradients_of(config, state, batch)
    config.accumulate = accumulate
    parts, accumulated = gradients_of(config, state, batch)
    np.testing.assert_allclose(parts.value, whole.value, rtol=1e-5)
    assert_trees_close(accumulated, grads, rtol=1e-3, atol=2e-6)
