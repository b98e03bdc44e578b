"""Image transforms.

Between `Decode` and `Normalize` the image of an example is a ``PIL.Image`` in mode RGB: Pillow's operations work
on it in C without copies to and from NumPy.  After `Normalize` it is a float32 array [height, width, 3].  A
pipeline without `Normalize` yields uint8.

Random transforms draw from the generator they are given and from nothing else.  Those with a `probability` are
applied to that fraction of the examples.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import math
import re
import struct
import zlib
from typing import Any

import numpy as np
from grain import transforms as grain_transforms
from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

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
class Trim(grain_transforms.Map):
    """Cuts a drawing on white out along its bounding box, centred in a square of the image's longer side.

    Collections of drawings differ in the margin that they leave; what is left of it after this is `margin`.
    An image without anything on it stays as it is.

    Attributes:
      margin: of white on each side, as a fraction of the drawing's longer side.
      threshold: a pixel counts as drawn if its darkest channel is this far from white, 1 to 255.
    """

    margin: float = 0.03
    threshold: int = 16
    field: str = "image"

    def __post_init__(self) -> None:
        if not 1 <= self.threshold <= 255 or self.margin < 0:
            raise UserError(
                f"Trim has margin={self.margin} and threshold={self.threshold}; the margin is 0 or more, and the "
                "threshold 1 to 255"
            )

    def map(self, element: Example) -> Example:
        image = _image(element, self.field)
        red, green, blue = image.split()
        darkest = ImageChops.darker(ImageChops.darker(red, green), blue)
        box = darkest.point(_drawn(self.threshold)).getbbox()
        if box is None:
            return element
        left, top, right, bottom = box
        half = max(right - left, bottom - top) * (0.5 + self.margin)
        across, down = (left + right) / 2, (top + bottom) / 2
        square = (across - half, down - half, across + half, down + half)
        side = max(image.size)
        trimmed = image.transform(
            (side, side), Image.Transform.EXTENT, square, Image.Resampling.BICUBIC, fillcolor=WHITE
        )
        return {**element, self.field: trimmed}


@functools.lru_cache(maxsize=8)
def _drawn(threshold: int) -> list[int]:
    """The table that maps what is far enough from white to 255, and the rest to 0."""
    return [255 if 255 - value >= threshold else 0 for value in range(256)]


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


# --- to numbers -----------------------------------------------------------------------------------------------

VALUE_RANGES = {"-1..1": (0.5, 0.5), "0..1": (0.0, 1.0)}


@dataclasses.dataclass(frozen=True)
class Normalize(grain_transforms.Map):
    """uint8 image, or several [..., height, width, 3], -> float32 of the same shape.

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
        )  # uint8 [..., height, width, 3]
        width, channels = pixels.shape[-2:]
        scale, shift = _affine_of(
            self.range, self.mean and tuple(self.mean), self.std and tuple(self.std), width
        )
        # Converted first, then scaled line by line: NumPy's inner loops then run over width * 3 values of one
        # type, which is several times as fast as broadcasting three factors over uint8.
        values = pixels.reshape(-1, width * channels).astype(np.float32)
        values *= scale
        values += shift
        return {**element, self.field: values.reshape(pixels.shape)}


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
