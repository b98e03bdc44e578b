"""Image transforms.

Between `Decode` and `Normalize` the image of an example is a ``PIL.Image`` in mode RGB: Pillow's operations work
on it in C without copies to and from NumPy.  After `Normalize` it is a float32 array [height, width, 3].  A
pipeline without `Normalize` yields uint8.

Random transforms draw from the generator they are given and from nothing else.  Those with a `probability` are
applied to that fraction of the examples.
"""

from __future__ import annotations

import cmath
import dataclasses
import functools
import io
import math
import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from grain import transforms as grain_transforms
from PIL import Image, ImageEnhance, ImageFilter, ImageOps, UnidentifiedImageError

from vlpjax.data.bad import BadExample
from vlpjax.data.transforms.fields import Example, require
from vlpjax.errors import UserError

WHITE = (255, 255, 255)
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
}
# What Pillow and the libraries below it raise on broken files.
DECODE_ERRORS = (
    OSError, ValueError, EOFError, SyntaxError, TypeError, zlib.error, struct.error, Image.DecompressionBombError,
)  # fmt: skip

Size = int | tuple[int, int]
Range = tuple[float, float]
Fill = tuple[int, int, int]


# --- checks of settings, made when the transform is built -----------------------------------------------------


def _check_probability(owner: Any, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not 0.0 <= value <= 1.0:
            raise UserError(f"{type(owner).__name__}.{name} is {value}; a probability is between 0 and 1")


def _check_resample(owner: Any) -> None:
    if owner.resample not in RESAMPLING:
        raise UserError(
            f"{type(owner).__name__}.resample is {owner.resample!r}; it is one of {', '.join(RESAMPLING)}"
        )


def _check_range(owner: Any, name: str, low: float = 0.0) -> None:
    value = getattr(owner, name)
    if len(value) != 2 or not low <= value[0] <= value[1]:
        raise UserError(
            f"{type(owner).__name__}.{name} is {value}; it is (lowest, highest) with {low:g} <= lowest <= highest"
        )


def _height_width(size: Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _image(example: Example, field: str) -> Image.Image:
    return require(example, field, Image.Image)


# --- decoding -------------------------------------------------------------------------------------------------


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB version of a decoded image; transparent parts become white."""
    if image.mode == "RGB":
        return image
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, WHITE)
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    if (
        image.mode.startswith("I;16") or image.mode == "I"
    ):  # Pillow would clip 16-bit grey to 255, not scale it
        grey = np.clip(np.asarray(image).astype(np.int32) >> 8, 0, 255).astype(np.uint8)
        return Image.fromarray(grey, mode="L").convert("RGB")
    return image.convert("RGB")


@dataclasses.dataclass(frozen=True)
class Decode(grain_transforms.Map):
    """Encoded bytes (JPEG, PNG, WebP, GIF, ...) -> RGB ``PIL.Image``; transparency is composited on white.

    Attributes:
      field: the field that is decoded in place.
      max_pixels: an image with more pixels than this is refused before it is decoded.
      jpeg_side: if not 0, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides stay at
        least this long.  Much faster for large photographs, at slightly different pixel values.
      orient: turn photographs upright by their EXIF orientation.
    """

    field: str = "image"
    max_pixels: int = 50_000_000
    jpeg_side: int = 0
    orient: bool = True

    def map(self, element: Example) -> Example:
        encoded = require(element, self.field, (bytes, Image.Image))
        if isinstance(encoded, Image.Image):  # a source that keeps decoded images
            return {**element, self.field: to_rgb(encoded)}
        return {**element, self.field: self.decode(encoded)}

    def decode(self, encoded: bytes) -> Image.Image:
        """The decoded RGB image; raises `BadExample` with the decoder's reason."""
        # Naming the format spares Pillow the trial of every other one (WebP: 65 -> 17 microseconds).
        formats = ("WEBP",) if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP" else None
        try:
            image: Image.Image = Image.open(io.BytesIO(encoded), formats=formats)
            width, height = image.size
            if width * height > self.max_pixels:
                raise BadExample(
                    f"image of {width} x {height} pixels, more than max_pixels={self.max_pixels}"
                )
            if self.jpeg_side and image.format == "JPEG":
                image.draft("RGB", (self.jpeg_side, self.jpeg_side))
            image.load()
            if self.orient and "exif" in image.info:
                image = ImageOps.exif_transpose(image)
            return to_rgb(image)
        except BadExample:
            raise
        except DECODE_ERRORS as error:
            raise BadExample(
                f"image of {len(encoded)} bytes cannot be decoded: {_one_line(error)}"
            ) from error


def _one_line(error: BaseException) -> str:
    """The error's first line; Pillow's own would name an object by its address, which differs between runs."""
    if isinstance(error, UnidentifiedImageError):
        return "it is in no known image format"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


# --- geometry -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Resize(grain_transforms.Map):
    """Resizes to `size` (an int for a square, or (height, width)).

    mode "stretch" ignores the aspect ratio; "shorter" gives the shorter side that length (then `CenterCrop`);
    "pad" fits the whole image inside and fills the rest with `fill`.
    """

    size: Size
    mode: str = "stretch"
    resample: str = "bicubic"
    fill: Fill = WHITE
    field: str = "image"

    def __post_init__(self) -> None:
        _check_resample(self)
        if self.mode not in ("stretch", "shorter", "pad"):
            raise UserError(f"Resize.mode is {self.mode!r}; it is 'stretch', 'shorter' or 'pad'")
        if self.mode == "shorter" and not isinstance(self.size, int):
            raise UserError(f"Resize.size is {self.size}; mode 'shorter' takes one length")

    def map(self, element: Example) -> Example:
        image = _image(element, self.field)
        height, width = _height_width(self.size)
        resample = RESAMPLING[self.resample]
        if self.mode == "stretch":
            resized = image if image.size == (width, height) else image.resize((width, height), resample)
        elif self.mode == "shorter":
            scale = height / min(image.size)
            target = (max(height, round(image.width * scale)), max(height, round(image.height * scale)))
            resized = image.resize(target, resample)
        else:
            resized = ImageOps.pad(image, (width, height), resample, color=self.fill)
        return {**element, self.field: resized}


@dataclasses.dataclass(frozen=True)
class CenterCrop(grain_transforms.Map):
    """Cuts the central `size` out of the image; parts that lie outside are filled with `fill`."""

    size: Size
    fill: Fill = WHITE
    field: str = "image"

    def map(self, element: Example) -> Example:
        image = _image(element, self.field)
        height, width = _height_width(self.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        if left >= 0 and top >= 0:
            return {**element, self.field: image.crop((left, top, left + width, top + height))}
        canvas = Image.new("RGB", (width, height), self.fill)
        canvas.paste(image, (-left, -top))
        return {**element, self.field: canvas}


@dataclasses.dataclass(frozen=True)
class Pad(grain_transforms.Map):
    """Adds `pixels` of `fill` on every side."""

    pixels: int
    fill: Fill = WHITE
    field: str = "image"

    def map(self, element: Example) -> Example:
        return {**element, self.field: ImageOps.expand(_image(element, self.field), self.pixels, self.fill)}


def draw_crop(
    width: int, height: int, scale: Range, ratio: Range, rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """A box (left, top, right, bottom) of random area and aspect ratio inside width x height.

    The published procedure (Szegedy et al. 2015, "Going deeper with convolutions", section 6): ten tries of an
    area uniform in `scale` (as a fraction) and an aspect ratio log-uniform in `ratio`; failing these, the
    largest central box whose aspect ratio is allowed.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area_draw, ratio_draw, left_draw, top_draw = rng.random(4).tolist()
        area = width * height * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(low + (high - low) * ratio_draw)
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(left_draw * (width - crop_width + 1))
            top = int(top_draw * (height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    aspect = min(max(width / height, ratio[0]), ratio[1])
    crop_width, crop_height = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop(grain_transforms.RandomMap):
    """A random part of the image, resized to `size` in one resampling (no intermediate crop)."""

    size: Size
    scale: Range = (0.08, 1.0)
    ratio: Range = (3 / 4, 4 / 3)
    resample: str = "bilinear"
    field: str = "image"

    def __post_init__(self) -> None:
        _check_resample(self)
        _check_range(self, "scale")
        _check_range(self, "ratio", low=1e-3)

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        image = _image(element, self.field)
        height, width = _height_width(self.size)
        box = draw_crop(image.width, image.height, self.scale, self.ratio, rng)
        return {**element, self.field: image.resize((width, height), RESAMPLING[self.resample], box=box)}


@dataclasses.dataclass(frozen=True)
class RandomAffine(grain_transforms.RandomMap):
    """Rotation, translation, scaling and shear about the centre, in one resampling.

    Attributes:
      rotate: largest angle in degrees, either way.
      translate: largest shift either way, as a fraction of the side.
      scale: (smallest, largest) factor of size.
      shear: largest shear angle in degrees, horizontally.
      fill: colour of what comes from outside the image.
    """

    rotate: float = 0.0
    translate: float = 0.0
    scale: Range = (1.0, 1.0)
    shear: float = 0.0
    fill: Fill = WHITE
    resample: str = "bilinear"
    probability: float = 1.0
    field: str = "image"

    def __post_init__(self) -> None:
        _check_probability(self, "probability")
        _check_range(self, "scale", low=1e-3)
        if self.resample not in ("nearest", "bilinear", "bicubic"):
            raise UserError(f"RandomAffine.resample is {self.resample!r}; it is nearest, bilinear or bicubic")

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        image = _image(element, self.field)
        chance, turn, right, down, size, shear = rng.random(6).tolist()
        if chance >= self.probability:
            return element
        coefficients = inverse_affine(
            image.size,
            angle=self.rotate * (2 * turn - 1),
            shift=(
                self.translate * (2 * right - 1) * image.width,
                self.translate * (2 * down - 1) * image.height,
            ),
            scale=self.scale[0] + (self.scale[1] - self.scale[0]) * size,
            shear=self.shear * (2 * shear - 1),
        )
        return {**element, self.field: _affine(image, coefficients, self.fill, RESAMPLING[self.resample])}


def inverse_affine(
    size: tuple[int, int], *, angle: float, shift: tuple[float, float], scale: float, shear: float
) -> tuple[float, ...]:
    """Pillow's six coefficients (output -> input) of: shear, scale, rotate by `angle` degrees, then shift."""
    radians, slope = math.radians(angle), math.tan(math.radians(shear))
    cos, sin = math.cos(radians) / scale, math.sin(radians) / scale
    # Inverse of rotation and scale is [[cos, sin], [-sin, cos]]; that of the shear is x -= slope * y.
    a, b, d, e = cos + slope * sin, sin - slope * cos, -sin, cos
    centre_x, centre_y = size[0] / 2, size[1] / 2
    out_x, out_y = centre_x + shift[0], centre_y + shift[1]
    return a, b, centre_x - a * out_x - b * out_y, d, e, centre_y - d * out_x - e * out_y


def _affine(image: Image.Image, coefficients: tuple[float, ...], fill: Fill, resample: int) -> Image.Image:
    transform = Image.Transform.AFFINE
    return image.transform(image.size, transform, coefficients, resample=resample, fillcolor=fill)


WORD_PAIRS = {"left": "right", "right": "left"}
# Whole words only ("right", "Left-pointing", "rightwards"), not "copyright" or "bright".
DIRECTION = re.compile(
    r"\b(left|right)(|s|most|ward|wards|wardly|ish|y|ies|hand|handed|side)\b", re.IGNORECASE
)


def swap_directions(text: str) -> str:
    """Exchanges left and right, with their derived words, in the case in which they are written."""

    def swapped(match: re.Match[str]) -> str:
        word = match.group(1)
        other = WORD_PAIRS[word.lower()]
        if word.isupper():
            other = other.upper()
        elif word[0].isupper():
            other = other.capitalize()
        return other + match.group(2)

    return DIRECTION.sub(swapped, text)


@dataclasses.dataclass(frozen=True)
class RandomFlip(grain_transforms.RandomMap):
    """Mirrors the image left to right, and says so in the texts: whole words left/right change places.

    Place it before or after the transform that draws the caption: every field of `captions` that the example
    has (a string or a sequence of strings) is rewritten.
    """

    probability: float = 0.5
    captions: tuple[str, ...] = ("caption", "name", "keywords")
    field: str = "image"

    def __post_init__(self) -> None:
        _check_probability(self, "probability")

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        image = _image(element, self.field)
        if rng.random() >= self.probability:
            return element
        mirrored = {**element, self.field: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)}
        for name in self.captions:
            text = element.get(name)
            if isinstance(text, str):
                mirrored[name] = swap_directions(text)
            elif isinstance(text, (tuple, list)):
                mirrored[name] = type(text)(swap_directions(part) for part in text)
        return mirrored


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


# --- to numbers -----------------------------------------------------------------------------------------------

VALUE_RANGES = {"-1..1": (0.5, 0.5), "0..1": (0.0, 1.0)}


@dataclasses.dataclass(frozen=True)
class Normalize(grain_transforms.Map):
    """uint8 image -> float32 [height, width, 3].

    Either `range` ("-1..1" or "0..1") or `mean` and `std` of the three channels, as fractions of 1, are given.
    """

    range: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    field: str = "image"

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise UserError("Normalize has one of mean and std; it takes both or neither")
        if self.range is not None and self.mean is not None:
            raise UserError("Normalize has range and mean; it takes one of the two")
        if self.range is not None and self.range not in VALUE_RANGES:
            raise UserError(
                f"Normalize.range is {self.range!r}; it is {' or '.join(map(repr, VALUE_RANGES))}"
            )

    def map(self, element: Example) -> Example:
        pixels = np.asarray(
            require(element, self.field, (Image.Image, np.ndarray))
        )  # uint8 [height, width, 3]
        height, width, channels = pixels.shape
        scale, shift = _affine_of(
            self.range, self.mean and tuple(self.mean), self.std and tuple(self.std), width
        )
        # Converted first, then scaled line by line: NumPy's inner loops then run over width * 3 values of one
        # type, which is several times as fast as broadcasting three factors over uint8.
        values = pixels.reshape(height, width * channels).astype(np.float32)
        values *= scale
        values += shift
        return {**element, self.field: values.reshape(height, width, channels)}


@functools.lru_cache(maxsize=64)
def _affine_of(
    name: str | None, mean: tuple[float, ...] | None, std: tuple[float, ...] | None, width: int
) -> tuple[np.ndarray | np.float32, np.ndarray | np.float32]:
    """Scale and shift for one line of `width` pixels, such that value = pixel * scale + shift."""
    if mean is None or std is None:
        centre, spread = VALUE_RANGES[name or "-1..1"]
        mean, std = (centre,) * 3, (spread,) * 3
    deviation = np.asarray(std, np.float64)
    scale, shift = 1.0 / (255.0 * deviation), -np.asarray(mean, np.float64) / deviation
    if len(set(zip(scale, shift, strict=True))) == 1:  # the same for all channels: a number is faster still
        return np.float32(scale[0]), np.float32(shift[0])
    return np.tile(scale, width).astype(np.float32), np.tile(shift, width).astype(np.float32)
