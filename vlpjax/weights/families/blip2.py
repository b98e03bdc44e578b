"""BLIP-2 (arXiv 2301.12597) as `transformers` writes it: its first stage, and its second with T5 as language model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.blip2 import Blip2, ImageQFormer
from vlpjax.models.qformer import QFormer
from vlpjax.models.vit import ViT
from vlpjax.weights.configs import activation_named, filled_in, require, their_activation
from vlpjax.weights.encoders import (
    convolved,
    expect,
    fused_attention,
    hold,
    image_example,
    linear,
    mlp_width,
    normed,
    square,
)
from vlpjax.weights.families import t5
from vlpjax.weights.families.qformer_rules import QFORMER, QUERIES, TEXTS
from vlpjax.weights.family import Family
from vlpjax.weights.layout import Rule, under

_LAYER = "encoder.layers.{n}"
VISION: tuple[Rule, ...] = (
    *convolved("patches/projection", "embeddings.patch_embedding"),
    Rule("class_token", "embeddings.class_embedding"),
    Rule("position_embedding", "embeddings.position_embedding"),
    *normed("block_{n}/attention_norm", f"{_LAYER}.layer_norm1"),
    *fused_attention(
        "block_{n}/attention",
        f"{_LAYER}.self_attn.qkv.weight",
        f"{_LAYER}.self_attn.qkv.bias",
        f"{_LAYER}.self_attn.projection",
    ),
    *normed("block_{n}/mlp_norm", f"{_LAYER}.layer_norm2"),
    *linear("block_{n}/mlp/up", f"{_LAYER}.mlp.fc1"),
    *linear("block_{n}/mlp/down", f"{_LAYER}.mlp.fc2"),
    *normed("final_norm", "post_layernorm"),
)

VISION_DEFAULTS = {
    "hidden_size": 1408,
    "intermediate_size": 6144,
    "num_hidden_layers": 39,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "qkv_bias": True,
}
QFORMER_DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "cross_attention_frequency": 2,
    "use_qformer_text_input": False,
}
DEFAULTS = {"num_query_tokens": 32, "image_text_hidden_size": 256}
RETRIEVAL, VISION_ALONE = "Blip2ForImageTextRetrieval", "Blip2VisionModelWithProjection"
GENERATION = ("Blip2ForConditionalGeneration", "Blip2Model")  # of one form; the first is written


def build_vision(config: dict[str, Any]) -> ViT:
    """The image tower of a ``vision_config``."""
    config = filled_in(config, VISION_DEFAULTS)
    return ViT(
        image_size=config["image_size"],
        patch=config["patch_size"],
        patch_bias=True,
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        class_tokens=1,
        pool="none",
        pre_norm=False,
        qkv_bias=config["qkv_bias"],
        activation=activation_named("BLIP-2", config["hidden_act"]),
        epsilon=config["layer_norm_eps"],
    )


def describe_vision(tower: ViT) -> dict[str, Any]:
    """The ``vision_config`` of an image tower."""
    config = {
        "model_type": "blip_2_vision_model",
        "hidden_size": tower.width,
        "intermediate_size": mlp_width(tower),
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "image_size": square("BLIP-2", "image_size", tower.image_size),
        "patch_size": square("BLIP-2", "patch", tower.patch),
        "hidden_act": their_activation(tower.activation),
        "layer_norm_eps": tower.epsilon,
        "qkv_bias": tower.qkv_bias,
    }
    hold("BLIP-2", tower, build_vision(config))
    return config


def build_qformer(config: dict[str, Any], *, texts: bool, embedding: bool) -> QFormer:
    """The Q-Former of a whole config."""
    whole = filled_in(config, DEFAULTS)
    part = filled_in(config.get("qformer_config") or {}, QFORMER_DEFAULTS)
    require("BLIP-2 Q-Former", part, position_embedding_type="absolute")
    if texts and not part["use_qformer_text_input"]:
        raise UserError(
            "The BLIP-2 config has use_qformer_text_input=False, but its Q-Former is to read texts; set it to true."
        )
    return QFormer(
        queries=whole["num_query_tokens"],
        width=part["hidden_size"],
        depth=part["num_hidden_layers"],
        heads=part["num_attention_heads"],
        mlp_dim=part["intermediate_size"],
        cross_every=part["cross_attention_frequency"],
        vocabulary=part["vocab_size"] if texts else None,
        length=part["max_position_embeddings"],
        embedding=whole["image_text_hidden_size"] if embedding else None,
        activation=activation_named("BLIP-2", part["hidden_act"]),
        epsilon=part["layer_norm_eps"],
        dropout=part["hidden_dropout_prob"],
        pad_id=part["pad_token_id"],
    )


def describe_qformer(qformer: QFormer, image: ViT) -> dict[str, Any]:
    """The ``qformer_config`` of a Q-Former, and the fields of the whole that are about it."""
    part = {
        "model_type": "blip_2_qformer",
        "vocab_size": qformer.vocabulary or QFORMER_DEFAULTS["vocab_size"],
        "hidden_size": qformer.width,
        "num_hidden_layers": qformer.depth,
        "num_attention_heads": qformer.heads,
        "intermediate_size": qformer.mlp_dim,
        "hidden_act": their_activation(qformer.activation),
        "hidden_dropout_prob": qformer.dropout,
        "max_position_embeddings": qformer.length,
        "layer_norm_eps": qformer.epsilon,
        "pad_token_id": qformer.pad_id,
        "cross_attention_frequency": qformer.cross_every,
        "use_qformer_text_input": qformer.vocabulary is not None,
        "encoder_hidden_size": image.width,
    }
    joint = {} if qformer.embedding is None else {"image_text_hidden_size": qformer.embedding}
    return {"qformer_config": part, "num_query_tokens": qformer.queries, **joint}


def build(config: dict[str, Any]) -> nn.Module:
    """The module of a config: of the first stage or of the second, by the class that the config names."""
    (name,) = config.get("architectures") or [GENERATION[0]]
    image = build_vision(config.get("vision_config") or {})
    if name in (RETRIEVAL, VISION_ALONE):
        texts = name == RETRIEVAL
        return ImageQFormer(image, build_qformer(config, texts=texts, embedding=True), matching=texts)
    if name not in GENERATION:
        known = ", ".join((RETRIEVAL, VISION_ALONE, *GENERATION))
        raise UserError(f"The BLIP-2 config has architectures={[name]}; there are {known}.")
    text = {"model_type": "opt", **(config.get("text_config") or {})}
    if text["model_type"] != "t5":
        raise UserError(
            f"The BLIP-2 config has a text_config of model_type {text['model_type']!r}; only 't5' can be represented."
        )
    token = config.get("image_token_index", config.get("image_token_id"))
    if token is None:
        raise UserError(
            "The BLIP-2 config has no image_token_index, the id that stands for a query in a text; add one that the "
            "tokenizer does not use, such as 32100 for Flan-T5."
        )
    language: Any = t5.build(text)
    return Blip2(image, build_qformer(config, texts=False, embedding=False), language, token)


def describe(model: nn.Module) -> dict[str, Any]:
    """The config of a module."""
    if not isinstance(model, (Blip2, ImageQFormer)):
        raise UserError(f"BLIP-2 is a Blip2 or an ImageQFormer, but the module is a {type(model).__name__}.")
    image = expect("BLIP-2's image tower", model.image, ViT)
    qformer = model.qformer
    config = {"vision_config": describe_vision(image), **describe_qformer(qformer, image)}
    if isinstance(model, Blip2):
        if qformer.vocabulary is not None or qformer.embedding is not None:
            raise UserError(
                f"Blip2.qformer has vocabulary={qformer.vocabulary} and embedding={qformer.embedding}, but the second "
                "stage of BLIP-2 has neither; set them to None."
            )
        text = {"model_type": "t5", **t5.describe(model.language)}
        return {
            "architectures": [GENERATION[0]],
            **config,
            "text_config": text,
            "image_token_index": model.image_token,
            "use_decoder_only_language_model": False,
        }
    texts = qformer.vocabulary is not None
    if qformer.embedding is None or model.matching != texts:
        raise UserError(
            "BLIP-2's first stage has an embedding, and a matching head exactly if the Q-Former has a vocabulary; the "
            f"module has embedding={qformer.embedding}, matching={model.matching}, vocabulary={qformer.vocabulary}."
        )
    return {"architectures": [RETRIEVAL if texts else VISION_ALONE], **config}


def example(model: nn.Module) -> tuple[jax.ShapeDtypeStruct, ...]:
    """An image, and the texts that the module reads."""
    assert isinstance(model, (Blip2, ImageQFormer))
    image: Any = model.image
    text = jax.ShapeDtypeStruct((1, model.qformer.queries), jnp.int32)
    if isinstance(model, Blip2):
        return *image_example(image), text, text
    short = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return *image_example(image), *([short] if model.qformer.vocabulary is not None else [])


_LANGUAGE = "language_model."
FAMILY = Family(
    name="blip2",
    model_types=("blip-2",),
    architecture=GENERATION[0],
    build=build,
    describe=describe,
    rules=(
        *under("image/", "vision_model.", VISION),
        *under("qformer/", "qformer.", QFORMER),
        *under("qformer/", "", QUERIES),
        *under("qformer/", "", TEXTS),
        *linear("matching_head/projection", "itm_head"),
        *linear("projection/projection", "language_projection"),
        *under("language/", _LANGUAGE, t5.FAMILY.rules),
    ),
    example=example,
    ignored=(r".*\.position_ids", *(rf"language_model\.{expression}" for expression in t5.FAMILY.ignored)),
    tied=tuple((_LANGUAGE + copy, _LANGUAGE + original) for copy, original in t5.FAMILY.tied),
)
