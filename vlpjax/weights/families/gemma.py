"""Gemma 1 (arXiv 2403.08295), and the fields that all Gemmas share."""

from __future__ import annotations

import math
from typing import Any

from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.decoder import Decoder
from vlpjax.weights import decoders
from vlpjax.weights.configs import require
from vlpjax.weights.family import Family


def shared(config: dict[str, Any], activation_field: str) -> dict[str, Any]:
    """The fields of a Decoder that are alike in all Gemmas."""
    require("Gemma", config, use_bidirectional_attention=False)
    bias = bool(config.get("attention_bias"))
    fields = {"head_dim": 256, **config}
    return dict(
        **decoders.sizes(fields, activation_field, "gelu_pytorch_tanh"),
        norm="rms_offset",
        qkv_bias=bias,
        out_bias=bias,
        embed_scale=math.sqrt(config["hidden_size"]),
        tied=bool(config.get("tie_word_embeddings", True)),
    )


def their_shared(model: nn.Module, family: str, activation_field: str, **fixed: Any) -> dict[str, Any]:
    """The inverse of :func:`shared`; ``fixed`` are fields that have one value in this Gemma."""
    model = decoders.hold(
        model, family, norm="rms_offset", gated=True, mlp_bias=False, learned_positions=False, **fixed
    )
    decoders.hold(model, family, out_bias=model.qkv_bias, embed_scale=math.sqrt(model.width))
    return {**decoders.their_sizes(model, activation_field), "attention_bias": model.qkv_bias}


def logit_scale(config: dict[str, Any]) -> float:
    """The attention's scale of Gemma 2 and 3."""
    return float(config.get("query_pre_attn_scalar", 256)) ** -0.5


def their_logit_scale(model: Decoder) -> int:
    """The inverse of :func:`logit_scale`."""
    head_dim = model.head_dim or model.width // model.heads
    scalar = head_dim if model.scale is None else model.scale**-2
    if abs(scalar - round(scalar)) > 1e-6 * scalar:
        raise UserError(f"Decoder.scale is {model.scale}; Gemma takes the inverse root of a whole number.")
    return round(scalar)


def build(config: dict[str, Any]) -> Decoder:
    """The decoder of a config."""
    # The first releases say "gelu" and were trained with its approximation by tanh.
    if config.get("hidden_act") == "gelu":
        config = {**config, "hidden_act": "gelu_pytorch_tanh"}
    return Decoder(**shared(config, "hidden_act"), rotary=decoders.config_rotary(config))


def describe(model: nn.Module) -> dict[str, Any]:
    """The config of a decoder."""
    fields = their_shared(
        model, "gemma", "hidden_act", order="pre", qk_norm=None, scale=None, soft_cap=None, final_soft_cap=None,
        activation="gelu_tanh",
    )  # fmt: skip
    model = decoders.hold(model, "gemma", pattern=("global",) * len(model.pattern))
    return {**fields, **decoders.their_rotary(model)}


FAMILY = Family(
    name="gemma",
    model_types=("gemma",),
    architecture="GemmaForCausalLM",
    build=build,
    describe=describe,
    rules=decoders.PRE,
    example=decoders.example,
    ignored=decoders.IGNORED,
    tied=decoders.TIED,
)
