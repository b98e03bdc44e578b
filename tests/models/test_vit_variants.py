"""Published sizes: the numbers of parameters are the published ones, to the last parameter where these are known."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from vlpjax.errors import UserError
from vlpjax.models.positions_2d import pair
from vlpjax.models.vit import ViT
from vlpjax.models.vit_variants import variant

PLAIN: dict[str, Any] = dict(patch_bias=True, pre_norm=False, scan=True)
CLASSES = 1000  # of the linear head that published classifiers have on top of the tower


def count(tower: ViT) -> int:
    """Parameters of a tower, of which only the shapes are evaluated."""
    shape = jax.ShapeDtypeStruct((1, *pair(tower.image_size), tower.channels), jnp.float32)
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(tower.init, jax.random.key(0), shape)))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # "Training data-efficient image transformers", arXiv 2012.12877, table 1: 5M, 22M, 86M.
        ("Ti/16", 5_717_416),
        ("S/16", 22_050_664),
        # torchvision's table of classification weights: vit_b_16, vit_b_32, vit_l_16, vit_l_32, vit_h_14.
        ("B/16", 86_567_656),
        ("B/32", 88_224_232),
        ("L/16", 304_326_632),
        ("L/32", 306_535_400),
        ("H/14", 632_045_800),
        # "Scaling Vision Transformers", arXiv 2106.04560, table 2: 1011M and 1843M without a head; timm has these.
        ("g/14", 1_012_611_432),
        ("G/14", 1_844_440_680),
    ],
)
def test_classifiers(name: str, parameters: int) -> None:
    fields = variant(name)
    assert count(ViT(**fields, **PLAIN)) + CLASSES * (fields["width"] + 1) == parameters


@pytest.mark.parametrize(
    ("name", "fields", "parameters"),
    [
        # Image towers of "SigLIP", arXiv 2303.15343 (93M; So400m: 428M), and of "SigLIP 2", arXiv 2502.14786 (1B).
        ("B/16", dict(pool="map"), 92_884_224),
        ("So400m/14", dict(pool="map", image_size=224), 427_680_704),
        ("So400m/14", dict(pool="map", image_size=384, patch_crop=True), 428_225_600),
        ("g-opt/16", dict(pool="map", image_size=256), 1_163_168_256),
        # "DINOv2", arXiv 2304.07193 (1.1B), and "Vision Transformers Need Registers", arXiv 2309.16588 (S: 22M).
        ("g-swiglu/14", dict(image_size=518, layer_scale=1e-5), 1_136_479_232),
        ("S/14", dict(image_size=518, layer_scale=1e-5, registers=4, position_prefix=False), 22_057_344),
    ],
)
def test_towers_without_a_classifier(name: str, fields: dict[str, Any], parameters: int) -> None:
    assert count(ViT(**{**variant(name), **PLAIN, **fields})) == parameters


def test_scanned_blocks_have_as_many_parameters() -> None:
    assert count(ViT(**variant("Ti/16"), scan=True)) == count(ViT(**variant("Ti/16")))


def test_an_unknown_size_is_told() -> None:
    for name in ("XXL/16", "S", "S/x"):
        with pytest.raises(UserError, match=f"{name!r}.*'S/16'"):
            variant(name)
