"""CroCo: nine tenths of one view are hidden, and are completed with the help of another view of the same scene.

python -m vlpjax.main --config=experiments/masked/croco.py --workdir=runs/croco

``small`` (the default) learns from pairs of overlapping crops of the bundled drawings, at 32 pixels.
``croco.py:paper`` is ViT-B/16 on 1.8 million pairs of rendered views of indoor scenes; it needs these pairs as a TFDS
data set with the fields ``view1`` and ``view2``.  Its schedule is that of 800 epochs; the published weights are those
of epoch 400.
"""

from __future__ import annotations

from typing import Any

from experiments import _bundled
from experiments.masked import _shared
from vlpjax.config import Config, spec
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.sources import TFDS
from vlpjax.data.transforms import ColorJitter, Decode, Normalize, OverlappingCrops, Resize
from vlpjax.models.vit import ViT
from vlpjax.models.vit_variants import variant
from vlpjax.objectives.masked_image import CrossViewCompletion
from vlpjax.objectives.masking import RandomPatches
from vlpjax.objectives.targets import Pixels

SIZES = ("small", "paper")
SYSTEM = dict(
    system="CroCo",
    paper="CroCo: Self-Supervised Pre-training for 3D Vision Tasks by Cross-View Completion, arXiv 2210.10716",
    here="one tower for both views, a decoder that attends to the second; pairs of overlapping crops",
    published="above MAE on depth and optical flow after fine-tuning",
    measured="shifted noise: loss 0.249 with the true second view, 1.642 with another image's "
    "(`tests/systems/test_croco.py`)",
)
VIEWS = ("view1", "view2")


def get_config(size: str = "small") -> Config:
    config = _shared.start("CroCo", size)
    if size == "small":
        config.towers = dict(image=_shared.small_tower(class_tokens=0))
        decoder = dict(patch=_shared.PATCH, decoder_width=64, decoder_depth=2, decoder_heads=4)
        crops = spec(OverlappingCrops, size=_shared.SIZE, overlap=0.6, names=VIEWS)
        config.data.train = _bundled.train(
            dict(crops=crops, **_normalized(_bundled.normalize)), keep=VIEWS, batch_size=128
        )
        _shared.small(config)
    else:
        config.duration = "800 epochs"
        config.towers = dict(
            image=spec(
                ViT, **variant("B/16"), patch_bias=True, positions="sincos", sincos_form="mae", pool="mean",
                pre_norm=False,
            )
        )  # fmt: skip
        decoder = dict(patch=16, decoder_width=512, decoder_depth=8, decoder_heads=16)
        _pairs(config)
        config.optimizer = _shared.adamw(1.5e-4 * 256 / 256, warmup="40 epochs")
    mask = spec(RandomPatches, ratio=0.9, rounding="hide")
    objective = spec(CrossViewCompletion, mask=mask, target=spec(Pixels), **decoder)
    config.objectives = dict(croco=dict(weight=1.0, loss=objective))
    return config


def _normalized(make: Any) -> dict[str, Config]:
    """A normalisation per view."""
    made = {}
    for view in VIEWS:
        made[f"normalize_{view}"] = make()
        made[f"normalize_{view}"].field = view
    return made


def _pairs(config: Config) -> None:
    """Rendered pairs at 224 pixels; each view has colours of its own."""
    transforms: dict[str, Config] = {}
    for view in VIEWS:
        transforms[f"decode_{view}"] = spec(Decode, field=view)
        transforms[f"resize_{view}"] = spec(Resize, size=224, resample="bicubic", field=view)
        transforms[f"jitter_{view}"] = spec(
            ColorJitter, brightness=0.5, contrast=0.5, saturation=0.5, hue=0.1, field=view
        )
    config.data.train = spec(
        Pipeline,
        source=spec(TFDS, name="habitat_pairs", data_dir="~/tensorflow_datasets", bytes_fields=VIEWS),
        transforms=transforms | _normalized(lambda: spec(Normalize, **_shared.IMAGENET)),
        batch_size=256,
        keep=VIEWS,
    )
    config.data.example = dict.fromkeys(VIEWS, "float32[224,224,3]")
    config.data.examples = 1_800_000
