"""Examples that bring a field of another example along: material for collages, and for pairs that do not match."""

from __future__ import annotations

from dataclasses import dataclass
from typing import SupportsIndex

from vlpjax.data.sources.base import Example, Source, checked_index, digest
from vlpjax.errors import UserError


@dataclass(frozen=True)
class Companion:
    """Every record of ``source``, with a field of the record that stands ``offset`` further on, around the end.

    Attributes:
      source: where records come from.
      offset: a number that is no multiple of the source's length, so that no record is its own companion.
      field: what is taken from the companion.
      name: of the new field.
    """

    source: Source
    offset: int = 1
    field: str = "image"
    name: str = "companion"

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: SupportsIndex) -> Example:
        number = checked_index(index, len(self), self)
        other = (number + self.offset) % len(self)
        if other == number:
            raise UserError(
                f"Companion.offset is {self.offset}, which pairs each of {len(self)} records with itself."
            )
        return {**self.source[number], self.name: self.source[other][self.field]}

    def describe(self, index: int) -> str:
        return f"{self.source.describe(index)} with {self.source.describe((index + self.offset) % len(self))}"

    def fingerprint(self) -> str:
        return digest("Companion", self.source.fingerprint(), self.offset, self.field, self.name)
