"""The encoder of a masked autoencoder as `transformers` writes it, without masking.

The decoder, which is thrown away after pretraining, is not read.  The fixed table of positions (sines and cosines)
is a parameter here, because it is a tensor there; a run that fine-tunes the tower may freeze it by name.

Source: "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377.
"""

from __future__ import annotations

from typing import Any

from flax import linen as nn

from vlpjax.models.vit import ViT
from vlpjax.weights.encoders import expect, hold, tower_example
from vlpjax.weights.families.vit import TOWER, build_tower, describe_tower
from vlpjax.weights.family import Family


def describe(model: nn.Module) -> dict[str, Any]:
    tower = expect("ViT-MAE", model, ViT)
    # Theirs masks whenever it is called, in inference too, unless it is told to mask nothing.
    config = {**describe_tower(tower), "mask_ratio": 0.0}
    hold("ViT-MAE", tower, build_tower(config))
    return config


VIT_MAE = Family(
    name="vit_mae",
    model_types=("vit_mae",),
    architecture="ViTMAEModel",
    build=build_tower,
    describe=describe,
    rules=TOWER,
    example=tower_example,
    ignored=(r"decoder\..*",),
    prefixes=("", "vit."),
)
