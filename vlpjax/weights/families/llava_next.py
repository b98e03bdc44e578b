"""LLaVA-NeXT: LLaVA 1.5 (arXiv 2310.03744) with images of any size, cut into tiles, as `transformers` writes it."""

from __future__ import annotations

import math
from typing import Any

from flax import linen as nn

from vlpjax.data.tiling import Tiling
from vlpjax.errors import UserError
from vlpjax.models.positions_2d import pair
from vlpjax.models.vision_language import VisionLanguageModel
from vlpjax.weights import decoders, multimodal
from vlpjax.weights.families import llava
from vlpjax.weights.family import Family
from vlpjax.weights.layout import Rule

RESOLUTIONS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def build(config: dict[str, Any]) -> VisionLanguageModel:
    """The module of a config."""
    model = llava.build(config, "LLaVA-NeXT")
    image: Any = model.image
    resolutions = config.get("image_grid_pinpoints") or RESOLUTIONS
    tiling = Tiling(pair(image.image_size)[0], grid(model), tuple((int(h), int(w)) for h, w in resolutions))
    return model.clone(tiling=tiling)


def grid(model: VisionLanguageModel) -> int:
    """Tokens along a tile's side.

    Raises:
      UserError: class tokens among the tiles', which then do not form a grid.
    """
    tokens = llava.image_tokens(model)
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise UserError(
            f"LLaVA-NeXT puts the tokens of tiles on a common grid, but a tile has {tokens}, its class token among "
            "them; leave that out: vision_feature_select_strategy='default', or image_prefix=False."
        )
    return side


def describe(model: nn.Module) -> dict[str, Any]:
    """The config of a module."""
    config = llava.describe(model, "LLaVA-NeXT")
    model = multimodal.hold("LLaVA-NeXT", model, nn.Module)
    if model.tiling is None:
        raise UserError(
            "VisionLanguageModel.tiling is None, but LLaVA-NeXT cuts images into tiles; LLaVA does not."
        )
    expected = Tiling(config["vision_config"]["image_size"], grid(model), model.tiling.resolutions)
    if model.tiling != expected:
        raise UserError(
            f"VisionLanguageModel.tiling has tile={model.tiling.tile} and grid={model.tiling.grid}, but the image "
            f"tower has images of {expected.tile} pixels and {expected.grid} patches a side."
        )
    return {**config, "image_grid_pinpoints": [list(size) for size in model.tiling.resolutions]}


FAMILY = Family(
    name="llava_next",
    model_types=("llava_next",),
    architecture="LlavaNextForConditionalGeneration",
    build=build,
    describe=describe,
    rules=(*multimodal.rules(decoders.PRE, llava.CONNECTOR), Rule("image_newline", "image_newline")),
    example=multimodal.example,
    ignored=multimodal.IGNORED,
    tied=multimodal.TIED,
    prefixes=multimodal.PREFIXES,
)
