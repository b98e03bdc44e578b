"""Evaluators of patch tokens on features that were planted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.tiny import unit
from vlpjax.errors import UserError
from vlpjax.evaluators.patches import (
    ObjectOverlap,
    PromptSegmentation,
    histogram_overlap,
    patch_objects,
    prompt_patch,
)

GRID, PATCH, D = (8, 8), 4, 16


def canvas(rng: np.random.Generator) -> np.ndarray:
    """Two rectangles on a ground, aligned with patches: int [32, 32]."""
    objects = np.zeros((32, 32), int)
    top, left = rng.integers(0, 3, 2) * PATCH
    objects[top : top + 16, left : left + 12] = 1
    top = rng.integers(0, 4) * PATCH
    objects[top : top + 16, 20 : 20 + 12] = 2
    return objects


def planted(alike: bool = False, noise: float = 0.05, turn: Any = None, scale: float = 1.0) -> list[Any]:
    """Images whose objects have orthogonal features (or equal ones), with noise."""
    rng, made = np.random.default_rng(1), []
    for _ in range(40):
        objects = canvas(rng)
        owners = patch_objects(objects, GRID)
        base = np.eye(D)[np.zeros_like(owners) if alike else owners]
        features = base + noise * rng.normal(size=base.shape) / D**0.5
        made.append((unit(scale * features if turn is None else scale * features @ turn), objects))
    return made


def segment(images: list[Any], **fields: Any) -> dict[str, float]:
    return PromptSegmentation(grid=GRID, **fields).measure(iter(images)).metrics


def overlap(images: list[Any]) -> dict[str, float]:
    return ObjectOverlap(grid=GRID).measure(iter(images)).metrics


def test_planted_objects_are_found_and_lie_apart() -> None:
    images = planted()
    # Bilinear resizing rounds the corners of what was cut along patches.
    assert segment(images, threshold=0.5)["iou"] > 0.93
    found = overlap(images)
    assert found["overlap"] == 0 and found["intra"] > 0.95 and abs(found["inter"]) < 0.1


def test_at_the_resolution_of_patches_the_segmentation_is_perfect() -> None:
    images = [(features, objects[::PATCH, ::PATCH]) for features, objects in planted()]
    assert segment(images, threshold=0.5)["iou"] == 1.0


def test_equal_features_overlap_wholly() -> None:
    found = overlap(planted(alike=True, noise=0.0))
    assert found["overlap"] == 1.0 and found["intra"] == pytest.approx(found["inter"])
    assert segment(planted(alike=True, noise=0.0), threshold=0.5)["iou"] < 0.3


def test_nothing_changes_under_scaling_and_rotation() -> None:
    turn, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(D, D)))
    plain, turned = (
        {**segment(images, threshold=0.5), **overlap(images)}
        for images in (planted(noise=0.5), planted(noise=0.5, turn=turn, scale=3.0))
    )
    assert plain == pytest.approx(turned)


def test_the_best_threshold_is_chosen_on_other_objects() -> None:
    found = segment(planted(noise=0.5), calibration=20)
    assert 0.2 <= found["threshold"] <= 0.9 and found["iou"] > 0.8
    with pytest.raises(UserError, match="80 objects, of which calibration=80"):
        segment(planted(), calibration=80)


def test_the_prompt_lies_in_the_object() -> None:
    ring = np.ones((32, 32), bool)
    ring[4:28, 4:28] = False
    row, column = divmod(prompt_patch(ring, GRID), GRID[1])
    assert ring[row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH].any()


def test_a_patch_belongs_to_what_covers_half_of_it() -> None:
    objects = np.zeros((4, 8), int)
    objects[:, :1], objects[:2, 4:] = 1, 2
    np.testing.assert_array_equal(patch_objects(objects, (1, 2)), [0, 0])
    objects[:, :4], objects[:, 4:6], objects[:2, 6:], objects[2:, 6:] = 1, 0, 2, 3
    np.testing.assert_array_equal(patch_objects(objects, (1, 2)), [1, 0])
    objects[:2, 4:6] = 4
    np.testing.assert_array_equal(patch_objects(objects, (1, 2)), [1, -1])


def test_overlap_is_the_shared_area_of_histograms() -> None:
    first, second = np.repeat([-0.5, 0.5], 50), np.repeat([0.5, 0.9], [25, 75])
    assert histogram_overlap(first, second) == pytest.approx(0.25)
