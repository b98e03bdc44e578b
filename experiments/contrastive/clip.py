"""Trains CLIP with a Vision Transformer: image and text towers under InfoNCE, nothing else.

python -m vlpjax.main --config=experiments/contrastive/clip.py --workdir=runs/clip

``small`` needs nothing but this package: bundled drawings of 32 px.  ``clip.py:paper`` is open_clip's ViT-B/32 on
LAION-400M, whose files it names; it needs some hundred accelerators.

``--config=experiments/contrastive/clip.py:small,teacher=runs/clip`` also learns from the similarities that a run of
the same towers sees between the images and texts of a batch ("CLIP with Quality Captions", arXiv 2405.08911).
"""

from __future__ import annotations

import optax

from experiments._bundled import (
    VOCABULARY,
    augmentation,
    caption,
    knn,
    normalize,
    retrieval,
    tokenize,
    train,
)
from experiments.contrastive import _web
from vlpjax.config import Config, spec
from vlpjax.experiment import base_config
from vlpjax.models.text import TextTransformer
from vlpjax.models.vit import ViT
from vlpjax.objectives.contrastive import InfoNCE
from vlpjax.objectives.distillation import SimilarityDistillation
from vlpjax.optim.optimizer import Optimizer, Schedule
from vlpjax.teachers import Teacher

SIZES = ("small", "paper")
SYSTEM = dict(
    system="CLIP",
    paper="Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020",
    here="InfoNCE over a Vision Transformer and a causal text transformer",
    published="ViT-B/32 on LAION-400M: 62.9 % zero-shot ImageNet (open_clip)",
    measured="drawings of an unseen style, 1,594 concepts, after 400 steps, 1 seed: recall@1 2.9 % image to text, "
    "3.5 % text to image, chance 0.06 %; 8.7 % 1-NN",
)
SIZE, LENGTH = 32, 12


def get_config(size: str = "small", teacher: str = "") -> Config:
    config = small() if size == "small" else paper()
    if teacher:
        config.teachers.best = spec(Teacher, towers=("image", "text"), checkpoint=teacher)
        config.objectives.distill = dict(
            weight=1.0, loss=spec(SimilarityDistillation, teachers=("best",), scale_of="clip")
        )
    return config


def small() -> Config:
    """Drawings and their names or keywords.  Several vendors draw one concept: they are positives of one another."""
    config = base_config()
    config.name = "CLIP, small"
    config.duration = "400 steps"
    config.towers = dict(image=small_image(), text=small_text())
    config.objectives = dict(clip=dict(weight=1.0, loss=spec(InfoNCE, same="label", temperature=0.04)))
    config.data.train = train(
        dict(**augmentation(SIZE), caption=caption(), tokenize=tokenize(LENGTH), normalize=normalize()),
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
