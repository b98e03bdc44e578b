"""``Tensors``: named arrays in files, read in parts.  Every file format gives one, and imports know only this."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from vlpjax.errors import UserError


class Tensors(Protocol):
    """Named arrays.

    Attributes:
      what: the file or folder, for messages.
    """

    what: str

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Per name; all names are its keys."""
        ...

    def dtype(self, name: str) -> np.dtype:
        """The type that a tensor is read in."""
        ...

    def read(self, name: str, part: Sequence[slice] = ()) -> np.ndarray:
        """The part of a tensor between these slices (all of it without), in memory of its own."""
        ...


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in a file.

    Attributes:
      file: that holds it.
      dtype, shape: of the tensor.
      offset: of its first element, in bytes.
      strides: in bytes; None is row by row without gaps.
    """

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def end(self) -> int:
        """The first byte after the tensor."""
        if self.strides is None or not math.prod(self.shape):
            return self.offset + self.nbytes
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return self.offset + last + self.dtype.itemsize


class MappedTensors:
    """Tensors that lie in files as they are in memory: the files are mapped, and only what is read is loaded.

    Attributes:
      what, shapes: of :class:`Tensors`.
      bytes_read: how many bytes of tensors were read so far.

    Raises:
      UserError: a tensor that reaches beyond the end of its file.
    """

    def __init__(self, what: str, entries: Mapping[str, Entry]):
        self.what = what
        self.shapes = {name: entry.shape for name, entry in entries.items()}
        self.bytes_read = 0
        self._entries = entries
        self._maps: dict[Path, np.memmap] = {}
        sizes = {entry.file: entry.file.stat().st_size for entry in entries.values()}
        for name, entry in entries.items():
            if entry.end > sizes[entry.file] or entry.offset < 0:
                raise UserError(
                    f"{entry.file} is cut off: it has {sizes[entry.file]} bytes, and the tensor {name!r} of shape "
                    f"{entry.shape} ends at byte {entry.end}."
                )

    def dtype(self, name: str) -> np.dtype:
        return self._entries[name].dtype

    def read(self, name: str, part: Sequence[slice] = ()) -> np.ndarray:
        entry = self._entries[name]
        if not math.prod(entry.shape):
            return np.zeros(entry.shape, entry.dtype)[tuple(part)]
        if entry.file not in self._maps:
            self._maps[entry.file] = np.memmap(entry.file, np.uint8, mode="r")
        whole: np.ndarray = np.ndarray(
            entry.shape, entry.dtype, self._maps[entry.file].data, entry.offset, entry.strides
        )
        found = np.array(whole[tuple(part)])
        self.bytes_read += found.nbytes
        return found


class ArrayTensors:
    """Tensors that are in memory already: what another program made, or what was put together by hand.

    Attributes:
      what, shapes: of :class:`Tensors`.
    """

    def __init__(self, what: str, arrays: Mapping[str, np.ndarray]):
        self.what = what
        self.shapes = {name: array.shape for name, array in arrays.items()}
        self._arrays = arrays

    def dtype(self, name: str) -> np.dtype:
        return self._arrays[name].dtype

    def read(self, name: str, part: Sequence[slice] = ()) -> np.ndarray:
        return np.array(self._arrays[name][tuple(part)])
