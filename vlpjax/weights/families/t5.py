"""T5 as `transformers` writes it, with its descendants T5 1.1, Flan-T5, mT5 and mT0.

Sources: "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", arXiv 1910.10683; "mT5",
arXiv 2010.11934.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.encoder_decoder import EncoderDecoder
from vlpjax.weights.configs import ACTIVATIONS, filled_in, require
from vlpjax.weights.encoders import attention as attention_rules
from vlpjax.weights.encoders import expect, hold, linear, normed
from vlpjax.weights.family import Family
from vlpjax.weights.layout import Rule, under

_ACTIVATION_NAMES = (*ACTIVATIONS, *(f"gated-{name}" for name in ACTIVATIONS))
GATED_GELU = (
    "gated-gelu"  # a name of theirs: with gates this is the tanh form, without gates "gelu" is the exact one
)

DEFAULTS = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
    "dropout_rate": 0.1,
    "layer_norm_epsilon": 1e-6,
    "feed_forward_proj": "relu",
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "eos_token_id": 1,
}
MT5_DEFAULTS = {
    **DEFAULTS,
    "vocab_size": 250112,
    "d_ff": 1024,
    "num_layers": 8,
    "num_heads": 6,
    "feed_forward_proj": GATED_GELU,
}


def _attention(ours: str, theirs: str) -> tuple[Rule, ...]:
    return attention_rules(ours, f"{theirs}.q", f"{theirs}.k", f"{theirs}.v", f"{theirs}.o")


def _stack(mlp: int) -> tuple[Rule, ...]:
    """One half, whose MLPs are the sub-layer of this number."""
    own, inner = "block.{n}.layer.0", f"block.{{n}}.layer.{mlp}"
    up = Rule("block_{n}/mlp/up/kernel", f"{inner}.DenseReluDense.wi.weight", "o i -> i o")
    return (
        Rule("relative_bias", "block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        *normed("block_{n}/attention_norm", f"{own}.layer_norm"),
        *_attention("block_{n}/attention", f"{own}.SelfAttention"),
        *normed("block_{n}/mlp_norm", f"{inner}.layer_norm"),
        *linear("block_{n}/mlp/gate", f"{inner}.DenseReluDense.wi_0"),
        replace(up, theirs=f"{inner}.DenseReluDense.wi_1.weight", beside="block_{n}/mlp/gate/kernel"),
        up,
        *linear("block_{n}/mlp/down", f"{inner}.DenseReluDense.wo"),
        *normed("final_norm", "final_layer_norm"),
    )


CROSS: tuple[Rule, ...] = (
    *normed("block_{n}/cross_norm", "block.{n}.layer.1.layer_norm"),
    *_attention("block_{n}/cross_attention", "block.{n}.layer.1.EncDecAttention"),
)


def activation_of(name: str) -> tuple[str, bool]:
    """Our activation, and whether there are gates, by their ``feed_forward_proj``.

    Raises:
      UserError: one that there is not.
    """
    *gates, kind = name.split("-")
    if gates not in ([], ["gated"]) or kind not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(
            f"The T5 config has feed_forward_proj={name!r}; there are {known}, also after 'gated-'."
        )
    return ("gelu_tanh" if name == GATED_GELU else ACTIVATIONS[kind]), bool(gates)


def build(config: dict[str, Any]) -> nn.Module:
    """The module of a config."""
    multilingual = config.get("model_type") == "mt5"
    given, config = config, filled_in(config, MT5_DEFAULTS if multilingual else DEFAULTS)
    architectures = config.get("architectures") or []
    if any(name.endswith(("EncoderModel", "Classification", "Answering")) for name in architectures):
        raise UserError(
            f"The T5 config has architectures={architectures}; only the encoder-decoder can be represented."
        )
    require("T5", config, is_encoder_decoder=True)
    activation, gated = activation_of(config["feed_forward_proj"])
    # T5 1.1 said by this field that it has a head of its own, and that logits are not scaled.  Since version 5
    # `transformers` writes the second as a field, and the first is seen from the tensors alone.  mT5 is as T5 1.1.
    scaled = given.get("scale_decoder_outputs", given.get("tie_word_embeddings") is not False)
    headless = bool(architectures) and all(name.endswith("5Model") for name in architectures)
    return EncoderDecoder(
        vocabulary=config["vocab_size"],
        width=config["d_model"],
        depth=config["num_layers"],
        decoder_depth=config.get("num_decoder_layers", config["num_layers"]),
        heads=config["num_heads"],
        head_dim=config["d_kv"],
        mlp_dim=config["d_ff"],
        activation=activation,
        gated=gated,
        buckets=config["relative_attention_num_buckets"],
        max_distance=config["relative_attention_max_distance"],
        tied=headless or (scaled and not multilingual),
        dropout=config["dropout_rate"],
        epsilon=config["layer_norm_epsilon"],
        pad_id=config["pad_token_id"],
        start_id=config["decoder_start_token_id"],
        eos_id=config["eos_token_id"],
    )


def describe(model: nn.Module) -> dict[str, Any]:
    """The config of a module."""
    model = expect("T5", model, EncoderDecoder)
    names = {activation_of(name): name for name in reversed(_ACTIVATION_NAMES)}
    if (model.activation, model.gated) not in names:
        raise UserError(
            f"EncoderDecoder.activation is {model.activation!r} with gated={model.gated}, which T5 cannot hold."
        )
    config = {
        "vocab_size": model.vocabulary,
        "d_model": model.width,
        "d_kv": model.head_dim,
        "d_ff": model.mlp_dim,
        "num_layers": model.depth,
        "num_decoder_layers": model.layers,
        "num_heads": model.heads,
        "relative_attention_num_buckets": model.buckets,
        "relative_attention_max_distance": model.max_distance,
        "dropout_rate": model.dropout,
        "layer_norm_epsilon": model.epsilon,
        "feed_forward_proj": names[(model.activation, model.gated)],
        "is_encoder_decoder": True,
        "tie_word_embeddings": model.tied,
        "pad_token_id": model.pad_id,
        "decoder_start_token_id": model.start_id,
        "eos_token_id": model.eos_id,
    }
    hold("T5", model.clone(decoder_depth=model.layers), build(config))
    return config


def example(model: nn.Module) -> tuple[jax.ShapeDtypeStruct, ...]:
    """An input and an output text of one token."""
    text = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return text, text


FAMILY = Family(
    name="t5",
    model_types=("t5", "mt5"),
    architecture="T5ForConditionalGeneration",
    build=build,
    describe=describe,
    rules=(
        Rule("token_embedding/embedding", "shared.weight"),
        *under("encoder/", "encoder.", _stack(1)),
        *under("decoder/", "decoder.", _stack(2)),
        *under("decoder/", "decoder.", CROSS),
        *linear("head", "lm_head"),
    ),
    example=example,
    # A table of the decoder's cross-attention that the first published files have and nothing uses.
    ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    tied=(
        ("encoder.embed_tokens.weight", "shared.weight"),
        ("decoder.embed_tokens.weight", "shared.weight"),
        ("lm_head.weight", "shared.weight"),
    ),
)
