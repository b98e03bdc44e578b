"""A source that only declares its examples: all that describing and planning need of data that is elsewhere."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np

from vlpjax.data.sources.base import Example, checked_index, digest
from vlpjax.errors import UserError

_ARRAY = re.compile(r"(float32|int32|uint8|bool)\[((?:\d+(?:,\d+)*)?)\]")


@dataclass(frozen=True)
class Declared:
    """Zeros of declared shapes in place of examples that were read and transformed.

    Attributes:
      example: name of a field -> its type and shape, such as ``"float32[224,224,3]"`` or ``"int32[]"``.
      examples: their number, which is the length of an epoch.
    """

    example: Mapping[str, str]
    examples: int

    def __post_init__(self) -> None:
        for name, text in self.example.items():
            _declared(name, text)
        if self.examples < 1:
            raise UserError(f"The declared number of examples is {self.examples}; it is 1 or more.")

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: SupportsIndex) -> Example:
        checked_index(index, self.examples, self)
        return {name: np.zeros(shape, dtype) for name, (shape, dtype) in self.shapes().items()}

    def shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and type of every field; examples of a long video are too large to be made for that."""
        return {name: _declared(name, text) for name, text in self.example.items()}

    def describe(self, index: int) -> str:
        return f"declared example {index}"

    def fingerprint(self) -> str:
        return digest("declared", self.examples, dict(self.example))


def _declared(name: str, text: str) -> tuple[tuple[int, ...], str]:
    """The shape and the type of a field that is declared as ``text``."""
    match = _ARRAY.fullmatch(text.replace(" ", ""))
    if match is None:
        raise UserError(
            f"The declared field {name!r} is {text!r}; write a type and a shape, such as 'float32[224,224,3]'."
        )
    return tuple(int(size) for size in match[2].split(",") if size), match[1]
