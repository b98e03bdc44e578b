"""VICReg: views agree, every dimension keeps its variance, no two dimensions say the same.

python -m vlpjax.main --config=experiments/self_supervised/vicreg.py --workdir=runs/vicreg

Needs nothing for ``vicreg.py:small`` (the default).  ``vicreg.py:paper`` is the published ResNet-50 on ImageNet-1K,
for a pod.
"""

from __future__ import annotations

from experiments._recipes import start
from experiments.self_supervised._shared import NORMALIZE, SCALE, SIZE, lars_optimizer, paper, resnet50, small
from experiments.self_supervised._views import asymmetric
from vlpjax.config import Config, spec
from vlpjax.objectives.vicreg import VICReg

SIZES = ("small", "paper")
SYSTEM = dict(
    system="VICReg",
    paper="VICReg: Variance-Invariance-Covariance Regularization, arXiv 2105.04906",
    here="three terms over the global batch, with gradient through its statistics",
    published="ResNet-50, 1000 epochs: 73.2 % linear probe on ImageNet",
    measured="not measured yet",
)
BATCH = 2048


def get_config(size: str = "small") -> Config:
    config = start("VICReg", size)
    if size == "small":
        views = asymmetric(SIZE, SCALE, normalize=NORMALIZE)
        return small(config, views, spec(VICReg, projector=(256, 256)))
    config = paper(config, resnet50(), asymmetric(224), spec(VICReg), BATCH, "1000 epochs")
    config.optimizer = lars_optimizer(0.2 * BATCH / 256, weight_decay=1e-6)
    return config
