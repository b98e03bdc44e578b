"""Canvases with several pictures and a label per pixel: segmentation data out of drawings on white paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np

from vlpjax.data.drawings import as_png, is_ink, on_paper
from vlpjax.data.sources.base import Example, LazySource, Source, checked_index, digest
from vlpjax.errors import UserError


@dataclass(frozen=True)
class Canvases(LazySource):
    """Canvas i shows ``objects`` pictures of ``source`` side by side in random order, drawn by (seed, i).

    Fields: ``image`` (PNG bytes, square) and two maps, int32 [size, size], that are 0 on paper: ``label_map`` is one
    more than the number of the picture's class, and ``objects`` the picture's number from 1 on, from left to right.

    Attributes:
      source: pictures on white or transparent paper (field ``image``, encoded) with a class number (``label``).
      count: number of canvases.
      classes: only pictures of the first so many classes of the source take part, in the order in which they occur;
        None takes all.
      objects: pictures per canvas, one in each of as many equal columns, each at a random height.
      size: of the canvas in pixels; a picture is as wide as its column.
      seed: of what is drawn.

    Raises (on first use):
      UserError: a source with fewer classes.
    """

    source: Source
    count: int
    classes: int | None = 10
    objects: int = 2
    size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if (
            min(self.count, 1 if self.classes is None else self.classes, self.objects) < 1
            or self.size < self.objects
        ):
            raise UserError(
                f"Canvases has count={self.count}, classes={self.classes}, objects={self.objects} and "
                f"size={self.size}; all are 1 or more, and the canvas has a pixel or more per object."
            )

    def _open(self) -> list[tuple[int, int]]:
        """(place in the source, number of its class) of every picture that takes part."""
        numbers: dict[int, int] = {}
        pictures = []
        for place in range(len(self.source)):
            label = int(self.source[place]["label"])
            number = numbers.setdefault(label, len(numbers))
            if self.classes is None or number < self.classes:
                pictures.append((place, number))
        if self.classes is not None and len(numbers) < self.classes:
            raise UserError(f"Canvases.classes is {self.classes}, but the source has {len(numbers)} classes.")
        return pictures

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: SupportsIndex) -> Example:
        rng = np.random.default_rng([self.seed, checked_index(index, self.count, self)])
        canvas = np.full((self.size, self.size, 3), 255, np.uint8)
        labels, objects = np.zeros((2, self.size, self.size), np.int32)
        side = self.size // self.objects
        for column in range(self.objects):
            place, number = self._opened[int(rng.integers(len(self._opened)))]
            top = int(rng.integers(self.size - side + 1))
            where = slice(top, top + side), slice(column * side, (column + 1) * side)
            picture = on_paper(self.source[place]["image"], side)
            canvas[where] = picture
            labels[where] = (number + 1) * is_ink(picture)
            objects[where] = (column + 1) * is_ink(picture)
        return {"image": as_png(canvas), "label_map": labels, "objects": objects}

    def describe(self, index: int) -> str:
        return f"canvas {index} of {self.count}"

    def fingerprint(self) -> str:
        fields = (self.count, self.classes, self.objects, self.size, self.seed)
        return digest("Canvases", self.source.fingerprint(), fields)
