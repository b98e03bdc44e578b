"""The contrastive losses against their formulas in NumPy, alone and spread over devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.objectives.rig import Compared, compared, comparison, scalars, slope
from tests.tiny import assert_trees_close, layout_of, model_config, take_steps, unit
from vlpjax.config import spec
from vlpjax.mesh import Layout
from vlpjax.objectives.base import normalize
from vlpjax.objectives.contrastive import Contrastive, InfoNCE, Sigmoid

B, E = 16, 6
RNG = np.random.default_rng(0)
FEATURES = {name: unit(RNG.normal(size=(B, E))).astype(np.float32) for name in ("image", "text")}
LABELS = RNG.integers(0, 6, B).astype(np.int32)
SCALE, BIAS = 7.0, -2.0
HEADS = {"logit_scale": np.log(SCALE), "logit_bias": BIAS}


def evaluate(objective: Contrastive, layout: Layout | None = None) -> Compared:
    """The loss, and its gradients by both features and all heads, on one device or on a mesh."""
    heads = scalars(**{name: HEADS[name] for name in objective.heads()})
    return compared(objective, FEATURES, heads, batch={"label": LABELS}, layout=layout)


def positives(same: bool) -> np.ndarray:
    return LABELS[:, None] == LABELS if same else np.eye(B, dtype=bool)


def info_nce(image: np.ndarray, text: np.ndarray, scale: float, same: bool, smoothing: float) -> float:
    logits, total = scale * image.astype(np.float64) @ text.T.astype(np.float64), 0.0
    for matrix in (logits, logits.T):
        for row in range(B):
            right = positives(same)[row]
            target = (1 - smoothing) * right / right.sum() + smoothing / B
            total -= target @ (matrix[row] - np.log(np.sum(np.exp(matrix[row]))))
    return total / (2 * B)


def sigmoid(image: np.ndarray, text: np.ndarray, scale: float, bias: float, same: bool) -> float:
    logits = scale * image.astype(np.float64) @ text.T.astype(np.float64) + bias
    total = 0.0
    for row, column in np.ndindex(B, B):
        sign = 1 if positives(same)[row, column] else -1
        total += np.log1p(np.exp(-sign * logits[row, column]))
    return total / B


CASES: dict[str, tuple[Contrastive, Callable[[Any, Any, float, float], float]]] = {
    "info_nce": (InfoNCE(), lambda u, v, s, b: info_nce(u, v, s, False, 0.0)),
    "info_nce_same": (InfoNCE(same="label"), lambda u, v, s, b: info_nce(u, v, s, True, 0.0)),
    "info_nce_smooth": (
        InfoNCE(same="label", label_smoothing=0.2),
        lambda u, v, s, b: info_nce(u, v, s, True, 0.2),
    ),
    "sigmoid": (Sigmoid(), lambda u, v, s, b: sigmoid(u, v, s, b, False)),
    "sigmoid_same": (Sigmoid(same="label"), lambda u, v, s, b: sigmoid(u, v, s, b, True)),
}


@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_are_those_of_the_formula(name: str) -> None:
    objective, formula = CASES[name]
    found = evaluate(objective)
    where = {**FEATURES, "logit_scale": np.log(SCALE), "logit_bias": BIAS}

    def value(image: Any, text: Any, logit_scale: Any, logit_bias: Any) -> float:
        return formula(image, text, np.exp(logit_scale), logit_bias)

    np.testing.assert_allclose(found.loss.value, value(**where), rtol=1e-5)
    rng = np.random.default_rng(1)
    for side in FEATURES:
        direction = rng.normal(size=(B, E))
        expected = slope(value, where, side, direction)
        np.testing.assert_allclose(np.sum(found.features[side] * direction), expected, rtol=1e-3)
    for head in objective.heads():
        expected = slope(value, where, head, 1.0)
        np.testing.assert_allclose(found.heads[f"loss_{head}"]["value"], expected, rtol=1e-3)


@pytest.mark.parametrize("name", ["info_nce_smooth", "sigmoid_same"])
def test_value_and_all_gradients_are_the_same_on_eight_devices(name: str) -> None:
    objective = CASES[name][0]
    one, eight = evaluate(objective), evaluate(objective, layout_of(8, replica=2, fsdp=4))
    np.testing.assert_allclose(eight.loss.value, one.loss.value, rtol=1e-6)
    assert_trees_close(eight.gradients, one.gradients, rtol=1e-5, atol=1e-7)
    assert_trees_close(dict(eight.loss.metrics), dict(one.loss.metrics), rtol=1e-6)


def test_logits_are_never_whole_on_one_device() -> None:
    layout, heads = layout_of(8), scalars(logit_scale=0.0)
    placed = jax.device_put(FEATURES, layout.sharding("batch"))
    function = jax.jit(comparison(InfoNCE(), heads, layout=layout))
    text = function.lower(placed, heads["params"], heads["params"], {}).compile().as_text()
    assert f"f32[{B // 8},{B}]" in text
    assert f"f32[{B},{B}]" not in text
    assert f"f32[{B},{E}]" in text  # what is gathered are features


def test_accuracy_counts_any_positive() -> None:
    loss = evaluate(InfoNCE(same="label")).loss
    best = np.argmax(FEATURES["image"] @ FEATURES["text"].T, axis=1)
    np.testing.assert_allclose(loss.metrics["accuracy"], np.mean(LABELS[best] == LABELS))
    np.testing.assert_allclose(loss.metrics["scale"], SCALE, rtol=1e-6)


@pytest.mark.parametrize(("max_scale", "initial"), [(2.0, 0.5), (100.0, 1.0)])
def test_the_scale_is_clipped_after_every_update(max_scale: float, initial: float) -> None:
    config = model_config()
    config.objectives.clip.loss = spec(InfoNCE, temperature=initial, max_scale=max_scale)
    config.optimizer.direction = spec(optax.scale, step_size=1.0)
    config.optimizer.clip_norm = None
    config.optimizer.learning_rate = 1e7  # far outside, on either side
    history = take_steps(config, layout_of(1)).history
    before, after = (float(history[step].params["clip_logit_scale"]["value"]) for step in (0, 1))
    np.testing.assert_allclose(before, -np.log(initial), atol=1e-6)
    assert after in (pytest.approx(0.0, abs=1e-7), pytest.approx(np.log(max_scale), rel=1e-6))


def test_initial_temperatures_are_the_papers() -> None:
    assert InfoNCE().heads()["logit_scale"].initial == pytest.approx(np.log(1 / 0.07))
    assert Sigmoid().heads()["logit_scale"].initial == pytest.approx(np.log(10))
    assert Sigmoid().heads()["logit_bias"].initial == -10.0


def test_normalize_keeps_zero_rows_with_a_finite_gradient() -> None:
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]], jnp.bfloat16)
    np.testing.assert_allclose(normalize(x), [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)
    assert normalize(x).dtype == jnp.float32
    grad = jax.grad(lambda x: jnp.sum(normalize(x) ** 2 + normalize(x)))(jnp.zeros((1, 3)))
    assert np.all(np.isfinite(grad))
