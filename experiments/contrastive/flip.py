"""Trains FLIP: CLIP that sees half of each image's patches in training, and all of them afterwards.

python -m vlpjax.main --config=experiments/contrastive/flip.py --workdir=runs/flip

``small`` needs nothing but this package: ``clip.py:small`` with half of the patches left out.  ``flip.py:paper`` is
L/16 on LAION-400M.  The short tuning without masks that ends the paper's recipe starts from its run:

python -m vlpjax.main --config=experiments/contrastive/flip.py:paper --workdir=runs/flip_tuned \
  --config.towers.image.patch_dropout=0 --config.start.run=runs/flip_paper --config.duration="0.32 epochs" \
  --config.optimizer.learning_rate=1.024e-5
"""

from __future__ import annotations

from experiments.contrastive import _web
from experiments.contrastive import clip as clip_experiment
from vlpjax.config import Config, spec
from vlpjax.objectives.contrastive import InfoNCE

SIZES = ("small", "paper")
SYSTEM = dict(
    system="FLIP",
    paper="Scaling Language-Image Pre-training via Masking, arXiv 2212.00794",
    here="patch dropout in the image tower of CLIP",
    published="L/16 on LAION-400M: 74.3 % zero-shot ImageNet",
    measured="not measured yet",
)
BATCH, LENGTH = 65_536, 32


def get_config(size: str = "small") -> Config:
    return small() if size == "small" else paper()


def small() -> Config:
    """CLIP's small setting with half of the patches left out."""
    config = clip_experiment.small()
    config.name = "FLIP, small"
    config.towers.image.patch_dropout = 0.5
    return config


def paper() -> Config:
    """L/16: mean-pooled patches with fixed positions, texts of 32 tokens, a rate of 4e-6 per 256 examples."""
    config = clip_experiment.paper()
    config.name = "FLIP, L/16 on LAION-400M"
    config.towers = dict(
        image=_web.vit(
            16,
            1024,
            24,
            768,
            pool="mean",
            positions="sincos",
            pre_norm=False,
            patch_bias=True,
            patch_dropout=0.5,
        ),
        text=_web.text(768, 12, 768, length=LENGTH),
    )
    config.objectives = dict(clip=dict(weight=1.0, loss=spec(InfoNCE, temperature=0.01)))
    config.data.example.text = f"int32[{LENGTH}]"
    config.data.train.batch_size = BATCH
    config.data.train.transforms.crop = _web.crop(224, scale=(0.5, 1.0))
    config.data.train.transforms.tokenize = _web.tokenize(LENGTH, field="text")
    config.optimizer = _web.adamw(4e-6 * BATCH / 256, 0.2, "1 epoch", b2=0.95, eps=1e-8)
    config.evaluators = dict(imagenet=_web.zero_shot(224, _web.tokenize(LENGTH)))
    return config
