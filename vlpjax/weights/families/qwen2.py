"""Qwen2 and Qwen2.5 ("Qwen2 Technical Report", arXiv 2407.10671): Llama's form with biases of q, k and v."""

from __future__ import annotations

from typing import Any

from flax import linen as nn

from vlpjax.models.decoder import Decoder
from vlpjax.weights import decoders
from vlpjax.weights.family import Family


def windows(config: dict[str, Any]) -> dict[str, Any]:
    """Pattern and window of Qwen's configs: without ``use_sliding_window`` none, else the layers from
    ``max_window_layers`` on."""
    if not config.get("use_sliding_window", False) or config.get("sliding_window") is None:
        return {}
    first = config.get("max_window_layers", 28)
    depth = config["num_hidden_layers"]
    kinds = ["sliding_attention" if layer >= first else "full_attention" for layer in range(depth)]
    return {"pattern": decoders.pattern(config, kinds), "window": config["sliding_window"]}


def their_windows(model: Decoder) -> dict[str, Any]:
    """The inverse of :func:`windows`."""
    local = "local" in model.kinds()
    fields: dict[str, Any] = {"use_sliding_window": local, "layer_types": decoders.layer_types(model)}
    if local:
        fields |= {"sliding_window": model.window, "max_window_layers": model.kinds().index("local")}
    return fields


def build(config: dict[str, Any]) -> Decoder:
    """The decoder of a config."""
    return Decoder(
        **decoders.sizes({**config, "head_dim": None}),
        **windows(config),
        qkv_bias=True,
        rotary=decoders.config_rotary(config),
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def describe(model: nn.Module) -> dict[str, Any]:
    """The config of a decoder."""
    model = decoders.hold(
        model, "qwen2", norm="rms", order="pre", gated=True, qk_norm=None, scale=None, soft_cap=None,
        final_soft_cap=None, learned_positions=False, embed_scale=1.0, qkv_bias=True, out_bias=False, mlp_bias=False,
    )  # fmt: skip
    if model.head_dim not in (None, model.width // model.heads):
        decoders.hold(model, "qwen2", head_dim=model.width // model.heads)
    fields = decoders.their_sizes(model)
    del fields["head_dim"]  # always width / heads
    return {**fields, **decoders.their_rotary(model), **their_windows(model)}


FAMILY = Family(
    name="qwen2",
    model_types=("qwen2",),
    architecture="Qwen2ForCausalLM",
    build=build,
    describe=describe,
    rules=decoders.PRE,
    example=decoders.example,
    ignored=decoders.IGNORED,
    tied=decoders.TIED,
)
