"""Few-shot ridge regression against solving the normal equations, and leaving every shot out in turn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.evaluators.given import dataset, evaluate
from vlpjax.errors import UserError
from vlpjax.evaluators.few_shot import FewShot, draw_shots, fit_ridge

RNG = np.random.default_rng(0)
CLASSES, E = 4, 6
CENTERS = RNG.normal(size=(CLASSES, E))


def clouds(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % CLASSES)
    return (CENTERS[labels] + 0.7 * rng.normal(size=(count, E))).astype(np.float32), labels


def ridge(x: np.ndarray, targets: np.ndarray, regularization: float) -> tuple[np.ndarray, np.ndarray]:
    """Kernel and intercept by the normal equations; the intercept is not shrunk."""
    mean, center = x.mean(axis=0), targets.mean(axis=0)
    gram = (x - mean).T @ (x - mean) + regularization * np.eye(x.shape[1])
    kernel = np.linalg.solve(gram, (x - mean).T @ (targets - center))
    return kernel, center - mean @ kernel


@pytest.mark.parametrize("count", [5, 16])  # fewer shots than features, and more
def test_the_classifier_and_its_left_out_errors_are_those_of_doing_it_by_hand(count: int) -> None:
    x, y = clouds(count, 1)
    options = (0.01, 1.0, 100.0)
    found = fit_ridge(x, y, CLASSES, options)
    standard = (x - x.mean(axis=0)) / x.std(axis=0)
    targets = np.where(y[:, None] == np.arange(CLASSES), 1.0, -1.0)
    errors = []
    for option in options:
        misses = []
        for left_out in range(count):
            rest = np.arange(count) != left_out
            kernel, bias = ridge(standard[rest], targets[rest], option)
            misses.append(targets[left_out] - (standard[left_out] @ kernel + bias))
        errors.append(np.mean(np.square(misses)))
    np.testing.assert_allclose(found.errors, errors, rtol=1e-6)
    assert found.regularization == options[int(np.argmin(errors))]
    kernel, bias = ridge(standard, targets, found.regularization)
    logits = np.asarray(found.classifier(x))
    np.testing.assert_allclose(logits, standard @ kernel + bias, atol=1e-4)


def test_shots_are_drawn_per_class_by_their_seed() -> None:
    _, labels = clouds(40, 2)
    real = np.arange(40) < 36
    few, more = (draw_shots(labels, real, shots, seed=0) for shots in (2, 5))
    assert np.bincount(labels[few]).tolist() == [2] * CLASSES
    assert set(few) <= set(more)
    assert max(more) < 36
    assert draw_shots(labels, real, 5, seed=1).tolist() != more.tolist()


@pytest.mark.parametrize("devices", [1, 8])
def test_scores_are_means_over_the_draws(devices: int) -> None:
    (x, y), (test_x, test_y) = clouds(41, 3), clouds(33, 4)
    options = (0.5, 8.0)
    evaluator = FewShot(
        train=dataset(image=x, label=7 * y), test=dataset(image=test_x, label=7 * test_y),
        shots=(1, 4), seeds=(0, 5), regularizations=options,
    )  # fmt: skip
    result = evaluate(evaluator, devices)
    for shots in (1, 4):
        scores = []
        for seed in (0, 5):
            rows = draw_shots(y, np.ones(41, bool), shots, seed)
            logits = np.asarray(fit_ridge(x[rows], y[rows], CLASSES, options).classifier(test_x))
            scores.append(np.mean(np.argmax(logits, axis=1) == test_y))
        assert result.metrics[f"shots{shots}/top1"] == pytest.approx(np.mean(scores))
        assert result.metrics[f"shots{shots}/top1_deviation"] == pytest.approx(np.std(scores, ddof=1))
        assert result.chance[f"shots{shots}/top1"] == 1 / CLASSES
    assert result.metrics["shots4/top1"] > result.metrics["shots1/top1"]


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: evaluate(FewShot()), ["'train' and 'test'"]),
        (lambda: FewShot(shots=(0,)), ["shots=(0,)", "from 1 on"]),
        (lambda: FewShot(regularizations=(0.0,)), ["above 0"]),
        (lambda: draw_shots(np.array([0, 0, 3]), np.ones(3, bool), 2, 0), ["class number 3 has 1"]),
    ],
    ids=range(4),
)
def test_what_does_not_work_is_told(make: Any, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert all(part in str(caught.value) for part in parts), caught.value
