"""Images of any size in tiles: which resolution an image is shown in, its pixels, and the tokens that these become.

All of it depends on the image's size alone and not on a model, so that data knows it before a model runs.

Source: "Improved Baselines with Visual Instruction Tuning", arXiv 2310.03744, section 3.4; released as LLaVA-NeXT.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, UInt8
from PIL import Image

from vlpjax.errors import UserError

NEWLINE, NOTHING = -1, -2  # in an arrangement: the learned end of a row of image tokens, and padding

Size = tuple[int, int]  # height and width


@dataclass(frozen=True)
class Tiling:
    """How an image of any size is cut: a small copy of the whole, and tiles that show it larger.

    The image is resized to fit into one of the resolutions, centred there, and cut.  Of the tiles' tokens those that
    show nothing but border are left out, and each row of the rest ends in a learned token.  Which tokens these are
    depends on sizes alone, so that it is known before a model runs, and is an array for it.

    Attributes:
      tile: side of a tile, and of the small copy, in pixels.
      grid: tokens along a tile's side.
      resolutions: heights and widths that an image may be resized to, in pixels; multiples of ``tile``.
    """

    tile: int
    grid: int
    resolutions: tuple[Size, ...]

    def __post_init__(self) -> None:
        wrong = [size for size in self.resolutions if min(size) < 1 or any(side % self.tile for side in size)]
        if wrong or not self.resolutions:
            raise UserError(
                f"Tiling.resolutions is {self.resolutions}; it takes heights and widths that are multiples of "
                f"tile={self.tile}, at least one."
            )

    def resolution(self, size: Size) -> Size:
        """Which of the resolutions an image of this size is shown in: the most of its pixels, then the least border."""

        def rank(resolution: Size) -> tuple[int, int]:
            scale = min(resolution[1] / size[1], resolution[0] / size[0])
            shown = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
            return shown, shown - resolution[0] * resolution[1]

        return max(self.resolutions, key=rank)

    def tiles(self, size: Size) -> int:
        """Images that the tower sees of an image of this size: the small copy and the tiles."""
        height, width = self.resolution(size)
        return 1 + (height // self.tile) * (width // self.tile)

    def most(self) -> tuple[int, int]:
        """The most images that the tower sees of one image, and the most tokens that these become."""
        tiles = max(self.tiles(size) for size in self.resolutions)
        return tiles, max(len(self.arrangement(size)) for size in self.resolutions)

    def cut(self, image: Image.Image, resample: Image.Resampling) -> UInt8[np.ndarray, "tiles tile tile 3"]:
        """The small copy of an RGB image, and its tiles row by row; the border is black."""
        size = (image.height, image.width)
        height, width = self.resolution(size)
        shown = _fitted(size, (height, width))
        canvas = Image.new("RGB", (width, height))
        place = (width - shown[1]) // 2, (height - shown[0]) // 2
        canvas.paste(image.resize(shown[::-1], resample), place)
        tiles = np.asarray(canvas).reshape(height // self.tile, self.tile, width // self.tile, self.tile, 3)
        small = np.asarray(image.resize((self.tile, self.tile), resample))
        return np.concatenate([small[None], tiles.swapaxes(1, 2).reshape(-1, self.tile, self.tile, 3)])

    def arrangement(self, size: Size) -> np.ndarray:
        """Image tokens of an image of this size, in order.

        Returns:
          int32 [tokens]: of the small copy, then of the rows of the tiles' common grid without the border, each with
          ``NEWLINE`` behind.  Numbers count tokens through the tower's images, the small copy first.
        """
        height, width = (side // self.tile for side in self.resolution(size))
        tiles = np.arange(height * width * self.grid**2).reshape(height, width, self.grid, self.grid)
        common = tiles.swapaxes(1, 2).reshape(height * self.grid, width * self.grid) + self.grid**2
        rows = np.pad(_without_border(common, size), [(0, 0), (0, 1)], constant_values=NEWLINE)
        return np.concatenate([np.arange(self.grid**2), rows.ravel()]).astype(np.int32)

    def arrangements(self, sizes: Sequence[Sequence[Size]]) -> Int[np.ndarray, "batch tokens"]:
        """What a batch gives :class:`VisionLanguageModel`, by the sizes of each row's images.

        All rows' images are padded to as many as the row with the most has; so are image tokens, with ``NOTHING``.
        """
        rows = []
        for images in sizes:
            before, parts = 0, [np.zeros(0, np.int32)]
            for size in images:
                own = self.arrangement(size)
                parts.append(np.where(own == NEWLINE, NEWLINE, own + before))
                before += self.tiles(size) * self.grid**2
            rows.append(np.concatenate(parts))
        longest = max(len(row) for row in rows)
        padded = [np.pad(row, (0, longest - len(row)), constant_values=NOTHING) for row in rows]
        return np.stack(padded).astype(np.int32)


def _fitted(size: Size, inside: Size) -> Size:
    """The largest size of the same aspect that fits into another one; the side that is left over is rounded up."""
    scale = min(inside[0] / size[0], inside[1] / size[1])
    if inside[1] / size[1] < inside[0] / size[0]:
        return min(math.ceil(size[0] * scale), inside[0]), inside[1]
    return inside[0], min(math.ceil(size[1] * scale), inside[1])


def _without_border(grid: np.ndarray, size: Size) -> np.ndarray:
    """The rows or columns in the middle of a grid on which an image of this size is centred."""
    rows, columns = grid.shape
    height, width = size
    # Rounded as the published model was trained: a border of 2 x 1.5 tokens is one of 1.
    if width / height > columns / rows:
        border = (rows - int(round(height * (columns / width), 7))) // 2
        return grid[border : rows - border]
    border = (columns - int(round(width * (rows / height), 7))) // 2
    return grid[:, border : columns - border]
