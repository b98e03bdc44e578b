"""Canvases: pure functions of their place, with a label under every pixel of ink."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from tests.tiny import DATA
from vlpjax.data.drawings import is_ink
from vlpjax.data.sources import TFDS, Canvases
from vlpjax.errors import UserError

DRAWINGS = TFDS(directory=DATA, split="openmoji[:40]")
CANVASES = Canvases(DRAWINGS, count=6, classes=5, objects=2, size=32)


def pixels(canvases: Canvases, index: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(canvases[index]["image"])))


def maps(canvases: Canvases, index: int) -> tuple[np.ndarray, np.ndarray]:
    return canvases[index]["label_map"], canvases[index]["objects"]


def test_labels_lie_under_the_ink_and_nowhere_else() -> None:
    for index in range(len(CANVASES)):
        image, labels, objects = pixels(CANVASES, index), *maps(CANVASES, index)
        np.testing.assert_array_equal(labels > 0, is_ink(image))
        np.testing.assert_array_equal(objects > 0, is_ink(image))
        assert labels.max() <= 5
        for number, columns in ((1, slice(16)), (2, slice(16, 32))):  # one picture each
            assert len(set(labels[:, columns][labels[:, columns] > 0].tolist())) == 1
            assert set(objects[:, columns].ravel().tolist()) == {0, number}


def test_of_all_classes_every_picture_takes_part() -> None:
    canvases = Canvases(DRAWINGS, count=200, classes=None, objects=2, size=8)
    drawn = {int(label) for index in range(200) for label in np.unique(canvases[index]["label_map"])}
    assert len(drawn - {0}) > 35  # of 40, by 400 draws


def test_a_canvas_is_the_same_whenever_it_is_drawn_and_another_one_is_not() -> None:
    again = Canvases(DRAWINGS, count=6, classes=5, objects=2, size=32)
    assert again[3]["image"] == CANVASES[3]["image"]
    assert CANVASES[2]["image"] != CANVASES[3]["image"]
    other = Canvases(DRAWINGS, count=6, classes=5, objects=2, size=32, seed=1)
    assert other[3]["image"] != CANVASES[3]["image"]
    assert again.fingerprint() == CANVASES.fingerprint() != other.fingerprint()


def test_what_does_not_work_is_told() -> None:
    with pytest.raises(UserError, match="classes is 50, but the source has 40"):
        Canvases(DRAWINGS, count=1, classes=50)[0]
    with pytest.raises(UserError, match="objects=0"):
        Canvases(DRAWINGS, count=1, objects=0)
    with pytest.raises(UserError, match="classes=0"):
        Canvases(DRAWINGS, count=1, classes=0)
