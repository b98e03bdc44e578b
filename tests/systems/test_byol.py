"""BYOL: what its loss is invariant to, where no gradient goes, and what keeps it from collapsing."""

from __future__ import annotations

import jax
import numpy as np

from tests.objectives.rig import compared, head_variables
from tests.systems.toy import train
from tests.tiny import assert_trees_close, assert_trees_equal, layout_of, unit
from vlpjax.config import spec
from vlpjax.objectives.byol import BYOL
from vlpjax.teachers import EMA

B, D = 16, 6
RNG = np.random.default_rng(0)
FEATURES = {name: RNG.normal(size=(B, 2, D)).astype(np.float32) for name in ("student", "teacher")}
LINEAR = BYOL(projector=(5,), predictor=(5,))


def test_the_loss_is_that_of_the_formula() -> None:
    heads = head_variables(LINEAR, FEATURES)
    teacher = head_variables(LINEAR, FEATURES, seed=1)
    ours = compared(LINEAR, FEATURES, heads, teacher)
    project, predict = (
        heads["params"][f"loss_{name}"]["layer_0"]["kernel"] for name in ("projector", "predictor")
    )
    predicted = unit(FEATURES["student"].astype(np.float64) @ project @ predict)
    targets = unit(
        FEATURES["teacher"].astype(np.float64) @ teacher["params"]["loss_projector"]["layer_0"]["kernel"]
    )
    cosines = [predicted[:, 0] * targets[:, 1], predicted[:, 1] * targets[:, 0]]
    np.testing.assert_allclose(ours.loss.value, np.mean(4 - 2 * np.sum(cosines, axis=(0, 2))), rtol=1e-5)


def test_the_length_of_either_side_does_not_matter() -> None:
    heads = head_variables(LINEAR, FEATURES)
    longer = {"student": FEATURES["student"] * 3, "teacher": FEATURES["teacher"] * 0.2}
    values = [compared(LINEAR, features, heads).loss.value for features in (FEATURES, longer)]
    np.testing.assert_allclose(values[0], values[1], rtol=1e-5)


def test_no_gradient_reaches_the_teacher() -> None:
    ours = compared(LINEAR, FEATURES)
    assert_trees_equal(ours.teacher, jax.tree.map(np.zeros_like, ours.teacher))
    np.testing.assert_array_equal(ours.features["teacher"], 0.0)
    assert np.any(ours.features["student"])


def test_batch_statistics_are_those_of_all_devices() -> None:
    objective = BYOL(projector=(8, 5), predictor=(8, 5))
    one, eight = compared(objective, FEATURES), compared(objective, FEATURES, layout=layout_of(8))
    assert_trees_close(eight.loss.value, one.loss.value, rtol=1e-5)
    assert_trees_close(eight.features["student"], one.features["student"], rtol=1e-3, atol=1e-5)


def test_predictor_and_teacher_keep_embeddings_apart_and_without_both_they_collapse() -> None:
    heads = dict(projector=(64, 32))
    ema = dict(ema=spec(EMA, decay=0.98, final_decay=1.0))
    whole = train(spec(BYOL, **heads, predictor=(64, 32)), teachers=ema, learning_rate=5e-2)
    neither = train(spec(BYOL, **heads, predictor=(), teacher=""), learning_rate=5e-2)
    assert whole.last("loss/spread") > 0.5
    assert neither.last("loss/spread") < 0.1
    assert neither.last("loss/loss") < 0.01  # collapsed, its loss is perfect
