"""Trains NegCLIP: each caption comes with one of the same words in a wrong order, which no image may choose.

python -m vlpjax.main --config=experiments/contrastive/negclip.py --workdir=runs/negclip

``small`` needs nothing but this package: scenes of two bundled drawings side by side ("a duck left of a tree").
``negclip.py:plain`` is the same without the negatives, to compare with.  ``negclip.py:paper`` tunes OpenAI's ViT-B/32
on COCO's captions, each image beside one of those that are most alike; ``coco/neighbors.npy`` lists these for every
image by the cosines of the same tower, and is written by ``tools/find_neighbors.py``.  Chosen here is how many they
are, three.
"""

from __future__ import annotations

from typing import Any

from experiments._bundled import SEEN, UNSEEN, VOCABULARY, normalize, once, tokenize
from experiments.contrastive import _web
from experiments.contrastive import clip as clip_experiment
from vlpjax.config import Config, spec
from vlpjax.data.cache import Prepared
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.sources import TFDS, Scenes, WithNeighbors
from vlpjax.data.transforms import Decode, Perturb, RandomAffine, SwappedCaption
from vlpjax.evaluators.order import MultipleChoice
from vlpjax.models.convnet import ConvNet
from vlpjax.models.text import TextTransformer
from vlpjax.objectives.contrastive import InfoNCE
from vlpjax.weights.starting import Pretrained

SIZES = ("small", "plain", "paper")
SYSTEM = dict(
    system="NegCLIP, ARO",
    paper="When and why vision-language models behave like bags-of-words, arXiv 2210.01936",
    here="swapped captions as columns that are never rows; order, relation and attribute probes",
    published="above CLIP (ViT-B/32) on the relations, attributes and orders of ARO",
    measured="relations, unseen style: 82.8 ± 4.2 % against 51.1 ± 2.0 % without negatives after 300 steps, 3 seeds "
    "(`python tools/compare.py experiments/contrastive/negclip.py`)",
)
# Early on: given many steps, plain CLIP learns the order of so few words too.
PROOF = dict(
    against="experiments/contrastive/negclip.py:plain",
    metrics=("relation/macro_accuracy",),
    settings=("duration=300 steps",),
)
SIZE, LENGTH = 32, 24
ORDERS = ("nouns_adjectives", "all_but_nouns_adjectives", "within_trigrams", "trigrams")


def get_config(size: str = "small") -> Config:
    return paper() if size == "paper" else small(negatives=size == "small")


def small(negatives: bool = True) -> Config:
    """Scenes of two drawings, with relations to learn."""
    config = clip_experiment.small()
    config.name = f"NegCLIP, {'small' if negatives else 'without negatives'}"
    config.duration = "300 steps"
    config.towers = dict(
        image=spec(  # flattened, because a relation is about where things are
            ConvNet,
            image_size=(SIZE, 2 * SIZE),
            channels=(32, 64, 96, 128),
            strides=(2, 2, 2, 2),
            pool="flatten",
            embedding=128,
        ),
        text=spec(
            TextTransformer, vocabulary=VOCABULARY, length=LENGTH, width=128, depth=2, heads=4, embedding=128
        ),
    )
    used = ("negative",) if negatives else ()
    config.objectives = dict(
        clip=dict(weight=1.0, loss=spec(InfoNCE, same="label", temperature=0.04, negatives=used))
    )
    config.data.train = spec(
        Pipeline,
        source=_scenes(SEEN, 20_000, "relation"),
        transforms=dict(
            affine=spec(RandomAffine, rotate=4.0, translate=0.03, scale=(0.9, 1.1)),
            negative=spec(SwappedCaption),
            tokenize=tokenize(LENGTH),
            tokenize_negative=tokenize(LENGTH, field="negative", out="negative"),
            normalize=normalize(),
        ),
        batch_size=64,
        keep=("image", "text", "label", *used),
    )
    config.evaluators = dict(
        relation=spec(
            MultipleChoice, data=_probe("relation"), group="relation", title="relations, unseen style"
        ),
        attribute=spec(
            MultipleChoice, data=_probe("attribute"), group="relation", title="attributes, unseen style"
        ),
        order=spec(MultipleChoice, data=_order_probe(), choices=("text", *ORDERS), title="order of words"),
    )
    return config


def _scenes(vendors: str, count: int, kind: str) -> Config:
    """Scenes of each vendor's drawings of thirty concepts."""
    scenes = spec(Scenes, source=_few(vendors), count=count, kind=kind, size=SIZE)
    return spec(Prepared, source=scenes, transforms=dict(decode=spec(Decode)))


def _few(vendors: str) -> Config:
    """The thirty animals that are concepts [1300:1330] of each vendor that has all of them."""
    return spec(TFDS, directory="bundled:emoji1594/1.0.0", split="+".join(
        f"{vendor}[1300:1330]" for vendor in vendors.split("+") if vendor not in ("noto_v1", "emojione")
    ))  # fmt: skip


def _probe(kind: str) -> Config:
    """Scenes of the unseen vendor, each with its right caption (``text``) and the wrong one (``negative``)."""
    wrong = tokenize(LENGTH, field="wrong", out="negative")
    return _once(kind, dict(tokenize=tokenize(LENGTH), tokenize_negative=wrong), ("text", "negative"))


def _order_probe() -> Config:
    """The same scenes with four perturbed captions."""
    steps: dict[str, Any] = {kind: spec(Perturb, kind=kind, out=kind) for kind in ORDERS}
    steps["tokenize"] = tokenize(LENGTH)  # afterwards, because a perturbation cuts the caption too
    steps |= {f"tokenize_{kind}": tokenize(LENGTH, field=kind, out=kind) for kind in ORDERS}
    return _once("relation", steps, ("text", *ORDERS))


def _once(kind: str, steps: dict[str, Any], texts: tuple[str, ...]) -> Config:
    scenes = spec(Scenes, source=_few(UNSEEN), count=512, kind=kind, size=SIZE, seed=1)
    return once(scenes, dict(decode=spec(Decode), **steps, normalize=normalize()), ("image", *texts))


def paper() -> Config:
    """ViT-B/32 with OpenAI's weights, five epochs of COCO's captions and their neighbours at a rate of 1e-6."""
    config = clip_experiment.paper()
    config.name = "NegCLIP, ViT-B/32 on COCO"
    config.duration = (
        "10 epochs"  # five, in which each image comes once for itself and once as another's neighbour
    )
    towers = dict(activation="quick_gelu", scan=False, remat="none")
    config.towers = dict(image=_web.vit(32, 768, 12, 512, **towers), text=_web.text(512, 12, 512, **towers))
    weights = spec(Pretrained, path="weights/clip-vit-base-patch32", new=())
    config.initialize = dict(image=weights, text=weights)
    config.objectives = dict(
        clip=dict(weight=1.0, loss=spec(InfoNCE, negatives=("negative",), temperature=0.01))
    )
    config.data = _web.declared(224, 77, examples=118_287, negative="int32[77]")
    config.data.train = _web.pairs(
        dict(
            negative=spec(SwappedCaption, field="text"),
            crop=_web.crop(224),
            tokenize=_web.tokenize(field="text"),
            tokenize_negative=_web.tokenize(field="negative", out="negative"),
            normalize=_web.normalize(),
        ),
        512,  # 256 images and their neighbours
        keep=("image", "text", "negative"),
    )
    config.data.train.source.tars = "coco/{00000..00059}.tar"
    config.data.train.source = spec(
        WithNeighbors, source=config.data.train.source, neighbors="coco/neighbors.npy"
    )
    config.data.train.max_bad_fraction = 0.05  # captions in which nothing can be swapped
    config.optimizer = _web.adamw(1e-6, 0.2, "50 steps")
    return config
