"""Several drawings on one canvas, with a map that says whose every pixel is."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from grain import transforms as grain_transforms
from PIL import Image

from vlpjax.data.transforms.fields import Example, require
from vlpjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Collage(grain_transforms.Map):
    """Puts the drawings of several fields side by side on white paper, and maps them.

    A pixel belongs to a drawing where the drawing is darker than paper in any channel.

    Attributes:
      fields: of the drawings, from left to right; RGB images.
      size: side of the square canvas in pixels; the drawings share its width evenly and stand at half its height.
      out, objects: fields of the canvas, an RGB image, and of the map: int32 [size, size], 0 for paper and n for the
        n-th drawing.
      paper: a channel at least this bright is paper's.
    """

    fields: tuple[str, ...]
    size: int
    out: str = "image"
    objects: str = "objects"
    paper: int = 240

    def __post_init__(self) -> None:
        if not self.fields or self.size < len(self.fields):
            raise UserError(
                f"Collage has {len(self.fields)} drawings on {self.size} pixels; it needs 1 pixel for each"
            )

    def map(self, element: Example) -> Example:
        canvas = np.full((self.size, self.size, 3), 255, np.uint8)
        objects = np.zeros((self.size, self.size), np.int32)
        side = self.size // len(self.fields)
        top = (self.size - side) // 2
        for place, field in enumerate(self.fields):
            drawing = require(element, field, Image.Image).resize((side, side), Image.Resampling.BILINEAR)
            pixels = np.asarray(drawing)
            where = (slice(top, top + side), slice(place * side, (place + 1) * side))
            canvas[where] = pixels
            objects[where] = (place + 1) * np.any(pixels < self.paper, axis=-1)
        kept: dict[str, Any] = {name: value for name, value in element.items() if name not in self.fields}
        return {**kept, self.out: Image.fromarray(canvas), self.objects: objects}
