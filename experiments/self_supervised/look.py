"""LOOK: supervised pretraining in which an image is classified by its nearest neighbours.

python -m vlpjax.main --config=experiments/self_supervised/look.py --workdir=runs/look

Needs nothing for ``look.py:small`` (the default): the classes that it is told are five arbitrary ones of 319 concepts
each, and the concepts are what is asked for.  ``look.py:paper`` is a ResNet-50 on ImageNet-1K; k, temperature, queue
and schedule are not public and are chosen here.
"""

from __future__ import annotations

from experiments._recipes import start
from experiments.self_supervised._shared import NORMALIZE, SCALE, SIZE, paper, resnet50, small
from experiments.self_supervised._views import EVEN, symmetric
from vlpjax.config import Config, spec
from vlpjax.objectives.look import LOOK
from vlpjax.optim.optimizer import Optimizer, Schedule
from vlpjax.optim.sgd import sgd
from vlpjax.teachers import EMA

SIZES = ("small", "paper")
SYSTEM = dict(
    system="LOOK",
    paper="Rethinking Supervised Pre-training for Better Downstream Transferring, arXiv 2110.06014",
    here="leave-one-out k nearest neighbours among a labelled queue of a teacher's embeddings",
    published="ResNet-50 on ImageNet: better transfer than cross-entropy and SupCon",
    measured="not measured yet",
)


def get_config(size: str = "small") -> Config:
    config = start("LOOK", size)
    if size == "small":
        views = symmetric(SIZE, SCALE, jitter=EVEN, blur=0.0, normalize=NORMALIZE)
        loss = spec(LOOK, label="fold", projector=(128, 64), neighbours=64, queue=4096)
        config = small(config, views, loss)
        config.data.train.keep = (*config.data.train.keep, "fold")
        config.teachers.ema = spec(EMA, decay=0.97)
        return config
    views = symmetric(224, (0.2, 1.0), jitter=EVEN)
    config = paper(config, resnet50(), views, spec(LOOK), 1024, "200 epochs")
    config.data.train.keep = (*config.data.train.keep, "label")
    config.data.example.label = "int32[]"
    config.teachers.ema = spec(EMA, decay=0.999)
    config.optimizer = spec(
        Optimizer,
        direction=spec(sgd, momentum=0.9, weight_decay=1e-4),
        learning_rate=0.4,
        schedule=spec(Schedule, warmup="5 epochs"),
    )
    return config
