"""What experiments share whatever they train: a named config, AdamW, and ImageNet-1K as TFDS prepares it.

No experiment itself (files whose names begin with an underscore are none).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optax

from vlpjax.config import Config, spec
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.sources import TFDS
from vlpjax.data.transforms import CenterCrop, Decode, Normalize, Resize
from vlpjax.experiment import base_config
from vlpjax.optim.optimizer import Optimizer, Schedule

IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))  # of its pixels
IMAGENET_EXAMPLES = 1_281_167


def start(title: str, size: str) -> Config:
    """A config with a name."""
    config = base_config()
    config.name = f"{title}, {size}"
    return config


def adamw(
    rate: float,
    *,
    warmup: str,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    final: float = 0.0,
    **fields: Any,
) -> Config:
    """AdamW with a linear warm-up and half a cosine, down to ``final`` times the rate; only matrices decay."""
    return spec(
        Optimizer,
        direction=spec(optax.scale_by_adam, b1=betas[0], b2=betas[1], eps=eps),
        learning_rate=rate,
        schedule=spec(Schedule, warmup=warmup, final=final),
        weight_decay=weight_decay,
        **fields,
    )


def imagenet(transforms: Mapping[str, Any], keep: tuple[str, ...], batch_size: int) -> Config:
    """Training images; ``transforms`` come after decoding."""
    return spec(
        Pipeline,
        source=_imagenet("train"),
        transforms=dict(decode=spec(Decode), **transforms),
        batch_size=batch_size,
        keep=keep,
    )


def imagenet_labelled(split: str, size: int = 224) -> Config:
    """The middle of every image, with its label, once and in order."""
    return spec(
        Pipeline,
        source=_imagenet(split),
        transforms=dict(
            decode=spec(Decode),
            resize=spec(Resize, size=round(size * 256 / 224), mode="shorter"),
            crop=spec(CenterCrop, size=size),
            normalize=spec(Normalize, **IMAGENET),
        ),
        batch_size=1024,
        shuffle=False,
        repeat=False,
        keep=("image", "label"),
    )


def _imagenet(split: str) -> Config:
    return spec(TFDS, name="imagenet2012", data_dir="~/tensorflow_datasets", split=split)
