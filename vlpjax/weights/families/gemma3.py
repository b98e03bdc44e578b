"""The text decoder of Gemma 3 (arXiv 2503.19786): five local layers to a global one, each kind with its own base."""

from __future__ import annotations

from typing import Any

from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.decoder import Decoder
from vlpjax.weights import decoders
from vlpjax.weights.families.gemma import logit_scale, shared, their_logit_scale, their_shared
from vlpjax.weights.family import Family


def rotaries(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary positions of global and local layers; the older fields scale those of the global ones only."""
    parameters = config.get("rope_parameters") or {}
    full = {**(parameters.get("full_attention") or {}), **(config.get("rope_scaling") or {})}
    local = parameters.get("sliding_attention") or {}
    return {
        "rotary": decoders.rotary(config, full, config.get("rope_theta") or 1_000_000.0),
        "local_rotary": decoders.rotary(config, local, config.get("rope_local_base_freq") or 10_000.0),
    }


def build(config: dict[str, Any]) -> Decoder:
    """The decoder of a config."""
    every = config.get("sliding_window_pattern", 6)
    depth = config["num_hidden_layers"]
    kinds = ["sliding_attention" if (layer + 1) % every else "full_attention" for layer in range(depth)]
    return Decoder(
        **shared(config, "hidden_activation"),
        **rotaries(config),
        order="both",
        qk_norm="rms_offset",
        scale=logit_scale(config),
        soft_cap=config.get("attn_logit_softcapping"),
        final_soft_cap=config.get("final_logit_softcapping"),
        pattern=decoders.pattern(config, kinds),
        window=config.get("sliding_window", 4096),
    )


def describe(model: nn.Module) -> dict[str, Any]:
    """The config of a decoder."""
    fields = their_shared(model, "gemma3", "hidden_activation", order="both", qk_norm="rms_offset")
    model = decoders.hold(model, "gemma3")
    if model.rotary is None:
        raise UserError("The family 'gemma3' holds decoders with rotary positions; this one has none.")
    full, local = model.rotary, model.local_rotary or model.rotary
    if full.fraction != 1 or local.fraction != 1 or local.scaling is not None:
        raise UserError(
            f"The family 'gemma3' scales the rotary positions of global layers only, not {local}."
        )
    parameters = decoders.rope_parameters(full)
    scaling = {name: value for name, value in parameters.items() if name != "rope_theta"}
    return {
        **fields,
        "rope_parameters": {
            "full_attention": parameters,
            "sliding_attention": decoders.rope_parameters(local),
        },
        "rope_theta": full.base,
        "rope_local_base_freq": local.base,
        **({"rope_scaling": scaling} if full.scaling is not None else {}),
        "query_pre_attn_scalar": their_logit_scale(model),
        "attn_logit_softcapping": model.soft_cap,
        "final_logit_softcapping": model.final_soft_cap,
        "sliding_window": model.window,
        "layer_types": decoders.layer_types(model),
    }


FAMILY = Family(
    name="gemma3",
    model_types=("gemma3_text",),
    architecture="Gemma3ForCausalLM",
    build=build,
    describe=describe,
    rules=decoders.BOTH,
    example=decoders.example,
    ignored=decoders.IGNORED,
    tied=decoders.TIED,
)
