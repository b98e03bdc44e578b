"""Patches of images packed into rows: nothing is lost, nothing is mixed, and what does not fit is told."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlpjax.data.packing import pack, patchify, size_within
from vlpjax.errors import UserError


def image(rows: int, columns: int, seed: int = 0, patch: tuple[int, int] = (2, 3)) -> np.ndarray:
    shape = (rows * patch[0], columns * patch[1], 3)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_patches_stand_in_reading_order() -> None:
    whole = image(2, 3)
    patches = patchify(whole, (2, 3))
    assert patches.shape == (2, 3, 18)
    np.testing.assert_array_equal(patches[1, 2], whole[2:4, 6:9].reshape(-1))


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=8), st.integers(1, 3))
def test_every_image_can_be_read_back(sizes: list[tuple[int, int]], segments: int) -> None:
    images = [image(*size, seed) for seed, size in enumerate(sizes)]
    packed = pack(images, (2, 3), length=16, segments=segments)
    for whole, (row, segment) in zip(images, packed["places"], strict=True):
        mine = packed["segment_ids"][row] == segment + 1
        grid = packed["grids"][row, segment]
        assert tuple(grid) == (whole.shape[0] // 2, whole.shape[1] // 3)
        assert np.all(np.diff(np.flatnonzero(mine)) == 1), "the patches of an image stand together"
        back = np.zeros((*grid, 18), np.float32)
        back[tuple(packed["positions"][row, mine].T)] = packed["patches"][row, mine]
        np.testing.assert_array_equal(back, patchify(whole, (2, 3)))
    assert np.sum(packed["segment_ids"] > 0) == sum(rows * columns for rows, columns in sizes)
    assert np.sum(packed["grids"].all(axis=-1)) == len(images)


def test_an_image_takes_the_first_row_with_room() -> None:
    images = [image(2, 3), image(3, 3), image(1, 4), image(1, 1)]
    places = pack(images, (2, 3), length=10, segments=2)["places"]
    assert places.tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert pack(images, (2, 3), length=10, segments=1)["places"][:, 0].tolist() == [0, 1, 2, 3]
    assert pack(images, (2, 3), length=10, segments=2, rows=5)["segment_ids"].shape == (5, 10)


@given(st.integers(1, 900), st.integers(1, 900), st.sampled_from([14, 16]), st.integers(1, 300))
def test_a_size_within_uses_its_patches_and_no_more(height: int, width: int, patch: int, most: int) -> None:
    rows, columns = (side // patch for side in size_within(height, width, patch, most))
    assert rows * columns >= 1 and (rows * columns <= most or min(rows, columns) == 1)
    assert (rows + 1) * (columns + 1) > min(most, rows * columns), "a larger factor has another row or column"


def test_sizes_within_256_patches() -> None:
    """What SigLIP 2's own image processor gives (`get_image_size_for_max_num_patches` of `transformers`)."""
    known = {(480, 640): (224, 288), (256, 256): (256, 256), (100, 1000): (80, 800), (33, 47): (208, 304)}
    assert {size: size_within(*size, 16, 256) for size in known} == known


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        (dict(images=[]), ["no image"]),
        (dict(images=[np.zeros((5, 6, 3))]), ["5x6", "2x3"]),
        (dict(length=3), ["Image 0", "4 patches", "holds 3"]),
        (dict(images=[np.zeros((4, 6, 3))] * 3, length=4, rows=2), ["3 images", "3 rows", "there are 2"]),
    ],
)
def test_what_cannot_be_packed_is_told(settings: dict, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        pack(**{**dict(images=[np.zeros((4, 6, 3))], patch=(2, 3), length=8, segments=2), **settings})
    assert all(part in str(caught.value) for part in parts), caught.value
    with pytest.raises(UserError, match="at least one patch"):
        size_within(10, 10, 16, 0)
