"""MoCo v3: symmetric, with a predictor; keys are the teacher's; the patch projection can be frozen."""

from __future__ import annotations

import jax
import numpy as np

from tests.objectives.rig import compared, head_variables, new_state, run_config, update, views
from tests.tiny import assert_trees_close, assert_trees_equal, layout_of, unit
from vlpjax.config import spec
from vlpjax.objectives.moco import MoCoV3
from vlpjax.teachers import EMA

B, D = 16, 6
RNG = np.random.default_rng(0)
FEATURES = {name: RNG.normal(size=(B, 2, D)).astype(np.float32) for name in ("student", "teacher")}
LINEAR = MoCoV3(projector=(5,), predictor=(5,), last_norm=None, predictor_last_norm=None, temperature=0.5)


def contrast(q: np.ndarray, k: np.ndarray, temperature: float) -> float:
    logits = unit(q) @ unit(k).T / temperature
    return float(2 * temperature * np.mean(np.log(np.exp(logits).sum(axis=1)) - np.diag(logits)))


def test_the_loss_is_twice_the_temperature_times_both_cross_entropies() -> None:
    heads, teacher = head_variables(LINEAR, FEATURES), head_variables(LINEAR, FEATURES, seed=1)
    ours = compared(LINEAR, FEATURES, heads, teacher)
    kernel = {name: head["layer_0"]["kernel"].astype(np.float64) for name, head in heads["params"].items()}
    q = FEATURES["student"] @ kernel["loss_projector"] @ kernel["loss_predictor"]
    k = FEATURES["teacher"] @ teacher["params"]["loss_projector"]["layer_0"]["kernel"].astype(np.float64)
    expected = contrast(q[:, 0], k[:, 1], 0.5) + contrast(q[:, 1], k[:, 0], 0.5)
    np.testing.assert_allclose(ours.loss.value, expected, rtol=1e-5)


def test_no_gradient_reaches_keys_or_their_encoder() -> None:
    ours = compared(MoCoV3(projector=(8, 5), predictor=(8, 5)), FEATURES)
    assert_trees_equal(ours.teacher, jax.tree.map(np.zeros_like, ours.teacher))
    np.testing.assert_array_equal(ours.features["teacher"], 0.0)
    assert np.any(ours.features["student"])


def test_last_norms_have_no_scale_and_the_paper_has_three_and_two_layers() -> None:
    heads = head_variables(MoCoV3(projector=(8, 8, 5), predictor=(8, 5)), FEATURES)["params"]
    assert set(heads["loss_projector"]) == {"layer_0", "norm_0", "layer_1", "norm_1", "layer_2"}
    assert set(heads["loss_predictor"]) == {"layer_0", "norm_0", "layer_1"}
    assert MoCoV3().projector == (4096, 4096, 256)
    assert MoCoV3().predictor == (4096, 256)


def test_devices_and_accumulation_give_the_same_update() -> None:
    """Heads with BatchNorm see the whole batch however it is split."""
    config = run_config(spec(MoCoV3, projector=(16, 8), predictor=(16, 8)), dict(ema=spec(EMA, decay=0.0)))
    config.optimizer.rate_rules = ((r"image/projection/.*", None), (r".*", 1.0))
    batch = views()
    state = new_state(config, batch)
    whole, metrics = update(config, state, batch)
    config.accumulate = 4
    spread, _ = update(config, state, batch, layout_of(2))
    assert_trees_close(spread.params, whole.params, rtol=1e-3, atol=1e-5)
    assert np.isfinite(metrics["loss"])
    assert_trees_equal(whole.params["image"]["projection"], state.params["image"]["projection"])  # frozen
    assert_trees_equal(whole.teachers["ema"], whole.params)  # a decay of 0
