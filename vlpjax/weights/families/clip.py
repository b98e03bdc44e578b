"""CLIP as `transformers` writes it: both towers with their scale, or one tower alone.

Source: "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020.
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
    SCALE,
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

VISION: tuple[Rule, ...] = (
    *convolved("patches/projection", "embeddings.patch_embedding"),
    Rule("class_token", "embeddings.class_embedding", "d -> 1 1 d"),
    Rule("position_embedding", "embeddings.position_embedding.weight", "n d -> 1 n d"),
    *normed("pre_norm", "pre_layrnorm"),  # the spelling is theirs
    *clip_block("encoder.layers.{n}"),
    # Theirs norms what was pooled; our own towers as a rule norm all tokens before, which pools the same.
    *normed("pool_norm", "post_layernorm"),
    *normed("final_norm", "post_layernorm"),
)
TEXT: tuple[Rule, ...] = (
    Rule("token_embedding/embedding", "embeddings.token_embedding.weight"),
    Rule("position_embedding", "embeddings.position_embedding.weight"),
    *clip_block("encoder.layers.{n}"),
    *normed("final_norm", "final_layer_norm"),
)
IMAGE_PROJECTION = linear("projection/kernel", "visual_projection")
TEXT_PROJECTION = linear("projection/kernel", "text_projection")

VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "projection_dim": 512,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "eos_token_id": 49407,
}
# In configs before 2023 the id of the end of text is this, which it is not; its place then is that of the largest id.
OLD_END = 2


def build_vision(config: dict[str, Any], embedding: int | None) -> ViT:
    """The image tower of a ``vision_config``."""
    config = filled_in(config, VISION_DEFAULTS)
    return ViT(
        image_size=config["image_size"],
        patch=config["patch_size"],
        channels=config["num_channels"],
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        pool="cls",
        embedding=embedding,
        pre_norm=True,
        final_norm=False,
        pool_norm=True,
        activation=activation_named("CLIP", config["hidden_act"]),
        epsilon=config["layer_norm_eps"],
    )


def build_text(config: dict[str, Any], embedding: int | None) -> TextTransformer:
    """The text tower of a ``text_config``."""
    config = filled_in(config, TEXT_DEFAULTS)
    end = config["eos_token_id"]
    return TextTransformer(
        vocabulary=config["vocab_size"],
        length=config["max_position_embeddings"],
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        embedding=embedding,
        activation=activation_named("CLIP", config["hidden_act"]),
        epsilon=config["layer_norm_eps"],
        pad_id=config["pad_token_id"],
        pool="eot",
        eos_id=config["vocab_size"] - 1 if end == OLD_END else end,
    )


def describe_vision(tower: ViT) -> dict[str, Any]:
    """The ``vision_config`` of an image tower."""
    if tower.pool == "cls" and tower.final_norm and not tower.pool_norm:
        tower = tower.clone(
            final_norm=False, pool_norm=True
        )  # the same features, but for those of single patches
    config = {
        "model_type": "clip_vision_model",
        "hidden_size": tower.width,
        "intermediate_size": mlp_width(tower),
        "projection_dim": tower.embedding or VISION_DEFAULTS["projection_dim"],
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "num_channels": tower.channels,
        "image_size": square("CLIP", "image_size", tower.image_size),
        "patch_size": square("CLIP", "patch", tower.patch),
        "hidden_act": their_activation(tower.activation),
        "layer_norm_eps": tower.epsilon,
    }
    hold("CLIP", tower, build_vision(config, tower.embedding))
    return config


def describe_text(tower: TextTransformer) -> dict[str, Any]:
    """The ``text_config`` of a text tower."""
    if tower.eos_id is None:
        raise UserError(
            "TextTransformer.eos_id is None, but CLIP finds the end of a text by its id; set it to the tokenizer's."
        )
    if tower.eos_id == OLD_END and tower.vocabulary != OLD_END + 1:
        raise UserError(
            f"TextTransformer.eos_id is {OLD_END}, which `transformers` takes for a mistake of old CLIP configs: it "
            "would pool at the largest id instead."
        )
    config = {
        "model_type": "clip_text_model",
        "vocab_size": tower.vocabulary,
        "hidden_size": tower.width,
        "intermediate_size": mlp_width(tower),
        "projection_dim": tower.embedding or TEXT_DEFAULTS["projection_dim"],
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "max_position_embeddings": tower.length,
        "hidden_act": their_activation(tower.activation),
        "layer_norm_eps": tower.epsilon,
        "pad_token_id": tower.pad_id,
        "eos_token_id": tower.eos_id,
    }
    hold("CLIP", tower, build_text(config, tower.embedding))
    return config


def _part(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A part of a config; the oldest files repeat it, with more in it, as ``<name>_dict``."""
    return {**(config.get(name) or {}), **(config.get(f"{name}_dict") or {})}


def build(config: dict[str, Any]) -> nn.Module:
    joint = filled_in(config, {"projection_dim": 512, "logit_scale_init_value": 2.6592})
    return Towers.of(
        {
            "image": build_vision(_part(config, "vision_config"), joint["projection_dim"]),
            "text": build_text(_part(config, "text_config"), joint["projection_dim"]),
            SCALE: Scalar(joint["logit_scale_init_value"]),
        }
    )


def describe(model: nn.Module) -> dict[str, Any]:
    towers = towers_of("CLIP", model, ("image", "text", SCALE))
    image, text = expect("CLIP's image tower", towers["image"], ViT), towers["text"]
    expect("CLIP's text tower", text, TextTransformer)
    if image.embedding is None or image.embedding != text.embedding:
        raise UserError(
            f"CLIP projects both towers to one width, but ViT.embedding is {image.embedding} and "
            f"TextTransformer.embedding is {text.embedding}."
        )
    return {
        "projection_dim": image.embedding,
        "logit_scale_init_value": towers[SCALE].initial,
        "vision_config": describe_vision(image),
        "text_config": describe_text(text),
    }


def _projected(config: dict[str, Any]) -> int | None:
    """The joint width, if the class of a tower that stands alone has the projection."""
    name = (config.get("architectures") or [""])[0]
    return config.get("projection_dim", 512) if name.endswith("WithProjection") else None


def _alone(config: dict[str, Any], embedding: int | None, architecture: str) -> dict[str, Any]:
    return {**config, "architectures": [architecture + "WithProjection" * (embedding is not None)]}


CLIP = Family(
    name="clip",
    model_types=("clip",),
    architecture="CLIPModel",
    build=build,
    describe=describe,
    rules=(
        *under("image/", "vision_model.", VISION),
        *under("image/", "", IMAGE_PROJECTION),
        *under("text/", "text_model.", TEXT),
        *under("text/", "", TEXT_PROJECTION),
        Rule(f"{SCALE}/value", "logit_scale"),
    ),
    example=tower_example,
    ignored=(r".*\.position_ids",),
)
CLIP_VISION = Family(
    name="clip_vision",
    model_types=("clip_vision_model",),
    architecture="CLIPVisionModel",
    build=lambda config: build_vision(config, _projected(config)),
    describe=lambda model: _alone(
        describe_vision(expect("CLIP's image tower", model, ViT)), model.embedding, "CLIPVisionModel"
    ),
    rules=(*under("", "vision_model.", VISION), *VISION, *IMAGE_PROJECTION),
    example=tower_example,
    ignored=(r".*\.position_ids",),
)
CLIP_TEXT = Family(
    name="clip_text",
    model_types=("clip_text_model",),
    architecture="CLIPTextModel",
    build=lambda config: build_text(config, _projected(config)),
    describe=lambda model: _alone(
        describe_text(expect("CLIP's text tower", model, TextTransformer)), model.embedding, "CLIPTextModel"
    ),
    rules=(*under("", "text_model.", TEXT), *TEXT, *TEXT_PROJECTION),
    example=tower_example,
    ignored=(r".*\.position_ids",),
)
