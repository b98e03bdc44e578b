"""MAE: hides three quarters of an image, and predicts their pixels from the patches that are seen.

python -m vlpjax.main --config=experiments/masked/mae.py --workdir=runs/mae

``small`` (the default) learns from the bundled drawings at 32 pixels; ``mae.py:paper`` is ViT-L/16 on ImageNet-1k for
1,600 epochs, which needs the data set as TFDS prepares it.
"""

from __future__ import annotations

from experiments import _bundled, _recipes
from experiments.masked import _shared
from vlpjax.config import Config, spec
from vlpjax.evaluators.linear_probe import TrainedProbe
from vlpjax.evaluators.pictures import Reconstruction
from vlpjax.models.vit import ViT
from vlpjax.models.vit_variants import variant
from vlpjax.objectives.masked_image import MaskedAutoencoding
from vlpjax.objectives.masking import RandomPatches
from vlpjax.objectives.targets import Pixels

SIZES = ("small", "paper")
SYSTEM = dict(
    system="MAE",
    paper="Masked Autoencoders Are Scalable Vision Learners, arXiv 2111.06377",
    here="a ViT that encodes the visible patches only, a light decoder, standardised pixels of hidden patches",
    published="ViT-L/16, 1,600 epochs: 85.9 % ImageNet after fine-tuning",
    measured="not measured yet",
)


def get_config(size: str = "small") -> Config:
    config = _shared.start("MAE", size)
    if size == "small":
        config.towers = dict(image=_shared.small_tower())
        decoder = dict(patch=_shared.PATCH, decoder_width=64, decoder_depth=2, decoder_heads=4)
        config.data.train = _shared.drawings()
        _shared.small(config)
        config.evaluators.pictures = spec(
            Reconstruction,
            objective="mae",
            data=_bundled.images(_bundled.UNSEEN, _shared.SIZE),
            title="reconstructions",
        )
    else:
        config.duration = "1600 epochs"
        config.towers = dict(image=_tower())
        decoder = dict(patch=16, decoder_width=512, decoder_depth=8, decoder_heads=16)
        _shared.imagenet(config, batch_size=4096, scale=(0.2, 1.0))
        config.evaluators.linear = spec(
            TrainedProbe,
            train=_recipes.imagenet_labelled("train"),
            test=_recipes.imagenet_labelled("validation"),
        )
        config.optimizer = _shared.adamw(1.5e-4 * 4096 / 256, warmup="40 epochs")
    objective = spec(MaskedAutoencoding, mask=spec(RandomPatches, ratio=0.75), target=spec(Pixels), **decoder)
    config.objectives = dict(mae=dict(weight=1.0, loss=objective))
    return config


def _tower() -> Config:
    return spec(
        ViT,
        **variant("L/16"),
        patch_bias=True,
        class_tokens=1,
        positions="sincos",
        sincos_form="mae",
        pool="mean",
        pre_norm=False,
    )
