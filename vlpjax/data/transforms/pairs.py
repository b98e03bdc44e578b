"""Two views of one scene: what cross-view completion learns from."""

from __future__ import annotations

import dataclasses

import numpy as np
from grain import transforms as grain_transforms
from PIL import Image

from vlpjax.data.transforms.fields import Example, require
from vlpjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class OverlappingCrops(grain_transforms.RandomMap):
    """Two crops of equal size whose centres are a short way apart: a camera that moved sideways.

    Both are cut from the image resized to `margin` times `size`, at integer places, so that what both show has equal
    pixels.  The share of each side that they share is at least `overlap`.

    Attributes:
      size: side of the crops, in pixels.
      overlap: smallest share of the side that the crops have in common, in each direction; in (0, 1].
      margin: side of the resized image over `size`, at least 1.
      names: fields of the first and the second crop.
      drop: whether the field itself goes.
    """

    size: int
    overlap: float = 0.5
    margin: float = 1.5
    names: tuple[str, str] = ("view1", "view2")
    field: str = "image"
    drop: bool = True

    def __post_init__(self) -> None:
        if not 0.0 < self.overlap <= 1.0:
            raise UserError(f"OverlappingCrops.overlap is {self.overlap}; it is a share above 0, up to 1")
        if self.margin < 1.0:
            raise UserError(
                f"OverlappingCrops.margin is {self.margin}; the image must not be smaller than a crop"
            )

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        image = require(element, self.field, Image.Image)
        side = round(self.margin * self.size)
        resized = image.resize((side, side), Image.Resampling.BILINEAR)
        room = side - self.size
        furthest = int((1 - self.overlap) * self.size)
        first = rng.integers(0, room + 1, size=2)
        before, after = np.minimum(first, furthest), np.minimum(room - first, furthest)
        second = first + rng.integers(-before, after + 1)
        made = {
            name: self._crop(resized, corner)
            for name, corner in zip(self.names, (first, second), strict=True)
        }
        kept = {name: value for name, value in element.items() if not (self.drop and name == self.field)}
        return {**kept, **made}

    def _crop(self, image: Image.Image, corner: np.ndarray) -> Image.Image:
        left, top = int(corner[0]), int(corner[1])
        return image.crop((left, top, left + self.size, top + self.size))
