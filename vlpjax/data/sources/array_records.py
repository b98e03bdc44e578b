"""Plain ArrayRecord files of MessagePack maps, as ``data_pipelines/convert_webdataset.py`` writes them.

MessagePack holds texts, numbers, bytes and lists of them and nothing that runs, so files from strangers are
safe to read.  A file written with ``group_size:1`` gives any record with one small read.
"""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, SupportsIndex

import msgpack
from array_record.python import array_record_data_source, array_record_module

from vlpjax.data.paths import expand_files
from vlpjax.data.sources.base import Example, LazySource, checked_index, digest
from vlpjax.errors import UserError

WRITER_OPTIONS = "group_size:1"


def pack_record(example: Example) -> bytes:
    """An example of texts, bytes, plain numbers and lists of them as one self-described record.

    Raises:
      UserError: for a value of another type, such as a NumPy array.
    """
    try:
        return msgpack.packb(example, use_bin_type=True)
    except (TypeError, OverflowError) as error:
        types = {name: type(value).__name__ for name, value in example.items()}
        raise UserError(
            f"An example with fields {types} cannot be stored ({error});"
            " use str, bytes, int, float, bool and lists of them."
        ) from error


def unpack_record(record: bytes) -> Example:
    """The inverse of ``pack_record``; raises ``ValueError`` for bytes that are no such record."""
    example = msgpack.unpackb(record, raw=False, strict_map_key=True)
    if not isinstance(example, dict):
        raise ValueError(f"it holds a {type(example).__name__} instead of a map of fields")
    return example


@dataclass(frozen=True)
class _Piece:
    """A part of a file, in the form that the ``array_record`` package asks for."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class _Files(NamedTuple):
    paths: tuple[str, ...]
    ends: tuple[int, ...]  # running total of the record counts
    records: array_record_data_source.ArrayRecordDataSource


@dataclass(frozen=True)
class ArrayRecords(LazySource):
    """Examples from ArrayRecord files; ``files`` are paths, globs or ``{000..015}`` forms.

    Raises (on first use):
      UserError: if a file is missing, is no ArrayRecord file, or if there are no records at all.
    """

    files: str | Sequence[str]

    _survives_fork: ClassVar[bool] = False

    def _open(self) -> _Files:
        paths = expand_files(self.files, "ArrayRecord")
        ends = tuple(itertools.accumulate(map(_count_records, paths)))
        if not ends[-1]:
            raise UserError(
                f"The ArrayRecord files {self.files!r} hold no records; check that the conversion ended."
            )
        counts = (end - begin for begin, end in zip((0, *ends), ends, strict=False))
        pieces = [_Piece(path, 0, count, count) for path, count in zip(paths, counts, strict=True) if count]
        return _Files(paths, ends, array_record_data_source.ArrayRecordDataSource(pieces))

    def __len__(self) -> int:
        return self._opened.ends[-1]

    def __getitem__(self, index: SupportsIndex) -> Example:
        number = checked_index(index, len(self), self)
        try:
            return unpack_record(self._opened.records[number])
        except (ValueError, RuntimeError, msgpack.UnpackException) as error:
            raise UserError(
                f"Cannot read {self.describe(number)}: {error}; convert the data again."
            ) from error

    def describe(self, index: int) -> str:
        number = checked_index(index, len(self), self)
        paths, ends, _ = self._opened
        file = bisect.bisect_right(ends, number)
        return f"record {number - (ends[file - 1] if file else 0)} of {paths[file]}"

    def fingerprint(self) -> str:
        paths, ends, _ = self._opened
        return digest("ArrayRecords", [(os.path.basename(p), os.path.getsize(p)) for p in paths], ends)


def _count_records(path: str) -> int:
    try:
        reader = array_record_module.ArrayRecordReader(path)
        count = reader.num_records()
        reader.close()  # tells what the reader found wrong, such as a cut file
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{path!r} is not a readable ArrayRecord file ({_first_line(error)}).") from error
    return count


def _first_line(error: Any) -> str:
    return (str(error).splitlines() or ["no reason given"])[0]
