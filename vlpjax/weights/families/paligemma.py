"""PaliGemma (arXiv 2407.07726) and PaliGemma 2 (arXiv 2412.03555) as `transformers` writes them.

There text positions count from 1.  Rotary attention sees differences of positions only, so that ours count from 0.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.connectors import LinearConnector
from vlpjax.models.vision_language import VisionLanguageModel
from vlpjax.weights import decoders, multimodal
from vlpjax.weights.configs import filled_in
from vlpjax.weights.encoders import linear
from vlpjax.weights.families.llava import image_tokens
from vlpjax.weights.family import Family

TEXTS = ("gemma", "gemma2")
VISIONS = ("siglip_vision_model",)
VISION_DEFAULT = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4096,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "vision_use_head": False,
}

# Gemma's name of the norm before an MLP is that of another norm in Gemma 2.
_GEMMA_2 = "block_{n}/attention_out_norm/scale"
GEMMA = tuple(
    replace(rule, without=_GEMMA_2) if rule.ours == "block_{n}/mlp_norm/scale" else rule
    for rule in decoders.PRE
)


def build(config: dict[str, Any]) -> VisionLanguageModel:
    """The module of a config."""
    config = filled_in(config, {"image_token_index": 256000, "tie_word_embeddings": True})
    # This field of a Gemma says of prompts what our model's prefix_lm does.
    text = {**(config.get("text_config") or {}), "use_bidirectional_attention": None}
    decoder = multimodal.build_text("PaliGemma", {**config, "text_config": text}, TEXTS)
    if config.get("projection_dim", decoder.width) != decoder.width:
        raise UserError(
            f"The PaliGemma config has projection_dim={config['projection_dim']}, but its text is {decoder.width} "
            "wide; they must be equal."
        )
    image, _ = multimodal.build_vision("PaliGemma", config, VISIONS, VISION_DEFAULT)
    return VisionLanguageModel(
        image=image,
        connector=LinearConnector(decoder.width),
        decoder=decoder,
        image_token=config.get("image_token_id", config["image_token_index"]),
        prefix_lm=True,
    )


def describe(model: nn.Module) -> dict[str, Any]:
    """The config of a module."""
    model = multimodal.hold(
        "PaliGemma", model, LinearConnector, image_layers=None, tiling=None, prefix_lm=True
    )
    connector: Any = model.connector
    width = model.decoder.width
    if connector.width != width or not connector.bias:
        raise UserError(
            f"PaliGemma's connector has a bias and is {width} wide, as its decoder, but the LinearConnector has "
            f"bias={connector.bias} and width={connector.width}."
        )
    vision = multimodal.describe_vision("PaliGemma", model.image, VISIONS)
    text = multimodal.describe_text("PaliGemma", model.decoder, TEXTS)
    return {
        "vision_config": {**vision, "projection_dim": width},
        "text_config": {**text, "num_image_tokens": image_tokens(model)},
        "image_token_index": model.image_token,
        "projection_dim": width,
        "hidden_size": width,
        "vocab_size": model.decoder.vocabulary,
        "tie_word_embeddings": model.decoder.tied,
    }


FAMILY = Family(
    name="paligemma",
    model_types=("paligemma",),
    architecture="PaliGemmaForConditionalGeneration",
    build=build,
    describe=describe,
    rules=multimodal.rules((*GEMMA, *decoders.BOTH), linear("projection", "linear")),
    example=multimodal.example,
    ignored=multimodal.IGNORED,
    tied=multimodal.TIED,
    prefixes=multimodal.PREFIXES,
)
