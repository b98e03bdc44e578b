"""Evaluators of patch tokens on features that were planted, given by hand and by a tower."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.evaluators.given import dataset, evaluate
from tests.tiny import unit
from vlpjax.errors import UserError
from vlpjax.evaluators.patches import (
    ObjectOverlap,
    PromptSegmentation,
    histogram_overlap,
    pair_similarities,
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
        owners = patch_objects(objects, GRID[0] * GRID[1])
        base = np.eye(D)[np.zeros_like(owners) if alike else owners]
        features = base + noise * rng.normal(size=base.shape) / D**0.5
        made.append((unit(scale * features if turn is None else scale * features @ turn), objects))
    return made


def segment(images: list[Any], **fields: Any) -> dict[str, float]:
    return PromptSegmentation(**fields).measure(iter(images)).metrics


def overlap(images: list[Any]) -> dict[str, float]:
    return ObjectOverlap().measure(iter(images)).metrics


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
    np.testing.assert_array_equal(patch_objects(objects, 2), [0, 0])
    objects[:, :4], objects[:, 4:6], objects[:2, 6:], objects[2:, 6:] = 1, 0, 2, 3
    np.testing.assert_array_equal(patch_objects(objects, 2), [1, 0])
    objects[:2, 4:6] = 4
    np.testing.assert_array_equal(patch_objects(objects, 2), [1, -1])


def test_overlap_is_the_shared_area_of_histograms() -> None:
    assert histogram_overlap(np.array([50, 50, 0]), np.array([0, 5, 15])) == pytest.approx(0.25)


def test_what_is_added_up_image_by_image_is_that_of_all_pairs() -> None:
    images = planted(noise=2.0)
    pairs = [pair_similarities(x, patch_objects(objects, len(x))) for x, objects in images]
    intra, inter = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    shares = [np.histogram(x, np.linspace(-1, 1, 101))[0] / len(x) for x in (intra, inter)]
    assert overlap(images) == {
        "overlap": pytest.approx(np.minimum(*shares).sum()),
        "intra": pytest.approx(intra.mean()),
        "inter": pytest.approx(inter.mean()),
    }


@pytest.mark.parametrize("devices", [1, 8])
def test_a_towers_tokens_are_judged_as_given_ones_and_padding_is_not(devices: int) -> None:
    images = planted(noise=0.5)[:11]
    tokens, objects = (np.stack(x) for x in zip(*images, strict=True))
    data = dataset(image=(3 * tokens).astype(np.float32), objects=objects.astype(np.int32))
    assert evaluate(PromptSegmentation(data=data, threshold=0.5), devices).metrics == pytest.approx(
        segment(images, threshold=0.5), abs=1e-4
    )
    assert evaluate(ObjectOverlap(data=data), devices).metrics == pytest.approx(overlap(images), abs=1e-3)


TOKENS, OBJECTS = np.zeros((3, 4, 2), np.float32), np.ones((3, 4, 4), np.int32)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        (dict(data=None), ["PromptSegmentation.data is not set"]),
        (dict(tower="imag"), ["'imag'", "image"]),
        (dict(objects="object"), ["'object'", "from the batch"]),
        (dict(data=dataset(image=TOKENS[:, 0], objects=OBJECTS)), ["[B, N, D]"]),
        (dict(data=dataset(image=TOKENS[:, :3], objects=OBJECTS)), ["3 patches", "4 x 4"]),
    ],
    ids=range(5),
)
def test_what_does_not_work_is_told(fields: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        evaluate(PromptSegmentation(**{**dict(data=dataset(image=TOKENS, objects=OBJECTS)), **fields}))
    assert all(part in str(caught.value) for part in parts), caught.value
