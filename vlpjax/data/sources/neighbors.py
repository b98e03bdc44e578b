"""Streams in which every example is followed by one that looks like it: hard negatives for contrast."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsIndex

import numpy as np

from vlpjax.data.paths import resolve_path
from vlpjax.data.sources import order
from vlpjax.data.sources.base import Example, LazySource, Source, checked_index, digest
from vlpjax.errors import UserError


@dataclass(frozen=True)
class WithNeighbors(LazySource):
    """The records of ``source``, each followed by one of its nearest neighbours.

    Position 2 p of the stream has the record that ``source`` alone has at position p, and position 2 p + 1 one of its
    neighbours, drawn evenly by (seed, position).  So a batch of an even size holds both, each with its own caption, and
    in one epoch half of the records come for their own sake.  As a plain sequence it is ``source``.

    Attributes:
      source: where records come from.
      neighbors: an ``.npy`` file of integers [records, K]: per record the indices of those that are most alike, the
        nearest first, as cosines of an image tower have it.
      most: of each row only the first so many are drawn.

    Raises (on first use):
      UserError: a table that does not fit the source.

    Source: "When and why vision-language models behave like bags-of-words", arXiv 2210.01936, section 4: "strong
    alternative images".
    """

    source: Source
    neighbors: str
    most: int = 3

    def _open(self) -> np.ndarray:
        path = Path(resolve_path(self.neighbors))
        if not path.is_file():
            raise UserError(f"WithNeighbors.neighbors is {self.neighbors!r}, which is no file.")
        table: np.ndarray = np.load(path, allow_pickle=False)
        size = len(self.source)
        if (
            table.dtype.kind not in "iu"
            or table.ndim != 2
            or len(table) != size
            or table.shape[1] < self.most
        ):
            raise UserError(
                f"{self.neighbors!r} has {table.dtype}{list(table.shape)}; for the {size} records of the source and "
                f"most={self.most} it takes integers [{size}, {self.most} or more]."
            )
        table = table[:, : self.most]
        if table.min() < 0 or table.max() >= size or np.any(table == np.arange(size)[:, None]):
            raise UserError(
                f"{self.neighbors!r} names records that the source does not have, or a record as its own neighbour."
            )
        return table

    @property
    def sources(self) -> Mapping[str, Source]:
        """The one part, as streams that decide their own order have them."""
        return {"records": self.source}

    def locate(self, position: int, seed: int, shuffle: bool) -> tuple[str, int, int]:
        """What the stream has at ``position``: ``("records", index, epoch)``."""
        index, epoch = order.draw(self.source, position // 2, seed, shuffle)
        if position % 2:
            index = int(np.random.default_rng([seed, position]).choice(self._opened[index]))
        return "records", index, epoch

    def cursors(self, position: int) -> dict[str, int]:
        """How many records came for their own sake before ``position``."""
        return {"records": (position + 1) // 2}

    def index_of(self, part: str, index: int) -> int:
        """The index that a record of the part has here: the same."""
        del part
        return index

    def part_of(self, index: int) -> tuple[str, int]:
        """The inverse of ``index_of``."""
        return "records", index

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SupportsIndex) -> Example:
        return self.source[checked_index(index, len(self), self)]

    def describe(self, index: int) -> str:
        return self.source.describe(index)

    def fingerprint(self) -> str:
        table = hashlib.blake2b(self._opened.tobytes(), digest_size=16).hexdigest()
        return digest("WithNeighbors", self.source.fingerprint(), table)
