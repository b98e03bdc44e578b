"""Google's ViT as `transformers` writes it: with its pooler, with a classifier, or with neither.

A classifier is the tower's projection, with a bias: ``"embedding"`` are the logits.

Source: "An Image is Worth 16x16 Words", arXiv 2010.11929.
"""

from __future__ import annotations

from typing import Any

from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.vit import ViT
from vlpjax.weights.configs import activation_named, filled_in, require, their_activation
from vlpjax.weights.encoders import (
    convolved,
    expect,
    hold,
    linear,
    mlp_width,
    normed,
    size,
    their_size,
    tower_example,
    vit_block,
)
from vlpjax.weights.family import Family
from vlpjax.weights.layout import Rule, under

TOWER: tuple[Rule, ...] = (
    *convolved("patches/projection", "embeddings.patch_embeddings.projection"),
    Rule("class_token", "embeddings.cls_token"),
    Rule("position_embedding", "embeddings.position_embeddings"),
    Rule("mask_token", "embeddings.mask_token"),
    *vit_block("encoder.layer.{n}"),
    *normed("final_norm", "layernorm"),
    *linear("pooler", "pooler.dense"),
)
CLASSIFIER = linear("projection/kernel", "classifier")

DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
    "pooler_act": "tanh",
}
BARE, CLASSIFYING = "ViTModel", "ViTForImageClassification"


def build_tower(config: dict[str, Any], **fields: Any) -> ViT:
    """The tower of a config, without what its class puts on top of it.

    Args:
      fields: further ones.
    """
    config = filled_in(config, DEFAULTS)
    return ViT(
        image_size=size(config["image_size"]),
        patch=size(config["patch_size"]),
        patch_bias=True,
        channels=config["num_channels"],
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        qkv_bias=config["qkv_bias"],
        pool="cls",
        pre_norm=False,
        activation=activation_named("ViT", config["hidden_act"]),
        epsilon=config["layer_norm_eps"],
        **fields,
    )


def describe_tower(tower: ViT) -> dict[str, Any]:
    """The fields of a tower, without what stands on top of it."""
    return {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "intermediate_size": mlp_width(tower),
        "hidden_act": their_activation(tower.activation),
        "layer_norm_eps": tower.epsilon,
        "image_size": their_size(tower.image_size),
        "patch_size": their_size(tower.patch),
        "num_channels": tower.channels,
        "qkv_bias": tower.qkv_bias,
    }


def classes(config: dict[str, Any]) -> int:
    """The number of classes: of their names, which is how `transformers` writes it; 2 if it writes nothing."""
    names = config.get("id2label")
    return config.get("num_labels", 2) if names is None else len(names)


def class_names(count: int) -> dict[str, Any]:
    """The fields that say how many classes there are."""
    names = {str(index): f"LABEL_{index}" for index in range(count)}
    return {"id2label": names, "label2id": {name: int(index) for index, name in names.items()}}


def build(config: dict[str, Any]) -> ViT:
    architecture = (config.get("architectures") or [BARE])[0]
    if architecture == BARE:
        width = config.get("hidden_size") or DEFAULTS["hidden_size"]
        pooled = config.get("pooler_output_size") or width
        require("ViT", {**config, "pooler_output_size": pooled}, pooler_act="tanh", pooler_output_size=width)
        return build_tower(config, pooler=True)
    if architecture == CLASSIFYING:
        count = classes(config)
        return build_tower(config, embedding=count or None, projection_bias=count > 0)
    raise UserError(
        f"The ViT config has the architecture {architecture!r}; there are {BARE!r} and {CLASSIFYING!r}."
    )


def describe(model: nn.Module) -> dict[str, Any]:
    tower = expect("ViT", model, ViT)
    config = describe_tower(tower)
    if tower.pooler:
        config |= {"architectures": [BARE]}
    else:  # without pooler it is a classifier, if need be of no classes: its class has no pooler
        config |= {"architectures": [CLASSIFYING], **class_names(tower.embedding or 0)}
    hold("ViT", tower, build(config))
    return config


FAMILY = Family(
    name="vit",
    model_types=("vit",),
    architecture=BARE,
    build=build,
    describe=describe,
    rules=(*under("", "vit.", TOWER), *TOWER, *CLASSIFIER),
    example=tower_example,
)
# Towers in whose file the pooler is missing (DINO's, arXiv 2104.14294), to be asked for by name.
FAMILY_WITHOUT_POOLER = Family(
    name="vit_without_pooler",
    model_types=("vit",),
    architecture=CLASSIFYING,
    build=build_tower,
    describe=describe,
    rules=FAMILY.rules,
    example=tower_example,
)
