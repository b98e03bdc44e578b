"""Overlapping crops share pixels, and are not always equal."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vlpjax.data.transforms import OverlappingCrops
from vlpjax.errors import UserError

SIZE, SIDE = 32, 48


def unique(side: int = SIDE) -> Image.Image:
    """An image whose every pixel is different from all others, so that a crop says where it was cut."""
    pixels = np.stack([*np.mgrid[0:side, 0:side] * 5, np.zeros((side, side), int)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def corners(side: int = SIDE, **fields: object) -> np.ndarray:
    """Corners of first and second crops of an image of this side: [draws, 2, 2]."""
    crops = OverlappingCrops(size=SIZE, margin=side / SIZE, **fields)  # type: ignore[arg-type]
    found, image = [], unique(side)
    for seed in range(200):
        made = crops.random_map({"image": image, "label": 3}, np.random.default_rng(seed))
        assert set(made) == {"view1", "view2", "label"}
        found.append([np.asarray(made[name])[0, 0, :2] // 5 for name in ("view1", "view2")])
    return np.array(found).astype(int)


def test_two_crops_share_at_least_the_overlap_and_are_not_always_equal() -> None:
    where = corners(overlap=0.6)
    assert where.min() >= 0 and where.max() <= SIDE - SIZE
    steps = where[:, 0] - where[:, 1]
    assert np.abs(steps).max() <= 0.4 * SIZE and np.abs(steps).max() > 8
    assert len(np.unique(steps, axis=0)) > 50


def test_what_both_show_has_equal_pixels() -> None:
    made = OverlappingCrops(size=SIZE).random_map({"image": unique()}, np.random.default_rng(1))
    first, second = (np.asarray(made[name]) for name in ("view1", "view2"))
    step = (second[0, 0, :2].astype(int) - first[0, 0, :2].astype(int)) // 5
    assert np.any(step != 0)
    height, width = SIZE - abs(step)
    cut = [slice(max(s, 0), max(s, 0) + n) for s, n in zip(step, (height, width), strict=True)]
    same = [slice(max(-s, 0), max(-s, 0) + n) for s, n in zip(step, (height, width), strict=True)]
    np.testing.assert_array_equal(first[cut[0], cut[1]], second[same[0], same[1]])


def test_full_overlap_is_one_place() -> None:
    still = corners(overlap=1.0)
    np.testing.assert_array_equal(still[:, 0], still[:, 1])


def test_steps_that_there_is_room_for_are_equally_likely() -> None:
    """With room for three places and an overlap that allows all of them, every pair of places is as likely."""
    first, second = np.moveaxis(corners(SIZE + 2), 1, 0).reshape(2, -1)
    counts = np.zeros((3, 3))
    np.add.at(counts, (first, second), 1)
    share = 1 / 9
    np.testing.assert_allclose(counts / 400, share, atol=4 * (share * (1 - share) / 400) ** 0.5)


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match="overlap is 0"):
        OverlappingCrops(size=32, overlap=0.0)
    with pytest.raises(UserError, match="margin is 0.5"):
        OverlappingCrops(size=32, margin=0.5)
