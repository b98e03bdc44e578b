"""Similarity-row distillation against a formula in loops, and what it does not look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from tests.objectives.rig import Compared, compared, scalars, slope
from tests.tiny import (
    ROOT,
    assert_trees_close,
    experiment_of,
    layout_of,
    model_config,
    random_batch,
    take_steps,
    unit,
)  # fmt: skip
from vlpjax.config import load, spec
from vlpjax.errors import UserError
from vlpjax.objectives.contrastive import InfoNCE
from vlpjax.objectives.distillation import SimilarityDistillation
from vlpjax.step import gradients
from vlpjax.teachers import EMA, Teacher

B = 16
RNG = np.random.default_rng(0)


def pair(width: int) -> dict[str, np.ndarray]:
    return {name: unit(RNG.normal(size=(B, width))).astype(np.float32) for name in ("image", "text")}


FEATURES = {"student": pair(6), "teacher_one": pair(6), "stored_0": pair(9)}
SAME = (("image", "image"), ("text", "text"))


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()


def formula(
    features: Any, pairs: Any, student: float, teacher: float, own: bool = True, kl: bool = True
) -> float:
    total = 0.0
    for rows, columns in pairs:
        for row in range(B):
            keep = [c for c in range(B) if own or rows != columns or c != row]
            p = np.mean(
                [
                    softmax(np.float64(f[columns] @ f[rows][row])[keep] / teacher)
                    for name, f in features.items()
                    if name != "student"
                ],
                axis=0,
            )
            q = softmax(
                np.float64(features["student"][columns] @ features["student"][rows][row])[keep] / student
            )
            total += float(-np.sum(p * np.log(q)) + kl * np.sum(p * np.log(p)))
    return total / (B * len(pairs))


def fixed(features: Any, temperature: float = 0.2, **fields: Any) -> Compared:
    """The comparison with a scale that is not learned."""
    objective = SimilarityDistillation(temperature=temperature, learned=False, **fields)
    return compared(objective, features, scalars())


@pytest.mark.parametrize("divergence", ["ce", "kl"])
def test_two_teachers_of_other_widths_are_averaged_after_the_softmax(divergence: str) -> None:
    found = fixed(
        FEATURES, teachers=("one",), stored=(("a", "b"),), teacher_temperature=0.1, divergence=divergence
    )
    cross = (("image", "text"), ("text", "image"))

    def value(image: Any, text: Any) -> float:
        features = FEATURES | {"student": {"image": image, "text": text}}
        return formula(features, cross, 0.2, 0.1, kl=divergence == "kl")

    np.testing.assert_allclose(found.loss.value, value(**FEATURES["student"]), rtol=1e-5)
    direction = RNG.normal(size=(B, 6))
    expected = slope(value, FEATURES["student"], "text", direction)
    np.testing.assert_allclose(np.sum(found.features["student"]["text"] * direction), expected, rtol=1e-3)
    for name in ("teacher_one", "stored_0"):
        assert not any(np.any(x) for x in jax.tree.leaves(found.features[name]))


def test_relations_within_a_modality_leave_out_the_diagonal() -> None:
    features = {name: FEATURES[name] for name in ("student", "teacher_one")}
    values = {}
    for own in (False, True):
        loss = fixed(features, teachers=("one",), pairs=SAME, teacher_temperature=0.2, own=own).loss
        np.testing.assert_allclose(loss.value, formula(features, SAME, 0.2, 0.2, own=own), rtol=1e-5)
        values[own] = float(loss.value)
    assert abs(values[True] - values[False]) > 1e-3


def test_the_same_on_eight_devices() -> None:
    objective = SimilarityDistillation(
        teachers=("one",), stored=(("a", "b"),), pairs=(("image", "text"), ("image", "image"))
    )
    one, eight = (
        compared(objective, FEATURES, scalars(logit_scale=1.0), layout=layout)
        for layout in (None, layout_of(8, replica=2, fsdp=4))
    )
    np.testing.assert_allclose(eight.loss.value, one.loss.value, rtol=1e-5)
    assert_trees_close(eight.gradients, one.gradients, rtol=1e-5, atol=1e-7)


def test_a_student_that_is_its_teacher_has_no_gradient_and_costs_the_entropy() -> None:
    features = {"student": FEATURES["student"], "teacher_one": FEATURES["student"]}
    for divergence in ("kl", "ce"):
        found = fixed(features, 0.07, teachers=("one",), divergence=divergence)
        expected = found.loss.metrics["teacher_entropy"] if divergence == "ce" else 0.0
        np.testing.assert_allclose(found.loss.value, expected, atol=1e-6)
        assert all(np.max(np.abs(x)) < 1e-6 for x in jax.tree.leaves(found.features["student"]))


@pytest.mark.parametrize("pairs", [SAME, (("image", "text"), ("text", "image"))])
def test_a_rotation_of_all_embeddings_changes_nothing(pairs: Any) -> None:
    rotation = np.linalg.qr(RNG.normal(size=(6, 6)))[0].astype(np.float32)
    turned = {name: x @ rotation for name, x in FEATURES["teacher_one"].items()}
    features = {"student": turned, "teacher_one": FEATURES["teacher_one"]}
    found = fixed(features, 0.07, teachers=("one",), pairs=pairs)
    np.testing.assert_allclose(found.loss.value, 0.0, atol=1e-5)


def test_a_frozen_teacher_of_a_run_and_accumulation() -> None:
    """A step with a real teacher and the contrastive objective's scale; the accumulated gradient is the same."""
    config = model_config()
    config.teachers = dict(start=spec(Teacher), ema=spec(EMA))
    config.objectives.distill = dict(
        weight=0.5, loss=spec(SimilarityDistillation, teachers=("start", "ema"), scale_of="clip")
    )
    trained = take_steps(config, layout_of(1), steps=2)
    assert float(trained.metrics[0]["distill/loss"]) == pytest.approx(0.0, abs=1e-6)
    assert float(trained.metrics[1]["distill/loss"]) > 1e-6
    found = {}
    for accumulate in (1, 4):
        config.accumulate = accumulate
        experiment = experiment_of(config)
        found[accumulate] = jax.jit(lambda s, b, e=experiment: gradients(e, s, b)[::2])(
            trained.history[1], random_batch(5)
        )
    assert_trees_close(found[4][1], found[1][1], rtol=1e-4, atol=1e-6)


def test_clip_learns_from_an_earlier_run_if_one_is_named(tmp_path: Path) -> None:
    config = load(f"{ROOT}/experiments/contrastive/clip.py:small,teacher={tmp_path}")
    experiment = experiment_of(config)
    (_, distill), teacher = experiment.objectives["distill"], experiment.teachers["best"]
    assert isinstance(distill, SimilarityDistillation) and distill.heads() == {}  # the scale is clip's
    assert (teacher.checkpoint, teacher.towers) == (str(tmp_path), ("image", "text"))
    assert "distill" not in load(f"{ROOT}/experiments/contrastive/clip.py").objectives


def test_settings_that_say_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="nobody to learn from"):
        SimilarityDistillation()
    with pytest.raises(UserError, match="pairs of 'image' and 'text'"):
        SimilarityDistillation(teachers=("one",), pairs=(("image", "audio"),))
    with pytest.raises(UserError, match="'ce' and 'kl'"):
        SimilarityDistillation(teachers=("one",), divergence="js")
    assert InfoNCE(scale_of="clip").heads() == {}
