"""Images of any size in tiles: what each tile shows, which tokens these become, and examples that form a batch."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vlpjax.data.bad import BadExample
from vlpjax.data.tiling import NEWLINE, NOTHING, Tiling
from vlpjax.data.transforms import Normalize, Tiles
from vlpjax.errors import UserError

TILING = Tiling(4, 2, ((4, 8), (8, 4), (8, 8)))
NEAREST = Image.Resampling.NEAREST


def drawn(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(1, 256, (height, width, 3), np.uint8))


def test_tiles_stand_on_one_grid_whose_rows_end_in_a_learned_token() -> None:
    assert TILING.tiles((10, 20)) == 3
    assert TILING.arrangement((10, 20)).tolist() == [0, 1, 2, 3, 4, 5, 8, 9, NEWLINE, 6, 7, 10, 11, NEWLINE]
    # Above and below a flat image there is border, which is left out.
    assert TILING.resolution((8, 14)) == (8, 8)
    assert Tiling(4, 4, ((8, 8),)).arrangement((4, 8)).shape == (16 + 4 * 9,)


def test_arrangements_count_through_the_images_of_a_row() -> None:
    found = TILING.arrangements([[(10, 20)], [(10, 20), (20, 10)]])
    one, other = TILING.arrangement((10, 20)), TILING.arrangement((20, 10))
    assert found.shape == (2, len(one) + len(other))
    assert found[0, len(one) :].tolist() == [NOTHING] * len(other)
    assert found[1, len(one) :].tolist() == [NEWLINE if token < 0 else token + 12 for token in other]


def test_tiles_show_the_image_row_by_row_behind_a_small_copy() -> None:
    image = drawn(8, 8)
    pixels = np.asarray(image)
    small, *tiles = TILING.cut(image, NEAREST)
    np.testing.assert_array_equal(small, pixels[1::2, 1::2])  # nearest to the centres of 2 x 2 pixels
    expected = [pixels[:4, :4], pixels[:4, 4:], pixels[4:, :4], pixels[4:, 4:]]
    np.testing.assert_array_equal(tiles, expected)


def test_an_image_is_centred_between_black_borders_of_which_the_second_may_be_larger() -> None:
    # 3 x 8 fits 4 x 8 as it is: no line above it, one below.
    small, left, right = TILING.cut(drawn(3, 8), NEAREST)
    assert (small > 0).all()
    np.testing.assert_array_equal(np.concatenate([left, right], axis=1)[:3], np.asarray(drawn(3, 8)))
    assert not left[3:].any() and not right[3:].any()
    # Of 8 lines, 100 x 61 takes 6.56, rounded up.
    _, *tiles = Tiling(4, 2, ((8, 4),)).cut(drawn(100, 61), NEAREST)
    shown = np.concatenate(tiles).any(axis=(1, 2))
    assert shown.tolist() == [True] * 7 + [False]


def test_examples_of_all_sizes_have_one_shape_and_those_that_are_not_filled_up_their_own() -> None:
    for size in ((3, 8), (30, 9), (8, 8), (5, 6)):
        example = {"image": drawn(*size), "label": 3}
        found, own = Tiles(TILING).map(example), Tiles(TILING, fill_up=False).map(example)
        count, tokens = TILING.tiles(size), TILING.arrangement(size)
        assert found["image"].shape == (5, 4, 4, 3) and found["image"].dtype == np.uint8
        assert found["arrangement"].shape == (4 + 4 * 5,) and found["arrangement"].dtype == np.int32
        np.testing.assert_array_equal(found["image"][:count], own["image"])
        assert own["image"].shape == (count, 4, 4, 3) and not found["image"][count:].any()
        np.testing.assert_array_equal(own["arrangement"], tokens)
        np.testing.assert_array_equal(found["arrangement"][: len(tokens)], tokens)
        assert (found["arrangement"][len(tokens) :] == NOTHING).all()
        assert found["label"] == 3 and isinstance(example["image"], Image.Image)


def test_tiles_are_normalized_as_images_are() -> None:
    tiles = Tiles(TILING).map({"image": drawn(8, 8)})
    normalize = Normalize(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    found = normalize.map(tiles)["image"]
    expected = [normalize.map({"image": tile})["image"] for tile in tiles["image"]]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match="Tiles.resample is 'cubic'"):
        Tiles(TILING, resample="cubic")
    with pytest.raises(UserError, match="multiples of tile=4"):
        Tiling(4, 2, ((4, 6),))
    with pytest.raises(BadExample, match="'image' is of type int"):
        Tiles(TILING).map({"image": 1})
