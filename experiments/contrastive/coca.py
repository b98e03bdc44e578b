"""Trains CoCa: one model for contrast and for captions, whose text decoder is cut in two.

python -m vlpjax.main --config=experiments/contrastive/coca.py --workdir=runs/coca

``small`` needs nothing but this package: bundled drawings of 32 px.  Its tokenizer has no start token, so all captions
begin with the same word, after which the decoder is asked for the first word of the name.  ``coca.py:paper`` has the
towers of open_clip's coca_ViT-L-14 and the paper's batch, optimizer and schedule; chosen here is LAION-400M, because
the paper's data are not public.
"""

from __future__ import annotations

from typing import Any

from experiments._bundled import VOCABULARY, caption, retrieval
from experiments.contrastive import _web
from experiments.contrastive import clip as clip_experiment
from vlpjax.config import Config, spec
from vlpjax.data.transforms import FixedCaption
from vlpjax.models.coca import CaptionDecoder, PooledImage, UnimodalText
from vlpjax.models.vit import ViT
from vlpjax.objectives.captioning import Captioning
from vlpjax.objectives.contrastive import InfoNCE
from vlpjax.optim.adafactor import adafactor

SIZES = ("small", "paper")
SYSTEM = dict(
    system="CoCa",
    paper="CoCa: Contrastive Captioners are Image-Text Foundation Models, arXiv 2205.01917",
    here="attention pooler with 256 + 1 queries, a text decoder in two halves, contrast and captioning at once",
    published="2.1B parameters: 86.3 % zero-shot ImageNet",
    measured="not measured yet",
)
LENGTH = 76  # the class token of the text is the 77th
START = "a {}"  # the captioning loss asks for every word but the first
SCHEDULE = "500_000 steps"


def get_config(size: str = "small") -> Config:
    return small() if size == "small" else paper()


def objectives(contrast: Config) -> dict[str, Any]:
    """Contrast and captioning, weighted 1 : 2 as in the paper's section 3.2."""
    return dict(clip=dict(weight=1.0, loss=contrast), captions=dict(weight=2.0, loss=spec(Captioning)))


def small() -> Config:
    """CLIP's small setting with CoCa's towers and the second loss."""
    config = clip_experiment.small()
    config.name = "CoCa, small"
    config.towers = dict(
        image=spec(
            PooledImage,
            tower=spec(ViT, image_size=clip_experiment.SIZE, patch=4, width=96, depth=3, heads=4, pool="none"),
            queries=16,
            width=128,
            heads=4,
            embedding=128,
        ),
        text=spec(
            UnimodalText, vocabulary=VOCABULARY, length=clip_experiment.LENGTH, width=128, depth=1, heads=4,
            embedding=128,
        ),
        decoder=spec(CaptionDecoder, vocabulary=VOCABULARY, depth=1, heads=4),
    )  # fmt: skip
    config.objectives = objectives(spec(InfoNCE, same="label", temperature=0.04))
    config.data.train.transforms.caption = caption(START)
    config.evaluators.style = retrieval(
        clip_experiment.SIZE, clip_experiment.LENGTH, spec(FixedCaption, template=START)
    )
    return config


def paper() -> Config:
    """ViT-L/14 with 12 + 12 text blocks of width 768; 500,000 steps of 65,536 pairs."""
    config = clip_experiment.paper()
    config.name = "CoCa, ViT-L/14"
    config.duration = SCHEDULE
    text = dict(mlp_ratio=4.0, epsilon=1e-5, scan=True, remat="projections")
    config.towers = dict(
        image=spec(
            PooledImage,
            tower=_web.vit(14, 1024, 24, None, pool="none", pool_norm=False),
            queries=256,
            width=768,
            heads=8,
            embedding=768,
            epsilon=1e-5,
        ),
        text=spec(
            UnimodalText, vocabulary=_web.VOCABULARY, length=LENGTH, width=768, depth=12, heads=12, embedding=768,
            **text,
        ),
        decoder=spec(CaptionDecoder, vocabulary=_web.VOCABULARY, depth=12, heads=12, **text),
    )  # fmt: skip
    config.objectives = objectives(spec(InfoNCE))
    config.data.example.text = f"int32[{LENGTH}]"
    config.data.train.batch_size = 65_536
    config.data.train.transforms.tokenize = _web.tokenize(LENGTH, field="text")
    config.optimizer = _web.adamw(8e-4, 0.01, "2%")
    config.optimizer.direction = spec(adafactor, b2=0.999)
    config.optimizer.schedule.decay = "linear"
    config.evaluators = dict(imagenet=_web.zero_shot(224, _web.tokenize(LENGTH)))
    return config
