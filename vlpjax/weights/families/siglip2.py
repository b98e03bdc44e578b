"""SigLIP 2 of any resolution and aspect (NaFlex) as `transformers` writes it: both towers, or the image tower.

Checkpoints of fixed resolution are written as SigLIP's: see :mod:`vlpjax.weights.families.siglip`.  The image tower
takes packed images, one per row (:class:`vlpjax.models.packing.Packed`), and plain ones of any size.

Source: "SigLIP 2", arXiv 2502.14786, section 2.4.2.
"""

from __future__ import annotations

import math
from typing import Any

from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.positions_2d import pair
from vlpjax.models.vit import ViT
from vlpjax.weights.configs import filled_in
from vlpjax.weights.encoders import expect, hold, linear, tower_example
from vlpjax.weights.families import siglip
from vlpjax.weights.family import Family
from vlpjax.weights.layout import Rule, under

# Theirs takes patches that are cut already.
VISION: tuple[Rule, ...] = (
    *linear("patches/projection", "embeddings.patch_embedding"),
    *siglip.AFTER_PATCHES,
)
DEFAULTS = {"num_patches": 256, "patch_size": 16}


def build_vision(config: dict[str, Any]) -> ViT:
    """The image tower of a ``vision_config``."""
    config = filled_in(config, DEFAULTS)
    side = math.isqrt(config["num_patches"])
    if side**2 != config["num_patches"]:
        raise UserError(
            f"The SigLIP 2 config has num_patches={config['num_patches']}, which is no square of a whole number."
        )
    tower = siglip.build_vision({**config, "image_size": side * config["patch_size"]})
    # Theirs resizes the table for every image, as if seen through a low-pass filter.
    return tower.clone(resize_positions=True, position_method="bilinear", position_antialias=True)


def describe_vision(tower: ViT) -> dict[str, Any]:
    """The ``vision_config`` of an image tower."""
    config = siglip.describe_vision(tower.clone(position_method="bicubic", position_antialias=False))
    side = pair(tower.image_size)[0] // pair(tower.patch)[0]
    config = {**config, "model_type": "siglip2_vision_model", "num_patches": side**2}
    del config["image_size"]
    hold("SigLIP 2", tower, build_vision(config))
    return config


def describe(model: nn.Module) -> dict[str, Any]:
    image, text = siglip.parts("SigLIP 2", model)
    text_config = {**siglip.describe_text(text), "model_type": "siglip2_text_model"}
    return {"vision_config": describe_vision(image), "text_config": text_config}


SIGLIP2 = Family(
    name="siglip2",
    model_types=("siglip2",),
    architecture="Siglip2Model",
    build=lambda config: siglip.joint(
        build_vision(config.get("vision_config") or {}), siglip.build_text(config.get("text_config") or {})
    ),
    describe=describe,
    rules=(
        *under("image/", "vision_model.", VISION),
        *under("text/", "text_model.", siglip.TEXT),
        *siglip.JOINT,
    ),
    example=tower_example,
    ignored=(r".*\.position_ids",),
)
SIGLIP2_VISION = Family(
    name="siglip2_vision",
    model_types=("siglip2_vision_model",),
    architecture="Siglip2VisionModel",
    build=build_vision,
    describe=lambda model: describe_vision(expect("SigLIP 2's image tower", model, ViT)),
    rules=(*under("", "vision_model.", VISION), *VISION),
    example=tower_example,
)
