"""MoCo v2: contrast with a queue of keys that a slowly following teacher has made.

python -m vlpjax.main --config=experiments/self_supervised/moco_v2.py --workdir=runs/moco_v2

Needs nothing for ``moco_v2.py:small`` (the default). ``moco_v2.py:paper`` is the published ResNet-50 on ImageNet-1K,
for eight accelerators.
"""

from __future__ import annotations

from experiments._recipes import start
from experiments.self_supervised._shared import NORMALIZE, SCALE, SIZE, paper, resnet50, small
from experiments.self_supervised._views import EVEN, symmetric
from vlpjax.config import Config, spec
from vlpjax.objectives.moco import MoCoV2
from vlpjax.optim.optimizer import Optimizer, Schedule
from vlpjax.optim.sgd import sgd
from vlpjax.teachers import EMA

SIZES = ("small", "paper")
SYSTEM = dict(
    system="MoCo v2",
    paper="Improved Baselines with Momentum Contrastive Learning, arXiv 2003.04297",
    here="a ring of past keys in the objective's state; keys carry no gradient",
    published="ResNet-50, 800 epochs: 71.1 % linear probe on ImageNet",
    measured="not measured yet",
)


def get_config(size: str = "small") -> Config:
    config = start("MoCo v2", size)
    if size == "small":
        views = symmetric(SIZE, SCALE, jitter=EVEN, blur=0.0, normalize=NORMALIZE)
        config = small(config, views, spec(MoCoV2, queue=2048, projector=(128, 64)))
        config.teachers.ema = spec(EMA, decay=0.97)
        return config
    views = symmetric(224, (0.2, 1.0), jitter=EVEN)
    config = paper(config, resnet50(), views, spec(MoCoV2), 256, "800 epochs")
    config.teachers.ema = spec(EMA, decay=0.999)
    config.optimizer = spec(
        Optimizer,
        direction=spec(sgd, momentum=0.9, weight_decay=1e-4),
        learning_rate=0.03,
        schedule=spec(Schedule),
    )
    return config
