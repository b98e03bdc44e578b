"""Drawings on white paper: transparent ones lie on it, and what is drawn is ink."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from vlpjax.data.drawings import as_png, is_ink, on_paper


def test_what_is_transparent_is_paper_and_what_is_drawn_is_ink() -> None:
    picture = np.zeros((4, 4, 4), np.uint8)  # transparent black
    picture[:2, :2] = (255, 255, 0, 255)  # yellow, whose darkest channel is black
    picture[2:, 2:] = (250, 250, 250, 255)  # almost paper
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG")
    seen = on_paper(data.getvalue(), 4)
    assert seen[0, 0].tolist() == [255, 255, 0] and seen[0, 3].tolist() == [255, 255, 255]
    expected = np.zeros((4, 4), bool)
    expected[:2, :2] = True
    np.testing.assert_array_equal(is_ink(seen), expected)


def test_png_keeps_every_pixel_and_is_read_in_another_size() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    np.testing.assert_array_equal(on_paper(as_png(pixels), 6), pixels)
    assert on_paper(as_png(pixels), 3).shape == (3, 3, 3)
