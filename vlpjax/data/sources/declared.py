"""A source that only declares its examples: all that describing and planning need of data that is elsewhere."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import SupportsIndex

import numpy as np

from vlpjax.data.sources.base import Example, digest
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
            if not _ARRAY.fullmatch(text.replace(" ", "")):
                raise UserError(
                    f"The declared field {name!r} is {text!r}; write a type and a shape, such as 'float32[224,224,3]'."
                )
        if self.examples < 1:
            raise UserError(f"The declared number of examples is {self.examples}; it is 1 or more.")

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: SupportsIndex) -> Example:
        if not 0 <= operator.index(index) < self.examples:
            raise IndexError(f"There are {self.examples} declared examples, and no number {index}.")
        return {name: self._zeros(text) for name, text in self.example.items()}

    def describe(self, index: int) -> str:
        return f"declared example {index}"

    def fingerprint(self) -> str:
        return digest("declared", self.examples, dict(self.example))

    @staticmethod
    def _zeros(text: str) -> np.ndarray:
        match = _ARRAY.fullmatch(text.replace(" ", ""))
        assert match is not None
        return np.zeros([int(size) for size in match[2].split(",") if size], match[1])
