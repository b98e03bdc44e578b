"""Images of any shape, cut into patches and packed into rows of one length, as the image tower takes them.

Source: "Patch n' Pack: NaViT", arXiv 2307.06304; with one image per row, the NaFlex form of "SigLIP 2", arXiv
2502.14786.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from vlpjax.errors import UserError


def patchify(image: np.ndarray, patch: tuple[int, int]) -> np.ndarray:
    """Patches of an image in reading order, on a grid.

    Args:
      image: [height, width, channels].
      patch: height and width of a patch in pixels; they divide the image's.

    Returns:
      [rows, columns, pixels], each patch flattened as [height, width, channels].

    Raises:
      UserError: an image that cannot be cut without a rest.
    """
    height, width, channels = image.shape
    if height % patch[0] or width % patch[1] or not image.size:
        raise UserError(
            f"An image of {height}x{width} pixels cannot be cut into patches of {patch[0]}x{patch[1]}; resize it to "
            "multiples of these first."
        )
    rows, columns = height // patch[0], width // patch[1]
    patches = image.reshape(rows, patch[0], columns, patch[1], channels).swapaxes(1, 2)
    return patches.reshape(rows, columns, patch[0] * patch[1] * channels)


def size_within(height: int, width: int, patch: int, patches: int) -> tuple[int, int]:
    """The size to resize an image to, so that it has nearly its shape and at most so many patches.

    Sides are scaled by one factor, then rounded up to multiples of the patch; the factor is the largest that keeps
    the number of patches, within 1e-5.  This is the rule of SigLIP 2's NaFlex models.

    Args:
      height, width: of the image, in pixels.
      patch: side of a patch, in pixels.
      patches: the most that the result may have.

    Raises:
      UserError: no room for a single patch.
    """
    if patches < 1:
        raise UserError(f"An image needs at least one patch, but {patches} are allowed.")

    def sides(factor: float) -> tuple[int, int]:
        rows, columns = (max(1, math.ceil(side * factor / patch)) for side in (height, width))
        return rows * patch, columns * patch

    low, high = 1e-6, 100.0
    while high - low >= 1e-5:
        middle = (low + high) / 2
        rows, columns = sides(middle)
        low, high = (middle, high) if rows * columns <= patches * patch**2 else (low, middle)
    return sides(low)


def pack(
    images: Sequence[np.ndarray],
    patch: int | tuple[int, int],
    length: int,
    segments: int,
    rows: int | None = None,
) -> dict[str, np.ndarray]:
    """Cuts images into patches, and puts each into the first row that has room for it.

    Args:
      images: each [height, width, channels], with as many channels; sides are multiples of the patch.
      patch: height and width of a patch in pixels, or both as one number.
      length: patches per row.
      segments: the most images that a row may hold.
      rows: how many rows there are; None makes as many as are needed.

    Returns:
      what :class:`vlpjax.models.vit.ViT` takes, R rows of N patches and S images: ``"patches"`` [R, N, pixels] of the
      images' type, ``"positions"`` [R, N, 2] (row and column), ``"segment_ids"`` [R, N] (from 1; 0 is padding) and
      ``"grids"`` [R, S, 2] (0 where there is no image), all of these int32; and where each image went: ``"places"``
      [images, 2] (row, and index into the tower's ``"pooled"`` of that row).

    Raises:
      UserError: no image, an image that is too large for a row, or more images than the rows can hold.
    """
    patch = (patch, patch) if isinstance(patch, int) else patch
    if not images:
        raise UserError("There is no image to pack; give at least one.")
    grids = [patchify(image, patch) for image in images]
    used: list[int] = []  # patches per row so far
    held: list[int] = []  # images per row so far
    places = np.zeros((len(images), 2), np.int32)
    starts = []
    for index, grid in enumerate(grids):
        count = grid.shape[0] * grid.shape[1]
        if count > length:
            raise UserError(
                f"Image {index} has {count} patches, but a row holds {length}; resize it to fewer, or lengthen rows."
            )
        fitting = (row for row in range(len(used)) if used[row] + count <= length and held[row] < segments)
        row = next(fitting, len(used))
        if row == len(used):
            used.append(0)
            held.append(0)
        places[index] = row, held[row]
        starts.append(used[row])
        used[row] += count
        held[row] += 1
    if rows is not None and len(used) > rows:
        raise UserError(
            f"{len(images)} images fill {len(used)} rows of {length} patches, but there are {rows}; give fewer images."
        )
    total = len(used) if rows is None else rows
    packed = {
        "patches": np.zeros((total, length, grids[0].shape[-1]), grids[0].dtype),
        "positions": np.zeros((total, length, 2), np.int32),
        "segment_ids": np.zeros((total, length), np.int32),
        "grids": np.zeros((total, segments, 2), np.int32),
        "places": places,
    }
    for grid, (row, segment), start in zip(grids, places, starts, strict=True):
        where = slice(start, start + grid.shape[0] * grid.shape[1])
        packed["patches"][row, where] = grid.reshape(-1, grid.shape[-1])
        packed["positions"][row, where] = np.argwhere(np.ones(grid.shape[:2], bool))
        packed["segment_ids"][row, where] = segment + 1
        packed["grids"][row, segment] = grid.shape[:2]
    return packed
