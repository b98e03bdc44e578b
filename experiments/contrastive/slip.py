"""Trains SLIP: CLIP on a weak view of each image, and SimCLR on two strong ones, with one image tower.

python -m vlpjax.main --config=experiments/contrastive/slip.py --workdir=runs/slip

``small`` needs nothing but this package: bundled drawings of 32 px.  ``slip.py:paper`` is ViT-B/16 on YFCC15M, as
tars of pictures and texts (title or description), with the published settings but for the first rate of the warm-up,
which is 8e-7 and not 1e-6.
"""

from __future__ import annotations

from typing import Any

from experiments._bundled import augmentation, caption, normalize, tokenize, train
from experiments._recipes import IMAGENET
from experiments.contrastive import _web
from experiments.contrastive import clip as clip_experiment
from experiments.self_supervised._views import EVEN, chain
from vlpjax.config import Config, spec
from vlpjax.data.transforms import DrawCaption, Normalize, RandomFlip, Views
from vlpjax.objectives.contrastive import InfoNCE
from vlpjax.objectives.ntxent import NTXent

SIZES = ("small", "paper")
SYSTEM = dict(
    system="SLIP",
    paper="SLIP: Self-supervision meets Language-Image Pre-training, arXiv 2112.12750",
    here="InfoNCE on a weak view plus NT-Xent on two strong views of the same image tower",
    published="ViT-B/16 on YFCC15M, 25 epochs: 42.8 % zero-shot, 72.1 % linear ImageNet",
    measured="against CLIP after 200 small steps, 3 seeds: R@1 1.4 ± 0.4 % against 0.6 ± 0.3 % and 1.2 ± 0.4 % against "
    "0.4 ± 0.2 %; 5-NN 4.9 ± 0.9 % against 4.0 ± 0.9 % (`python tools/compare.py experiments/contrastive/slip.py`)",
)
PROOF = dict(
    against="experiments/contrastive/clip.py:small",
    metrics=("knn/k5/top1", "style/image_to_text/recall@1", "style/text_to_image/recall@1"),
    settings=("duration=200 steps", "towers.image.patch=8", "data.train.batch_size=64"),
)
VIEWS = ("view1", "view2")
# Drawings fill their frame, and 32 pixels are blurred as it is.
SMALL: dict[str, Any] = dict(strong_scale=(0.3, 1.0), blur=0.0)
PAPER_BATCH, PAPER_RATE = 4096, 3e-3


def get_config(size: str = "small") -> Config:
    return small() if size == "small" else paper()


def objectives(contrast: Config, projector: tuple[int, ...]) -> dict[str, Any]:
    """The paper adds both losses up; its second is the mean of what ``NTXent`` sums over the two views."""
    return dict(
        clip=dict(weight=1.0, loss=contrast),
        simclr=dict(weight=0.5, loss=spec(NTXent, views=VIEWS, temperature=0.1, projector=projector)),
    )


def views(
    names: tuple[str, ...],
    weak: dict[str, Config],
    size: int,
    pixels: Config,
    strong_scale: tuple[float, float],
    **strong: Any,
) -> Config:
    """The first of the names is a weak view, the others are strong ones, whose chain takes ``strong`` too."""
    own = chain(size, strong_scale, EVEN, normalize=pixels, **strong)
    return spec(Views, views={names[0]: dict(**weak, normalize=pixels), **dict.fromkeys(names[1:], own)})


def small() -> Config:
    """CLIP's small setting with two more views."""
    config = clip_experiment.small()
    config.name = "SLIP, small"
    weak = augmentation(clip_experiment.SIZE)
    weak.pop("flip")  # which sides a caption names is known before the views are made
    config.objectives = objectives(spec(InfoNCE, same="label", temperature=0.04), (256, 256, 64))
    config.data.train = train(
        dict(
            flip=spec(RandomFlip),
            caption=caption(),
            tokenize=tokenize(clip_experiment.LENGTH),
            views=views(("image", *VIEWS), weak, clip_experiment.SIZE, normalize(), **SMALL),
        ),
        keep=("image", "text", "label", *VIEWS),
        batch_size=128,
    )
    return config


def paper() -> Config:
    """ViT-B/16 on YFCC15M, 25 epochs of 4,096."""
    config = clip_experiment.paper()
    config.name = "SLIP, ViT-B/16 on YFCC15M"
    config.duration = "25 epochs"
    config.towers = dict(
        image=_web.vit(
            16, 768, 12, 512, pre_norm=False, patch_bias=True, final_norm=True, pool_norm=False, epsilon=1e-6
        ),
        text=_web.text(512, 12, 512),
    )
    config.objectives = objectives(spec(InfoNCE), (4096, 4096, 256))
    config.data = _web.declared(224, 77, examples=14_829_396, **dict.fromkeys(VIEWS, "float32[224,224,3]"))
    pixels = spec(Normalize, **IMAGENET)
    config.data.train = _web.pairs(
        dict(
            caption=spec(DrawCaption, fields=("title", "description"), max_parts=1),
            tokenize=_web.tokenize(),
            views=views(
                ("image", *VIEWS), dict(crop=_web.crop(224, scale=(0.5, 1.0))), 224, pixels, (0.08, 1.0)
            ),
        ),
        PAPER_BATCH,
        keep=("image", "text", *VIEWS),
    )
    config.data.train.source.tars = "yfcc15m/{00000..01499}.tar"
    config.optimizer = _web.adamw(PAPER_RATE, 0.1, "1 epoch", eps=1e-8, final=1e-5 / PAPER_RATE)
    config.evaluators = dict(imagenet=_web.zero_shot(224, _web.tokenize(), pixels))
    return config
