"""BYOL: predict a teacher's projection of the other view, without negatives.

python -m vlpjax.main --config=experiments/self_supervised/byol.py --workdir=runs/byol

Needs nothing for ``byol.py:small`` (the default).  ``byol.py:paper`` is the published ResNet-50 on ImageNet-1K, for a
pod.
"""

from __future__ import annotations

from experiments import _bundled
from experiments._recipes import start
from experiments.self_supervised._shared import NORMALIZE, SCALE, SIZE, lars_optimizer, paper, resnet50, small
from experiments.self_supervised._views import asymmetric
from vlpjax.config import Config, spec
from vlpjax.evaluators.collapse import Collapse
from vlpjax.objectives.byol import BYOL
from vlpjax.teachers import EMA

SIZES = ("small", "paper")
SYSTEM = dict(
    system="BYOL",
    paper="Bootstrap your own latent: A new approach to self-supervised Learning, arXiv 2006.07733",
    here="predictor, EMA teacher of tower and projector, BatchNorm over the global batch",
    published="ResNet-50, 1000 epochs: 74.3 % linear probe on ImageNet",
    measured="not measured yet",
)
BATCH = 4096


def get_config(size: str = "small") -> Config:
    config = start("BYOL", size)
    if size == "small":
        views = asymmetric(SIZE, SCALE, normalize=NORMALIZE)
        config = small(config, views, spec(BYOL, projector=(256, 64), predictor=(256, 64)))
        config.teachers.ema = spec(EMA, decay=0.97, final_decay=1.0)
        images = _bundled.images(_bundled.UNSEEN, SIZE)
        config.evaluators.collapse = spec(Collapse, data=images, every="25%", title="spread of features")
        return config
    config = paper(config, resnet50(), asymmetric(224), spec(BYOL), BATCH, "1000 epochs")
    config.teachers.ema = spec(EMA, decay=0.996, final_decay=1.0)
    config.optimizer = lars_optimizer(0.2 * BATCH / 256, weight_decay=1.5e-6)
    return config
