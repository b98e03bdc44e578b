"""SwAV: predict the balanced cluster code of one crop from the others.

python -m vlpjax.main --config=experiments/self_supervised/swav.py --workdir=runs/swav

Needs nothing for ``swav.py:small`` (the default).  ``swav.py:paper`` is the published ResNet-50 on ImageNet-1K with
two crops of 224 and six of 96 pixels, for a pod.
"""

from __future__ import annotations

from experiments._recipes import start
from experiments.self_supervised._shared import (
    LOCAL_SCALE,
    LOCAL_SIZE,
    NORMALIZE,
    SCALE,
    SIZE,
    lars_optimizer,
    paper,
    resnet50,
    small,
)
from experiments.self_supervised._views import STRONG, multi_crop, numbered
from vlpjax.config import Config, spec
from vlpjax.objectives.swav import SwAV

SIZES = ("small", "paper")
SYSTEM = dict(
    system="SwAV",
    paper="Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, arXiv 2006.09882",
    here="Sinkhorn over the global batch and an optional queue, unit prototypes, multi-crop",
    published="ResNet-50, 800 epochs, 2x224 + 6x96: 75.3 % linear probe on ImageNet",
    measured="entropy of the prototypes' use, of its maximum: 0.988 balanced, 9e-8 not (`tests/systems/test_swav.py`)",
)
BATCH = 4096


def get_config(size: str = "small") -> Config:
    config = start("SwAV", size)
    if size == "small":
        views = multi_crop(
            (SIZE, LOCAL_SIZE), 2, SCALE, LOCAL_SCALE, jitter=STRONG, solarize=False, normalize=NORMALIZE
        )
        loss = spec(
            SwAV,
            local_views=numbered("local", 2),
            projector=(256, 64),
            prototypes=256,
            queue=512,
            queue_start="20%",
            freeze_prototypes="10%",
        )
        return small(config, views, loss)
    views = multi_crop((224, 96), 6, (0.14, 1.0), (0.05, 0.14), jitter=STRONG, solarize=False)
    loss = spec(SwAV, local_views=numbered("local", 6), freeze_prototypes="313 steps")
    config = paper(config, resnet50(), views, loss, BATCH, "800 epochs")
    # The paper warms up from 0.3, and this schedule from 0.
    config.optimizer = lars_optimizer(4.8, weight_decay=1e-6, final=0.0048 / 4.8)
    return config
