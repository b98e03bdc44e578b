"""Transforms of single examples: flat dicts in, flat dicts out.

See the modules of this folder: `appearance`, `conversations`, `fields`, `frames`, `images`, `order`, `pairs`,
`text_augment`, `texts`, `tiles` and `views`.
"""

from vlpjax.data.transforms.appearance import (
    ColorJitter,
    GaussianBlur,
    Grayscale,
    Invert,
    Outline,
    RandAugment,
    RandomErasing,
    Solarize,
)
from vlpjax.data.transforms.conversations import Ask, ChatTemplate, Conversation
from vlpjax.data.transforms.fields import Drop, Keep, Rename
from vlpjax.data.transforms.frames import Frames
from vlpjax.data.transforms.images import (
    CenterCrop,
    Decode,
    Normalize,
    Pad,
    RandomAffine,
    RandomFlip,
    RandomResizedCrop,
    Resize,
    Trim,
)
from vlpjax.data.transforms.order import Perturb, SwappedCaption
from vlpjax.data.transforms.pairs import OverlappingCrops
from vlpjax.data.transforms.text_augment import EasyAugment, RemoveStopWords
from vlpjax.data.transforms.texts import DrawCaption, FixedCaption, Tokenize, TranslatedName
from vlpjax.data.transforms.tiles import Tiles
from vlpjax.data.transforms.views import Views

__all__ = [
    "Ask", "CenterCrop", "ChatTemplate", "ColorJitter", "Conversation", "Decode", "DrawCaption", "Drop", "EasyAugment",
    "FixedCaption", "Frames", "GaussianBlur", "Grayscale", "Invert", "Keep", "Normalize", "Outline", "OverlappingCrops",
    "Pad", "Perturb", "RandAugment", "RandomAffine", "RandomErasing", "RandomFlip", "RandomResizedCrop",
    "RemoveStopWords", "Rename", "Resize", "Solarize", "SwappedCaption", "Tiles", "Tokenize",
    "TranslatedName", "Trim", "Views",
]  # fmt: skip
