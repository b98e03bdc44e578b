"""NEPA: a causal ViT predicts the embedding of the next patch; no decoder, no teacher, no pixels.

python -m vlpjax.main --config=experiments/masked/nepa.py --workdir=runs/nepa

``small`` (the default) learns from the bundled drawings at 32 pixels; ``nepa.py:paper`` is ViT-B/14 on ImageNet-1k for
1,600 epochs, which needs the data set as TFDS prepares it.  The metric ``spread`` shows whether the embeddings have
collapsed; ``--config.objectives.nepa.loss.stop_gradient=False`` makes them.
"""

from __future__ import annotations

from typing import Any

from experiments.masked import _shared
from vlpjax.config import Config, spec
from vlpjax.models.vit import ViT
from vlpjax.models.vit_variants import variant
from vlpjax.objectives.predictive import NextEmbedding
from vlpjax.teachers import EMA

SIZES = ("small", "paper")
SYSTEM = dict(
    system="NEPA",
    paper="Next-Embedding Prediction Makes Strong Vision Learners, arXiv 2512.16922",
    here="a causal tower with rotary positions, the cosine with the next patch's embedding",
    published="ViT-B/14: 83.8 % ImageNet after fine-tuning",
    measured="not measured yet",
)
# Positions act in attention only, so that an embedding holds what a patch shows and not where it stands.
TOWER: dict[str, Any] = dict(
    patch_bias=True,
    causal=True,
    class_tokens=1,
    positions="rotary",
    rotary_form="centred",
    rotary_base=100.0,
    rotary_rescale=2.0,
    qk_norm="layer_plain",
    layer_scale=1e-5,
    pool="mean",
    pre_norm=False,
    epsilon=1e-12,
)


def get_config(size: str = "small") -> Config:
    config = _shared.start("NEPA", size)
    if size == "small":
        # A layer scale of 1e-5 is made for hundreds of thousands of steps.
        config.towers = dict(image=_shared.small_tower(**(TOWER | dict(layer_scale=0.1))))
        config.data.train = _shared.drawings()
        _shared.small(config)
    else:
        config.duration = "1600 epochs"
        # A gated MLP of two thirds of the width has as many parameters as a plain one.
        config.towers = dict(
            image=spec(ViT, **variant("B/14"), **TOWER, mlp_dim=2048, activation="silu", gated=True)
        )
        config.teachers = dict(average=spec(EMA, decay=0.9999))  # evaluated in place of the student
        _shared.imagenet(config, batch_size=4096, scale=(0.2, 1.0))
        config.evaluators.knn.params = "average"
        config.optimizer = _shared.adamw(3e-4 * 4096 / 256, warmup="2.5%")
    config.objectives = dict(nepa=dict(weight=1.0, loss=spec(NextEmbedding)))
    return config
