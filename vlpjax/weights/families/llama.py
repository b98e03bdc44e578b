"""Llama 1 to 3 ("The Llama 3 Herd of Models", arXiv 2407.21783) and what has its form, such as SmolLM2."""

from __future__ import annotations

from typing import Any

from flax import linen as nn

from vlpjax.models.decoder import Decoder
from vlpjax.weights import decoders
from vlpjax.weights.family import Family


def build(config: dict[str, Any]) -> Decoder:
    """The decoder of a config."""
    bias = bool(config.get("attention_bias"))
    return Decoder(
        **decoders.sizes(config),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bool(config.get("mlp_bias")),
        rotary=decoders.config_rotary(config),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def describe(model: nn.Module) -> dict[str, Any]:
    """The config of a decoder."""
    model = decoders.hold(model, "llama")
    decoders.hold(
        model, "llama", norm="rms", order="pre", gated=True, qk_norm=None, scale=None, soft_cap=None,
        final_soft_cap=None, learned_positions=False, embed_scale=1.0, pattern=("global",) * len(model.pattern),
    )  # fmt: skip
    decoders.hold(model, "llama", out_bias=model.qkv_bias)
    return {
        **decoders.their_sizes(model),
        **decoders.their_rotary(model),
        "attention_bias": model.qkv_bias,
        "mlp_bias": model.mlp_bias,
    }


FAMILY = Family(
    name="llama",
    model_types=("llama",),
    architecture="LlamaForCausalLM",
    build=build,
    describe=describe,
    rules=decoders.PRE,
    example=decoders.example,
    ignored=decoders.IGNORED,
    tied=decoders.TIED,
)
