"""MoCo v3: contrast with a teacher's keys of the same batch, on a Vision Transformer.

python -m vlpjax.main --config=experiments/self_supervised/moco_v3.py --workdir=runs/moco_v3

Needs nothing for ``moco_v3.py:small`` (the default). ``moco_v3.py:paper`` is the published ViT-B/16 on ImageNet-1K,
for a pod.  In both the patch projection stays as it was initialised.
"""

from __future__ import annotations

from experiments._recipes import adamw, start
from experiments.self_supervised._shared import NORMALIZE, SCALE, SIZE, paper, small, vit
from experiments.self_supervised._views import asymmetric
from vlpjax.config import Config, spec
from vlpjax.objectives.moco import MoCoV3
from vlpjax.teachers import EMA

SIZES = ("small", "paper")
SYSTEM = dict(
    system="MoCo v3",
    paper="An Empirical Study of Training Self-Supervised Vision Transformers, arXiv 2104.02057",
    here="symmetric, with predictor, teacher's keys and a frozen patch projection",
    published="ViT-B/16, 300 epochs: 76.7 % linear probe on ImageNet",
    measured="not measured yet",
)
BATCH = 4096
FROZEN_PATCHES = ((r"image/patches/.*", None), (r".*", 1.0))


def get_config(size: str = "small") -> Config:
    config = start("MoCo v3", size)
    if size == "small":
        views = asymmetric(SIZE, SCALE, normalize=NORMALIZE)
        config = small(config, views, spec(MoCoV3, projector=(256, 256, 64), predictor=(256, 64)))
    else:
        views = asymmetric(224)
        config = paper(config, vit("B/16", positions="sincos"), views, spec(MoCoV3), BATCH, "300 epochs")
        config.optimizer = adamw(1.5e-4 * BATCH / 256, warmup="40 epochs", weight_decay=0.1)
    config.teachers.ema = spec(EMA, decay=0.99, final_decay=1.0)
    config.optimizer.rate_rules = FROZEN_PATCHES
    return config
