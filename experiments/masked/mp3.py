"""MP3: patches without positions predict where they stand, attending to a random quarter of them.

python -m vlpjax.main --config=experiments/masked/mp3.py --workdir=runs/mp3

``small`` (the default) learns from the bundled drawings at 32 pixels, half of whose patches are attended to;
``mp3.py:paper`` is ViT-B/16 on ImageNet-1k for 100 epochs, which needs the data set as TFDS prepares it.
"""

from __future__ import annotations

from typing import Any

from experiments.masked import _shared
from vlpjax.config import Config, spec
from vlpjax.models.vit import ViT
from vlpjax.models.vit_variants import variant
from vlpjax.objectives.masking import RandomPatches
from vlpjax.objectives.predictive import PositionPrediction

SIZES = ("small", "paper")
SYSTEM = dict(
    system="MP3",
    paper="Position Prediction as an Effective Pretraining Strategy, arXiv 2207.07611",
    here="a tower without positions, keys restricted to a random context in every block, one class per place",
    published="above supervised ViTs and MoCo v3 at 100 epochs, below MAE",
    measured="textures under a ramp, 16 places: accuracy 0.94 with all patches as context, 0.51 with a quarter "
    "(`tests/systems/test_mp3.py`)",
)
TOWER: dict[str, Any] = dict(patch_bias=True, class_tokens=0, positions="none", pool="mean", pre_norm=False)


def get_config(size: str = "small") -> Config:
    config = _shared.start("MP3", size)
    if size == "small":
        config.towers = dict(image=_shared.small_tower(**TOWER))
        place, ratio = dict(patch=_shared.PATCH, grid=(8, 8)), 0.5
        config.data.train = _shared.drawings()
        _shared.small(config)
    else:
        config.duration = "100 epochs"
        config.towers = dict(image=spec(ViT, **variant("B/16"), **TOWER))
        place, ratio = dict(patch=16, grid=(14, 14)), 0.75
        _shared.imagenet(config, batch_size=4096, scale=(0.2, 1.0))
        config.optimizer = _shared.adamw(1e-3, warmup="10 epochs")
    objective = spec(PositionPrediction, mask=spec(RandomPatches, ratio=ratio), **place)
    config.objectives = dict(mp3=dict(weight=1.0, loss=objective))
    return config
