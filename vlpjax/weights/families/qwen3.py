"""Qwen3 ("Qwen3 Technical Report", arXiv 2505.09388): Llama's form with norms on each head's queries and keys."""

from __future__ import annotations

from typing import Any

from flax import linen as nn

from vlpjax.models.decoder import Decoder
from vlpjax.weights import decoders
from vlpjax.weights.families.qwen2 import their_windows, windows
from vlpjax.weights.family import Family


def build(config: dict[str, Any]) -> Decoder:
    """The decoder of a config."""
    bias = bool(config.get("attention_bias"))
    return Decoder(
        **decoders.sizes({"head_dim": 128, **config}),
        **windows(config),
        qkv_bias=bias,
        out_bias=bias,
        qk_norm="rms",
        rotary=decoders.config_rotary(config),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def describe(model: nn.Module) -> dict[str, Any]:
    """The config of a decoder."""
    model = decoders.hold(
        model, "qwen3", norm="rms", order="pre", gated=True, qk_norm="rms", scale=None, soft_cap=None,
        final_soft_cap=None, learned_positions=False, embed_scale=1.0, mlp_bias=False,
    )  # fmt: skip
    decoders.hold(model, "qwen3", out_bias=model.qkv_bias)
    return {
        **decoders.their_sizes(model),
        **decoders.their_rotary(model),
        **their_windows(model),
        "attention_bias": model.qkv_bias,
    }


FAMILY = Family(
    name="qwen3",
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    build=build,
    describe=describe,
    rules=decoders.PRE,
    example=decoders.example,
    ignored=decoders.IGNORED,
    tied=decoders.TIED,
)
