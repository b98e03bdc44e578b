"""Preprocessing files against the image processors of `transformers`."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from transformers import AutoImageProcessor

from vlpjax.errors import UserError
from vlpjax.weights import Preprocessing

MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.25, 0.27)
CASES = {
    "cropped": Preprocessing((16, 16), shortest_edge=20, mean=MEAN, std=STD),
    "stretched": Preprocessing((16, 24), interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3),
    "between -1 and 1": Preprocessing((16, 16), value_range=(-1.0, 1.0)),
    "between 0 and 255": Preprocessing(
        (16, 16), value_range=(0.0, 255.0), mean=(127.0,) * 3, std=(128.0,) * 3
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_their_processor_does_what_ours_says(case, tmp_path):
    given = CASES[case]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(given.to_json()))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (30, 45, 3), np.uint8))
    found = np.asarray(processor(image, return_tensors="np")["pixel_values"])[0].transpose(1, 2, 0)

    height, width = given.size
    resample = Image.Resampling[given.interpolation.upper()]
    if given.shortest_edge is None:
        pixels = image.resize((width, height), resample)
    else:
        resized = image.resize((45 * given.shortest_edge // 30, given.shortest_edge), resample)
        left, top = (resized.width - width) // 2, (resized.height - height) // 2
        pixels = resized.crop((left, top, left + width, top + height))
    low, high = given.value_range
    values = low + np.asarray(pixels, np.float32) / 255 * (high - low)
    expected = (values - np.array(given.mean)) / np.array(given.std)
    step = (high - low) / 255 / min(given.std)  # their resizing may round a pixel's value the other way
    assert np.abs(found - expected).max() <= 1.01 * step
    assert np.abs(found - expected).mean() <= 0.1 * step


@pytest.mark.parametrize("case", ["cropped", "stretched", "between 0 and 255"])
def test_what_was_written_is_read(case):
    given = CASES[case]
    found = Preprocessing.from_json(given.to_json())
    assert (found.size, found.shortest_edge, found.interpolation) == (
        given.size,
        given.shortest_edge,
        given.interpolation,
    )
    np.testing.assert_allclose(found.value_range, given.value_range)
    np.testing.assert_allclose((found.mean, found.std), (given.mean, given.std))


def test_another_lower_end_is_read_as_the_same_map():
    given = CASES["between -1 and 1"]
    found = Preprocessing.from_json(given.to_json())
    for pixel in (0, 100, 255):
        ours = [
            (low + pixel / 255 * (high - low) - p.mean[0]) / p.std[0]
            for p in (given, found)
            for low, high in [p.value_range]
        ]
        assert ours[0] == pytest.approx(ours[1], abs=1e-6)


def test_older_spellings_are_read():
    found = Preprocessing.from_json({"size": 224, "crop_size": 224, "do_center_crop": True, "resample": 2})
    assert (found.size, found.shortest_edge, found.interpolation) == ((224, 224), 224, "bilinear")
    assert Preprocessing.from_json({"size": {"height": 3, "width": 4}}).size == (3, 4)
    assert Preprocessing.from_json({"size": 8, "do_rescale": False}).value_range == (0.0, 255.0)
    assert Preprocessing.from_json({"size": 8, "do_normalize": False, "image_mean": [9] * 3}).mean == (
        0,
        0,
        0,
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"resample": 9}, "resample is 9"),
        ({"do_resize": False}, "do_resize is false"),
        ({"size": {"longest_edge": 5}}, "neither a number nor"),
    ],
)
def test_what_cannot_be_said_is_told(fields, message):
    with pytest.raises(UserError, match=message):
        Preprocessing.from_json(fields)
    with pytest.raises(UserError, match="interpolation is 'cubic'; there are nearest"):
        Preprocessing((8, 8), interpolation="cubic")
