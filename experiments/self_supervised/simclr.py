"""SimCLR: of all views in the batch, find the other view of the same image.

python -m vlpjax.main --config=experiments/self_supervised/simclr.py --workdir=runs/simclr

Needs nothing for ``simclr.py:small`` (the default).  ``simclr.py:paper`` is the published ResNet-50 on ImageNet-1K,
for a pod.
"""

from __future__ import annotations

from experiments._recipes import start
from experiments.self_supervised._shared import NORMALIZE, SCALE, SIZE, lars_optimizer, paper, resnet50, small
from experiments.self_supervised._views import STRONG, symmetric
from vlpjax.config import Config, spec
from vlpjax.objectives.ntxent import NTXent

SIZES = ("small", "paper")
SYSTEM = dict(
    system="SimCLR",
    paper="A Simple Framework for Contrastive Learning of Visual Representations, arXiv 2002.05709",
    here="NT-Xent over 2B views, each device holding its own rows",
    published="ResNet-50, 1000 epochs: 69.3 % linear probe on ImageNet",
    measured="not measured yet",
)
BATCH = 4096


def get_config(size: str = "small") -> Config:
    config = start("SimCLR", size)
    if size == "small":
        views = symmetric(SIZE, SCALE, jitter=STRONG, blur=0.0, normalize=NORMALIZE)
        return small(config, views, spec(NTXent, projector=(128, 64), temperature=0.2))
    views = symmetric(224, jitter=STRONG)
    loss = spec(NTXent, projector_last_norm="affine")  # as the paper's code has it
    config = paper(config, resnet50(), views, loss, BATCH, "1000 epochs")
    config.optimizer = lars_optimizer(0.3 * BATCH / 256, weight_decay=1e-6)
    return config
