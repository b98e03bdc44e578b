"""LLaVA-NeXT from pixels: tiles and answers equal those of `transformers`' image processor and model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers import AutoImageProcessor

from tests.weights import parity
from tests.weights.test_llava import IMAGE, PROMPTS, RESOLUTIONS, TEXT, VISION
from vlpjax.data.tiling import NOTHING, Tiling
from vlpjax.data.transforms import Normalize, Tiles
from vlpjax.models.vision_language import expand_prompts, generate_with_images
from vlpjax.weights import Preprocessing, from_pretrained, save_pretrained

MEAN, STD = (0.48, 0.45, 0.40), (0.26, 0.25, 0.27)
PREPROCESSING = Preprocessing((16, 16), mean=MEAN, std=STD, resolutions=RESOLUTIONS)
SIZES = [(10, 30), (31, 20), (40, 41), (100, 9), (7, 5), (33, 64), (16, 16), (1, 50), (77, 76)]


def drawn(height: int, width: int) -> Image.Image:
    random = np.random.default_rng(height * width)
    return Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8))


def transforms(said: Preprocessing, tiling: Tiling, fill_up: bool = True) -> list[Any]:
    """What a preprocessing says, for a tower with this tiling."""
    assert tiling.resolutions == said.resolutions and said.size == (tiling.tile, tiling.tile)
    return [
        Tiles(tiling, resample=said.interpolation, fill_up=fill_up),
        Normalize(mean=said.mean, std=said.std),
    ]


def prepared(image: Image.Image, steps: list[Any]) -> dict[str, Any]:
    example: dict[str, Any] = {"image": image}
    for step in steps:
        example = step.map(example)
    return example


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of ours with its preprocessing, as it is written."""
    fields: dict[str, Any] = dict(
        image_grid_pinpoints=[list(size) for size in RESOLUTIONS],
        image_token_index=IMAGE,
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT),
    )
    peer = transformers.LlavaNextForConditionalGeneration(transformers.LlavaNextConfig(**fields))
    root = tmp_path_factory.mktemp("llava_next")
    parity.save_theirs(parity.randomize(peer), root / "theirs")
    model, variables = from_pretrained(root / "theirs")
    save_pretrained(model, variables, root / "ours", preprocessing=PREPROCESSING)
    return root / "ours"


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_tiles_equal_those_of_their_image_processor(tmp_path: Path, interpolation: str) -> None:
    said = Preprocessing((16, 16), mean=MEAN, std=STD, resolutions=RESOLUTIONS, interpolation=interpolation)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said.to_json()))
    processor = AutoImageProcessor.from_pretrained(tmp_path)
    tiling = Tiling(16, 2, RESOLUTIONS)
    for size in SIZES:
        theirs = processor(drawn(*size), return_tensors="np")
        ours = prepared(drawn(*size), transforms(said, tiling, fill_up=False))["image"]
        assert theirs["image_sizes"][0].tolist() == list(size)
        assert len(ours) == tiling.tiles(size)
        np.testing.assert_allclose(
            ours, theirs["pixel_values"][0].transpose(0, 2, 3, 1), atol=2e-6, err_msg=str(size)
        )


def test_a_preprocessing_with_tiles_is_read_as_it_was_written() -> None:
    assert Preprocessing.from_json(PREPROCESSING.to_json()) == PREPROCESSING


def test_from_pixels_to_answers_equals_theirs(folder: Path) -> None:
    model, variables = from_pretrained(folder)
    said = Preprocessing.from_json(json.loads((folder / "preprocessor_config.json").read_text()))
    assert isinstance(model.tiling, Tiling)
    images = [drawn(21, 61), drawn(35, 30)]
    examples = [prepared(image, transforms(said, model.tiling)) for image in images]
    batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
    counts = [[int(np.sum(row != NOTHING))] for row in batch["arrangement"]]
    prompts = expand_prompts(PROMPTS, counts, IMAGE)
    assert counts[0] != counts[1]

    peer: Any = parity.load_theirs(folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    for row, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        given = dict(processor(image, return_tensors="pt"), input_ids=torch.tensor([prompt]))
        with torch.no_grad():
            logits = peer(**given).logits
            answer = peer.generate(**given, max_new_tokens=16, do_sample=False, eos_token_id=None)
        own = (np.array([prompt]), batch["image"][row : row + 1])
        options = dict(arrangement=batch["arrangement"][row : row + 1])
        found = jax.jit(lambda ids, pixels, at: model.apply(variables, ids, pixels, arrangement=at)["logits"])
        parity.compare({"logits": found(*own, options["arrangement"])}, {"logits": logits})
        written = generate_with_images(model, variables, *own, **options, max_new_tokens=16)
        np.testing.assert_array_equal(written.tokens, answer[:, len(prompt) :])
