"""TIPS: CLIP with two captions per image, each with a class token of its own, and self-distillation of patches.

python -m vlpjax.main --config=experiments/contrastive/tips.py --workdir=runs/tips

Needs nothing for ``tips.py:small`` (the default), where the drawings' names stand for captions of the web and their
keywords for synthetic ones.  ``tips.py:paper`` are the published settings of ViT-g/14, as far as they are public, on
image-text pairs with a field ``synthetic_caption``.
"""

from __future__ import annotations

import optax

from experiments import _bundled
from experiments._recipes import adamw, start
from experiments.self_supervised._shared import LOCAL_SIZE, SIZE, small_tower, vit
from experiments.self_supervised._views import chain, numbered, views
from vlpjax.config import Config, spec
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.sources import WebDataset
from vlpjax.data.tokenizers import SentencePieceTokenizer
from vlpjax.data.transforms import Decode, DrawCaption, FixedCaption, Normalize, Tokenize
from vlpjax.models.text import TextTransformer
from vlpjax.objectives.contrastive import InfoNCE
from vlpjax.objectives.ibot import IBOT
from vlpjax.optim.optimizer import Optimizer, Schedule
from vlpjax.teachers import EMA

SIZES = ("small", "paper")
SYSTEM = dict(
    system="TIPS",
    paper="TIPS: Text-Image Pretraining with Spatial awareness, arXiv 2410.16512",
    here="two class tokens with a caption each, DINO from one large crop, masked patches",
    published="ViT-g/14, high resolution: 83.1 mIoU on PASCAL, 83.2 % k-NN on ImageNet",
    measured="against the same without its images' own loss, 200 small steps, 3 seeds: mean IoU of patches "
    "0.106 ± 0.001 against 0.107 ± 0.001, R@1 0.5 ± 0.1 % against 0.3 ± 0.2 %: no effect yet "
    "(`python tools/compare.py experiments/contrastive/tips.py`)",
)
# Against the same run whose images teach themselves nothing: what single patches know.
PROOF = dict(
    against="experiments/contrastive/tips.py:small",
    metrics=("segmentation/mean_iou", "style/text_to_image/recall@1"),
    settings=("duration=200 steps", "data.train.batch_size=32"),
    set_b=("objectives.patches.weight=0.0",),
)
LENGTH, PAPER_LENGTH, LOCAL = 12, 64, 6
KEEP = ("image", "text", "synthetic")


def get_config(size: str = "small") -> Config:
    config = start("TIPS", size)
    _small(config) if size == "small" else _paper(config)
    config.teachers.ema = spec(
        EMA, towers=("image", "patches_head", "patches_patch_head"), decay=0.994, final_decay=1.0
    )
    return config


def _objectives(prototypes: int, local: int, **head: object) -> dict[str, dict[str, object]]:
    """L = (InfoNCE(web) + InfoNCE(synthetic)) / 2 + self-distillation + 2 masked patches (section 3.2)."""
    captions = dict(text_output="pooled", same=None)
    distillation = spec(
        IBOT,
        global_views=("image",),
        local_views=numbered("local", local),
        output="prefix/0",
        prototypes=prototypes,
        patch_prototypes=prototypes,
        teacher_temperature=(0.07, 0.07),
        patch_teacher_temperature=(0.04, 0.07),
        teacher_warmup="10%",
        mask_probability=1.0,
        mask_ratio=(0.75, 0.75),
        mask_shape="random",
        patch_weight=2.0,
        **head,
    )
    return dict(
        web=dict(weight=0.5, loss=spec(InfoNCE, image_output="prefix/0", **captions)),
        synthetic=dict(
            weight=0.5,
            loss=spec(InfoNCE, image_output="prefix/1", text_field="synthetic", scale_of="web", **captions),
        ),
        patches=dict(weight=1.0, loss=distillation),
    )


def _small(config: Config) -> None:
    config.duration = "6 epochs"
    config.towers = dict(
        image=small_tower(class_tokens=2, position_prefix=False, mask_token=True),
        text=spec(
            TextTransformer, vocabulary=_bundled.VOCABULARY, length=LENGTH, width=128, depth=2, heads=4,
            causal=False, mask_padding=True, pool="mean",
        ),
    )  # fmt: skip
    config.objectives = _objectives(512, 2, hidden=(256,), bottleneck=64)
    for name in ("web", "synthetic"):
        config.objectives[name].loss.same = "label"
    fields = dict(normalize=_bundled.normalize(), blur=0.0, flip=False)
    crops = views(
        image=chain(SIZE, (0.6, 1.0), **fields),
        **{name: chain(LOCAL_SIZE, (0.1, 0.4), **fields) for name in numbered("local", 2)},
    )
    synthetic = _bundled.tokenize(LENGTH)
    synthetic.field, synthetic.out = "synthetic_caption", "synthetic"
    steps = dict(
        caption=spec(FixedCaption),
        synthetic_caption=spec(
            DrawCaption, fields=("keywords", "name"), weights=(1.0, 0.0), out="synthetic_caption"
        ),
        tokenize=_bundled.tokenize(LENGTH),
        tokenize_synthetic=synthetic,
        views=crops,
    )
    config.data.train = _bundled.train(steps, (*KEEP, *numbered("local", 2), "label"), batch_size=128)
    config.optimizer = adamw(1e-3, warmup="10%", clip_norm=1.0)
    config.evaluators = dict(
        style=_bundled.retrieval(SIZE, LENGTH),
        knn=_bundled.knn(SIZE, params="ema", output="pooled"),
        # Each of the two drawings on a canvas is as large as a training crop.
        segmentation=_bundled.segmentation(2 * SIZE, params="ema"),
    )


def _paper(config: Config) -> None:
    batch = 16_384
    config.duration = "10 epochs"
    config.towers = dict(
        image=vit("g-swiglu/14", class_tokens=2, position_prefix=False, position_method="bilinear", mask_token=True),
        text=spec(
            TextTransformer, vocabulary=32_000, length=PAPER_LENGTH, width=1536, depth=12, heads=24,
            activation="relu", causal=False, mask_padding=True, pool="mean", positions="sincos", embed_scale=1536**0.5,
        ),
    )  # fmt: skip
    config.objectives = _objectives(32_768, LOCAL)
    pixels = spec(Normalize, range="0..1")
    crops = views(
        image=chain(224, (0.4, 1.0), normalize=pixels, flip=False),
        **{name: chain(98, (0.05, 0.4), normalize=pixels, flip=False) for name in numbered("local", LOCAL)},
    )
    words = spec(SentencePieceTokenizer, path="tokenizers/tips/tokenizer.model")
    config.data.train = spec(
        Pipeline,
        source=spec(WebDataset, tars="pairs/{00000..11599}.tar"),
        transforms=dict(
            decode=spec(Decode),
            tokenize=spec(Tokenize, tokenizer=words, length=PAPER_LENGTH, field="text"),
            tokenize_synthetic=spec(
                Tokenize, tokenizer=words, length=PAPER_LENGTH, field="synthetic_caption", out="synthetic"
            ),
            views=crops,
        ),
        batch_size=batch,
        keep=(*KEEP, *numbered("local", LOCAL)),
    )
    config.data.examples = 116_000_000
    config.data.example = dict(
        image="float32[224,224,3]",
        text=f"int32[{PAPER_LENGTH}]",
        synthetic=f"int32[{PAPER_LENGTH}]",
        **dict.fromkeys(numbered("local", LOCAL), "float32[98,98,3]"),
    )
    config.optimizer = spec(
        Optimizer,
        direction=spec(optax.scale_by_factored_rms),
        learning_rate=1e-3,
        schedule=spec(Schedule, warmup="5%"),
        weight_decay=1e-4,
        clip_norm=1.0,
    )
