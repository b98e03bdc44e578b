"""POA: one run of self-distillation, from which networks of all sizes can be cut.

python -m vlpjax.main --config=experiments/self_supervised/poa.py --workdir=runs/poa

Needs nothing for ``poa.py:small`` (the default).  ``poa.py:paper`` is the published ViT-L/16 with its 143 sizes on
ImageNet-1K.  Networks are cut out of the teacher with
``python tools/extract_poa.py --workdir=runs/poa --width=64 --depth=2 --out=runs/poa-64x2``.
"""

from __future__ import annotations

from experiments._bundled import knn
from experiments._recipes import adamw, start
from experiments.self_supervised._shared import SIZE, paper, small_tower, vit
from experiments.self_supervised._views import multi_crop, numbered
from experiments.self_supervised.dino import small_distillation
from vlpjax.config import Config, spec
from vlpjax.models.elastic import ElasticViT
from vlpjax.objectives.poa import POA
from vlpjax.optim.layers import LayerDecay
from vlpjax.teachers import EMA

SIZES = ("small", "paper")
SYSTEM = dict(
    system="POA",
    paper="POA: Pre-training Once for Models of All Sizes, arXiv 2408.01031",
    here="masked weights in one program for all sizes; sub-networks are cut out as ordinary ViTs",
    published="ViT-L/16, ViT-B/16 and ViT-S/16 of one run, each better than when pretrained alone",
    measured="not measured yet",
)
# What the elastic branch is for: the same small part of a network that was only ever trained whole knows less.
PROOF = dict(
    against="experiments/self_supervised/poa.py:small",
    metrics=("small_knn/k5/top1", "knn/k5/top1"),
    settings=("duration=200 steps", "data.train.batch_size=32", "objectives.loss.loss.koleo=0.0"),
    set_b=("objectives.loss.loss.share=1.0",),
)
BATCH, LOCAL = 1600, 8
SMALLEST = (64, 2)  # width and depth


def get_config(size: str = "small") -> Config:
    config = start("POA", size)
    if size == "small":
        loss = spec(
            POA,
            local_views=numbered("local", 2),
            head_prototypes=(256, 512),
            hidden=(256,),
            bottleneck=64,
            widths=(64, 128, 32),
            depths=(2, 4),
        )
        config = small_distillation(config, loss)
        config.towers.image = spec(ElasticViT, tower=small_tower(mask_token=True))
        config.evaluators.small_knn = knn(
            SIZE, params="ema", options=dict(size=SMALLEST), title="k-NN of the smallest sub-network"
        )
        return config
    views = multi_crop((224, 96), LOCAL, (0.32, 1.0), (0.05, 0.32))
    loss = spec(
        POA,
        local_views=numbered("local", LOCAL),
        teacher_temperature=(0.04, 0.07),
        teacher_warmup="24000 steps",  # 30 of the paper's epochs, which have 800 steps
        patch_start="24000 steps",
        freeze_prototypes="800 steps",
    )
    tower = spec(ElasticViT, tower=vit("L/16", mask_token=True, layer_scale=1e-5, drop_path=0.2))
    config = paper(config, tower, views, loss, BATCH, f"{346 * 800} steps")
    config.evaluators.knn.params = "ema"
    config.teachers.ema = spec(EMA, decay=0.992, final_decay=0.9999)
    rate = 0.004 * (BATCH / 1024) ** 0.5
    config.optimizer = adamw(
        rate,
        warmup="8000 steps",
        weight_decay=0.04,
        final_weight_decay=0.4,
        final=2e-5 / rate,
        clip_norm=1.5,
        layer_decay=spec(LayerDecay, factor=0.9),
    )
    return config
