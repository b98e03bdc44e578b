"""SigLIP, and SigLIP 2 of fixed resolution, as `transformers` writes them: both towers, or one alone.

Source: "Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343; "SigLIP 2", arXiv 2502.14786.
"""

from __future__ import annotations

from typing import Any

from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.heads import Scalar
from vlpjax.models.text import TextTransformer
from vlpjax.models.towers import Towers
from vlpjax.models.vit import ViT
from vlpjax.weights.configs import activation_named, filled_in, their_activation
from vlpjax.weights.encoders import (
    BIAS,
    SCALE,
    attention_pool,
    clip_block,
    convolved,
    expect,
    hold,
    linear,
    mlp_width,
    normed,
    square,
    tower_example,
    towers_of,
)
from vlpjax.weights.family import Family
from vlpjax.weights.layout import Rule, under

AFTER_PATCHES: tuple[Rule, ...] = (
    Rule("position_embedding", "embeddings.position_embedding.weight", "n d -> 1 n d"),
    *clip_block("encoder.layers.{n}"),
    *normed("final_norm", "post_layernorm"),
    *attention_pool("pool_head", "head"),
)
VISION = (*convolved("patches/projection", "embeddings.patch_embedding"), *AFTER_PATCHES)
TEXT: tuple[Rule, ...] = (
    Rule("token_embedding/embedding", "embeddings.token_embedding.weight"),
    Rule("position_embedding", "embeddings.position_embedding.weight"),
    *clip_block("encoder.layers.{n}"),
    *normed("final_norm", "final_layer_norm"),
    *linear("projection/kernel", "head"),
)
# Both numbers are vectors of length 1 there.
JOINT = (Rule(f"{SCALE}/value", "logit_scale", "1 ->"), Rule(f"{BIAS}/value", "logit_bias", "1 ->"))

VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}
TEXT_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "pad_token_id": 1,
}
# What SigLIP starts from (arXiv 2303.15343, section 3.2): a temperature of 0.1 and a bias of -10.
FIRST_SCALE, FIRST_BIAS = 2.302585092994046, -10.0


def build_vision(config: dict[str, Any]) -> ViT:
    """The image tower of a ``vision_config``."""
    config = filled_in(config, VISION_DEFAULTS)
    return ViT(
        image_size=config["image_size"],
        patch=config["patch_size"],
        patch_bias=True,
        channels=config["num_channels"],
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        pool="map" if config["vision_use_head"] else "none",
        pre_norm=False,
        activation=activation_named("SigLIP", config["hidden_act"]),
        epsilon=config["layer_norm_eps"],
    )


def build_text(config: dict[str, Any]) -> TextTransformer:
    """The text tower of a ``text_config``."""
    config = filled_in(config, TEXT_DEFAULTS)
    return TextTransformer(
        vocabulary=config["vocab_size"],
        length=config["max_position_embeddings"],
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        embedding=config.get("projection_size", config["hidden_size"]),
        projection_bias=True,
        activation=activation_named("SigLIP", config["hidden_act"]),
        epsilon=config["layer_norm_eps"],
        pad_id=config["pad_token_id"],
        causal=False,
        pool="last",
    )


def describe_vision(tower: ViT) -> dict[str, Any]:
    """The ``vision_config`` of an image tower."""
    config = {
        "model_type": "siglip_vision_model",
        "hidden_size": tower.width,
        "intermediate_size": mlp_width(tower),
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "num_channels": tower.channels,
        "image_size": square("SigLIP", "image_size", tower.image_size),
        "patch_size": square("SigLIP", "patch", tower.patch),
        "hidden_act": their_activation(tower.activation),
        "layer_norm_eps": tower.epsilon,
        "vision_use_head": tower.pool != "none",
    }
    hold("SigLIP", tower, build_vision(config))
    return config


def describe_text(tower: TextTransformer) -> dict[str, Any]:
    """The ``text_config`` of a text tower."""
    config = {
        "model_type": "siglip_text_model",
        "vocab_size": tower.vocabulary,
        "hidden_size": tower.width,
        "intermediate_size": mlp_width(tower),
        "projection_size": tower.embedding,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "max_position_embeddings": tower.length,
        "hidden_act": their_activation(tower.activation),
        "layer_norm_eps": tower.epsilon,
        "pad_token_id": tower.pad_id,
    }
    hold("SigLIP", tower, build_text(config))
    return config


def joint(image: ViT, text: TextTransformer) -> Towers:
    """Both towers with the learned scale and bias."""
    return Towers.of({"image": image, "text": text, SCALE: Scalar(FIRST_SCALE), BIAS: Scalar(FIRST_BIAS)})


def parts(family: str, model: nn.Module) -> tuple[ViT, TextTransformer]:
    """The two towers of a model that SigLIP can hold.

    Raises:
      UserError: other towers, or features of two widths.
    """
    towers = towers_of(family, model, ("image", "text", SCALE, BIAS))
    image = expect(f"{family}'s image tower", towers["image"], ViT)
    text = expect(f"{family}'s text tower", towers["text"], TextTransformer)
    if text.embedding != image.width:
        raise UserError(
            f"{family} compares texts with the image tower's features of width {image.width}, but "
            f"TextTransformer.embedding is {text.embedding}."
        )
    return image, text


def describe(model: nn.Module) -> dict[str, Any]:
    image, text = parts("SigLIP", model)
    return {"vision_config": describe_vision(image), "text_config": describe_text(text)}


SIGLIP = Family(
    name="siglip",
    model_types=("siglip",),
    architecture="SiglipModel",
    build=lambda config: joint(
        build_vision(config.get("vision_config") or {}), build_text(config.get("text_config") or {})
    ),
    describe=describe,
    rules=(*under("image/", "vision_model.", VISION), *under("text/", "text_model.", TEXT), *JOINT),
    example=tower_example,
    ignored=(r".*\.position_ids",),
)
SIGLIP_VISION = Family(
    name="siglip_vision",
    model_types=("siglip_vision_model",),
    architecture="SiglipVisionModel",
    build=build_vision,
    describe=lambda model: describe_vision(expect("SigLIP's image tower", model, ViT)),
    rules=(*under("", "vision_model.", VISION), *VISION),
    example=tower_example,
    ignored=(r".*\.position_ids",),
)
SIGLIP_TEXT = Family(
    name="siglip_text",
    model_types=("siglip_text_model",),
    architecture="SiglipTextModel",
    build=build_text,
    describe=lambda model: describe_text(expect("SigLIP's text tower", model, TextTransformer)),
    rules=(*under("", "text_model.", TEXT), *TEXT),
    example=tower_example,
    ignored=(r".*\.position_ids",),
)
