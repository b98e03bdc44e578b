"""Trains CLIP from scratch on the bundled drawings, on a laptop's CPU.

python -m vlpjax.main --config=experiments/quickstart.py --workdir=runs/quickstart
"""

from __future__ import annotations

from experiments import _bundled
from experiments._bundled import UNSEEN, VOCABULARY, normalize, pairs, tokenize
from vlpjax.config import Config, spec
from vlpjax.data.transforms import TranslatedName
from vlpjax.evaluators.retrieval import Retrieval
from vlpjax.evaluators.zeroshot import ZeroShot
from vlpjax.experiment import base_config
from vlpjax.models.convnet import ConvNet
from vlpjax.models.text import TextTransformer
from vlpjax.objectives.contrastive import InfoNCE
from vlpjax.optim.muon import muon
from vlpjax.optim.optimizer import Optimizer, Schedule

SPLITS = ("style", "concept", "language")
SYSTEM = dict(
    system="CLIP",
    paper="Learning Transferable Visual Models From Natural Language Supervision, arXiv 2103.00020",
    here="InfoNCE over a small convolutional net and a causal text transformer, trained with Muon",
    published="ViT-B/32 on LAION-400M: 62.9 % zero-shot ImageNet (open_clip)",
    measured="held-out style, R@1 among 1,594: see above (`make quickstart`)",
)
# The language split: names in these languages are trained on, names in the others are only tested.
LANGUAGES = ("en", "de", "nl", "sv", "fr", "es", "it", "ro")
OTHER_LANGUAGES = ("pt", "no")
SIZE = 32


def get_config(split: str = "style") -> Config:
    config = base_config()
    config.name = f"quickstart, {split} split"
    config.duration = "1000 steps"
    length = 24 if split == "language" else 12  # the tokenizer has English pieces and spells other words
    config.towers = dict(
        image=spec(
            ConvNet,
            image_size=SIZE,
            channels=(32, 64, 128, 192),
            strides=(2, 2, 1, 2),
            pool="flatten",
            embedding=128,
        ),
        text=spec(
            TextTransformer,
            vocabulary=VOCABULARY,
            length=length,
            width=128,
            depth=1,
            heads=4,
            embedding=128,
            norm="rms",
            activation="squared_relu",
        ),
    )
    # Several vendors draw the same concept: in one batch they are positives of one another, not negatives.
    config.objectives = dict(clip=dict(weight=1.0, loss=spec(InfoNCE, same="label", temperature=0.04)))
    config.data.train = _bundled.train(
        dict(
            **_bundled.augmentation(SIZE),
            caption=_bundled.caption(),
            tokenize=tokenize(length),
            normalize=normalize(),
        ),
        keep=("image", "text", "label"),
        batch_size=128,
        concepts=_concepts(split, held_out=False),
    )
    config.optimizer = spec(
        Optimizer,
        direction=spec(muon, rate=10.0),
        learning_rate=2e-3,
        schedule=spec(Schedule, warmup="5%"),
        weight_decay=1.0,
        clip_norm=1.0,
    )
    if split == "language":
        transforms = config.data.train.transforms
        transforms.flip.probability = 0.0  # only English captions know their left from their right
        transforms.caption = spec(TranslatedName, locales=LANGUAGES, out="caption")
        for locale in ("en", *OTHER_LANGUAGES):
            title = f"names in {locale}" + ("" if locale in LANGUAGES else ", an unseen language")
            data = _test(UNSEEN, split, length)
            data.transforms.caption = spec(TranslatedName, locales=(locale,), out="caption")
            config.evaluators[f"names_{locale}"] = spec(
                Retrieval, data=data, title=f"held-out style, {title}"
            )
    elif split == "style":
        config.evaluators = dict(
            style=spec(Retrieval, data=_test(UNSEEN, split, length), title="held-out style"),
            zeroshot=spec(
                ZeroShot,
                data=_test(UNSEEN, split, length),
                tokenize=tokenize(length),
                title="zero-shot, held-out style",
            ),
        )
    else:
        config.evaluators = dict(
            concept=spec(
                Retrieval, data=_test("noto", split, length), title="held-out concepts, known style"
            ),
            concept_and_style=spec(
                Retrieval, data=_test(UNSEEN, split, length), title="held-out concepts, held-out style"
            ),
        )
    return config


def _concepts(split: str, *, held_out: bool) -> str:
    if split != "concept":
        return "all"
    return "held_out" if held_out else "seen"


def _test(vendor: str, split: str, length: int) -> Config:
    return pairs(vendor, SIZE, length, _concepts(split, held_out=True))
