"""A source that prepares its examples once and remembers them, for data sets that fit in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from grain import transforms as grain_transforms
from PIL import Image

from vlpjax.data.sources.base import digest
from vlpjax.data.sources.order import cursors
from vlpjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Prepared:
    """`source` with transforms that draw nothing done once per example and process, then kept in memory.

    Reading, decoding and trimming a 64 px WebP costs twice as much as all that a training pipeline does to it
    afterwards, and a small data set is passed through hundreds of times.  What is kept is the example after
    the last transform, which the pipeline's own transforms start from; they return new images and never change
    the one they are given.

    Each worker process has a memory of its own.  In a mixture, wrap the parts, not the mixture.

    Attributes:
      source: where examples come from.
      transforms: by name, `grain.transforms.Map`s such as `Decode`, `Trim` and `Resize`; none is a
        `RandomMap`, which would draw once and then never again.
      max_bytes: when the kept examples fill this much memory, further ones are prepared each time.
    """

    source: Any
    transforms: Mapping[str, Any]
    max_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if list(cursors(self.source, 0)) != ["source"]:
            raise UserError(
                f"Prepared was given a {type(self.source).__name__}, which decides its own order; "
                "wrap its parts instead"
            )
        for name, transform in self.transforms.items():
            if not isinstance(transform, grain_transforms.Map):
                raise UserError(
                    f"Prepared.transforms has {name!r}, a {type(transform).__name__}; only a grain Map, which draws "
                    "nothing, may be done once and remembered"
                )
        self._forget()

    def _forget(self) -> None:
        object.__setattr__(self, "_kept", {})
        object.__setattr__(self, "_used", 0)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        kept: dict[int, dict[str, Any]] = self._kept  # type: ignore[attr-defined]
        example = kept.get(index)
        if example is None:
            example = self.source[index]
            for transform in self.transforms.values():
                example = transform.map(example)
            used = self._used + sum(map(_bytes, example.values()))  # type: ignore[attr-defined]
            if used <= self.max_bytes:
                kept[index] = example
                object.__setattr__(self, "_used", used)
        return dict(example)

    def describe(self, index: int) -> str:
        return self.source.describe(index)

    def fingerprint(self) -> str:
        steps = [(type(step).__qualname__, dataclasses.astuple(step)) for step in self.transforms.values()]
        return digest("Prepared", self.source.fingerprint(), steps)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


def _bytes(value: Any) -> int:
    """What a field of an example takes in memory; Pillow keeps an RGB pixel in four bytes."""
    if isinstance(value, Image.Image):
        return 4 * value.width * value.height
    if hasattr(value, "nbytes"):
        return int(value.nbytes)
    return len(value) if isinstance(value, (str, bytes)) else 8
