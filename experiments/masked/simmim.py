"""SimMIM: mask tokens at the places of hidden cells, one linear layer, raw pixels.

python -m vlpjax.main --config=experiments/masked/simmim.py --workdir=runs/simmim

``small`` (the default) learns from the bundled drawings at 32 pixels; ``simmim.py:paper`` is ViT-B/16 on ImageNet-1k
for 800 epochs, which needs the data set as TFDS prepares it.  The paper multiplies the learning rate by 0.1 at epoch
700; here it falls along half a cosine.
"""

from __future__ import annotations

from experiments.masked import _shared
from vlpjax.config import Config, spec
from vlpjax.models.vit import ViT
from vlpjax.models.vit_variants import variant
from vlpjax.objectives.masked_image import MaskedPrediction
from vlpjax.objectives.masking import RandomCells
from vlpjax.objectives.targets import Pixels

SIZES = ("small", "paper")
SYSTEM = dict(
    system="SimMIM",
    paper="SimMIM: A Simple Framework for Masked Image Modeling, arXiv 2111.09886",
    here="mask tokens on a coarse random grid, one linear layer, L1 on the hidden pixels",
    published="ViT-B/16, 800 epochs: 83.8 % ImageNet after fine-tuning",
    measured="not measured yet",
)


def get_config(size: str = "small") -> Config:
    config = _shared.start("SimMIM", size)
    target = spec(Pixels, standardize=False, distance="l1")
    if size == "small":
        config.towers = dict(image=_shared.small_tower(class_tokens=0, mask_token=True))
        patch = _shared.PATCH
        config.data.train = _shared.drawings()
        _shared.small(config)
    else:
        config.duration = "800 epochs"
        config.towers = dict(image=tower(drop_path=0.1))
        patch = 16
        _shared.imagenet(config, batch_size=2048, scale=(0.67, 1.0))
        rate = 1e-4 * 2048 / 512  # the paper counts per 512 images
        config.optimizer = _shared.adamw(rate, warmup="10 epochs", betas=(0.9, 0.999), clip_norm=5.0)
    objective = spec(MaskedPrediction, mask=spec(RandomCells, ratio=0.6, cell=2), target=target, patch=patch)
    config.objectives = dict(simmim=dict(weight=1.0, loss=objective))
    return config


def tower(**fields: object) -> Config:
    """ViT-B/16 with learned positions and a mask token."""
    settings = dict(patch_bias=True, class_tokens=1, pool="mean", pre_norm=False, mask_token=True)
    return spec(ViT, **variant("B/16"), **(settings | fields))
