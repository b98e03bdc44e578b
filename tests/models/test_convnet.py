"""The convolutional image tower: outputs by name, what its pooling keeps, whose statistics it uses."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from vlpjax.errors import UserError
from vlpjax.models.convnet import ConvNet

IMAGES = np.random.default_rng(0).normal(size=(4, 16, 16, 3)).astype(np.float32)
TINY = dict(image_size=16, channels=(4, 8), strides=(2, 2), embedding=6)


def make(**fields: Any) -> tuple[ConvNet, Any]:
    tower = ConvNet(**{**TINY, **fields})
    return tower, jax.jit(tower.init)(jax.random.key(0), IMAGES)


@pytest.mark.parametrize(("pool", "width"), [("mean", 8), ("flatten", 16 * 8)])
def test_outputs_by_name(pool: str, width: int) -> None:
    tower, variables = make(pool=pool)
    outputs = tower.apply(variables, IMAGES)
    shapes = {name: x.shape for name, x in outputs.items()}
    assert shapes == {"tokens": (4, 16, 8), "pooled": (4, width), "embedding": (4, 6)}
    plain, variables = make(pool=pool, embedding=None)
    outputs = plain.apply(variables, IMAGES)
    np.testing.assert_array_equal(outputs["embedding"], outputs["pooled"])


def test_only_the_flattened_features_know_where_things_are() -> None:
    # Norms of single positions, and white margins: the drawing moves by one whole position of the last grid.
    drawing = np.zeros((1, 16, 16, 3), np.float32)
    drawing[:, 4:8, 4:8] = 1.0
    moved = np.roll(drawing, 4, axis=2)
    for pool, same in (("mean", True), ("flatten", False)):
        tower, variables = make(pool=pool, stem_norm="rms", norm="rms")
        features = [tower.apply(variables, x)["pooled"] for x in (drawing, moved)]
        assert np.allclose(*features, atol=1e-5) == same


def test_evaluation_does_not_look_at_the_other_images_of_a_batch() -> None:
    tower, variables = make()
    together = tower.apply(variables, IMAGES)["embedding"]
    alone = tower.apply(variables, IMAGES[:1])["embedding"]
    np.testing.assert_allclose(together[:1], alone, rtol=1e-5, atol=1e-6)
    _, changed = tower.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
    means = [jax.tree.leaves(stats)[0] for stats in (variables["batch_stats"], changed["batch_stats"])]
    assert not np.allclose(*means)


def test_dropout_acts_in_training_only() -> None:
    tower, variables = make(dropout=0.5, pool="flatten", stem_norm="rms")
    calm = tower.apply(variables, IMAGES)["embedding"]
    np.testing.assert_array_equal(calm, tower.apply(variables, IMAGES)["embedding"])
    noisy = tower.apply(variables, IMAGES, train=True, rngs={"dropout": jax.random.key(1)})["embedding"]
    assert not np.allclose(calm, noisy)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(image_size=32), "takes 32 pixels, but the batch has"),
        (dict(pool="max"), "pool is 'max'; there are 'mean' and 'flatten'"),
        (dict(strides=(2,)), "channels has 2 entries, but there are 1 strides"),
        (dict(stem_norm="group"), "norm is 'group'"),
    ],
)
def test_bad_settings_are_told(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**fields)
