"""What the families of image and text encoders share: layers as rules, names of activations, and checks.

Nothing here is a family; a family file is its rules, ``build`` and ``describe``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.decoder import Decoder
from vlpjax.models.heads import Scalar
from vlpjax.models.positions_2d import pair
from vlpjax.models.text import TextTransformer
from vlpjax.models.towers import Towers
from vlpjax.models.vit import ViT
from vlpjax.weights.layout import Rule

# Of the joint heads that contrastive objectives learn: their places among our towers (an objective called "clip").
SCALE, BIAS = "clip_logit_scale", "clip_logit_bias"

# Settings of training and of execution: a checkpoint says nothing about them, so that they need not agree with it.
FREE = frozenset(
    {"dtype", "dropout", "drop_path", "patch_dropout", "rotary_rescale", "scan", "remat", "sequence_scheme",
     "resize_positions", "parent", "name"}
)  # fmt: skip
STEM = frozenset({"stem_channels", "stem_strides", "stem_norm"})


# --- rules ----------------------------------------------------------------------------------------------------


def linear(ours: str, theirs: str) -> tuple[Rule, ...]:
    """A linear layer with or without bias."""
    return Rule(f"{ours}/kernel", f"{theirs}.weight", "o i -> i o"), Rule(f"{ours}/bias", f"{theirs}.bias")


def normed(ours: str, theirs: str) -> tuple[Rule, ...]:
    """A LayerNorm, or an RMSNorm, which has no bias."""
    return Rule(f"{ours}/scale", f"{theirs}.weight"), Rule(f"{ours}/bias", f"{theirs}.bias")


def convolved(ours: str, theirs: str) -> tuple[Rule, ...]:
    """A patch projection that is written as a convolution."""
    return (
        Rule(f"{ours}/kernel", f"{theirs}.weight", "o c p q -> (p q c) o"),
        Rule(f"{ours}/bias", f"{theirs}.bias"),
    )


def attention(ours: str, query: str, key: str, value: str, out: str) -> tuple[Rule, ...]:
    """Attention whose four projections are layers of their own."""
    named = {"query": query, "key": key, "value": value}
    entering = (
        rule
        for mine, theirs in named.items()
        for rule in (
            Rule(f"{ours}/{mine}/kernel", f"{theirs}.weight", "(h d) i -> i h d"),
            Rule(f"{ours}/{mine}/bias", f"{theirs}.bias", "(h d) -> h d"),
        )
    )
    return (*entering, *attention_out(ours, out))


def attention_out(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The output projection of attention."""
    return (
        Rule(f"{ours}/out/kernel", f"{theirs}.weight", "o (h d) -> h d o"),
        Rule(f"{ours}/out/bias", f"{theirs}.bias"),
    )


def fused_attention(ours: str, weight: str, bias: str, out: str) -> tuple[Rule, ...]:
    """Attention whose query, key and value are one tensor, in this order (``torch.nn.MultiheadAttention``, timm)."""
    names = ("query", "key", "value")
    return (
        Rule(tuple(f"{ours}/{name}/kernel" for name in names), weight, "(n h d) i -> n i h d"),
        Rule(tuple(f"{ours}/{name}/bias" for name in names), bias, "(n h d) -> n h d"),
        *attention_out(ours, out),
    )


def attention_pool(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The attention pooling of SigLIP in `transformers`."""
    fused = fused_attention(
        f"{ours}/attention",
        f"{theirs}.attention.in_proj_weight",
        f"{theirs}.attention.in_proj_bias",
        f"{theirs}.attention.out_proj",
    )
    return (
        Rule(f"{ours}/query", f"{theirs}.probe"),
        *fused,
        *normed(f"{ours}/mlp_norm", f"{theirs}.layernorm"),
        *linear(f"{ours}/mlp/up", f"{theirs}.mlp.fc1"),
        *linear(f"{ours}/mlp/down", f"{theirs}.mlp.fc2"),
    )


def clip_block(theirs: str) -> tuple[Rule, ...]:
    """A block as CLIP and SigLIP spell it in `transformers`, in either tower."""
    of = f"{theirs}.self_attn"
    return (
        *normed("block_{n}/attention_norm", f"{theirs}.layer_norm1"),
        *attention("block_{n}/attention", f"{of}.q_proj", f"{of}.k_proj", f"{of}.v_proj", f"{of}.out_proj"),
        *normed("block_{n}/mlp_norm", f"{theirs}.layer_norm2"),
        *linear("block_{n}/mlp/up", f"{theirs}.mlp.fc1"),
        *linear("block_{n}/mlp/down", f"{theirs}.mlp.fc2"),
    )


def vit_block(theirs: str) -> tuple[Rule, ...]:
    """A block as google's ViT and ViT-MAE spell it in `transformers`."""
    of = f"{theirs}.attention.attention"
    out = f"{theirs}.attention.output.dense"
    return (
        *normed("block_{n}/attention_norm", f"{theirs}.layernorm_before"),
        *attention("block_{n}/attention", f"{of}.query", f"{of}.key", f"{of}.value", out),
        *normed("block_{n}/mlp_norm", f"{theirs}.layernorm_after"),
        *linear("block_{n}/mlp/up", f"{theirs}.intermediate.dense"),
        *linear("block_{n}/mlp/down", f"{theirs}.output.dense"),
    )


# --- configs --------------------------------------------------------------------------------------------------


def size(value: Any) -> int | tuple[int, int]:
    """A height and width as our fields take them."""
    return value if isinstance(value, int) else (int(value[0]), int(value[1]))


def their_size(value: int | tuple[int, int]) -> int | list[int]:
    """A height and width as a config writes them: one number if they are equal."""
    height, width = pair(value)
    return height if height == width else [height, width]


def square(family: str, field: str, value: int | tuple[int, int]) -> int:
    """The side of a square.

    Raises:
      UserError: height and width differ.
    """
    height, width = pair(value)
    if height != width:
        raise UserError(
            f"ViT.{field} is {(height, width)}, but {family} takes squares only: make height and width equal."
        )
    return height


# --- modules --------------------------------------------------------------------------------------------------


def expect(family: str, model: nn.Module, kind: type[nn.Module]) -> Any:
    """The module, if it is of this kind.

    Raises:
      UserError: it is not.
    """
    if not isinstance(model, kind):
        raise UserError(f"{family} is a {kind.__name__}, but the module is a {type(model).__name__}.")
    return model


def towers_of(
    family: str, model: nn.Module, needed: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, Any]:
    """The towers of these names.

    Raises:
      UserError: the module is no ``Towers``, lacks one of these, or has others, which would be lost.
    """
    names = set(expect(family, model, Towers))
    lacking = [name for name in needed if name not in names]
    surplus = sorted(names - {*needed, *optional})
    if lacking or surplus:
        flaws = [f"lacks {', '.join(lacking)}"] * bool(lacking) + [f"also has {', '.join(surplus)}"] * bool(
            surplus
        )
        raise UserError(f"{family} has the towers {', '.join(needed)}; the model {' and '.join(flaws)}.")
    return {name: model.makers[name]() for name in model}  # type: ignore[attr-defined]


def mlp_width(tower: ViT | TextTransformer) -> int:
    """The hidden width of a tower's MLPs."""
    return tower.mlp_dim or round(tower.mlp_ratio * tower.width)


def hold(family: str, model: nn.Module, built: nn.Module) -> None:
    """Checks that ``built``, made of a description of ``model``, computes the same.

    Settings of training and of execution may differ; all other fields must not.

    Raises:
      UserError: a field that got lost, with the value that the family would make of it.
    """
    if isinstance(model, ViT):
        built = built.clone(resize_positions=model.resize_positions)
    found, kept = _meaning(model), _meaning(built)
    for field, value in found.items():
        if kept[field] != value:
            raise UserError(
                f"{type(model).__name__}.{field} is {value!r}, which {family} cannot hold; there it is {kept[field]!r}."
            )


def _meaning(model: nn.Module) -> dict[str, Any]:
    """The fields that decide what a module computes, defaults resolved."""
    values = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in FREE
    }
    if isinstance(model, (ViT, TextTransformer)):
        del values["mlp_ratio"]
        values["mlp_dim"] = mlp_width(model)
    if isinstance(model, Decoder):
        values["kv_heads"] = model.kv_heads or model.heads
        values["head_dim"] = model.head_dim or model.width // model.heads
        values["mlp_dim"] = model.mlp_dim or 4 * model.width
    if isinstance(model, ViT):
        image, patch = pair(model.image_size), pair(model.patch)
        values |= {"image_size": image, "patch": patch, "patch_base": pair(model.patch_base or patch)}
        values["class_tokens"] = (
            int(model.pool == "cls") if model.class_tokens is None else model.class_tokens
        )
        values["position_prefix"] = model.position_prefix and values["class_tokens"] > 0
        values["position_grid"] = tuple(model.position_grid or (image[0] // patch[0], image[1] // patch[1]))
        # What other settings leave without effect.
        without = {"segments"} | (STEM if model.stem == "linear" else set())
        if model.positions != "learned":
            without |= {"position_grid", "position_prefix", "position_method", "position_antialias"}
        without |= {"sincos_form"} if model.positions != "sincos" else set()
        without |= {"rotary_form", "rotary_base"} if model.positions != "rotary" else set()
        if (
            values["position_grid"] == (image[0] // patch[0], image[1] // patch[1])
            and not model.resize_positions
        ):
            without |= {"position_method", "position_antialias"}
        if model.layer_scale is not None:
            values["layer_scale"] = True  # an initial value
        for field in without:
            values[field] = None
    return values


def image_example(tower: ViT) -> tuple[jax.ShapeDtypeStruct, ...]:
    """One image of a tower's size."""
    return (jax.ShapeDtypeStruct((1, *pair(tower.image_size), tower.channels), jnp.float32),)


def text_example(tower: TextTransformer) -> tuple[jax.ShapeDtypeStruct, ...]:
    """One sequence of a tower's length."""
    return (jax.ShapeDtypeStruct((1, tower.length), jnp.int32),)


def tower_example(model: nn.Module) -> Any:
    """Arguments of a tower, or of each of several: images, texts, and none for learned numbers."""
    if isinstance(model, Towers):
        return {name: tower_example(model.makers[name]()) for name in model}
    if isinstance(model, ViT):
        return image_example(model)
    if isinstance(model, TextTransformer):
        return text_example(model)
    if isinstance(model, Scalar):
        return ()
    raise UserError(f"A {type(model).__name__} is no tower of images or texts.")
