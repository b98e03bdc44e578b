"""Transforms of single examples: flat dicts in, flat dicts out.  See `images`, `texts` and `fields`."""

from vlpjax.data.transforms.fields import Drop, Keep, Rename
from vlpjax.data.transforms.images import (
    CenterCrop,
    ColorJitter,
    Decode,
    GaussianBlur,
    Grayscale,
    Invert,
    Normalize,
    Pad,
    RandAugment,
    RandomAffine,
    RandomErasing,
    RandomFlip,
    RandomResizedCrop,
    Resize,
    Solarize,
)
from vlpjax.data.transforms.texts import DrawCaption, FixedCaption, Tokenize

__all__ = [
    "CenterCrop", "ColorJitter", "Decode", "DrawCaption", "Drop", "FixedCaption", "GaussianBlur", "Grayscale",
    "Invert", "Keep", "Normalize", "Pad", "RandAugment", "RandomAffine", "RandomErasing", "RandomFlip",
    "RandomResizedCrop", "Rename", "Resize", "Solarize", "Tokenize",
]  # fmt: skip
