"""Mistral ("Mistral 7B", arXiv 2310.06825): Llama's form, with a window in all layers or in none."""

from __future__ import annotations

from typing import Any

from flax import linen as nn

from vlpjax.models.decoder import Decoder
from vlpjax.weights import decoders
from vlpjax.weights.configs import require
from vlpjax.weights.family import Family


def build(config: dict[str, Any]) -> Decoder:
    """The decoder of a config."""
    require("Mistral", config, layer_types=None)
    window = config.get("sliding_window")
    return Decoder(
        **decoders.sizes(config),
        pattern=("global",) if window is None else ("local",),
        window=window,
        rotary=decoders.config_rotary(config),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def describe(model: nn.Module) -> dict[str, Any]:
    """The config of a decoder."""
    model = decoders.hold(
        model, "mistral", norm="rms", order="pre", gated=True, qk_norm=None, scale=None, soft_cap=None,
        final_soft_cap=None, learned_positions=False, embed_scale=1.0, qkv_bias=False, out_bias=False,
        mlp_bias=False,
    )  # fmt: skip
    kinds = model.kinds()
    decoders.hold(model, "mistral", pattern=kinds[:1] * len(model.pattern))
    return {
        **decoders.their_sizes(model),
        **decoders.their_rotary(model),
        "sliding_window": model.window if kinds[0] == "local" else None,
    }


FAMILY = Family(
    name="mistral",
    model_types=("mistral",),
    architecture="MistralForCausalLM",
    build=build,
    describe=describe,
    rules=decoders.PRE,
    example=decoders.example,
    ignored=decoders.IGNORED,
    tied=decoders.TIED,
)
