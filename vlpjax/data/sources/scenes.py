"""Scenes made of two pictures side by side, with captions that are right or wrong by the order of their words alone."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np
from PIL import Image

from vlpjax.data.drawings import as_png, on_paper
from vlpjax.data.sources.base import Example, LazySource, Source, checked_index, digest
from vlpjax.errors import UserError

KINDS = ("relation", "attribute")
COLORS = {
    "red": (205, 40, 40), "green": (30, 150, 60), "blue": (40, 80, 215), "orange": (240, 140, 20),
    "purple": (140, 50, 170),
}  # fmt: skip


@dataclass(frozen=True)
class Scenes(LazySource):
    """Scene i shows two different things of ``source``, drawn by (seed, i): a pure function.

    Fields: ``image`` (PNG bytes, ``size`` high and twice as wide), ``caption`` and ``wrong``, which differ in the order
    of two words; ``relation`` (``"left of"``, ``"right of"``, or both colours), by which scores can be grouped; and
    ``label``, equal for scenes that show the same, whichever way round their captions say it.

      * ``"relation"``: "a duck left of a tree" is right, "a tree left of a duck" wrong;
      * ``"attribute"``: both things are recoloured: "a red duck and a blue tree" is right, "a blue duck and a red tree"
        wrong.

    Attributes:
      source: pictures (field ``image``, encoded) with names (``name``).
      count: number of scenes.
      kind: ``"relation"`` or ``"attribute"``.
      size: height of the scene in pixels.
      seed: of what is drawn.

    Raises (on first use):
      UserError: pictures of fewer than two names.
    """

    source: Source
    count: int
    kind: str = "relation"
    size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"Scenes.kind is {self.kind!r}; there are {', '.join(KINDS)}.")
        if self.count < 1 or self.size < 1:
            raise UserError(f"Scenes has count={self.count} and size={self.size}; both are 1 or more.")

    def _open(self) -> tuple[list[str], dict[str, int]]:
        """The name of each picture, and a number for each name."""
        names = [str(self.source[thing]["name"]) for thing in range(len(self.source))]
        numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
        if len(numbers) < 2:
            raise UserError(f"Scenes needs pictures of two names to choose from, but has {len(numbers)}.")
        return names, numbers

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: SupportsIndex) -> Example:
        number = checked_index(index, self.count, self)
        rng = np.random.default_rng([self.seed, number])
        all_names, numbers = self._opened
        left = right = int(rng.integers(len(all_names)))
        while all_names[right] == all_names[left]:
            right = int(rng.integers(len(all_names)))
        names = [all_names[left], all_names[right]]
        content = numbers[names[0]] * len(numbers) + numbers[names[1]]
        pictures = [_on_paper(self.source[thing]["image"], self.size) for thing in (left, right)]
        if self.kind == "relation":
            flipped = bool(rng.random() < 0.5)
            first, second = reversed(names) if flipped else names
            relation = "right of" if flipped else "left of"
            caption, wrong = (f"a {a} {relation} a {b}" for a, b in ((first, second), (second, first)))
        else:
            colors = [str(name) for name in rng.choice(list(COLORS), 2, replace=False)]
            pictures = [_recolored(x, COLORS[name]) for x, name in zip(pictures, colors, strict=True)]
            caption = f"a {colors[0]} {names[0]} and a {colors[1]} {names[1]}"
            wrong = f"a {colors[1]} {names[0]} and a {colors[0]} {names[1]}"
            relation = " and ".join(sorted(colors))
            places = [list(COLORS).index(name) for name in colors]
            content = (content * len(COLORS) + places[0]) * len(COLORS) + places[1]
        return {
            "image": as_png(np.concatenate(pictures, axis=1)), "caption": caption, "wrong": wrong, "relation": relation,
            "label": content,
        }  # fmt: skip

    def describe(self, index: int) -> str:
        return f"scene {index} ({self[index]['caption']})"

    def fingerprint(self) -> str:
        fields = (self.count, self.kind, self.size, self.seed)
        return digest("Scenes", self.source.fingerprint(), fields)


_on_paper = functools.lru_cache(maxsize=4096)(on_paper)  # what it returns is never changed


def _recolored(picture: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    """What is not white in one colour; darker parts stay darker."""
    darkness = 1 - np.asarray(Image.fromarray(picture).convert("L"), np.float32) / 255
    ink = np.clip(darkness[..., None] * 3, 0, 1)
    shade = np.asarray(color, np.float32) * (1 - 0.4 * darkness[..., None])
    return (255 * (1 - ink) + shade * ink).round().astype(np.uint8)
