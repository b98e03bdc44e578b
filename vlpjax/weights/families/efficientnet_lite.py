"""EfficientNet-lite 0 to 4 as PyTorch ports of the published TensorFlow weights name their tensors.

They come as bare ``.pth`` files; a file without a config is read by naming its family, such as
``family="efficientnet_lite0"``, and is then a classifier of 1,000 ImageNet classes.

Source: "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", arXiv 1905.11946.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.efficientnet import SIZES, EfficientNetLite
from vlpjax.weights.encoders import expect
from vlpjax.weights.family import Family
from vlpjax.weights.layout import Rule, under

IMAGENET = 1000  # classes


def _norm(ours: str, theirs: str) -> tuple[Rule, ...]:
    """BatchNorm: what is learned, and the running statistics."""
    return (
        Rule(f"{ours}/norm/scale", f"{theirs}.weight"),
        Rule(f"{ours}/norm/bias", f"{theirs}.bias"),
        Rule(f"batch_stats/{ours}/norm/mean", f"{theirs}.running_mean"),
        Rule(f"batch_stats/{ours}/norm/var", f"{theirs}.running_var"),
    )


_POINT = "o i 1 1 -> i o"
_BLOCK = (
    Rule("expand/kernel", "_expand_conv.weight", _POINT),
    *_norm("expand", "_bn0"),
    Rule("depthwise/kernel", "_depthwise_conv.weight", "c 1 p q -> p q c"),
    *_norm("depthwise", "_bn1"),
    Rule("project/kernel", "_project_conv.weight", _POINT),
    *_norm("project", "_bn2"),
)
RULES = (
    Rule("stem/kernel", "_conv_stem.weight", "o c p q -> p q c o"),
    *_norm("stem", "_bn0"),
    *under("block_{n}/", "_blocks.{n}.", _BLOCK),
    Rule("top/kernel", "_conv_head.weight", _POINT),
    *_norm("top", "_bn1"),
    Rule("head/kernel", "_fc.weight", "o i -> i o"),
    Rule("head/bias", "_fc.bias"),
)


def build(config: dict[str, Any], size: int) -> EfficientNetLite:
    """The tower of a size, with the classifier that the config names (``"num_classes"``; null has none)."""
    width, depth, _ = SIZES[size]
    return EfficientNetLite(
        width=width,
        depth=depth,
        channels=config.get("num_channels", 3),
        classes=config.get("num_classes", IMAGENET),
    )


def describe(model: nn.Module, size: int) -> dict[str, Any]:
    """The config of a tower of this size."""
    tower = expect("EfficientNet-lite", model, EfficientNetLite)
    config = {
        "model_type": f"efficientnet_lite{size}",
        "num_channels": tower.channels,
        "num_classes": tower.classes,
        "image_size": SIZES[size][2],
    }
    built = build(config, size)
    for field in ("width", "depth", "embedding", "epsilon"):
        if getattr(tower, field) != getattr(built, field):
            raise UserError(
                f"EfficientNetLite.{field} is {getattr(tower, field)!r}; in EfficientNet-lite{size} it is "
                f"{getattr(built, field)!r}."
            )
    return config


def example(model: nn.Module) -> Any:
    """One small image; any size has the same parameters."""
    tower = expect("EfficientNet-lite", model, EfficientNetLite)
    return (jax.ShapeDtypeStruct((1, 32, 32, tower.channels), jnp.float32),)


def _family(size: int) -> Family:
    name = f"efficientnet_lite{size}"
    return Family(
        name=name,
        model_types=(name,),
        architecture="",
        build=functools.partial(build, size=size),
        describe=functools.partial(describe, size=size),
        rules=RULES,
        example=example,
        sizes=lambda config: {},
        ignored=(r".*\.num_batches_tracked",),
        prefixes=("", "module."),
    )


LITE0 = _family(0)
LITE1 = _family(1)
LITE2 = _family(2)
LITE3 = _family(3)
LITE4 = _family(4)
