"""DINOv2 as `transformers` writes it, with and without registers.

The table of positions is resized to every image: images may have any sides that the patch divides.

Source: "DINOv2: Learning Robust Visual Features without Supervision", arXiv 2304.07193; "Vision Transformers Need
Registers", arXiv 2309.16588.
"""

from __future__ import annotations

from typing import Any

from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.vit import ViT
from vlpjax.weights.configs import activation_named, filled_in, their_activation
from vlpjax.weights.encoders import (
    attention,
    convolved,
    expect,
    hold,
    linear,
    mlp_width,
    normed,
    size,
    their_size,
    tower_example,
)
from vlpjax.weights.family import Family
from vlpjax.weights.layout import Rule

_BLOCK = "encoder.layer.{n}"
RULES: tuple[Rule, ...] = (
    *convolved("patches/projection", "embeddings.patch_embeddings.projection"),
    Rule("class_token", "embeddings.cls_token"),
    Rule("registers", "embeddings.register_tokens"),
    Rule("mask_token", "embeddings.mask_token", "1 d -> 1 1 d"),
    Rule("position_embedding", "embeddings.position_embeddings"),
    *normed("block_{n}/attention_norm", f"{_BLOCK}.norm1"),
    *attention(
        "block_{n}/attention",
        f"{_BLOCK}.attention.attention.query",
        f"{_BLOCK}.attention.attention.key",
        f"{_BLOCK}.attention.attention.value",
        f"{_BLOCK}.attention.output.dense",
    ),
    Rule("block_{n}/attention_scale", f"{_BLOCK}.layer_scale1.lambda1"),
    *normed("block_{n}/mlp_norm", f"{_BLOCK}.norm2"),
    Rule("block_{n}/mlp_scale", f"{_BLOCK}.layer_scale2.lambda1"),
    *normed("final_norm", "layernorm"),
)
PLAIN_MLP = (
    *linear("block_{n}/mlp/up", f"{_BLOCK}.mlp.fc1"),
    *linear("block_{n}/mlp/down", f"{_BLOCK}.mlp.fc2"),
)
# The giant's: both entering projections are one layer, the activated one first.
_ENTERING = ("block_{n}/mlp/gate", "block_{n}/mlp/up")
GATED_MLP = (
    Rule(
        tuple(f"{name}/kernel" for name in _ENTERING), f"{_BLOCK}.mlp.weights_in.weight", "(n o) i -> n i o"
    ),
    Rule(tuple(f"{name}/bias" for name in _ENTERING), f"{_BLOCK}.mlp.weights_in.bias", "(n o) -> n o"),
    *linear("block_{n}/mlp/down", f"{_BLOCK}.mlp.weights_out"),
)

DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": True,
    "layerscale_value": 1.0,
    "use_swiglu_ffn": False,
    "use_mask_token": True,
}


def gated_width(width: int, ratio: float) -> int:
    """The hidden width of gated MLPs: two thirds of the plain one's, rounded up to a multiple of 8."""
    return (int(int(width * ratio) * 2 / 3) + 7) // 8 * 8


def build(config: dict[str, Any], registers: int | None = None) -> ViT:
    """The tower of a config.

    Args:
      registers: their number; None is DINOv2 as it was before it had them.
    """
    for architecture in config.get("architectures") or []:
        if not architecture.endswith(("Model", "Backbone")):
            raise UserError(
                f"The DINOv2 config has the architecture {architecture!r}, whose head reads more than one feature; "
                "there is the tower alone: 'Dinov2Model'."
            )
    config = filled_in(config, DEFAULTS)
    gated, width = config["use_swiglu_ffn"], config["hidden_size"]
    return ViT(
        image_size=size(config["image_size"]),
        patch=size(config["patch_size"]),
        patch_bias=True,
        channels=config["num_channels"],
        width=width,
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        mlp_dim=gated_width(width, config["mlp_ratio"]) if gated else int(width * config["mlp_ratio"]),
        gated=gated,
        activation="silu" if gated else activation_named("DINOv2", config["hidden_act"]),
        qkv_bias=config["qkv_bias"],
        layer_scale=config["layerscale_value"],
        registers=registers or 0,
        mask_token=registers is not None or config["use_mask_token"],
        resize_positions=True,
        position_antialias=registers is not None,
        pool="cls",
        pre_norm=False,
        epsilon=config["layer_norm_eps"],
    )


def build_with_registers(config: dict[str, Any]) -> ViT:
    """The tower of a config with registers."""
    count = config.get("num_register_tokens", 4)
    if not count:
        raise UserError("The DINOv2 config has num_register_tokens=0; write it as 'dinov2' instead.")
    return build(config, count)


def _describe(model: nn.Module, *, registers: bool, gated: bool) -> dict[str, Any]:
    tower = expect("DINOv2", model, ViT)
    for field, wanted in (("registers", registers), ("gated", gated)):
        if bool(getattr(tower, field)) != wanted:
            raise UserError(
                f"ViT.{field} is {getattr(tower, field)}; DINOv2 is four families: 'dinov2' and "
                "'dinov2_with_registers', each with '_gated' behind if MLPs are gated."
            )
    hidden, ratio = mlp_width(tower), mlp_width(tower) / tower.width
    if gated:  # the ratio is that of a plain MLP; the one that leads to this width, if there is one
        ratio = next(
            (r for r in (4, hidden * 3 / 2 / tower.width) if gated_width(tower.width, r) == hidden), ratio
        )
    if isinstance(ratio, float) and ratio.is_integer():
        ratio = int(ratio)
    if not isinstance(ratio, int):
        raise UserError(
            f"The MLPs are {hidden} wide, which is no whole multiple of ViT.width {tower.width}, as DINOv2's are"
            + (", before they are gated." if gated else ".")
        )
    config = {
        "hidden_size": tower.width,
        "num_hidden_layers": tower.depth,
        "num_attention_heads": tower.heads,
        "mlp_ratio": ratio,
        "hidden_act": "gelu" if gated else their_activation(tower.activation),
        "layer_norm_eps": tower.epsilon,
        "image_size": their_size(tower.image_size),
        "patch_size": their_size(tower.patch),
        "num_channels": tower.channels,
        "qkv_bias": tower.qkv_bias,
        "layerscale_value": tower.layer_scale,
        "use_swiglu_ffn": gated,
    }
    if registers:
        config["num_register_tokens"] = tower.registers
        hold("DINOv2 with registers", tower, build_with_registers(config))
    else:
        config["use_mask_token"] = tower.mask_token
        hold("DINOv2", tower, build(config))
    return config


def _family(*, registers: bool, gated: bool) -> Family:
    # Reading, the names in the file decide between the two forms of MLP; writing, the order of the rules does.
    mlps = (*GATED_MLP, *PLAIN_MLP) if gated else (*PLAIN_MLP, *GATED_MLP)
    kind = "dinov2_with_registers" if registers else "dinov2"
    return Family(
        name=kind + "_gated" * gated,
        model_types=(kind,),
        architecture="Dinov2WithRegistersModel" if registers else "Dinov2Model",
        build=build_with_registers if registers else build,
        describe=lambda model: _describe(model, registers=registers, gated=gated),
        rules=(*RULES, *mlps),
        example=tower_example,
        prefixes=("", f"{kind}."),
    )


DINOV2 = _family(registers=False, gated=False)
DINOV2_GATED = _family(registers=False, gated=True)
DINOV2_WITH_REGISTERS = _family(registers=True, gated=False)
DINOV2_WITH_REGISTERS_GATED = _family(registers=True, gated=True)
