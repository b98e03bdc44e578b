"""Masked autoencoders as `transformers` writes them: the encoder alone, or with the decoder that predicts pixels.

Both are read from the same files: the encoder by default, and by ``family="vit_mae_with_decoder"`` the towers
``image`` and ``mae_decoder``.  Their encoder masks whenever it is called, in inference too, unless it is told to mask
nothing; ours does what it is told by ``keep``.

Positions are fixed sines and cosines, which are tensors there.  In an encoder that is read they are a parameter (a run
that fine-tunes the tower may freeze it by name); an encoder that computes them is written as well.

Source: "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from vlpjax.models.mae import MAEDecoder
from vlpjax.models.positions_2d import pair
from vlpjax.models.towers import Towers
from vlpjax.models.vit import ViT
from vlpjax.weights.configs import activation_named, filled_in, require
from vlpjax.weights.encoders import expect, hold, linear, normed, tower_example, towers_of, vit_block
from vlpjax.weights.families.vit import TOWER, build_tower, describe_tower
from vlpjax.weights.family import Family
from vlpjax.weights.layout import Rule, under

MAE_DECODER = "mae_decoder"  # the tower that the decoder is
MASK_RATIO = 0.75  # of the paper
DECODER: tuple[Rule, ...] = (
    *linear("embed", "decoder_embed"),
    Rule("mask_token", "mask_token"),
    *vit_block("decoder_layers.{n}"),
    *vit_block("decoder_encoder.layer.{n}"),  # as `transformers` 5 spells them when it writes
    *normed("norm", "decoder_norm"),
    *linear("prediction", "decoder_pred"),
)
DEFAULTS = {
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "patch_size": 16,
    "num_channels": 3,
    "decoder_hidden_size": 512,
    "decoder_num_hidden_layers": 8,
    "decoder_num_attention_heads": 16,
    "decoder_intermediate_size": 2048,
}


def positions(grid: tuple[int, int], width: int) -> np.ndarray:
    """Sines and cosines of a grid of patches behind a class token without any: float32 [1, 1 + N, D]."""
    rates = 1.0 / 10000.0 ** (np.arange(width // 4) / (width // 4))
    rows, columns = (axis.reshape(-1, 1) * rates for axis in np.indices(grid))  # [N, D / 4]
    table = np.concatenate([np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)], axis=1)
    return np.pad(table, [(1, 0), (0, 0)])[None].astype(np.float32)


def _grid(tower: ViT) -> tuple[int, int]:
    (height, width), patch = pair(tower.image_size), pair(tower.patch)
    return height // patch[0], width // patch[1]


def _features(tower: ViT) -> int:
    height, width = pair(tower.patch)
    return height * width * tower.channels


def build(config: dict[str, Any]) -> Towers:
    """Encoder and decoder of a config."""
    require("ViT-MAE", config, qkv_bias=True)
    image, config = build_tower(config), filled_in(config, DEFAULTS)
    width = config["decoder_hidden_size"]
    decoder = MAEDecoder(
        features=_features(image),
        width=width,
        depth=config["decoder_num_hidden_layers"],
        heads=config["decoder_num_attention_heads"],
        mlp_ratio=config["decoder_intermediate_size"] / width,
        epsilon=config["layer_norm_eps"],
        activation=activation_named("ViT-MAE", config["hidden_act"]),
    )
    return Towers.of({"image": image, MAE_DECODER: decoder})


def describe(model: nn.Module) -> dict[str, Any]:
    """The config of an encoder and its decoder."""
    towers = towers_of("ViT-MAE", model, ("image", MAE_DECODER))
    decoder: Any = expect("ViT-MAE's decoder", towers[MAE_DECODER], MAEDecoder)
    config = {
        **_describe_encoder(towers["image"]),
        "decoder_hidden_size": decoder.width,
        "decoder_num_hidden_layers": decoder.depth,
        "decoder_num_attention_heads": decoder.heads,
        "decoder_intermediate_size": round(decoder.mlp_ratio * decoder.width),
        "mask_ratio": MASK_RATIO,
    }
    hold("ViT-MAE", decoder.clone(mlp_ratio=1.0), build(config).makers[MAE_DECODER]().clone(mlp_ratio=1.0))
    return config


def _describe_encoder(model: nn.Module) -> dict[str, Any]:
    tower = expect("ViT-MAE", model, ViT)
    # Theirs returns tokens and pools nothing, so that it holds ours however it pools.
    plain = tower.clone(pool="cls", class_tokens=1 if tower.class_tokens is None else tower.class_tokens)
    if _computes_positions(tower):
        plain = plain.clone(positions="learned")
    config = describe_tower(tower)
    hold("ViT-MAE", plain, build_tower(config))
    return config


def _computes_positions(tower: ViT) -> bool:
    return tower.positions == "sincos" and tower.sincos_form == "mae"


def fixed_of_encoder(model: nn.Module) -> dict[str, np.ndarray]:
    """The encoder's positions, if it computes them."""
    tower = expect("ViT-MAE", model, ViT)
    table = positions(_grid(tower), tower.width)
    return {"embeddings.position_embeddings": table} if _computes_positions(tower) else {}


def fixed(model: nn.Module) -> dict[str, np.ndarray]:
    """The decoder's positions, and the encoder's if it computes them."""
    towers: dict[str, Any] = towers_of("ViT-MAE", model, ("image", MAE_DECODER))
    own = {f"vit.{name}": table for name, table in fixed_of_encoder(towers["image"]).items()}
    return {
        **own,
        "decoder.decoder_pos_embed": positions(_grid(towers["image"]), towers[MAE_DECODER].width),
    }


def example(model: nn.Module) -> Any:
    """Images for the encoder; for the decoder, tokens of which the first patch was left out."""
    towers: dict[str, Any] = towers_of("ViT-MAE", model, ("image", MAE_DECODER))
    image, grid = towers["image"], _grid(towers["image"])
    count = grid[0] * grid[1]
    tokens = jax.ShapeDtypeStruct((1, max(1, count - 1), image.width), jnp.float32)
    restore = jax.ShapeDtypeStruct((1, count), jnp.int32)
    return {"image": tower_example(image), MAE_DECODER: (tokens, restore, grid)}


VIT_MAE = Family(
    name="vit_mae",
    model_types=("vit_mae",),
    architecture="ViTMAEModel",
    build=build_tower,
    describe=lambda model: {**_describe_encoder(model), "mask_ratio": 0.0},
    rules=TOWER,
    example=tower_example,
    fixed=fixed_of_encoder,
    ignored=(r"decoder\..*",),
    prefixes=("", "vit."),
)
VIT_MAE_WITH_DECODER = Family(
    name="vit_mae_with_decoder",
    model_types=("vit_mae",),
    architecture="ViTMAEForPreTraining",
    build=build,
    describe=describe,
    rules=(*under("image/", "vit.", TOWER), *under("mae_decoder/", "decoder.", DECODER)),
    example=example,
    fixed=fixed,
)
