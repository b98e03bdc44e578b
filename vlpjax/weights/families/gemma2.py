"""Gemma 2 (arXiv 2408.00118): windows in every other layer, soft caps, and norms at both ends of each branch."""

from __future__ import annotations

from typing import Any

from flax import linen as nn

from vlpjax.models.decoder import Decoder
from vlpjax.weights import decoders
from vlpjax.weights.families.gemma import logit_scale, shared, their_logit_scale, their_shared
from vlpjax.weights.family import Family


def build(config: dict[str, Any]) -> Decoder:
    """The decoder of a config."""
    kinds = ["sliding_attention", "full_attention"] * config["num_hidden_layers"]
    return Decoder(
        **shared(config, "hidden_activation"),
        order="both",
        scale=logit_scale(config),
        soft_cap=config.get("attn_logit_softcapping", 50.0),
        final_soft_cap=config.get("final_logit_softcapping", 30.0),
        pattern=decoders.pattern(config, kinds[: config["num_hidden_layers"]]),
        window=config.get("sliding_window", 4096),
        rotary=decoders.config_rotary(config),
    )


def describe(model: nn.Module) -> dict[str, Any]:
    """The config of a decoder."""
    fields = their_shared(model, "gemma2", "hidden_activation", order="both", qk_norm=None)
    model = decoders.hold(model, "gemma2")
    return {
        **fields,
        **decoders.their_rotary(model),
        "query_pre_attn_scalar": their_logit_scale(model),
        "attn_logit_softcapping": model.soft_cap,
        "final_logit_softcapping": model.final_soft_cap,
        "sliding_window": model.window,
        "layer_types": decoders.layer_types(model),
    }


FAMILY = Family(
    name="gemma2",
    model_types=("gemma2",),
    architecture="Gemma2ForCausalLM",
    build=build,
    describe=describe,
    rules=decoders.BOTH,
    example=decoders.example,
    ignored=decoders.IGNORED,
    tied=decoders.TIED,
)
