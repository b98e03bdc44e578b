"""iBOT: DINO, and the teacher's word on every patch that the student does not see.

python -m vlpjax.main --config=experiments/self_supervised/ibot.py --workdir=runs/ibot

Needs nothing for ``ibot.py:small`` (the default).  ``ibot.py:paper`` is the published ViT-B/16 on ImageNet-1K.
"""

from __future__ import annotations

from experiments._recipes import adamw, start
from experiments.self_supervised._shared import paper, vit
from experiments.self_supervised._views import multi_crop, numbered
from experiments.self_supervised.dino import SMALL_HEAD, small_distillation
from vlpjax.config import Config, spec
from vlpjax.objectives.ibot import IBOT
from vlpjax.teachers import EMA

SIZES = ("small", "paper")
SYSTEM = dict(
    system="iBOT",
    paper="iBOT: Image BERT Pre-Training with Online Tokenizer, arXiv 2111.07832",
    here="DINO with block-masked crops and a patch loss through the shared head",
    published="ViT-B/16, 400 epochs: 77.1 % k-NN, 79.5 % linear probe on ImageNet",
    measured="not measured yet",
)
BATCH, LOCAL = 1024, 10


def get_config(size: str = "small") -> Config:
    config = start("iBOT", size)
    if size == "small":
        config = small_distillation(config, spec(IBOT, **SMALL_HEAD))
        config.towers.image.mask_token = True
        return config
    views = multi_crop((224, 96), LOCAL, (0.32, 1.0), (0.05, 0.32))
    loss = spec(
        IBOT,
        local_views=numbered("local", LOCAL),
        prototypes=8192,
        teacher_temperature=(0.04, 0.07),
        teacher_warmup="50 epochs",
        freeze_prototypes="3 epochs",
    )
    tower = vit("B/16", mask_token=True, drop_path=0.1)
    config = paper(config, tower, views, loss, BATCH, "400 epochs")
    config.evaluators.knn.params = "ema"
    config.teachers.ema = spec(EMA, decay=0.996, final_decay=1.0)
    rate = 7.5e-4 * BATCH / 256
    config.optimizer = adamw(
        rate, warmup="10 epochs", weight_decay=0.04, final_weight_decay=0.4, final=2e-6 / rate, clip_norm=0.3
    )
    return config
