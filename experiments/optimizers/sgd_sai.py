"""Trains with SGD-SaI: momentum SGD whose rate per parameter is measured once, with half of Adam's state.

python -m vlpjax.main --config=experiments/optimizers/sgd_sai.py --workdir=runs/sgd_sai

``small`` is the quick start with another optimizer (bundled drawings, a few CPU minutes); ``paper`` is a supervised
ViT-S/16 on ImageNet-1k, which TFDS must have prepared under ``~/tensorflow_datasets``.  Any other experiment takes
the optimizer by ``--config.optimizer.direction=vlpjax.optim.sgd_sai:sgd_sai``.

``paper`` has the published defaults of the optimizer; batch, length and augmentation, where the paper leaves them
open, are those of "Better plain ViT baselines for ImageNet-1k", arXiv 2205.01580, without mixup.
"""

from __future__ import annotations

from experiments.quickstart import get_config as quickstart
from vlpjax.config import Config, spec
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.sources import TFDS
from vlpjax.data.transforms import (
    CenterCrop,
    Decode,
    Normalize,
    RandAugment,
    RandomFlip,
    RandomResizedCrop,
    Resize,
)
from vlpjax.evaluators.knn import KNN
from vlpjax.experiment import base_config
from vlpjax.models.vit import ViT
from vlpjax.models.vit_variants import variant
from vlpjax.objectives.classification import Classification
from vlpjax.optim.optimizer import Optimizer, Schedule
from vlpjax.optim.sgd_sai import sgd_sai

SIZES = ("small", "paper")
SYSTEM = dict(
    system="SGD-SaI",
    paper="No More Adam: Learning Rate Scaling at Initialization is All You Need, arXiv 2412.11768",
    here="momentum SGD with a signal-to-noise ratio per parameter as its rate, measured at the first step",
    published="ViT-S/16 on ImageNet-1k: on a par with AdamW, with half of the optimizer's state",
    measured="not measured yet",
)


def get_config(size: str = "small") -> Config:
    config = _small() if size == "small" else _paper()
    config.name = f"SGD-SaI, {size}"
    return config


def _small() -> Config:
    config = quickstart("style")
    config.optimizer = _optimizer(learning_rate=3e-3, weight_decay=1e-2, warmup="5%")
    return config


def _optimizer(learning_rate: float, weight_decay: float, warmup: str) -> Config:
    return spec(
        Optimizer,
        direction=spec(sgd_sai, momentum=0.9, eps=1e-8),
        learning_rate=learning_rate,
        schedule=spec(Schedule, warmup=warmup),
        weight_decay=weight_decay,
        clip_norm=1.0,
    )


def _paper() -> Config:
    config = base_config()
    config.duration = "90 epochs"
    config.towers.image = spec(ViT, image_size=224, positions="sincos", pool="mean", **variant("S/16"))
    config.objectives.classes = dict(weight=1.0, loss=spec(Classification, classes=1000))
    config.data.example = dict(image="float32[224,224,3]", label="int32[]")
    config.data.examples = 1_281_167
    config.data.train = _imagenet(
        "train",
        dict(
            crop=spec(RandomResizedCrop, size=224, scale=(0.05, 1.0)),
            flip=spec(RandomFlip),
            augment=spec(RandAugment, layers=2, magnitude=10.0, fill=(128, 128, 128)),
        ),
        batch_size=1024,
        workers=16,
    )
    config.optimizer = _optimizer(learning_rate=1e-2, weight_decay=1e-2, warmup="10000 steps")
    once = dict(batch_size=1024, shuffle=False, repeat=False)
    whole = dict(resize=spec(Resize, size=256, mode="shorter"), crop=spec(CenterCrop, size=224))
    config.evaluators.knn = spec(
        KNN, train=_imagenet("train", whole, **once), test=_imagenet("validation", whole, **once), ks=(10, 20)
    )
    return config


def _imagenet(split: str, transforms: dict[str, Config], **fields: object) -> Config:
    return spec(
        Pipeline,
        source=spec(TFDS, name="imagenet2012", split=split, data_dir="~/tensorflow_datasets"),
        transforms=dict(decode=spec(Decode), **transforms, normalize=spec(Normalize, range="-1..1")),
        keep=("image", "label"),
        **fields,
    )
