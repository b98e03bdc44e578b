"""Rows of short videos whose frames are drawings, each followed by the names of what it showed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np

from vlpjax.data.drawings import on_paper
from vlpjax.data.sources.base import Example, LazySource, Source, checked_index, digest
from vlpjax.data.tokenizers import Tokenizer
from vlpjax.errors import UserError


@dataclass(frozen=True)
class Slideshows(LazySource):
    """Row i is filled with videos that are drawn by (seed, i), one after the other, while there is room.

    A video of n frames is n times ``tokens_per_frame`` placeholders, and then the n names, each ended by the
    tokenizer's end-of-text token.  Fields: ``video``, bytes [frames, size, size, 3], of all videos of the row in order
    and white where there are no more; ``tokens``, int32 [length + 1]; ``segment_ids``, int32 [length + 1], which video
    of the row each token is of, from 1 on, and 0 for padding.

    Attributes:
      source: pictures (field ``image``, encoded), of which ``name_field`` is the name and ``label`` the concept.
      tokenizer: of the names.
      count: number of rows.
      length: of a row; it has one token more, which is only predicted.
      frames: that a row has room for; ``size``, height and width of each in pixels.
      longest: most frames of a video.
      tokens_per_frame: visual tokens that the connector makes of a frame.
      placeholder: the id that stands for a visual token.
      concepts: only pictures of the source's first so many concepts take part; None takes all.
      name_field: of the source's examples.
      seed: of what is drawn.

    Raises (when made or on first use):
      UserError: numbers below 1, a tokenizer without an end-of-text token, or rows too short for any video.
    """

    source: Source
    tokenizer: Tokenizer
    count: int
    length: int
    frames: int
    tokens_per_frame: int
    placeholder: int
    size: int = 32
    longest: int = 3
    concepts: int | None = None
    name_field: str = "name"
    seed: int = 0

    def __post_init__(self) -> None:
        numbers = {
            name: getattr(self, name)
            for name in ("count", "length", "frames", "tokens_per_frame", "size", "longest")
        }
        for name, number in numbers.items():
            if number < 1:
                raise UserError(f"Slideshows.{name} is {number}; it is 1 or more.")

    def _open(self) -> list[tuple[int, list[int]]]:
        """(place in the source, ids of the name) of every picture that takes part."""
        end = self.tokenizer.eos_id
        if end is None:
            raise UserError("Slideshows.tokenizer has no token that ends a text.")
        known: set[int] = set()
        pictures = []
        for place in range(len(self.source)):
            example = self.source[place]
            label = int(example["label"])
            if label in known or self.concepts is None or len(known) < self.concepts:
                known.add(label)
                name = [*self.tokenizer.encode(str(example[self.name_field]).lower()), end]
                pictures.append((place, name))
        shortest = min((len(name) for _, name in pictures), default=0)
        if not pictures or self.tokens_per_frame + shortest > self.length + 1:
            raise UserError(
                f"No video fits in a row of Slideshows.length={self.length}: one frame and its name take "
                f"{self.tokens_per_frame + shortest} tokens, and the source has {len(pictures)} pictures."
            )
        return pictures

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: SupportsIndex) -> Example:
        rng = np.random.default_rng([self.seed, checked_index(index, self.count, self)])
        tokens, segments = np.zeros((2, self.length + 1), np.int32)
        video = np.full((self.frames, self.size, self.size, 3), 255, np.uint8)
        used = shown = number = 0
        while shown < self.frames:
            drawn = rng.integers(len(self._opened), size=int(rng.integers(1, self.longest + 1)))
            names = [self._opened[picture][1] for picture in drawn]
            ids = [self.placeholder] * (self.tokens_per_frame * len(drawn)) + [
                id for name in names for id in name
            ]
            # What does not fit ends the row, unless nothing would be in it.
            if used + len(ids) > self.length + 1 or shown + len(drawn) > self.frames:
                if number:
                    break
                continue
            number += 1
            tokens[used : used + len(ids)], segments[used : used + len(ids)] = ids, number
            for picture in drawn:
                video[shown] = on_paper(self.source[self._opened[picture][0]]["image"], self.size)
                shown += 1
            used += len(ids)
        return {"video": video, "tokens": tokens, "segment_ids": segments}

    def describe(self, index: int) -> str:
        return f"row {index} of {self.count} of slideshows"

    def fingerprint(self) -> str:
        fields = (
            self.count, self.length, self.frames, self.tokens_per_frame, self.placeholder, self.size, self.longest,
            self.concepts, self.name_field, self.seed,
        )  # fmt: skip
        return digest("Slideshows", self.source.fingerprint(), self.tokenizer.fingerprint(), fields)
