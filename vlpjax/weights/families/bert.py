"""BERT as `transformers` writes it: the encoder with its pooler, or the encoder with the head for masked tokens.

Source: "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", arXiv 1810.04805.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlpjax.models.text import MaskedLanguageHead, TextTransformer
from vlpjax.models.towers import Towers
from vlpjax.weights.configs import activation_named, filled_in, require, their_activation
from vlpjax.weights.encoders import (
    attention,
    expect,
    hold,
    linear,
    mlp_width,
    normed,
    text_example,
    towers_of,
)
from vlpjax.weights.family import Family
from vlpjax.weights.layout import Rule, under

HEAD = "mlm_head"  # the tower's name beside "text"
MASKED = "BertForMaskedLM"

DEFAULTS = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}


def _layer_norm(ours: str, theirs: str) -> tuple[Rule, ...]:
    """A LayerNorm in today's spelling and in that of the first conversions from TensorFlow."""
    return (
        *normed(ours, f"{theirs}.LayerNorm"),
        Rule(f"{ours}/scale", f"{theirs}.LayerNorm.gamma"),
        Rule(f"{ours}/bias", f"{theirs}.LayerNorm.beta"),
    )


def bert_attention(ours: str, of: str, out: str) -> tuple[Rule, ...]:
    """Attention as BERT and its descendants spell it: ``of.query``, ..., ``out.dense``."""
    return attention(ours, f"{of}.query", f"{of}.key", f"{of}.value", f"{out}.dense")


_LAYER = "encoder.layer.{n}"
TOWER: tuple[Rule, ...] = (
    Rule("token_embedding/embedding", "embeddings.word_embeddings.weight"),
    Rule("position_embedding", "embeddings.position_embeddings.weight"),
    Rule("type_embedding/embedding", "embeddings.token_type_embeddings.weight"),
    *_layer_norm("embedding_norm", "embeddings"),
    *bert_attention("block_{n}/attention", f"{_LAYER}.attention.self", f"{_LAYER}.attention.output"),
    *_layer_norm("block_{n}/attention_norm", f"{_LAYER}.attention.output"),
    *linear("block_{n}/mlp/up", f"{_LAYER}.intermediate.dense"),
    *linear("block_{n}/mlp/down", f"{_LAYER}.output.dense"),
    *_layer_norm("block_{n}/mlp_norm", f"{_LAYER}.output"),
    *linear("pooler", "pooler.dense"),
)
MASKED_HEAD: tuple[Rule, ...] = (
    *linear("dense", "transform.dense"),
    *_layer_norm("norm", "transform"),
    Rule("bias", "bias"),
)


def _build_tower(config: Mapping[str, Any], pooler: bool) -> TextTransformer:
    config = filled_in(config, DEFAULTS)
    require(
        "BERT",
        config,
        is_decoder=False,
        add_cross_attention=False,
        position_embedding_type="absolute",
        tie_word_embeddings=True,
    )
    return TextTransformer(
        vocabulary=config["vocab_size"],
        length=config["max_position_embeddings"],
        width=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_dim=config["intermediate_size"],
        activation=activation_named("BERT", config["hidden_act"]),
        dropout=config["hidden_dropout_prob"],
        epsilon=config["layer_norm_eps"],
        pad_id=config["pad_token_id"],
        types=config["type_vocab_size"],
        causal=False,
        mask_padding=True,
        pool="cls",
        pooler=pooler,
        order="post",
        embedding_norm=True,
        final_norm=False,
    )


def build(config: dict[str, Any]) -> nn.Module:
    """The tower alone, or beside its head if the config names the class with one."""
    masked = MASKED in (config.get("architectures") or [])
    tower = _build_tower(config, pooler=not masked)
    if not masked:
        return tower
    head = MaskedLanguageHead(tower.vocabulary, activation=tower.activation, epsilon=tower.epsilon)
    return Towers.of({"text": tower, HEAD: head})


def describe(model: nn.Module) -> dict[str, Any]:
    """The config of a tower, or of a tower and a head."""
    if isinstance(model, Towers):
        towers = towers_of("BERT with a head", model, ("text", HEAD))
        tower = expect("BERT", towers["text"], TextTransformer)
        config = _describe_tower(tower, [MASKED])
        built = towers_of("BERT with a head", build(config), ("text", HEAD))
        hold("BERT", expect("BERT's head", towers[HEAD], MaskedLanguageHead), built[HEAD])
        return config
    return _describe_tower(expect("BERT", model, TextTransformer), ["BertModel"])


def _describe_tower(tower: TextTransformer, architectures: list[str]) -> dict[str, Any]:
    config = {
        "architectures": architectures,
        "vocab_size": tower.vocabulary,
        "hidden_size": tower.width,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "intermediate_size": mlp_width(tower),
        "hidden_act": their_activation(tower.activation),
        "hidden_dropout_prob": tower.dropout,
        "attention_probs_dropout_prob": 0.0,  # ours has none
        "max_position_embeddings": tower.length,
        "type_vocab_size": tower.types,
        "layer_norm_eps": tower.epsilon,
        "pad_token_id": tower.pad_id,
    }
    hold("BERT", tower, _build_tower(config, pooler=architectures != [MASKED]))
    return config


def example(model: nn.Module) -> Any:
    """Texts, and for the head their tokens with the table of embeddings."""
    if not isinstance(model, Towers):
        return text_example(expect("BERT", model, TextTransformer))
    tower = model.makers["text"]()
    assert isinstance(tower, TextTransformer)
    tokens, table = (1, 1, tower.width), (tower.vocabulary, tower.width)
    head = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (tokens, table))
    return {"text": text_example(tower), HEAD: head}


FAMILY = Family(
    name="bert",
    model_types=("bert",),
    architecture="BertModel",
    build=build,
    describe=describe,
    rules=(
        *TOWER,
        *under("", "bert.", TOWER),
        *under("text/", "bert.", TOWER),
        *under(f"{HEAD}/", "cls.predictions.", MASKED_HEAD),
    ),
    example=example,
    # Classes differ in which heads they have: a tower alone takes none, and one with the head for masked tokens has no
    # pooler.  A file may have them all.
    ignored=(r".*\.position_ids", r"(bert\.)?pooler\..*", r"cls\..*"),
    tied=(
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ),
)
