"""What the experiments of this folder share: a small tower, the drawings without captions, and ImageNet.

No experiment itself (files whose names begin with an underscore are none).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments import _bundled, _recipes
from experiments._recipes import IMAGENET, IMAGENET_EXAMPLES, imagenet_labelled, start
from vlpjax.config import Config, spec
from vlpjax.data.transforms import Normalize, RandomFlip, RandomResizedCrop
from vlpjax.evaluators.knn import KNN
from vlpjax.models.vit import ViT

__all__ = ["IMAGENET", "IMAGENET_EXAMPLES", "start"]  # which its experiments take from here too
SIZE, PATCH = 32, 4  # of the small runs, in pixels


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


def small(config: Config) -> None:
    """What the small runs have in common: length, optimizer, and nearest neighbours as their evaluation."""
    config.duration = "600 steps"
    config.optimizer = adamw(1e-3, warmup="10%")
    config.evaluators = dict(knn=_bundled.knn(SIZE))


def adamw(rate: float, *, warmup: str, **fields: Any) -> Config:
    """AdamW as masked autoencoders take it."""
    return _recipes.adamw(rate, warmup=warmup, **{"betas": (0.9, 0.95), **fields})


def imagenet(
    config: Config, batch_size: int, scale: tuple[float, float], *, size: int = 224, **fields: Any
) -> None:
    """ImageNet-1k as TFDS prepares it, with a random crop and a flip, and what an example of a batch looks like."""
    config.data.train = _recipes.imagenet(
        dict(
            crop=spec(RandomResizedCrop, size=size, scale=scale, resample="bicubic"),
            flip=spec(RandomFlip),
            **fields,
            normalize=spec(Normalize, **IMAGENET),
        ),
        keep=("image",),
        batch_size=batch_size,
    )
    config.data.example = dict(image=f"float32[{size},{size},3]")
    config.data.examples = IMAGENET_EXAMPLES
    config.evaluators = dict(
        knn=spec(
            KNN,
            train=imagenet_labelled("train"),
            test=imagenet_labelled("validation"),
            ks=(10, 20),
            every="10%",
        )
    )
