"""Segmentation by neighbours of patches, on features that say what is where, and against doing it by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.evaluators.given import dataset, evaluate
from tests.tiny import unit
from vlpjax.errors import UserError
from vlpjax.evaluators import segmentation
from vlpjax.evaluators.segmentation import (
    PatchSegmentation,
    evenly,
    label_counts,
    overlap,
    patch_labels,
    patch_side,
    spread_out,
)

RNG = np.random.default_rng(0)
D, CLASSES = 5, 3
MAPS, TEST_MAPS = (RNG.integers(0, CLASSES, (count, 4, 6)).astype(np.int32) for count in (11, 9))
TOKENS, TEST_TOKENS = (RNG.normal(size=(count, 6, D)).astype(np.float32) for count in (11, 9))


def segment(
    devices: int = 1, test: np.ndarray = TEST_TOKENS, test_data: Any = None, **fields: Any
) -> dict[str, float]:
    evaluator = PatchSegmentation(
        **{
            "train": dataset(image=TOKENS, label_map=MAPS),
            "test": test_data or dataset(image=test, label_map=TEST_MAPS),
            "k": 4,
            **fields,
        }
    )
    return evaluate(evaluator, devices).metrics


def commonest(pixels: np.ndarray) -> int:
    return int(np.argmax(np.bincount(pixels.ravel(), minlength=CLASSES)))


def by_hand(test: np.ndarray, remembered: Any = slice(None)) -> np.ndarray:
    """The predicted label maps, patch by patch."""
    known = [commonest(m[r : r + 2, c : c + 2]) for m in MAPS for r in (0, 2) for c in (0, 2, 4)]
    known, memory = np.array(known)[remembered], TOKENS.reshape(-1, D)[remembered]
    found = np.zeros_like(TEST_MAPS)
    for image, tokens in enumerate(test):
        for patch, scores in enumerate(unit(tokens) @ unit(memory).T):
            votes = np.zeros(CLASSES)
            for place in np.argsort(-scores)[:4]:
                votes[known[place]] += np.exp(scores[place] / 0.07)
            row, column = 2 * (patch // 3), 2 * (patch % 3)
            found[image, row : row + 2, column : column + 2] = votes.argmax()
    return found


def scores(found: np.ndarray, truth: np.ndarray = TEST_MAPS) -> dict[str, Any]:
    """Of label maps, over the pixels whose true label is a class."""
    counted = truth < CLASSES
    shares = [
        np.sum(((found == label) & (label == truth))[counted])
        / np.sum(((found == label) | (label == truth))[counted])
        for label in range(CLASSES)
    ]
    right = np.mean((found == truth)[counted])
    return {"mean_iou": pytest.approx(np.mean(shares)), "pixel_accuracy": pytest.approx(right)}


@pytest.mark.parametrize("devices", [1, 8])
def test_every_patch_takes_the_vote_of_its_neighbours(devices: int) -> None:
    assert segment(devices) == scores(by_hand(TEST_TOKENS))


@pytest.mark.parametrize("devices", [1, 8])
def test_only_what_is_remembered_is_searched(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, make = [], segmentation.make_nearest

    def recorded(*args: Any) -> Any:
        nearest = make(*args)
        return lambda queries, memory, real: rows.append(len(memory)) or nearest(queries, memory, real)

    monkeypatch.setattr(segmentation, "make_nearest", recorded)
    remembered = evenly(np.ones(66, bool), 10)
    assert segment(devices, memory=10) == scores(by_hand(TEST_TOKENS, remembered))
    assert rows == [10 if devices == 1 else 16]  # the next number that eight devices share evenly


def test_ignored_pixels_neither_vote_nor_count() -> None:
    ignored = RNG.random(TEST_MAPS.shape) < 0.3
    maps = np.where(ignored, 255, TEST_MAPS).astype(np.int32)
    test = dataset(image=TEST_TOKENS, label_map=maps)
    assert segment(test_data=test, ignore=255) == scores(by_hand(TEST_TOKENS), maps)
    # An ignored patch of train is not remembered: where only the first image is not ignored, it alone is known.
    train = MAPS.copy()
    train[1:] = 255
    known = dataset(image=TOKENS, label_map=train)
    assert segment(train=known, ignore=255) == scores(by_hand(TEST_TOKENS, slice(6)))


def test_the_label_of_a_patch_is_the_commonest_of_the_pixels_that_count() -> None:
    label_map = np.array([[7, 7, 7, 7], [7, 2, 7, 7]], np.int32)
    assert patch_labels(label_map[None], 2, 8).tolist() == [[7, 7]]
    assert patch_labels(label_map[None], 2, 3, ignore=7).tolist() == [[2, -1]]
    assert label_counts(label_map, 2, 8)[0].tolist() == [0, 0, 1, 0, 0, 0, 0, 3]


def test_turning_and_scaling_all_features_changes_nothing() -> None:
    assert segment(test=7 * TEST_TOKENS) == segment()


def test_features_that_say_the_class_segment_without_error() -> None:
    maps = np.repeat(np.repeat(RNG.integers(0, CLASSES, (9, 2, 3)), 2, axis=1), 2, axis=2).astype(np.int32)
    tokens = np.eye(D, dtype=np.float32)[patch_labels(maps, 6, CLASSES)]
    data = dataset(image=tokens, label_map=maps)
    found = evaluate(PatchSegmentation(train=data, test=data, k=4)).metrics
    assert found == {"mean_iou": 1.0, "pixel_accuracy": 1.0}


def test_labels_of_patches_become_maps_and_maps_labels_of_patches() -> None:
    labels = RNG.integers(0, CLASSES, (4, 6)).astype(np.int32)
    np.testing.assert_array_equal(patch_labels(spread_out(labels, (4, 6)), 6, CLASSES), labels)


def test_overlap_counts_only_classes_that_occur() -> None:
    truth, found = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    assert overlap(found, truth, classes=5) == {
        "mean_iou": pytest.approx((1 / 2 + 2 / 3) / 2),
        "pixel_accuracy": 0.75,
    }


def test_the_memory_is_spread_evenly_over_what_is_real() -> None:
    real = np.arange(10) < 8
    assert evenly(real, 4).tolist() == [0, 2, 4, 7]
    assert evenly(real, 100).tolist() == list(range(8))


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: segment(train=None), ["'train' and 'test'"]),
        (lambda: segment(label="maps"), ["'maps'", "from the batch"]),
        (lambda: segment(k=80), ["80", "66 patches"]),
        (lambda: patch_side(5, (4, 6)), ["5 patches", "4 x 6"]),
    ],
    ids=range(4),
)
def test_what_does_not_work_is_told(make: Any, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert all(part in str(caught.value) for part in parts), caught.value
