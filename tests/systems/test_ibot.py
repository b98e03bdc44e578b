"""iBOT and DINOv2: which patches are hidden and which have a loss, whose word they get, and exact accumulation."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from tests.objectives.rig import compared, gradients_of, head_variables, new_state, run_config, views
from tests.systems.test_dino import FEATURES, logits_of, softmax
from tests.tiny import assert_trees_close, layout_of
from vlpjax.config import spec
from vlpjax.errors import UserError
from vlpjax.models.towers import Towers
from vlpjax.objectives.base import Context
from vlpjax.objectives.dino import DINO
from vlpjax.objectives.ibot import IBOT
from vlpjax.teachers import EMA

B, D, M = 16, 6, 5
LOCAL = ("local1", "local2")
SMALL: dict[str, Any] = dict(local_views=LOCAL, prototypes=9, hidden=(8,), bottleneck=5)
RNG = np.random.default_rng(0)
REAL = np.arange(M) < RNG.integers(0, M + 1, (B, 2, 1))
PATCHES = {
    **FEATURES,
    "student_patches": RNG.normal(size=(B, 2, M, D)).astype(np.float32),
    "teacher_patches": RNG.normal(size=(B, 2, M, D)).astype(np.float32),
    "real": REAL.astype(np.float32),
}


def masks_of(objective: IBOT, rows: np.ndarray | None = None, size: int = 64) -> np.ndarray:
    """The masks of 64x64 pixels in patches of 8."""
    batch = {"global1": np.zeros((size, 64, 64, 3), np.float32)}
    context = Context(Towers.of({}), batch, jax.random.key(3), np.int32(0), objective="loss", rows=rows)
    return np.asarray(objective.draw_masks(context, 64))


def test_half_of_the_crops_lose_between_a_tenth_and_a_half_in_blocks() -> None:
    masks = masks_of(IBOT()).reshape(-1, 64)
    hidden = masks.sum(axis=1)
    assert 0.35 < np.mean(hidden > 0) < 0.65
    assert hidden.max() <= 32
    assert len(set(hidden)) > 5
    grids = masks.reshape(-1, 8, 8)
    inside = (grids[:, 1:] & grids[:, :-1]).sum() + (grids[:, :, 1:] & grids[:, :, :-1]).sum()
    assert inside > 0.9 * hidden.sum()  # scattered patches would touch far less often
    every = masks_of(IBOT(mask_probability=1.0, mask_ratio=(0.75, 0.75), mask_shape="random"))
    assert set(every.sum(axis=-1).ravel()) == {48}


def test_a_mask_is_a_function_of_the_row_whatever_else_is_in_the_batch() -> None:
    whole = masks_of(IBOT())
    part = masks_of(IBOT(), rows=np.arange(1, 64, 4), size=16)
    np.testing.assert_array_equal(part, whole[1::4])


@pytest.mark.parametrize("separate", [False, True])
def test_the_patch_loss_is_a_mean_per_crop_and_then_over_crops(separate: bool) -> None:
    fields: dict[str, Any] = dict(patch_prototypes=7) if separate else {}
    objective = IBOT(**SMALL, **fields, patch_teacher_temperature=(0.05, 0.05))
    heads, teacher = head_variables(objective, PATCHES), head_variables(objective, PATCHES, seed=1)
    head = "loss_patch_head" if separate else "loss_head"
    own, others = ({"params": {"loss_head": side["params"][head]}} for side in (heads, teacher))
    centre = np.linspace(-0.1, 0.1, 7 if separate else 9).astype(np.float32)
    state = {**objective.initial_state(jax.random.key(0)), "patch_centre": centre}
    ours = compared(objective, PATCHES, heads, teacher, state=state)
    teacher_logits = logits_of(others, PATCHES["teacher_patches"])
    targets = softmax((teacher_logits - centre) / 0.05)
    losses = -np.sum(targets * np.log(softmax(logits_of(own, PATCHES["student_patches"]) / 0.1)), axis=-1)
    per_crop = np.sum(losses * REAL, axis=-1) / np.maximum(REAL.sum(axis=-1), 1)
    np.testing.assert_allclose(ours.loss.metrics["patches"], np.mean(per_crop), rtol=1e-4)
    plain = compared(
        DINO(**SMALL), FEATURES, {"params": {"loss_head": heads["params"]["loss_head"]}},
        {"params": {"loss_head": teacher["params"]["loss_head"]}},
    )  # fmt: skip
    np.testing.assert_allclose(ours.loss.value, plain.loss.value + np.mean(per_crop), rtol=1e-4)
    moved = 0.9 * centre + 0.1 * teacher_logits[REAL].mean(axis=0)
    np.testing.assert_allclose(ours.loss.state["patch_centre"], moved, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("centring", ["mean", "sinkhorn"])
def test_what_is_not_masked_has_no_part_in_anything(centring: str) -> None:
    objective = IBOT(**SMALL, centring=centring)
    other = {
        name: np.where(REAL[..., None], PATCHES[name], 3.0).astype(np.float32)
        for name in ("student_patches", "teacher_patches")
    }
    ours, changed = compared(objective, PATCHES), compared(objective, {**PATCHES, **other})
    np.testing.assert_allclose(changed.loss.value, ours.loss.value, rtol=1e-5)
    assert_trees_close(changed.loss.state, ours.loss.state, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(ours.features["student_patches"])[~REAL], 0.0)
    assert np.any(np.asarray(ours.features["student_patches"])[REAL])


def test_eight_devices_share_balance_and_neighbours() -> None:
    objective = IBOT(**SMALL, centring="sinkhorn", koleo=0.1)
    one, eight = compared(objective, PATCHES), compared(objective, PATCHES, layout=layout_of(8))
    assert_trees_close(eight.loss.value, one.loss.value, rtol=1e-5)
    assert_trees_close(eight.features, one.features, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("centring", ["mean", "sinkhorn"])
def test_micro_batches_draw_the_same_masks_and_give_the_gradient_of_the_whole_batch(centring: str) -> None:
    loss = spec(
        IBOT, local_views=LOCAL, prototypes=12, hidden=(8,), bottleneck=8, centring=centring, koleo=0.1,
        mask_shape="random",
    )  # fmt: skip
    config = run_config(loss, dict(ema=spec(EMA, decay=0.9)))
    batch = views(global1=16, global2=16, local1=8, local2=8)
    state = new_state(config, batch)
    whole, grads = gradients_of(config, state, batch)
    assert 0.0 < float(whole.metrics["masked"]) < 1.0
    assert np.any(grads["image"]["mask_token"])
    config.accumulate = 4
    parts, accumulated = gradients_of(config, state, batch)
    np.testing.assert_allclose(parts.value, whole.value, rtol=1e-5)
    assert_trees_close(accumulated, grads, rtol=1e-3, atol=1e-5)
    assert_trees_close(parts.state, whole.state, rtol=1e-4, atol=1e-6)


def test_the_patch_loss_may_start_late() -> None:
    objective = IBOT(**SMALL, patch_start="5 steps")
    before, after = (compared(objective, PATCHES, step=step).loss for step in (4, 5))
    np.testing.assert_allclose(before.value, before.metrics["class"], rtol=1e-6)
    np.testing.assert_allclose(after.value, after.metrics["class"] + after.metrics["patches"], rtol=1e-6)


def test_odd_settings_are_told() -> None:
    with pytest.raises(UserError, match=r"mask_ratio is \(0.5, 0.1\)"):
        IBOT(mask_ratio=(0.5, 0.1))
    with pytest.raises(UserError, match=r"mask_shape is 'stripes'.*'blocks'"):
        IBOT(mask_shape="stripes")
