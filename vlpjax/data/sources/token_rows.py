"""Rows of tokens for language models: many documents end to end, cut into pieces of one length.

Nothing is padded: a row begins where the last one ended, in the middle of a document or not.  Consecutive rows share
one token, which is the last label of one and the first input of the next.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, SupportsIndex

import numpy as np

from vlpjax.data.paths import expand_files
from vlpjax.data.sources.base import Example, LazySource, Source, checked_index, digest
from vlpjax.data.tokenizers import Tokenizer
from vlpjax.errors import UserError

TYPES = ("uint16", "uint32", "int32")


def segment_ids(tokens: np.ndarray, end: int) -> np.ndarray:
    """Which document of its row each token is of, from 1 on; ``end`` is the last token of a document."""
    return 1 + np.cumsum(np.concatenate([[False], tokens[:-1] == end])).astype(np.int32)


def rows_in(tokens: int, length: int) -> int:
    """Rows of ``length + 1`` tokens that share their ends; what is left at the end is dropped."""
    return max(tokens - 1, 0) // length


class _Rows(LazySource):
    """What both sources do with a row: ``"tokens"``, and ``"segment_ids"`` if documents have an end."""

    length: int

    def _check(self) -> None:
        if self.length < 1:
            raise UserError(f"{type(self).__name__}.length is {self.length}; a row has at least 1 token.")

    @staticmethod
    def _row(tokens: np.ndarray, end: int | None) -> Example:
        row = {"tokens": tokens.astype(np.int32)}
        return row if end is None else {**row, "segment_ids": segment_ids(tokens, end)}


@dataclass(frozen=True)
class TokenFiles(_Rows):
    """Files of token ids and nothing else, read where they lie.

    Attributes:
      files: a path with ``*`` or ``{000..127}``; raw little-endian numbers, each file one long text.
      length: of a row; it has one token more, which is only predicted.
      dtype: ``"uint16"``, ``"uint32"`` or ``"int32"``.
      end: the id that ends a document, for the field ``"segment_ids"``; None leaves that field out.

    Raises:
      UserError: another type, a length below 1, or files that are not there or hold no whole numbers.
    """

    files: str
    length: int
    dtype: str = "uint16"
    end: int | None = None

    def __post_init__(self) -> None:
        self._check()
        if self.dtype not in TYPES:
            raise UserError(f"TokenFiles.dtype is {self.dtype!r}; there are {', '.join(map(repr, TYPES))}.")

    def _open(self) -> tuple[tuple[str, ...], np.ndarray]:
        paths = expand_files(self.files, "token")
        item, sizes = np.dtype(self.dtype).itemsize, [os.path.getsize(path) for path in paths]
        for path, size in zip(paths, sizes, strict=True):
            if size % item:
                raise UserError(f"{path} has {size} bytes, which are no whole numbers of type {self.dtype}.")
        return paths, np.cumsum([0, *(rows_in(size // item, self.length) for size in sizes)])

    def __len__(self) -> int:
        return int(self._opened[1][-1])

    def _place(self, index: SupportsIndex) -> tuple[str, int]:
        """The file that a row is in, and which of its rows it is."""
        paths, ends = self._opened
        number = checked_index(index, len(self), self)
        file = int(np.searchsorted(ends, number, side="right")) - 1
        return paths[file], number - int(ends[file])

    def __getitem__(self, index: SupportsIndex) -> Example:
        path, row = self._place(index)
        start = row * self.length
        tokens = np.memmap(path, np.dtype(self.dtype).newbyteorder("<"), "r")[start : start + self.length + 1]
        return self._row(tokens, self.end)

    def describe(self, index: int) -> str:
        path, row = self._place(index)
        return f"tokens {row * self.length} to {(row + 1) * self.length} of {path}"

    def fingerprint(self) -> str:
        paths, _ = self._opened
        files = [(os.path.basename(path), os.path.getsize(path)) for path in paths]
        return digest("TokenFiles", files, self.length, self.dtype, self.end)


@dataclass(frozen=True)
class PackedTexts(_Rows):
    """The texts of a small source, tokenized and packed when the source is first read; all are held in memory.

    Attributes:
      source: of the texts.
      tokenizer: whose end-of-text token ends each of them.
      length: of a row; it has one token more, which is only predicted.
      fields: of the source's examples; each that holds a text is a document.
      lower: whether texts are lower-cased first.

    Raises:
      UserError: a length below 1, a tokenizer without an end-of-text token, or too little text for one row.
    """

    source: Source
    tokenizer: Tokenizer
    length: int
    fields: tuple[str, ...] = ("text",)
    lower: bool = False

    def __post_init__(self) -> None:
        self._check()

    def _texts(self) -> Iterator[str]:
        for index in range(len(self.source)):
            example = self.source[index]
            texts = (example.get(field) for field in self.fields)
            yield from (
                text.lower() if self.lower else text for text in texts if isinstance(text, str) and text
            )

    def _open(self) -> tuple[np.ndarray, int]:
        end = self.tokenizer.eos_id
        if end is None:
            raise UserError(f"PackedTexts.tokenizer {self.tokenizer.path!r} has no token that ends a text.")
        ids = [number for text in self._texts() for number in (*self.tokenizer.encode(text), end)]
        if not rows_in(len(ids), self.length):
            raise UserError(
                f"The texts have {len(ids)} tokens, too few for a row of PackedTexts.length={self.length} and one more."
            )
        return np.asarray(ids, np.int32), end

    def __len__(self) -> int:
        return rows_in(len(self._opened[0]), self.length)

    def __getitem__(self, index: SupportsIndex) -> Example:
        tokens, end = self._opened
        start = checked_index(index, len(self), self) * self.length
        return self._row(tokens[start : start + self.length + 1], end)

    def describe(self, index: int) -> str:
        return f"tokens {index * self.length} to {(index + 1) * self.length} of the packed texts"

    def fingerprint(self) -> str:
        parts: tuple[Any, ...] = (self.source.fingerprint(), self.tokenizer.fingerprint())
        return digest("PackedTexts", *parts, self.length, list(self.fields), self.lower)
