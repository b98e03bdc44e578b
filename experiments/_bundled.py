"""What experiments on the bundled drawings share: which vendors are seen, how pictures and captions are made ready.

No experiment itself (files whose names begin with an underscore are none).  ``size`` is in pixels, ``length`` in
tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from vlpjax.config import Config, spec
from vlpjax.data.cache import Prepared
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.sources import TFDS, Canvases, Filter
from vlpjax.data.tokenizers import SentencePieceTokenizer
from vlpjax.data.transforms import (
    ColorJitter,
    Decode,
    DrawCaption,
    FixedCaption,
    Grayscale,
    Normalize,
    Outline,
    RandomAffine,
    RandomFlip,
    Resize,
    Tokenize,
    Trim,
)
from vlpjax.evaluators.answers import GeneratedAnswers
from vlpjax.evaluators.knn import KNN
from vlpjax.evaluators.linear_probe import LinearProbe
from vlpjax.evaluators.retrieval import Retrieval
from vlpjax.evaluators.segmentation import PatchSegmentation

SEEN = "noto+noto_v1+twemoji+emojione+fluent_flat+fluent_gradient"
UNSEEN = "openmoji"  # a vendor whose drawings are never trained on
FEW = tuple(range(0, 1594, 66))  # labels of 25 concepts of all kinds, for models that learn little in minutes
HELD_OUT = (0,)  # the fold of concepts that the concept split never trains on
VOCABULARY = 3000  # pieces of the bundled tokenizer


def source(vendors: str, concepts: str = "all") -> Config:
    """The drawings of some vendors: of ``"all"`` concepts, a ``"few"``, the ``"seen"`` ones or those ``"held_out"``."""
    drawings = spec(TFDS, directory="bundled:emoji1594/1.0.0", split=vendors)
    if concepts == "all":
        return drawings
    if concepts == "few":
        return spec(Filter, source=drawings, field="label", values=FEW)
    return spec(Filter, source=drawings, field="fold", values=HELD_OUT, exclude=concepts == "seen")


def prepared(drawings: Config) -> Config:
    """The same, decoded and trimmed once and then remembered."""
    return spec(Prepared, source=drawings, transforms=dict(decode=spec(Decode), trim=spec(Trim)))


def augmentation(size: int) -> dict[str, Config]:
    """What drawings bear without becoming others, from the decoded picture to ``size`` pixels."""
    return dict(
        flip=spec(RandomFlip),
        affine=spec(RandomAffine, rotate=8.0, translate=0.05, scale=(0.85, 1.15), shear=3.0),
        resize=spec(Resize, size=size, resample="bilinear"),
        outline=spec(Outline, probability=0.3),
        jitter=spec(ColorJitter, brightness=0.15, contrast=0.3, saturation=0.5, hue=0.075, probability=0.8),
        grayscale=spec(Grayscale, probability=0.12),
    )


def caption(template: str = "{}") -> Config:
    """The name, or some of the keywords."""
    return spec(DrawCaption, weights=(0.8, 0.2), max_parts=4, templates=(template,))


def tokenize(length: int, **fields: Any) -> Config:
    """Captions to ids with the bundled tokenizer, which has no start token."""
    tokenizer = spec(SentencePieceTokenizer, path="bundled:emoji1594.spm.model")
    return spec(Tokenize, tokenizer=tokenizer, length=length, lower=True, **fields)


def normalize() -> Config:
    """White paper becomes exactly 0, so that a patch holds what is drawn and not the paper."""
    return spec(Normalize, mean=(1.0, 1.0, 1.0), std=(1 / 3, 1 / 3, 1 / 3))


def train(
    transforms: Mapping[str, Any], keep: tuple[str, ...], batch_size: int, concepts: str = "all"
) -> Config:
    """The seen vendors' drawings, shuffled without end.  ``transforms`` come after decoding and trimming."""
    return spec(
        Pipeline,
        source=prepared(source(SEEN, concepts)),
        transforms=dict(transforms),
        batch_size=batch_size,
        keep=keep,
    )


def images(vendors: str, size: int, concepts: str = "all") -> Config:
    """Drawings with their labels (fields ``image`` and ``label``), once and in order."""
    steps = dict(resize=spec(Resize, size=size, resample="bilinear"), normalize=normalize())
    return once(prepared(source(vendors, concepts)), steps, ("image", "label"))


def pairs(
    vendor: str, size: int, length: int, concepts: str = "all", caption: Config | None = None
) -> Config:
    """The drawings of one vendor, each with its name (fields ``image`` and ``text``), once and in order."""
    steps = dict(
        decode=spec(Decode),
        trim=spec(Trim),
        resize=spec(Resize, size=size, resample="bilinear"),
        caption=spec(FixedCaption) if caption is None else caption,
        tokenize=tokenize(length),
        normalize=normalize(),
    )
    return once(source(vendor, concepts), steps, ("image", "text"))


def retrieval(size: int, length: int, caption: Config | None = None) -> Config:
    """Retrieval among the drawings of the vendor that was never trained on."""
    return spec(Retrieval, data=pairs(UNSEEN, size, length, caption=caption), title="held-out style")


def knn(size: int, **fields: Any) -> Config:
    """Neighbours of the unseen vendor's drawings among the seen vendors' ones; the concept is the class."""
    return spec(
        KNN,
        train=images(SEEN, size),
        test=images(UNSEEN, size),
        **(dict(title="k-NN, held-out style") | fields),
    )


def linear_probe(size: int, **fields: Any) -> Config:
    """A classifier of concepts, fitted to the seen vendors' drawings and tested on the unseen vendor's."""
    return spec(
        LinearProbe,
        train=images(SEEN, size),
        test=images(UNSEEN, size),
        title="linear probe, held-out style",
        **fields,
    )


def segmentation(size: int, **fields: Any) -> Config:
    """Patches of canvases with two of ten concepts: those of the unseen vendor among those of the seen ones."""

    def canvases(vendors: str, count: int) -> Config:
        drawings = spec(Canvases, source=source(vendors), count=count, size=size)
        steps = dict(decode=spec(Decode), normalize=normalize())
        return once(drawings, steps, ("image", "label_map"))

    return spec(
        PatchSegmentation,
        train=canvases(SEEN, 512),
        test=canvases(UNSEEN, 256),
        title="patch segmentation, held-out style",
        **fields,
    )


def answers(size: int, transforms: Mapping[str, Any], concepts: str = "all", batch_size: int = 128) -> Config:
    """What a decoder says of the unseen vendor's drawings, against their names; also with drawings exchanged.

    ``transforms`` make rows out of a picture and the field ``caption``.
    """
    resize = spec(Resize, size=size, resample="bilinear")
    return spec(
        GeneratedAnswers,
        data=once(
            prepared(source(UNSEEN, concepts)),
            # Copies: what is changed for training is training's.
            dict(
                resize=resize,
                caption=spec(FixedCaption),
                **copy.deepcopy(dict(transforms)),
                normalize=normalize(),
            ),
            keep=("image", "tokens", "weights"),
            batch_size=batch_size,
        ),
        tokenizer=spec(SentencePieceTokenizer, path="bundled:emoji1594.spm.model"),
        other_pictures=True,
        title="answers, held-out style",
    )


def once(
    drawings: Config, transforms: Mapping[str, Any], keep: tuple[str, ...], batch_size: int = 256
) -> Config:
    """A finite pipeline, in order."""
    return spec(
        Pipeline,
        source=drawings,
        transforms=dict(transforms),
        batch_size=batch_size,
        shuffle=False,
        repeat=False,
        keep=keep,
    )
