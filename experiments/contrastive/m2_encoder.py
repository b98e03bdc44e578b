"""Trains M2-Encoder: one multiway transformer for images and texts in two languages, compared inside groups of devices.

python -m vlpjax.main --config=experiments/contrastive/m2_encoder.py --workdir=runs/m2_encoder

``small`` needs nothing but this package: bundled drawings with their English and Chinese names.
``m2_encoder.py:paper`` has the towers of the 1B model; how it was optimised is not published, so chosen here are CLIP's
optimizer and batch, eight groups, and one pass over six billion pairs.  It is scored on ImageNet with English prompts.
"""

from __future__ import annotations

from typing import Any

from experiments._bundled import UNSEEN, VOCABULARY, augmentation, normalize, pairs, tokenize, train
from experiments.contrastive import _web
from experiments.contrastive import clip as clip_experiment
from vlpjax.config import Config, spec
from vlpjax.data.tokenizers import SentencePieceTokenizer
from vlpjax.data.transforms import Tokenize, TranslatedName
from vlpjax.evaluators.retrieval import Retrieval
from vlpjax.models.multiway import Multiway
from vlpjax.objectives.contrastive import InfoNCE

SIZES = ("small", "paper")
SYSTEM = dict(
    system="M2-Encoder",
    paper="M2-Encoder: Advancing Bilingual Image-Text Understanding, arXiv 2401.15896",
    here="multiway transformer, two contrastive heads, features gathered inside groups of devices only",
    published="10B: 88.5 % zero-shot ImageNet, 80.7 % in Chinese",
    measured="not measured yet",
)
LANGUAGES = ("en", "zh")
LENGTH, PAPER_LENGTH = 24, 52


def get_config(size: str = "small") -> Config:
    return small() if size == "small" else paper()


def objectives(groups: int, **fields: Any) -> dict[str, Any]:
    """A head after the joint layers and one before, each with its own scale."""
    both = dict(image="encoder", text="encoder", groups=groups, **fields)
    early = dict(image_output="early_embedding", text_output="early_embedding")
    return dict(
        late=dict(weight=1.0, loss=spec(InfoNCE, **both)),
        early=dict(weight=1.0, loss=spec(InfoNCE, **both, **early)),
    )


def small() -> Config:
    """Drawings with a name in one of two languages; no name is ever paired with its translation."""
    config = clip_experiment.small()
    config.name = "M2-Encoder, small"
    config.towers = dict(
        encoder=spec(
            Multiway, image_size=clip_experiment.SIZE, patch=4, vocabulary=VOCABULARY, length=LENGTH, width=96, depth=2,
            joint_depth=1, heads=4, embedding=128,
        )
    )  # fmt: skip
    config.objectives = objectives(2, same="label", temperature=0.04)
    config.data.train = train(
        dict(
            **augmentation(clip_experiment.SIZE),
            caption=spec(TranslatedName, locales=LANGUAGES, out="caption"),
            tokenize=tokenize(LENGTH),
            normalize=normalize(),
        ),
        keep=("image", "text", "label"),
        batch_size=128,
    )
    config.data.train.transforms.flip.probability = (
        0.0  # only English captions know their left from their right
    )
    config.evaluators = {
        f"names_{locale}": spec(
            Retrieval,
            data=pairs(
                UNSEEN,
                clip_experiment.SIZE,
                LENGTH,
                caption=spec(TranslatedName, locales=(locale,), out="caption"),
            ),
            image="encoder",
            text="encoder",
            title=f"held-out style, names in {locale}",
        )
        for locale in LANGUAGES
    }
    return config


def paper() -> Config:
    """The 1B model: 21 + 3 layers of width 1,024, compared inside eight groups."""
    config = clip_experiment.paper()
    config.name = "M2-Encoder, 1B"
    config.duration = "1 epoch"
    config.towers = dict(
        encoder=spec(
            Multiway,
            image_size=224,
            patch=14,
            width=1024,
            depth=21,
            joint_depth=3,
            heads=16,
            embedding=1024,
            remat=True,
        )
    )
    config.objectives = objectives(8)
    config.data = _web.declared(224, PAPER_LENGTH, examples=6_000_000_000)
    pieces = spec(SentencePieceTokenizer, path="tokenizers/m2_encoder/sp.model")
    config.data.train = _web.pairs(
        dict(
            crop=_web.crop(224),
            tokenize=spec(Tokenize, tokenizer=pieces, length=PAPER_LENGTH, field="text"),
            normalize=_web.normalize(),
        ),
        32_768,
    )
    config.data.train.source.tars = "bm6b/{000000..599999}.tar"
    prompts = spec(Tokenize, tokenizer=pieces, length=PAPER_LENGTH)
    config.evaluators = dict(imagenet=_web.zero_shot(224, prompts, image="encoder", text="encoder"))
    return config
