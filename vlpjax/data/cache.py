"""A source that remembers its decoded images, for data sets that fit in memory."""

from __future__ import annotations

import dataclasses
from typing import Any

from PIL import Image

from vlpjax.data.sources.base import digest
from vlpjax.data.sources.order import cursors
from vlpjax.data.transforms import Decode
from vlpjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Decoded:
    """`source` with its images decoded, each once per process, then kept in memory.

    Reading and decoding a 64 px WebP costs about as much as all that a training pipeline does to it afterwards,
    and a small data set is passed through hundreds of times.  What is kept is the ``PIL.Image`` itself (4 bytes
    per pixel), which `Decode` in the transforms passes on as it is.  Transforms must return new images, never
    change the one they are given; all of this package do.

    Each worker process has a memory of its own.  In a mixture, wrap the parts, not the mixture.

    Attributes:
      source: where examples come from.
      decode: how images are decoded; as `Decode` does by default if None.
      max_bytes: when the kept images fill this much memory, further ones are decoded each time.
    """

    source: Any
    decode: Decode | None = None
    max_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        if list(cursors(self.source, 0)) != ["source"]:
            raise UserError(
                f"Decoded was given a {type(self.source).__name__}, which decides its own order; wrap its parts instead"
            )
        self._forget()

    @property
    def _decoder(self) -> Decode:
        return self.decode or Decode()

    def _forget(self) -> None:
        object.__setattr__(self, "_kept", {})
        object.__setattr__(self, "_used", 0)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        kept: dict[int, dict[str, Any]] = self._kept  # type: ignore[attr-defined]
        example = kept.get(index)
        if example is None:
            example = self._decoder.map(self.source[index])
            image: Image.Image = example[self._decoder.field]
            used = self._used + 4 * image.width * image.height  # type: ignore[attr-defined]
            if used <= self.max_bytes:
                kept[index] = example
                object.__setattr__(self, "_used", used)
        return dict(example)

    def describe(self, index: int) -> str:
        return self.source.describe(index)

    def fingerprint(self) -> str:
        if self._decoder == Decode():  # the examples are those of the source, remembered or not
            return self.source.fingerprint()
        return digest("Decoded", self.source.fingerprint(), dataclasses.astuple(self._decoder))

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()
