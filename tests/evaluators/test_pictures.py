"""Pictures in the report: reconstructions of an objective, and attention laid over images."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from tests.evaluators.given import dataset
from tests.tiny import experiment_of, layout_of, model_config, random_batch
from vlpjax.config import spec
from vlpjax.errors import UserError
from vlpjax.evaluators import pictures
from vlpjax.evaluators.base import Evaluator, Result
from vlpjax.evaluators.pictures import AttentionMaps, Reconstruction, looked_at, overlaid
from vlpjax.experiment import Experiment
from vlpjax.models.heads import Scalar
from vlpjax.objectives.base import Context, Loss, Objective
from vlpjax.observe.report import Evaluation, _example_grids

RNG = np.random.default_rng(0)
IMAGES = random_batch(0, 11)["image"]


@dataclass(frozen=True)
class Halving(Objective):
    """Reconstructs every image as half of it; its only parameter is that half."""

    def heads(self) -> dict[str, nn.Module]:
        return {"factor": Scalar(0.5)}

    def __call__(self, context: Context) -> Loss:
        return Loss(context.head("factor"))

    def reconstruct(self, context: Context) -> Mapping[str, jax.Array]:
        images = context.read("image")
        return {
            "original": images,
            "masked": jnp.zeros_like(images),
            "reconstructed": context.head("factor") * images,
        }


@functools.cache
def parts(**tower: Any) -> tuple[Experiment, Any]:
    """A tiny experiment with that objective and some fields of the image tower, and its parameters."""
    config = model_config()
    config.towers.image.update(tower)
    config.objectives.half = dict(weight=1.0, loss=spec(Halving))
    experiment = experiment_of(config)
    return experiment, nn.meta.unbox(jax.jit(experiment.initial_variables)(random_batch()))


def evaluate(evaluator: Evaluator, devices: int = 1, **tower: Any) -> Result:
    experiment, variables = parts(**tower)
    layout = layout_of(devices)
    return evaluator.make(experiment, layout)(jax.device_put(variables, layout.replicated))


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_a_reconstruction_stands_beside_its_image() -> None:
    result = evaluate(Reconstruction(data=dataset(image=IMAGES), objective="half", examples=3), 8)
    assert result.metrics["error"] == pytest.approx(np.mean(np.square(IMAGES[:8] / 2)), rel=1e-5)
    assert len(result.examples) == 3
    shown = result.examples[1]["pictures"]
    assert [one["text"] for one in shown] == ["original", "masked", "reconstructed"]
    low, high = IMAGES[:8].min(), IMAGES[:8].max()
    for one, expected in zip(shown, (IMAGES[1], 0 * IMAGES[1], IMAGES[1] / 2), strict=True):
        np.testing.assert_allclose(pixels(one["image"]), 255 * (expected - low) / (high - low), atol=0.51)


def test_the_report_shows_every_picture_with_its_name() -> None:
    result = evaluate(Reconstruction(data=dataset(image=IMAGES), objective="half", examples=2))
    shown = "".join(
        map(str, _example_grids(Evaluation("half", "Half", 1, result.metrics, examples=result.examples)))
    )
    assert shown.count("<img") == 6
    assert shown.count("reconstructed") >= 2


def test_attention_of_the_class_token_leaves_the_prefix_out() -> None:
    weights = RNG.dirichlet(np.ones(6), size=(2, 3, 6)).astype(np.float32)  # [B, heads, tokens, keys]
    heads = weights.mean(axis=1)
    for prefix, by_class, rows in ((2, True, heads[:, 0]), (2, False, heads[:, 2:].mean(axis=1))):
        expected = rows[:, prefix:] / rows[:, prefix:].sum(axis=1, keepdims=True)
        np.testing.assert_allclose(looked_at(jnp.asarray(weights), prefix, by_class), expected, rtol=1e-5)
    np.testing.assert_allclose(looked_at(jnp.asarray(weights), 0, False), heads.mean(axis=1), rtol=1e-5)


def test_an_image_is_bright_where_it_is_looked_at() -> None:
    images = np.full((1, 4, 6, 3), 2.0, np.float32)
    images[0, 0, 0] = 0.0  # the darkest value, which stays
    shown = overlaid(images, np.array([[0.0, 0.5, 0.0, 0.0, 0.0, 0.25]]))
    np.testing.assert_allclose(shown[0, :2, 2:4], 2.0)
    np.testing.assert_allclose(shown[0, 2:, 4:], 2.0 * (0.15 + 0.85 * 0.5))
    np.testing.assert_allclose(shown[0, 2:, :4], 0.3)


@pytest.mark.parametrize("devices", [1, 8])
def test_the_attention_of_a_vit_is_shown(devices: int) -> None:
    result = evaluate(AttentionMaps(data=dataset(image=IMAGES), examples=2), devices)
    assert 0 < result.metrics["attended_share"] <= 1.0001
    assert [one["text"] for one in result.examples[0]["pictures"]] == ["original", "attention"]


@pytest.mark.parametrize(("classes", "registers"), [(1, 2), (0, 2)])
def test_a_register_is_no_class_token(classes: int, registers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def recorded(weights: jax.Array, prefix: int, by_class: bool) -> jax.Array:
        seen.append((prefix, by_class))
        return looked_at(weights, prefix, by_class)

    monkeypatch.setattr(pictures, "looked_at", recorded)
    tower = dict(class_tokens=classes, registers=registers, pool="mean")
    evaluate(AttentionMaps(data=dataset(image=IMAGES)), **tower)
    assert seen == [(classes + registers, bool(classes))]


@pytest.mark.parametrize(
    ("evaluator", "words"),
    [
        (Reconstruction(), ["Reconstruction.data is not set"]),
        (Reconstruction(data=dataset(image=IMAGES), objective="hlaf"), ["'hlaf'", "'half'"]),
        (Reconstruction(data=dataset(image=IMAGES), objective="clip"), ["'clip'", "InfoNCE", "reconstruct"]),
        (AttentionMaps(), ["AttentionMaps.data is not set"]),
        (AttentionMaps(data=dataset(image=IMAGES), tower="imag"), ["'imag'", "image, text"]),
    ],
    ids=range(5),
)
def test_what_does_not_work_is_told(evaluator: Any, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        evaluate(evaluator)
    assert all(part in str(caught.value) for part in words), caught.value
