"""A folder of images with captions: in a table, in text files beside the images, or as sub-folder names."""

from __future__ import annotations

import csv
import json
import operator
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsIndex

from vlpjax.data.paths import path_inside, resolve_path
from vlpjax.data.sources.base import Example, LazySource, checked_index, digest
from vlpjax.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
_TABLES = (".csv", ".tsv", ".jsonl", ".json")


class _Entry(NamedTuple):
    file: str  # relative to the folder, with forward slashes
    fields: dict[str, Any]


class _Opened(NamedTuple):
    folder: str
    entries: tuple[_Entry, ...]


@dataclass(frozen=True)
class ImageFolder(LazySource):
    """Images under ``directory`` and their captions.

    ``captions`` says where the captions are:
      * ``"captions.csv"`` (or .tsv, .jsonl, .json; a path inside the folder): a table with the columns
        ``file`` and ``caption``; further columns become fields.  JSON is a list of such objects or
        ``{"a.jpg": "caption"}``.  A file may have several rows, or a list of captions.
      * ``"sidecar"``: ``a.txt`` beside ``a.jpg``, one caption per line.
      * ``"folders"``: the sub-folder is the class; examples get ``label`` (int) and ``class_name``.

    Examples have ``image`` (encoded bytes) and ``text``; if any image has several captions, all examples
    have the list ``captions`` instead of ``text``.

    Raises (on first use):
      UserError: for a missing folder, table or column, a caption without its image, an image without its
        sidecar file, a path that leaves the folder, or a folder without images.
    """

    directory: str
    captions: str = "captions.csv"
    file: str = "file"
    caption: str = "caption"

    def __post_init__(self) -> None:
        if self.captions not in ("sidecar", "folders") and not self.captions.endswith(_TABLES):
            raise UserError(
                f"captions={self.captions!r} is not understood; give 'sidecar', 'folders' or a table"
                f" ending in {', '.join(_TABLES)}."
            )

    def _open(self) -> _Opened:
        folder = resolve_path(self.directory)
        if not os.path.isdir(folder):
            raise UserError(f"The image folder {folder!r} does not exist; give the path of a folder.")
        files = _files_below(folder)
        if self.captions == "folders":
            entries = _labelled(folder, files)
        elif self.captions == "sidecar":
            entries = [_Entry(name, {"captions": lines}) for name, lines in _sidecars(folder, files)]
        else:
            entries = self._from_table(folder, files)
        if not entries:
            raise UserError(
                f"The image folder {folder!r} holds no captioned images ({self.captions}); add some."
            )
        return _Opened(folder, tuple(_same_fields(entries)))

    def _from_table(self, folder: str, files: set[str]) -> list[_Entry]:
        table = path_inside(folder, self.captions, "captions=")
        if not os.path.isfile(table):
            raise UserError(f"The captions table {table!r} does not exist; the folder has {_some(files)}.")
        merged: dict[str, dict[str, Any]] = {}
        for row in _rows(table, self.file, self.caption):
            for column in (self.file, self.caption):
                if row.get(column) is None:
                    raise UserError(
                        f"{table!r} has no column {column!r} in {_some(map(str, row))}; add or name it."
                    )
            name = os.path.normpath(str(row.pop(self.file))).replace(os.sep, "/")
            if name not in files:
                path_inside(folder, name, repr(table))
                raise UserError(
                    f"{table!r} has a caption for {name!r}, but {folder!r} holds no such file; add it."
                )
            given = row.pop(self.caption)
            entry = merged.setdefault(name, row | {"captions": []})
            entry["captions"] += [str(text) for text in given] if isinstance(given, list) else [str(given)]
        return [_Entry(name, fields) for name, fields in merged.items()]

    def __len__(self) -> int:
        return len(self._opened.entries)

    def __getitem__(self, index: SupportsIndex) -> Example:
        folder, entries = self._opened
        file, fields = entries[checked_index(index, len(entries), self)]
        try:
            with open(os.path.join(folder, file), "rb") as stream:
                return {"image": stream.read(), **fields}
        except OSError as error:
            raise UserError(
                f"Cannot read {self.describe(operator.index(index))}: {error.strerror}."
            ) from error

    def describe(self, index: int) -> str:
        folder, entries = self._opened
        return f"image {os.path.join(folder, entries[checked_index(index, len(entries), self)].file)}"

    def fingerprint(self) -> str:
        folder, entries = self._opened
        return digest(
            "ImageFolder",
            [(e.file, os.path.getsize(os.path.join(folder, e.file)), e.fields) for e in entries],
        )


def _files_below(folder: str) -> set[str]:
    """All files of the folder, as relative names; links to folders are not followed."""
    found = set()
    for parent, _, names in os.walk(folder):
        inside = os.path.relpath(parent, folder).replace(os.sep, "/")
        for name in names:
            relative = name if inside == "." else f"{inside}/{name}"
            if os.path.islink(os.path.join(parent, name)):
                path_inside(folder, relative, f"A link in {folder!r}")
            found.add(relative)
    return found


def _images(files: set[str]) -> list[str]:
    return sorted(name for name in files if name.lower().endswith(IMAGE_SUFFIXES))


def _labelled(folder: str, files: set[str]) -> list[_Entry]:
    images = [name for name in _images(files) if "/" in name]
    classes = sorted({name.split("/")[0] for name in images})
    labels = {name: number for number, name in enumerate(classes)}
    return [
        _Entry(name, {"label": labels[c], "class_name": c}) for name in images for c in [name.split("/")[0]]
    ]


def _sidecars(folder: str, files: set[str]) -> Iterator[tuple[str, list[str]]]:
    images = _images(files)
    stems = {os.path.splitext(name)[0] for name in images}
    for name in sorted(files):
        if name.endswith(".txt") and name[:-4] not in stems:
            raise UserError(f"{folder!r} has the caption {name!r}, but no image of that name; add the image.")
    for name in images:
        text = os.path.splitext(name)[0] + ".txt"
        if text not in files:
            raise UserError(f"The image {name!r} in {folder!r} has no caption file {text!r}; add it.")
        with open(os.path.join(folder, text), encoding="utf-8") as stream:
            lines = [line.strip() for line in stream if line.strip()]
        if not lines:
            raise UserError(f"The caption file {text!r} in {folder!r} is empty; write a caption.")
        yield name, lines


def _rows(table: str, file: str, caption: str) -> Iterator[dict[str, Any]]:
    try:
        with open(table, encoding="utf-8-sig", newline="") as stream:
            if table.endswith((".csv", ".tsv")):
                yield from csv.DictReader(stream, dialect="excel-tab" if table.endswith(".tsv") else "excel")
                return
            if table.endswith(".jsonl"):
                rows = [json.loads(line) for line in stream if line.strip()]
            else:
                content = json.load(stream)
                is_map = isinstance(content, dict)
                rows = [{file: name, caption: text} for name, text in content.items()] if is_map else content
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise UserError(f"The captions table {table!r} cannot be read: {error}.") from error
    for row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{table!r} has the entry {row!r}; give objects with {file!r} and {caption!r}.")
        yield dict(row)


def _same_fields(entries: list[_Entry]) -> Iterator[_Entry]:
    """One caption everywhere becomes ``text``; otherwise everyone keeps the list."""
    several = any(len(fields.get("captions", ())) > 1 for _, fields in entries)
    for file, fields in entries:
        if "captions" in fields and not several:
            (text,) = fields.pop("captions")
            fields["text"] = text
        yield _Entry(file, fields)


def _some(names: Any) -> str:
    listed = sorted(names)
    return ", ".join(listed[:6]) + (", ..." if len(listed) > 6 else "") or "nothing"
