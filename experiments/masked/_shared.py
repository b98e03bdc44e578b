"""What the experiments of this folder share: a small tower, the drawings without captions, and ImageNet.

No experiment itself (files whose names begin with an underscore are none).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import optax

from experiments import _bundled
from vlpjax.config import Config, spec
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.sources import TFDS
from vlpjax.data.transforms import Decode, Normalize, RandomFlip, RandomResizedCrop
from vlpjax.errors import UserError
from vlpjax.experiment import base_config
from vlpjax.models.vit import ViT
from vlpjax.optim.optimizer import Optimizer, Schedule

SIZES = ("small", "paper")
SIZE, PATCH = 32, 4  # of the small runs, in pixels
IMAGENET_EXAMPLES = 1_281_167
IMAGENET = dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def start(title: str, size: str) -> Config:
    """A config with a name; an unknown size is an error."""
    if size not in SIZES:
        raise UserError(f"{title} has no size {size!r}; there are {', '.join(SIZES)}.")
    config = base_config()
    config.name = f"{title}, {size}"
    return config


def small_tower(**fields: Any) -> Config:
    """A ViT of 0.8 million parameters with MAE's positions, for images of 32 pixels."""
    settings = dict(
        image_size=SIZE,
        patch=PATCH,
        patch_bias=True,
        width=128,
        depth=4,
        heads=4,
        class_tokens=1,
        positions="sincos",
        sincos_form="mae",
        pool="mean",
        pre_norm=False,
    )
    return spec(ViT, **(settings | fields))


def drawings(
    batch_size: int = 128, transforms: Mapping[str, Any] | None = None, keep: tuple[str, ...] = ("image",)
) -> Config:
    """The seen vendors' drawings, weakly augmented: a crop and a flip."""
    weak = dict(crop=spec(RandomResizedCrop, size=SIZE, scale=(0.5, 1.0)), flip=spec(RandomFlip))
    steps = weak if transforms is None else dict(transforms)
    return _bundled.train(dict(**steps, normalize=_bundled.normalize()), keep, batch_size)


def small_optimizer(rate: float = 1e-3) -> Config:
    """AdamW with a short warm-up."""
    return adamw(rate, warmup="10%")


def adamw(
    rate: float,
    *,
    warmup: str,
    weight_decay: float = 0.05,
    betas: tuple[float, float] = (0.9, 0.95),
    **fields: Any,
) -> Config:
    """AdamW with a linear warm-up and half a cosine down to 0; only matrices decay."""
    return spec(
        Optimizer,
        direction=spec(optax.scale_by_adam, b1=betas[0], b2=betas[1]),
        learning_rate=rate,
        schedule=spec(Schedule, warmup=warmup),
        weight_decay=weight_decay,
        **fields,
    )


def imagenet(
    config: Config, batch_size: int, scale: tuple[float, float], *, size: int = 224, **fields: Any
) -> None:
    """ImageNet-1k as TFDS prepares it, with a random crop and a flip, and what an example of a batch looks like."""
    config.data.train = spec(
        Pipeline,
        source=spec(TFDS, name="imagenet2012", data_dir="~/tensorflow_datasets", split="train"),
        transforms=dict(
            decode=spec(Decode),
            crop=spec(RandomResizedCrop, size=size, scale=scale, resample="bicubic"),
            flip=spec(RandomFlip),
            **fields,
            normalize=spec(Normalize, **IMAGENET),
        ),
        batch_size=batch_size,
        keep=("image",),
    )
    config.data.example = dict(image=f"float32[{size},{size},3]")
    config.data.examples = IMAGENET_EXAMPLES
