"""Transforms of how an image looks, not of where things are in it: colour, blur, erasing, RandAugment."""

from __future__ import annotations

import cmath
import dataclasses
import math
from collections.abc import Callable

import numpy as np
from grain import transforms as grain_transforms
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from vlpjax.data.transforms.fields import Example
from vlpjax.data.transforms.images import (
    WHITE,
    Fill,
    Range,
    _affine,
    _check_probability,
    _check_range,
    _image,
    draw_crop,
)
from vlpjax.errors import UserError

# --- colour ---------------------------------------------------------------------------------------------------

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow's mode L
RGB_TO_YIQ = np.array([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
_CHROMA_TURN = np.array([(0, 0, 0), (0, 0, -1), (0, 1, 0)])  # in YIQ: a quarter turn of the chroma plane
# The three parts of every map below, row by row: luma to grey, chroma as it is, chroma turned by a quarter.
_GREY = np.outer(np.ones(3), LUMA).ravel().tolist()
_CHROMA = (np.eye(3) - np.outer(np.ones(3), LUMA)).ravel().tolist()
_QUARTER = (np.linalg.inv(RGB_TO_YIQ) @ _CHROMA_TURN @ RGB_TO_YIQ).ravel().tolist()


@dataclasses.dataclass(frozen=True)
class ColorJitter(grain_transforms.RandomMap):
    """Random brightness, contrast, saturation and hue, in random order, as one colour matrix.

    Brightness, contrast and saturation scale by a factor uniform in [max(0, 1 - x), 1 + x]; hue turns by an
    angle uniform in [-x, x] of the full circle (x <= 0.5), as a rotation of the chroma plane (YIQ).  All four are
    affine maps of the colour, so they are composed and applied once; values are clipped once, at the
    end.  `op_probability` is the chance of each of the four, `probability` that of the whole.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    probability: float = 1.0
    op_probability: float = 1.0
    field: str = "image"

    def __post_init__(self) -> None:
        _check_probability(self, "probability", "op_probability")
        for name in ("brightness", "contrast", "saturation", "hue"):
            if getattr(self, name) < 0:
                raise UserError(f"ColorJitter.{name} is {getattr(self, name)}; it is 0 or more")
        if self.hue > 0.5:
            raise UserError(f"ColorJitter.hue is {self.hue}; it is a fraction of the circle, at most 0.5")

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        image = _image(element, self.field)
        draws = rng.random(13).tolist()
        if draws[0] >= self.probability:
            return element
        # Sorting by random keys is a random order; cheaper than rng.permutation.
        order = sorted(range(4), key=draws[1:5].__getitem__)
        strengths = (self.brightness, self.contrast, self.saturation, self.hue)
        ops = [
            (op, strengths[op] * (2 * draws[9 + op] - 1))
            for op in order
            if strengths[op] and draws[5 + op] < self.op_probability
        ]
        return {**element, self.field: adjust_color(image, ops)} if ops else element


def adjust_color(image: Image.Image, ops: list[tuple[int, float]]) -> Image.Image:
    """Applies (0 brightness | 1 contrast | 2 saturation | 3 hue, amount) in order, as one affine colour map.

    In luma and chroma, with chroma as a complex number, every one of them has the form
    ``luma -> scale * luma + offset``, ``chroma -> chroma * factor``; so has whatever they are composed to.
    """
    luma_scale, luma_offset, chroma_factor = 1.0, 0.0, 1.0 + 0.0j
    for op, amount in ops:
        if op == 3:
            chroma_factor *= cmath.exp(2j * math.pi * amount)
            continue
        factor = max(0.0, 1.0 + amount)
        chroma_factor *= factor
        if op == 2:
            continue
        if op == 1:  # towards the mean grey of the image as it is after the operations so far
            mean = luma_scale * _mean_luma(image) + luma_offset
            luma_offset = factor * luma_offset + (1.0 - factor) * mean
        else:
            luma_offset *= factor
        luma_scale *= factor
    re, im = chroma_factor.real, chroma_factor.imag
    m = [luma_scale * y + re * c + im * q for y, c, q in zip(_GREY, _CHROMA, _QUARTER, strict=True)]
    return image.convert("RGB", (*m[0:3], luma_offset, *m[3:6], luma_offset, *m[6:9], luma_offset))


def _mean_luma(image: Image.Image) -> float:
    red, green, blue = image.reduce(image.size).getpixel((0, 0))  # type: ignore[misc]
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


@dataclasses.dataclass(frozen=True)
class _ChancedImageMap(grain_transforms.RandomMap):
    """An image operation without further randomness, applied with a probability."""

    probability: float = 0.5
    field: str = "image"

    def __post_init__(self) -> None:
        _check_probability(self, "probability")

    def apply(self, image: Image.Image) -> Image.Image:
        raise TypeError(f"{type(self).__name__} does not say what it does to an image")

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        image = _image(element, self.field)
        return {**element, self.field: self.apply(image)} if rng.random() < self.probability else element


@dataclasses.dataclass(frozen=True)
class Grayscale(_ChancedImageMap):
    """Removes the colour; the image keeps three channels."""

    def apply(self, image: Image.Image) -> Image.Image:
        return image.convert("L").convert("RGB")


@dataclasses.dataclass(frozen=True)
class Invert(_ChancedImageMap):
    """Inverts all colours."""

    def apply(self, image: Image.Image) -> Image.Image:
        return ImageOps.invert(image)


@dataclasses.dataclass(frozen=True)
class Solarize(_ChancedImageMap):
    """Inverts the values from `threshold` up."""

    threshold: int = 128

    def apply(self, image: Image.Image) -> Image.Image:
        return ImageOps.solarize(image, self.threshold)


@dataclasses.dataclass(frozen=True)
class GaussianBlur(grain_transforms.RandomMap):
    """Blur with a standard deviation uniform in `sigma`, in pixels."""

    sigma: Range = (0.1, 2.0)
    probability: float = 0.5
    field: str = "image"

    def __post_init__(self) -> None:
        _check_probability(self, "probability")
        _check_range(self, "sigma")

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        image = _image(element, self.field)
        chance, where = rng.random(2).tolist()
        if chance >= self.probability:
            return element
        sigma = self.sigma[0] + (self.sigma[1] - self.sigma[0]) * where
        return {**element, self.field: image.filter(ImageFilter.GaussianBlur(sigma))}


@dataclasses.dataclass(frozen=True)
class Outline(grain_transforms.RandomMap):
    """Draws dark lines where brightness or colour changes, as an illustrator with a pen would.

    Pictures of one thing in several styles often differ in just this, so a model that is to recognise an unseen
    style should not rely on it.

    Attributes:
      threshold: (smallest, largest) change, 0 to 1, above which there is a line; drawn per image.
      gain: (smallest, largest) darkness per change beyond the threshold; drawn per image.
      thick: chance that lines are two pixels wide.
      probability: chance that the image is outlined at all.
    """

    threshold: Range = (0.08, 0.25)
    gain: Range = (3.0, 6.0)
    thick: float = 0.5
    probability: float = 0.5
    field: str = "image"

    def __post_init__(self) -> None:
        _check_probability(self, "probability", "thick")
        _check_range(self, "threshold")
        _check_range(self, "gain")

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        chance, wide, low, slope = rng.random(4).tolist()
        if chance >= self.probability:
            return element
        pixels = np.asarray(_image(element, self.field), np.int16)
        edge = np.zeros(pixels.shape[:2], np.int16)
        edge[:, :-1] = np.abs(np.diff(pixels, axis=1)).max(-1)
        np.maximum(edge[:-1], np.abs(np.diff(pixels, axis=0)).max(-1), out=edge[:-1])
        if wide < self.thick:
            edge[1:] = np.maximum(edge[1:], edge[:-1])
            edge[:, 1:] = np.maximum(edge[:, 1:], edge[:, :-1])
        threshold = self.threshold[0] + low * (self.threshold[1] - self.threshold[0])
        gain = self.gain[0] + slope * (self.gain[1] - self.gain[0])
        ink = np.clip((edge / np.float32(255) - threshold) * gain, 0, 1)
        inked = (pixels * (1 - ink)[..., None]).astype(np.uint8)
        return {**element, self.field: Image.fromarray(inked)}


@dataclasses.dataclass(frozen=True)
class RandomErasing(grain_transforms.RandomMap):
    """Fills a rectangle with one colour (Zhong et al. 2017; with ratio (1, 1) also known as cutout).

    Attributes:
      scale: (smallest, largest) area as a fraction of the image.
      ratio: (smallest, largest) aspect ratio.
    """

    scale: Range = (0.02, 0.33)
    ratio: Range = (0.3, 3.3)
    fill: Fill = (127, 127, 127)
    probability: float = 0.5
    field: str = "image"

    def __post_init__(self) -> None:
        _check_probability(self, "probability")
        _check_range(self, "scale")
        _check_range(self, "ratio", low=1e-3)

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        image = _image(element, self.field)
        if rng.random() >= self.probability:
            return element
        erased = image.copy()
        erased.paste(self.fill, draw_crop(image.width, image.height, self.scale, self.ratio, rng))
        return {**element, self.field: erased}


# --- RandAugment ----------------------------------------------------------------------------------------------

ImageOp = Callable[[Image.Image, float, Fill], Image.Image]


def _rotated(image: Image.Image, degrees: float, fill: Fill) -> Image.Image:
    return image.rotate(degrees, Image.Resampling.BILINEAR, fillcolor=fill)


def _sheared(image: Image.Image, x: float, y: float, fill: Fill) -> Image.Image:
    matrix = (1.0, x, -x * image.height / 2, y, 1.0, -y * image.width / 2)
    return _affine(image, matrix, fill, Image.Resampling.BILINEAR)


def _shifted(image: Image.Image, x: float, y: float, fill: Fill) -> Image.Image:
    return _affine(
        image, (1.0, 0.0, x * image.width, 0.0, 1.0, y * image.height), fill, Image.Resampling.NEAREST
    )


# Cubuk et al. 2019 (RandAugment), section 3: fourteen operations.  `level` is in [-1, 1]; the sign matters
# where an operation has a direction.  Ranges are those of AutoAugment (Cubuk et al. 2018, table 6).
RANDAUGMENT_OPS: dict[str, ImageOp] = {
    "identity": lambda image, level, fill: image,
    "autocontrast": lambda image, level, fill: ImageOps.autocontrast(image),
    "equalize": lambda image, level, fill: ImageOps.equalize(image),
    "rotate": lambda image, level, fill: _rotated(image, 30.0 * level, fill),
    "solarize": lambda image, level, fill: ImageOps.solarize(image, round(256 - 256 * abs(level))),
    "color": lambda image, level, fill: ImageEnhance.Color(image).enhance(1.0 + 0.9 * level),
    "posterize": lambda image, level, fill: ImageOps.posterize(image, 8 - round(4 * abs(level))),
    "contrast": lambda image, level, fill: adjust_color(image, [(1, 0.9 * level)]),
    "brightness": lambda image, level, fill: adjust_color(image, [(0, 0.9 * level)]),
    "sharpness": lambda image, level, fill: ImageEnhance.Sharpness(image).enhance(1.0 + 0.9 * level),
    "shear_x": lambda image, level, fill: _sheared(image, 0.3 * level, 0.0, fill),
    "shear_y": lambda image, level, fill: _sheared(image, 0.0, 0.3 * level, fill),
    "translate_x": lambda image, level, fill: _shifted(image, 0.45 * level, 0.0, fill),
    "translate_y": lambda image, level, fill: _shifted(image, 0.0, 0.45 * level, fill),
}


@dataclasses.dataclass(frozen=True)
class RandAugment(grain_transforms.RandomMap):
    """`layers` operations, each drawn uniformly from `ops`, at `magnitude` (0 to 10) with a random sign.

    Attributes:
      ops: names out of `RANDAUGMENT_OPS`; empty for all fourteen.
      fill: colour of what comes from outside the image.
    """

    layers: int = 2
    magnitude: float = 9.0
    ops: tuple[str, ...] = ()
    fill: Fill = WHITE
    field: str = "image"

    def __post_init__(self) -> None:
        unknown = [name for name in self.ops if name not in RANDAUGMENT_OPS]
        if unknown:
            raise UserError(
                f"RandAugment.ops has {unknown[0]!r}; the operations are {', '.join(RANDAUGMENT_OPS)}"
            )
        if not 0 <= self.magnitude <= 10:
            raise UserError(f"RandAugment.magnitude is {self.magnitude}; it is between 0 and 10")
        if self.layers < 0:
            raise UserError(f"RandAugment.layers is {self.layers}; it is 0 or more")

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        image = _image(element, self.field)
        names = self.ops or tuple(RANDAUGMENT_OPS)
        draws = rng.random(2 * self.layers).tolist()
        for which, sign in zip(draws[::2], draws[1::2], strict=True):
            level = self.magnitude / 10 * (1 if sign < 0.5 else -1)
            image = RANDAUGMENT_OPS[names[int(which * len(names))]](image, level, self.fill)
        return {**element, self.field: image}
