"""Tables of images and texts in Parquet files, as Hugging Face data sets store them."""

from __future__ import annotations

import bisect
import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsIndex

import pyarrow as pa
import pyarrow.parquet as pq

from vlpjax.data.paths import expand_files, path_inside
from vlpjax.data.sources.base import Example, LazySource, checked_index, digest
from vlpjax.errors import UserError

_KEPT_ROW_GROUPS = 4  # decoded row groups that a thread keeps
_KEPT_FILES = 8  # open files that a thread keeps


class _Opened(NamedTuple):
    paths: tuple[str, ...]
    groups: tuple[tuple[int, int], ...]  # (file, row group in the file)
    ends: tuple[int, ...]  # running total of rows, one per row group
    thread: threading.local  # Parquet readers are not made for several threads, so each has its own


@dataclass(frozen=True)
class Parquet(LazySource):
    """The rows of Parquet files; ``files`` are paths, globs or ``{000..015}`` forms.

    The ``image`` column holds bytes or ``struct{bytes, path}`` (a path is taken relative to its file) and
    becomes the field ``image``; the ``text`` column becomes ``text``, or ``captions`` if it holds lists;
    ``columns`` are kept under their own names.  ``image`` and ``text`` may be None.

    A row costs the decoding of its row group unless that is among the last four of the thread, so shuffled
    reading wants small row groups (about a hundred rows): write them so, or convert to ArrayRecord.

    Raises (on first use):
      UserError: if a file is missing or damaged, lacks a column, or if there are no rows.
    """

    files: str | Sequence[str]
    image: str | None = "image"
    text: str | None = "caption"
    columns: tuple[str, ...] = ()

    def _wanted(self) -> list[str]:
        return [name for name in (self.image, self.text, *self.columns) if name is not None]

    def _open(self) -> _Opened:
        paths = expand_files(self.files, "Parquet")
        groups, rows = [], []
        for number, path in enumerate(paths):
            try:
                metadata = pq.read_metadata(path)
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{path!r} is not a readable Parquet file: {_first_line(error)}.") from error
            exist = metadata.schema.to_arrow_schema().names
            for column in self._wanted():
                if column not in exist:
                    raise UserError(f"{path!r} has no column {column!r}; its columns are {', '.join(exist)}.")
            groups += [(number, group) for group in range(metadata.num_row_groups)]
            rows += [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        if not sum(rows):
            raise UserError(
                f"The Parquet files {self.files!r} hold no rows; check that they were written fully."
            )
        return _Opened(paths, tuple(groups), tuple(itertools.accumulate(rows)), threading.local())

    def _row_group(self, number: int) -> dict[str, pa.ChunkedArray]:
        """The decoded columns of a row group, from the thread's cache if they are there."""
        opened = self._opened
        held: OrderedDict[int, dict[str, pa.ChunkedArray]] = _thread_cache(opened.thread, "groups")
        if number not in held:
            file, group = opened.groups[number]
            files: OrderedDict[int, pq.ParquetFile] = _thread_cache(opened.thread, "files")
            if file not in files:
                files[file] = pq.ParquetFile(opened.paths[file])
            table = files[file].read_row_group(group, columns=self._wanted(), use_threads=False)
            held[number] = {name: table.column(name) for name in table.column_names}
            _forget_oldest(files, _KEPT_FILES)
            _forget_oldest(held, _KEPT_ROW_GROUPS)
        held.move_to_end(number)
        return held[number]

    def _place(self, index: SupportsIndex) -> tuple[int, int]:
        ends = self._opened.ends
        number = checked_index(index, ends[-1], self)
        group = bisect.bisect_right(ends, number)
        return group, number - (ends[group - 1] if group else 0)

    def __len__(self) -> int:
        return self._opened.ends[-1]

    def __getitem__(self, index: SupportsIndex) -> Example:
        group, row = self._place(index)
        try:
            columns = self._row_group(group)
        except (pa.ArrowException, OSError) as error:
            where = self.describe(int(index))
            raise UserError(f"Cannot read {where}: {_first_line(error)}; the file is damaged.") from error
        example = {name: columns[name][row].as_py() for name in self.columns}
        for column in self._wanted():
            if not columns[column][row].is_valid:
                raise UserError(
                    f"Column {column!r} of {self.describe(int(index))} is null; every row needs a value."
                )
        if self.image is not None:
            example["image"] = self._image_bytes(columns[self.image][row].as_py(), int(index))
        if self.text is not None:
            text = columns[self.text][row].as_py()
            example["captions" if isinstance(text, list) else "text"] = text
        return example

    def _image_bytes(self, value: Any, index: int) -> bytes:
        if isinstance(value, bytes):
            return value
        where = self.describe(index)
        if not isinstance(value, dict) or not (value.get("bytes") or value.get("path")):
            raise UserError(f"Column {self.image!r} of {where} holds no image bytes and no path of an image.")
        if value.get("bytes"):
            return value["bytes"]
        folder = os.path.dirname(self._opened.paths[self._opened.groups[self._place(index)[0]][0]]) or "."
        path = path_inside(folder, value["path"], where)
        if not os.path.isfile(path):
            raise UserError(
                f"{where} names the image {path!r}, which does not exist; add it beside the table."
            )
        with open(path, "rb") as stream:
            return stream.read()

    def column(self, name: str) -> list[Any]:
        """All values of one column, read without the others; the fields ``text`` and ``image`` count too."""
        stored = {"text": self.text, "captions": self.text}.get(name) or name
        values: list[Any] = []
        for path in self._opened.paths:
            exist = pq.read_schema(path).names
            if stored not in exist:
                raise UserError(f"{path!r} has no column {stored!r}; its columns are {', '.join(exist)}.")
            values += pq.read_table(path, columns=[stored]).column(stored).to_pylist()
        return values

    def describe(self, index: int) -> str:
        group, row = self._place(index)
        file, group_in_file = self._opened.groups[group]
        return f"row {row} of row group {group_in_file} of {self._opened.paths[file]}"

    def fingerprint(self) -> str:
        paths, _, ends, _ = self._opened
        files = [(os.path.basename(path), os.path.getsize(path)) for path in paths]
        return digest("Parquet", files, ends, self.image, self.text, list(self.columns))


def _thread_cache(thread: threading.local, name: str) -> OrderedDict[int, Any]:
    return thread.__dict__.setdefault(name, OrderedDict())


def _forget_oldest(cache: OrderedDict[int, Any], keep: int) -> None:
    while len(cache) > keep:
        cache.popitem(last=False)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no reason given"])[0].rstrip(".")
