"""Trains CLIP with a Vision Transformer: image and text towers under InfoNCE, nothing else.

python -m vlpjax.main --config=experiments/contrastive/clip.py --workdir=runs/clip

``small`` needs nothing but this package: bundled drawings of 32 px.  ``clip.py:paper`` is open_clip's ViT-B/32 on
LAION-400M, whose files it names; it needs some hundred accelerators.
"""

from __future__ import annotations

import optax

from experiments._bundled import VOCABULARY, knn, normalize, retrieval, tokenize, train
from experiments.contrastive import _web
from vlpjax.config import Config, spec
from vlpjax.data.transforms import (
    ColorJitter,
    DrawCaption,
    Grayscale,
    Outline,
    RandomAffine,
    RandomFlip,
    Resize,
)  # fmt: skip
from vlpjax.experiment import base_config
from vlpjax.models.text import TextTransformer
from vlpjax.models.vit import ViT
from vlpjax.objectives.contrastive import InfoNCE
from vlpjax.optim.optimizer import Optimizer, Schedule

SIZES = ("small", "paper")
SYSTEM = dict(
    system="CLIP",
    paper="Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020",
    here="InfoNCE over a Vision Transformer and a causal text transformer",
    published="ViT-B/32 on LAION-400M: 62.9 % zero-shot ImageNet (open_clip)",
    measured="not measured yet",
)
SIZE, LENGTH = 32, 12


def get_config(size: str = "small") -> Config:
    return small() if size == "small" else paper()


def small() -> Config:
    """Drawings and their names or keywords.  Several vendors draw one concept: they are positives of one another."""
    config = base_config()
    config.name = "CLIP, small"
    config.duration = "400 steps"
    config.towers = dict(image=small_image(), text=small_text())
    config.objectives = dict(clip=dict(weight=1.0, loss=spec(InfoNCE, same="label", temperature=0.04)))
    config.data.train = train(
        dict(**augmentation(), caption=caption(), tokenize=tokenize(LENGTH), normalize=normalize()),
        keep=("image", "text", "label"),
        batch_size=128,
    )
    config.optimizer = spec(
        Optimizer,
        direction=spec(optax.scale_by_adam, b2=0.98),
        learning_rate=2e-3,
        schedule=spec(Schedule, warmup="10%"),
        weight_decay=0.2,
        clip_norm=1.0,
    )
    config.evaluators = dict(style=retrieval(SIZE, LENGTH), knn=knn(SIZE))
    return config


def small_image() -> Config:
    """A Vision Transformer of 64 patches."""
    return spec(ViT, image_size=SIZE, patch=4, width=96, depth=3, heads=4, embedding=128)


def small_text() -> Config:
    """A text transformer for names of a few words."""
    return spec(
        TextTransformer, vocabulary=VOCABULARY, length=LENGTH, width=128, depth=1, heads=4, embedding=128
    )


def caption() -> Config:
    """The name, or some of the keywords."""
    return spec(DrawCaption, weights=(0.8, 0.2), max_parts=4)


def augmentation() -> dict[str, Config]:
    """What drawings bear without becoming others, from the decoded picture to 32 px."""
    return dict(
        flip=spec(RandomFlip),
        affine=spec(RandomAffine, rotate=8.0, translate=0.05, scale=(0.85, 1.15), shear=3.0),
        resize=spec(Resize, size=SIZE, resample="bilinear"),
        outline=spec(Outline, probability=0.3),
        jitter=spec(ColorJitter, brightness=0.15, contrast=0.3, saturation=0.5, hue=0.075, probability=0.8),
        grayscale=spec(Grayscale, probability=0.12),
    )


def paper() -> Config:
    """open_clip's ViT-B/32 on LAION-400M: 32 epochs of 400 million pairs, 32,768 to a batch."""
    config = base_config()
    config.name = "CLIP, ViT-B/32 on LAION-400M"
    config.duration = "32 epochs"
    config.towers = dict(image=_web.vit(32, 768, 12, 512, remat="none"), text=_web.text(512, 12, 512))
    config.objectives = dict(clip=dict(weight=1.0, loss=spec(InfoNCE)))
    config.data = _web.declared(224, 77)
    config.data.train = _web.pairs(
        dict(crop=_web.crop(224), tokenize=_web.tokenize(field="text"), normalize=_web.normalize()), 32_768
    )
    config.optimizer = _web.adamw(5e-4, 0.2, "2000 steps")
    config.evaluators = dict(imagenet=_web.zero_shot(224, _web.tokenize()))
    return config
