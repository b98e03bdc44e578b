"""An image of any size as a small copy and tiles, beside the order of the tokens that these become."""

from __future__ import annotations

import dataclasses

import numpy as np
from grain import transforms as grain_transforms
from PIL import Image

from vlpjax.data.tiling import NOTHING, Tiling
from vlpjax.data.transforms.fields import Example, require
from vlpjax.data.transforms.images import RESAMPLING
from vlpjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tiles(grain_transforms.Map):
    """``PIL.Image`` of any size -> uint8 [tiles, tile, tile, 3], the small copy first.  `Normalize` comes after it.

    The model takes the images together with their arrangement, int32 [tokens]; a prompt has as many placeholders as
    it has entries that are not ``NOTHING``.

    Attributes:
      tiling: see `vlpjax.data.tiling`.
      resample: how the image is resized, once for the copy and once for the tiles.
      fill_up: give all examples as many tiles and tokens as the largest has, so that they form a batch: with black
        tiles that no token comes from, and with ``NOTHING``.
      out: the new field with the arrangement.
    """

    tiling: Tiling
    resample: str = "bicubic"
    fill_up: bool = True
    field: str = "image"
    out: str = "arrangement"

    def __post_init__(self) -> None:
        if self.resample not in RESAMPLING:
            raise UserError(f"Tiles.resample is {self.resample!r}; it is one of {', '.join(RESAMPLING)}")

    def map(self, element: Example) -> Example:
        image = require(element, self.field, Image.Image)
        tiles = self.tiling.cut(image, RESAMPLING[self.resample])
        arrangement = self.tiling.arrangement((image.height, image.width))
        if self.fill_up:
            most_tiles, most_tokens = self.tiling.most()
            tiles = np.pad(tiles, [(0, most_tiles - len(tiles)), (0, 0), (0, 0), (0, 0)])
            arrangement = np.pad(
                arrangement, (0, most_tokens - len(arrangement)), constant_values=np.int32(NOTHING)
            )
        return {**element, self.field: tiles, self.out: arrangement}
