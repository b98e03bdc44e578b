"""What the published settings of contrastive systems share: web pairs in tars, CLIP's tokenizer, ImageNet zero-shot.

No experiment itself.  The files that these name are the user's: ``laion400m/*.tar`` as img2dataset writes them,
``tokenizers/clip/tokenizer.json`` of ``openai/clip-vit-base-patch32``, and ``imagenet/val`` with one folder per class,
called by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments import _recipes
from vlpjax.config import Config, spec
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.sources import ImageFolder, WebDataset
from vlpjax.data.tokenizers import JsonTokenizer
from vlpjax.data.transforms import CenterCrop, Decode, Normalize, RandomResizedCrop, Resize, Tokenize
from vlpjax.evaluators.zeroshot import ZeroShot
from vlpjax.models.text import TextTransformer
from vlpjax.models.vit import ViT

LAION = "laion400m/{00000..41407}.tar"
PAIRS = 400_000_000
VOCABULARY, END = 49_408, 49_407  # of CLIP's byte-level BPE; its end-of-text token has the last id
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)


def tokenize(length: int = 77, **fields: Any) -> Config:
    """CLIP's tokens: start, text, end, filled up with id 0, which is the token ``!``."""
    words = spec(
        JsonTokenizer,
        path="tokenizers/clip/tokenizer.json",
        pad="!",
        bos="<|startoftext|>",
        eos="<|endoftext|>",
    )
    return spec(Tokenize, **{**dict(tokenizer=words, length=length, lower=True, bos=True), **fields})


def normalize() -> Config:
    """Pixels by the statistics that the CLIP models were trained with."""
    return spec(Normalize, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))


def crop(size: int, scale: tuple[float, float] = (0.9, 1.0)) -> Config:
    """The one augmentation of CLIP: a random part of the picture."""
    return spec(RandomResizedCrop, size=size, scale=scale, resample="bicubic")


def pairs(
    transforms: Mapping[str, Any], batch_size: int, keep: tuple[str, ...] = ("image", "text")
) -> Config:
    """LAION-400M: pictures (decoded) and their alternative texts (field ``text``)."""
    return spec(
        Pipeline,
        source=spec(WebDataset, tars=LAION),
        transforms=dict(decode=spec(Decode), **transforms),
        batch_size=batch_size,
        keep=keep,
        workers=16,
    )


def declared(size: int, length: int, examples: int = PAIRS, **more: str) -> dict[str, Any]:
    """What an example of the batch looks like where the data is not."""
    example = dict(image=f"float32[{size},{size},3]", text=f"int32[{length}]", **more)
    return dict(example=example, examples=examples)


def zero_shot(size: int, tokens: Config, pixels: Config | None = None, **fields: Any) -> Config:
    """ImageNet by class names put into seven templates."""
    data = spec(
        Pipeline,
        source=spec(ImageFolder, directory="imagenet/val", captions="folders"),
        transforms=dict(
            decode=spec(Decode),
            resize=spec(Resize, size=size, mode="shorter"),
            crop=spec(CenterCrop, size=size),
            normalize=normalize() if pixels is None else pixels,
        ),
        batch_size=1024,
        shuffle=False,
        repeat=False,
        keep=("image", "label"),
    )
    return spec(
        ZeroShot,
        data=data,
        tokenize=tokens,
        templates=TEMPLATES,
        name="class_name",
        every="1 epoch",
        title="ImageNet, zero-shot",
        **fields,
    )


def vit(patch: int, width: int, depth: int, embedding: int | None, **fields: Any) -> Config:
    """An image tower of CLIP: norms before the first block and on the class token, heads of 64."""
    own = dict(
        image_size=224, patch=patch, width=width, depth=depth, heads=width // 64, embedding=embedding,
        final_norm=False, pool_norm=True, epsilon=1e-5, scan=True, remat="projections",
    )  # fmt: skip
    return spec(ViT, **{**own, **fields})


def text(width: int, depth: int, embedding: int | None, length: int = 77, **fields: Any) -> Config:
    """A text tower of CLIP: causal, read at the end of the text, heads of 64."""
    own = dict(
        vocabulary=VOCABULARY, length=length, width=width, depth=depth, heads=width // 64, embedding=embedding,
        eos_id=END, epsilon=1e-5, scan=True, remat="projections",
    )  # fmt: skip
    return spec(TextTransformer, **{**own, **fields})


def adamw(
    learning_rate: float,
    weight_decay: float,
    warmup: str,
    *,
    b2: float = 0.98,
    eps: float = 1e-6,
    **fields: Any,
) -> Config:
    """AdamW as CLIP takes it."""
    return _recipes.adamw(
        learning_rate, warmup=warmup, weight_decay=weight_decay, betas=(0.9, b2), eps=eps, **fields
    )
