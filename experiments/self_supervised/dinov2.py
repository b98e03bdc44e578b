"""DINOv2: iBOT at scale: balanced targets, and features spread by KoLeo.

python -m vlpjax.main --config=experiments/self_supervised/dinov2.py --workdir=runs/dinov2

Needs nothing for ``dinov2.py:small`` (the default). ``dinov2.py:paper`` is the published recipe of the ViT-L/16 that
is trained on ImageNet-1K; the 142 million images of the paper's other models are not public.
"""

from __future__ import annotations

from experiments._recipes import adamw, start
from experiments.self_supervised._shared import paper, vit
from experiments.self_supervised._views import multi_crop, numbered
from experiments.self_supervised.dino import SMALL_HEAD, small_distillation
from vlpjax.config import Config, spec
from vlpjax.objectives.ibot import IBOT
from vlpjax.optim.layers import LayerDecay
from vlpjax.teachers import EMA

SIZES = ("small", "paper")
SYSTEM = dict(
    system="DINOv2",
    paper="DINOv2: Learning Robust Visual Features without Supervision, arXiv 2304.07193",
    here="Sinkhorn-balanced class and patch targets over the global batch, KoLeo per crop",
    published="ViT-g/14 on 142 million images: 86.5 % linear probe on ImageNet",
    measured="not measured yet",
)
BATCH, LOCAL = 2048, 8


def get_config(size: str = "small") -> Config:
    config = start("DINOv2", size)
    if size == "small":
        loss = spec(IBOT, **SMALL_HEAD, patch_prototypes=512, centring="sinkhorn", koleo=0.1)
        config = small_distillation(config, loss)
        config.towers.image.mask_token = True
        return config
    views = multi_crop((224, 96), LOCAL, (0.32, 1.0), (0.05, 0.32))
    loss = spec(
        IBOT,
        local_views=numbered("local", LOCAL),
        centring="sinkhorn",
        koleo=0.1,
        teacher_temperature=(0.04, 0.07),
        teacher_warmup="30 epochs",
        freeze_prototypes="1 epoch",
    )
    tower = vit("L/16", mask_token=True, layer_scale=1e-5, drop_path=0.3)
    config = paper(config, tower, views, loss, BATCH, "100 epochs")
    config.evaluators.knn.params = "ema"
    config.teachers.ema = spec(EMA, decay=0.992, final_decay=1.0)
    rate = 0.004 * (BATCH / 1024) ** 0.5
    config.optimizer = adamw(
        rate,
        warmup="10 epochs",
        weight_decay=0.04,
        final_weight_decay=0.4,
        final=1e-6 / rate,
        clip_norm=3.0,
        layer_decay=spec(LayerDecay, factor=0.9),
        rate_rules=((r"image/patches/.*", 0.2), (r".*", 1.0)),
    )
    return config
