"""DINO: a student predicts, from other crops, what its teacher says of an image.

python -m vlpjax.main --config=experiments/self_supervised/dino.py --workdir=runs/dino

Needs nothing for ``dino.py:small`` (the default).  ``dino.py:paper`` is the published ViT-S/16 on ImageNet-1K with
two crops of 224 and eight of 96 pixels.
"""

from __future__ import annotations

from typing import Any

from experiments import _bundled
from experiments._recipes import adamw, start
from experiments.self_supervised._shared import (
    LOCAL_SCALE,
    LOCAL_SIZE,
    NORMALIZE,
    SCALE,
    SIZE,
    paper,
    small,
    vit,
)
from experiments.self_supervised._views import multi_crop, numbered
from vlpjax.config import Config, spec
from vlpjax.evaluators.pictures import AttentionMaps
from vlpjax.objectives.dino import DINO
from vlpjax.teachers import EMA

SIZES = ("small", "paper")
SYSTEM = dict(
    system="DINO",
    paper="Emerging Properties in Self-Supervised Vision Transformers, arXiv 2104.14294",
    here="multi-crop, a running centre in the objective's state, frozen last layer at first",
    published="ViT-S/16, 800 epochs: 74.5 % k-NN, 77.0 % linear probe on ImageNet",
    measured="not measured yet",
)
BATCH, LOCAL = 1024, 8


def get_config(size: str = "small") -> Config:
    config = start("DINO", size)
    if size == "small":
        config = small_distillation(config, spec(DINO, **SMALL_HEAD))
        images = _bundled.images(_bundled.UNSEEN, SIZE)
        config.evaluators.attention = spec(
            AttentionMaps, data=images, params="ema", title="where the class token looks"
        )
        return config
    views = multi_crop((224, 96), LOCAL, (0.4, 1.0), (0.05, 0.4))
    loss = spec(
        DINO,
        local_views=numbered("local", LOCAL),
        teacher_temperature=(0.04, 0.07),
        teacher_warmup="30 epochs",
        freeze_prototypes="1 epoch",
    )
    tower = vit("S/16", drop_path=0.1)
    config = paper(config, tower, views, loss, BATCH, "800 epochs")
    config.evaluators.knn.params = "ema"
    config.teachers.ema = spec(EMA, decay=0.996, final_decay=1.0)
    config.optimizer = adamw(
        5e-4 * BATCH / 256,
        warmup="10 epochs",
        weight_decay=0.04,
        final_weight_decay=0.4,
        final=1e-6 / (5e-4 * BATCH / 256),
        clip_norm=3.0,
    )
    return config


SMALL_HEAD: dict[str, Any] = dict(
    local_views=numbered("local", 2), prototypes=512, hidden=(256,), bottleneck=64, freeze_prototypes="5%"
)


def small_distillation(config: Config, loss: Config) -> Config:
    """The small run of DINO and of what builds on it."""
    views = multi_crop((SIZE, LOCAL_SIZE), 2, SCALE, LOCAL_SCALE, normalize=NORMALIZE)
    config = small(config, views, loss)
    config.evaluators.knn.params = "ema"
    config.teachers.ema = spec(EMA, decay=0.97, final_decay=1.0)
    config.optimizer.clip_norm = 3.0
    return config
