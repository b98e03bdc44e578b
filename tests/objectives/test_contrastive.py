"""The contrastive losses against their formulas in NumPy, alone and spread over devices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.tiny import assert_trees_close, layout_of, model_config, take_steps, unit
from vlpjax.config import spec
from vlpjax.mesh import Layout
from vlpjax.models.towers import Towers
from vlpjax.objectives.base import Context, Loss, head_name, normalize
from vlpjax.objectives.contrastive import Contrastive, InfoNCE, Sigmoid

B, E = 16, 6
RNG = np.random.default_rng(0)
FEATURES = {name: unit(RNG.normal(size=(B, E))).astype(np.float32) for name in ("image", "text")}
LABELS = RNG.integers(0, 6, B).astype(np.int32)
SCALE, BIAS = 7.0, -2.0
HEADS = {"logit_scale": np.log(SCALE), "logit_bias": BIAS}


def evaluate(objective: Contrastive, layout: Layout | None = None) -> tuple[Loss, Any]:
    """The loss, and its gradients by both features and all heads, on one device or on a mesh."""
    towers = Towers.of({head_name("clip", name): head for name, head in objective.heads().items()})
    params = {head_name("clip", name): {"value": jnp.float32(HEADS[name])} for name in objective.heads()}

    def compare(features: Any, params: Any, labels: jax.Array) -> tuple[jax.Array, Loss]:
        def run(towers: Towers) -> Loss:
            context = Context(towers, {"label": labels}, jax.random.key(0), jnp.int32(0), objective="clip")
            return objective.compare(features, context)

        loss = towers.apply({"params": params}, method=run)
        return loss.value, loss

    def whole(features: Any, params: Any, labels: jax.Array) -> Any:
        if layout is None:
            return jax.grad(compare, argnums=(0, 1), has_aux=True)(features, params, labels)
        with layout.activate():
            return jax.grad(compare, argnums=(0, 1), has_aux=True)(features, params, labels)

    features, labels = FEATURES, LABELS
    if layout is not None:
        features, labels = jax.device_put((features, labels), layout.sharding("batch"))
    grads, loss = jax.jit(whole)(features, params, labels)
    return loss, grads


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
    loss, (features, heads) = evaluate(objective)
    image, text = (FEATURES[side].astype(np.float64) for side in ("image", "text"))
    np.testing.assert_allclose(loss.value, formula(image, text, SCALE, BIAS), rtol=1e-5)

    step, rng = 1e-5, np.random.default_rng(1)
    for side in ("image", "text"):  # along a random direction
        direction = rng.normal(size=(B, E))
        ends = []
        for sign in (1, -1):
            moved = {"image": image, "text": text}
            moved[side] = moved[side] + sign * step * direction
            ends.append(formula(moved["image"], moved["text"], SCALE, BIAS))
        np.testing.assert_allclose(
            np.sum(features[side] * direction), (ends[0] - ends[1]) / (2 * step), rtol=1e-3
        )
    ends = [formula(image, text, SCALE * np.exp(sign * step), BIAS) for sign in (1, -1)]
    np.testing.assert_allclose(
        heads["clip_logit_scale"]["value"], (ends[0] - ends[1]) / (2 * step), rtol=1e-3
    )
    if "clip_logit_bias" in heads:
        ends = [formula(image, text, SCALE, BIAS + sign * step) for sign in (1, -1)]
        np.testing.assert_allclose(
            heads["clip_logit_bias"]["value"], (ends[0] - ends[1]) / (2 * step), rtol=1e-3
        )


@pytest.mark.parametrize("name", ["info_nce_smooth", "sigmoid_same"])
def test_value_and_all_gradients_are_the_same_on_eight_devices(name: str) -> None:
    objective = CASES[name][0]
    one, eight = evaluate(objective), evaluate(objective, layout_of(8, replica=2, fsdp=4))
    np.testing.assert_allclose(eight[0].value, one[0].value, rtol=1e-6)
    assert_trees_close(eight[1], one[1], rtol=1e-5, atol=1e-7)
    assert_trees_close(dict(eight[0].metrics), dict(one[0].metrics), rtol=1e-6)


def test_logits_are_never_whole_on_one_device() -> None:
    layout = layout_of(8)
    towers = Towers.of({"clip_logit_scale": InfoNCE().heads()["logit_scale"]})

    def compare(features: Any) -> jax.Array:
        with layout.activate():

            def run(towers: Towers) -> jax.Array:
                return (
                    InfoNCE()
                    .compare(features, Context(towers, {}, jax.random.key(0), jnp.int32(0), objective="clip"))
                    .value
                )

            return towers.apply({"params": {"clip_logit_scale": {"value": jnp.float32(0)}}}, method=run)

    placed = jax.device_put(FEATURES, layout.sharding("batch"))
    text = jax.jit(jax.grad(compare)).lower(placed).compile().as_text()
    assert f"f32[{B // 8},{B}]" in text
    assert f"f32[{B},{B}]" not in text
    assert f"f32[{B},{E}]" in text  # what is gathered are features


def test_accuracy_counts_any_positive() -> None:
    loss, _ = evaluate(InfoNCE(same="label"))
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
    assert replace(InfoNCE(), max_scale=50.0).bounds() == {"logit_scale": (0.0, pytest.approx(np.log(50.0)))}


def test_normalize_keeps_zero_rows_with_a_finite_gradient() -> None:
    x = jnp.array([[3.0, 4.0], [0.0, 0.0]], jnp.bfloat16)
    np.testing.assert_allclose(normalize(x), [[0.6, 0.8], [0.0, 0.0]], rtol=1e-6)
    assert normalize(x).dtype == jnp.float32
    grad = jax.grad(lambda x: jnp.sum(normalize(x) ** 2 + normalize(x)))(jnp.zeros((1, 3)))
    assert np.all(np.isfinite(grad))
