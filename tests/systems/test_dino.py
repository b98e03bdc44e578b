"""DINO: which crops are compared, what the teacher's targets are, and the two ways to collapse."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.objectives.rig import compared, gradients_of, head_variables, new_state, run_config, update, views
from tests.systems.toy import train
from tests.tiny import assert_trees_close, assert_trees_equal, layout_of
from vlpjax.config import spec
from vlpjax.errors import UserError
from vlpjax.objectives.crops import crop_pairs
from vlpjax.objectives.dino import DINO
from vlpjax.objectives.koleo import koleo
from vlpjax.teachers import EMA

B, D, K, V = 16, 6, 9, 4
LOCAL = ("local1", "local2")
RNG = np.random.default_rng(0)
FEATURES = {
    "student": RNG.normal(size=(B, V, D)).astype(np.float32),
    "teacher": RNG.normal(size=(B, 2, D)).astype(np.float32),
}
SMALL: dict[str, Any] = dict(local_views=LOCAL, prototypes=K, hidden=(8,), bottleneck=5)
CROPS = dict(global1=8, global2=8, local1=4, local2=4)


def logits_of(heads: Any, features: np.ndarray) -> np.ndarray:
    """The head in NumPy."""
    mlp, kernel = heads["params"]["loss_head"]["mlp"], heads["params"]["loss_head"]["prototypes"]["kernel"]
    x = np.asarray(
        jax.nn.gelu(features @ mlp["layer_0"]["kernel"] + mlp["layer_0"]["bias"], approximate=False)
    )
    x = x @ mlp["layer_1"]["kernel"] + mlp["layer_1"]["bias"]
    x, kernel = (y / np.linalg.norm(y, axis=axis, keepdims=True) for y, axis in ((x, -1), (kernel, 0)))
    cosines: np.ndarray = x @ kernel
    return cosines


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    p: np.ndarray = e / e.sum(axis=-1, keepdims=True)
    return p


def distilled(student: np.ndarray, targets: np.ndarray) -> tuple[float, int]:
    """The mean cross-entropy over pairs of a large crop and another, and the number of pairs."""
    losses = [
        -np.mean(np.sum(targets[:, q] * np.log(softmax(student[:, v] / 0.1)), axis=-1))
        for q in range(targets.shape[1])
        for v in range(student.shape[1])
        if v != q
    ]
    return float(np.mean(losses)), len(losses)


def test_the_loss_is_the_mean_over_all_pairs_and_the_centre_follows_the_mean() -> None:
    objective = DINO(**SMALL, teacher_temperature=(0.04, 0.07), teacher_warmup="10 steps")
    heads, teacher = head_variables(objective, FEATURES), head_variables(objective, FEATURES, seed=1)
    centre = np.random.default_rng(1).normal(size=K).astype(np.float32) * 0.1
    for step, temperature in ((0, 0.04), (5, 0.055), (20, 0.07)):
        ours = compared(objective, FEATURES, heads, teacher, state={"centre": centre}, step=step)
        teacher_logits = logits_of(teacher, FEATURES["teacher"])
        targets = softmax((teacher_logits - centre) / temperature)
        expected, pairs = distilled(logits_of(heads, FEATURES["student"]), targets)
        assert pairs == 2 * V - 2 == np.count_nonzero(crop_pairs(2, V))
        np.testing.assert_allclose(ours.loss.value, expected, rtol=1e-4)
        moved = 0.9 * centre + 0.1 * teacher_logits.mean(axis=(0, 1))
        np.testing.assert_allclose(ours.loss.state["centre"], moved, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("centring", ["mean", "sinkhorn", "none"])
def test_targets_sum_to_one_and_carry_no_gradient(centring: str) -> None:
    objective = DINO(**SMALL, centring=centring)
    logits = FEATURES["teacher"][:, 0]
    centre = jnp.zeros(D) if centring == "mean" else None

    def total(logits: jax.Array) -> jax.Array:
        return jnp.sum(objective.targets(logits, jnp.float32(0.04), centre)[0] * logits)

    targets = objective.targets(logits, jnp.float32(0.04), centre)[0]
    np.testing.assert_allclose(targets.sum(axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(total)(logits), targets, rtol=1e-6)  # of the second factor only
    ours = compared(objective, FEATURES)
    assert_trees_equal(ours.teacher, jax.tree.map(np.zeros_like, ours.teacher))
    np.testing.assert_array_equal(ours.features["teacher"], 0.0)


def test_a_constant_shift_of_the_teacher_is_gone_once_the_centre_has_followed() -> None:
    objective = DINO(**SMALL)
    logits, shift = FEATURES["teacher"][:, 0], np.linspace(-2, 2, D).astype(np.float32)
    plain, _ = objective.targets(logits, jnp.float32(0.07), jnp.zeros(D))
    centre = jnp.zeros(D)
    for _ in range(200):
        moved, centre = objective.targets(jnp.broadcast_to(shift, (4, D)), jnp.float32(0.07), centre)
    moved, _ = objective.targets(logits + shift, jnp.float32(0.07), centre)
    np.testing.assert_allclose(moved, plain, rtol=1e-3, atol=1e-5)


def test_koleo_pushes_the_closest_two_apart() -> None:
    x = np.random.default_rng(4).normal(size=(8, 5)).astype(np.float32)
    x[1] = x[0] + 0.05
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    distance = np.linalg.norm(unit[:, None] - unit[None], axis=-1) + 9 * np.eye(8)
    np.testing.assert_allclose(koleo(x), -np.mean(np.log(distance.min(axis=1))), rtol=1e-5)
    moved = x - 1e-3 * np.asarray(jax.grad(koleo)(x))
    after = moved / np.linalg.norm(moved, axis=1, keepdims=True)
    assert np.linalg.norm(after[0] - after[1]) > np.linalg.norm(unit[0] - unit[1])
    assert np.all(np.isfinite(jax.grad(koleo)(np.ones((4, 5), np.float32))))


def test_no_device_holds_all_distances_of_koleo_or_their_gradient() -> None:
    layout = layout_of(8)

    def run(x: jax.Array) -> Any:
        with layout.activate():
            return jax.value_and_grad(koleo)(x)

    x = FEATURES["teacher"][:, 0]
    placed = jax.device_put(x, layout.sharding("batch"))
    compiled = jax.jit(run).lower(placed).compile()
    text = compiled.as_text()
    assert f"f32[{B // 8},{B}]" in text and f"f32[{B},{B}]" not in text
    assert_trees_close(compiled(placed), jax.value_and_grad(koleo)(x), rtol=1e-4, atol=1e-5)


def test_koleo_is_of_each_large_crop_by_itself() -> None:
    plain, spread = (compared(DINO(**SMALL, koleo=weight), FEATURES).loss for weight in (0.0, 0.1))
    crops = [float(koleo(FEATURES["student"][:, view])) for view in range(2)]
    np.testing.assert_allclose(spread.value - plain.value, 0.1 * sum(crops), rtol=1e-3)
    np.testing.assert_allclose(spread.metrics["koleo"], np.mean(crops), rtol=1e-5)


@pytest.mark.parametrize("centring", ["mean", "sinkhorn"])
def test_eight_devices_share_centre_and_balance(centring: str) -> None:
    objective = DINO(**SMALL, centring=centring, koleo=0.1)
    one, eight = compared(objective, FEATURES), compared(objective, FEATURES, layout=layout_of(8))
    assert_trees_close(eight.loss.value, one.loss.value, rtol=1e-5)
    assert_trees_close(eight.features, one.features, rtol=1e-3, atol=1e-5)
    assert_trees_close(eight.loss.state, one.loss.state, rtol=1e-4, atol=1e-6)


def test_micro_batches_give_the_update_of_the_whole_batch_and_prototypes_rest_at_first() -> None:
    loss = spec(DINO, local_views=LOCAL, prototypes=12, hidden=(8,), bottleneck=8, freeze_prototypes="1 step")
    config = run_config(loss, dict(ema=spec(EMA, decay=0.9)))
    batch = views(**CROPS)
    state = new_state(config, batch)
    _, grads = gradients_of(config, state, batch)
    np.testing.assert_array_equal(grads["loss_head"]["prototypes"]["kernel"], 0.0)
    assert np.any(grads["loss_head"]["mlp"]["layer_0"]["kernel"])
    state = state.replace(step=np.int32(1))
    whole, grads = gradients_of(config, state, batch)
    assert np.any(grads["loss_head"]["prototypes"]["kernel"])
    for accumulate in (2, 4, 8):
        config.accumulate = accumulate
        parts, accumulated = gradients_of(config, state, batch)
        np.testing.assert_allclose(parts.value, whole.value, rtol=1e-5)
        assert_trees_close(accumulated, grads, rtol=1e-3, atol=1e-5)
        assert_trees_close(parts.state, whole.state, rtol=1e-4, atol=1e-6)


def test_the_teacher_follows_tower_and_head_after_the_update() -> None:
    loss = spec(DINO, local_views=LOCAL, prototypes=12, hidden=(8,), bottleneck=8)
    config, batch = run_config(loss, dict(ema=spec(EMA, decay=0.5))), views(**CROPS)
    before = new_state(config, batch)
    after, _ = update(config, before, batch)
    mean = jax.tree.map(lambda old, new: (old + new) / 2, before.params, after.params)
    assert_trees_close(after.teachers["ema"], mean, rtol=1e-5, atol=1e-7)


def test_centring_and_sharpening_hold_each_other_in_balance() -> None:
    fields: dict[str, Any] = dict(global_views=("view1", "view2"), prototypes=64, hidden=(64,), bottleneck=32)
    ema = dict(ema=spec(EMA, decay=0.98, final_decay=1.0))
    both = train(spec(DINO, **fields), teachers=ema)
    one_prototype = train(spec(DINO, **fields, centring="none"), teachers=ema)
    uniform = train(spec(DINO, **fields, teacher_temperature=(1.0, 1.0)), teachers=ema)
    assert both.last("loss/mean_entropy") > 0.4
    assert both.last("loss/entropy") < both.last("loss/mean_entropy") - 0.1
    assert one_prototype.last("loss/mean_entropy") < 0.15
    assert uniform.last("loss/entropy") > 0.95


def test_an_unknown_centring_is_told() -> None:
    with pytest.raises(UserError, match=r"centring is 'median'.*'mean'"):
        DINO(centring="median")
