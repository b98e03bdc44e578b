"""Rows of one length that hold several documents with their pictures, each whole and beside the others.

Which documents share a row is planned once, from what every document measures, before the first row is read.  So a row
is a pure function of its index, as every record of a source is: :class:`vlpjax.data.pipeline.Pipeline` shuffles rows in
every epoch, starts at any step without a replay, lets each process make its own rows only, and has nothing about
packing to write into a checkpoint.  A packer behind the transforms would have to pass through all that came before, in
every process.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, SupportsIndex

import numpy as np
from grain import transforms as grain_transforms

from vlpjax.data.bad import BadExample, is_bad_data
from vlpjax.data.paths import resolve_path
from vlpjax.data.pipeline import generator, name_key, settings
from vlpjax.data.sources.base import Example, LazySource, Source, checked_index, digest
from vlpjax.data.sources.order import cursors, permute
from vlpjax.data.transforms.conversations import listed
from vlpjax.data.transforms.fields import require
from vlpjax.errors import UserError

log = logging.getLogger("vlpjax.data")

FEW_BAD = 10  # so many documents may be left out of any source, however small it is
NAMED_BAD = 3  # of those left out, so many are named in the log
SECONDS = 60.0  # between two lines of the log while documents are measured


def first_fit(sizes: np.ndarray, room: Sequence[int], open_rows: int) -> list[list[int]]:
    """Puts documents, as they come, each into the first open row that has room for it.

    One that no open row has room for opens another row; if there are ``open_rows`` already, the one with the least room
    for tokens is closed, of several such the one that was opened first.

    Args:
      sizes: int [documents, kinds]: how much of each kind a document has, tokens first; none has more than a row.
      room: of a row, for each kind.
      open_rows: the most that are open at once.

    Returns:
      the documents of every row; rows are in the order in which they were opened.

    Source: "Bounded space on-line bin packing: best is better than first" (Csirik and Johnson, 2001), which shows what
    closing the fullest row is worth.
    """
    rows: list[list[int]] = []
    held: list[list[int]] = []  # the open ones, and what is free in each
    free = np.zeros((open_rows, len(room)), np.int64)
    for document, size in enumerate(sizes):
        fitting = np.flatnonzero((free[: len(held)] >= size).all(axis=1))
        if len(fitting):
            place = int(fitting[0])
        else:
            if len(held) == open_rows:
                fullest = int(free[:, 0].argmin())
                free[fullest:-1] = free[fullest + 1 :]
                del held[fullest]
            place = len(held)
            held.append([])
            rows.append(held[place])
            free[place] = room
        held[place].append(document)
        free[place] -= size
    return rows


class _Plan(NamedTuple):
    """Row r holds the documents ``order[starts[r] : starts[r + 1]]``."""

    order: np.ndarray  # int64 [documents]
    starts: np.ndarray  # int64 [rows + 1]


@dataclass(frozen=True)
class PackedDocuments(LazySource):
    """Rows of ``length + 1`` tokens, each of several documents of ``source`` that do not see one another.

    Every document is in one row, whole; in an epoch of rows none is missing and none comes twice.  Fields of a row:
    ``field`` and those of ``per_token`` [length + 1], filled up with ``padding`` and 0; ``segment_ids``, int32
    [length + 1], which document of the row a token is of, from 1 on, and 0 for padding; and, where there is room for
    pictures, ``images_field``, a list of those of all documents in order.
    :class:`vlpjax.data.transforms.frames.Frames` may follow, and makes an array of them.

    When the source is first used, all documents are made once to measure them, and packed in a random order by
    :func:`first_fit`.  Documents keep their company from epoch to epoch, and what a transform draws for one is drawn
    once, since its length is part of the plan; rows come in a new order.  A document that is broken, or larger than a
    row, is left out.  One that breaks later, when its pictures are decoded, is replaced with its row.

    For a mixture with weights, pack its parts; weights then are of rows.

    Attributes:
      source: of records.
      transforms: by name, a grain ``Map`` or ``RandomMap`` each; they make a document of a record: an array of tokens
        without padding, and what else a row has.  :class:`vlpjax.data.transforms.conversations.Conversation` with
        ``pad=False`` does.
      length: of a row, as the model sees it; it has one token more, which is only predicted.
      images: that a row has room for.
      open_rows: that wait for documents at once; more of them leave less padding.
      seed: of the order in which documents are packed, and of what transforms draw.
      padding: the token that fills rows up.
      field: of a document's tokens; ``per_token`` has one entry for each; ``images_field`` is a list, or is not there.
      sizes: a file that keeps what documents measure (``.npy``), made by the first run that needs it; empty: every run
        measures.
      max_bad_fraction: of the documents, that may be left out; 10 may be in any case.

    Raises (when made or on first use):
      UserError: numbers below their least, a transform of another kind, a source that decides its own order, sizes of
        other documents, or too many documents that are left out.
    """

    source: Source
    transforms: Mapping[str, Any]
    length: int
    images: int = 0
    open_rows: int = 256
    seed: int = 0
    padding: int = 0
    field: str = "tokens"
    per_token: tuple[str, ...] = ("weights",)
    images_field: str = "image"
    sizes: str = ""
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        for name, least in (("length", 1), ("images", 0), ("open_rows", 1)):
            if getattr(self, name) < least:
                raise UserError(f"PackedDocuments.{name} is {getattr(self, name)}; it is {least} or more.")
        for name, transform in self.transforms.items():
            if not isinstance(transform, (grain_transforms.Map, grain_transforms.RandomMap)):
                raise UserError(
                    f"PackedDocuments.transforms has {name!r}, a {type(transform).__name__}; it must be a grain Map or "
                    "RandomMap."
                )
        if list(cursors(self.source, 0)) != ["source"]:
            raise UserError(
                f"PackedDocuments was given a {type(self.source).__name__}, which decides its own order; pack its "
                "parts instead."
            )

    # --- the plan -------------------------------------------------------------------------------------------------

    def _open(self) -> _Plan:
        key = self.fingerprint()
        if key not in _PLANS:
            _PLANS[key] = self._planned()
        return _PLANS[key]

    def _planned(self) -> _Plan:
        sizes = self._kept_sizes() if self.sizes else self._measured()
        count, room = len(sizes), (self.length + 1, self.images)
        usable = (sizes[:, 0] > 0) & (sizes <= room).all(axis=1)
        left_out = count - int(usable.sum())
        if left_out > max(FEW_BAD, self.max_bad_fraction * count) or left_out == count:
            large = int(np.sum((sizes > room).any(axis=1)))
            raise UserError(
                f"{left_out} of {count} documents are left out, {large} of them as larger than a row of {room[0]} "
                f"tokens and {room[1]} pictures and the others as broken; PackedDocuments.max_bad_fraction="
                f"{self.max_bad_fraction:g} allows fewer."
            )
        shuffled = permute(np.arange(count), count, seed=self.seed, name="documents")
        order = shuffled[usable[shuffled]]
        rows = first_fit(sizes[order], room, self.open_rows)
        tokens = int(sizes[order, 0].sum())
        log.info(
            "Packed %d documents into %d rows of %d tokens: %.2f %% are no padding, %d documents were left out",
            len(order), len(rows), room[0], 100 * tokens / (len(rows) * room[0]), left_out,
        )  # fmt: skip
        starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return _Plan(order[np.concatenate([np.asarray(row, np.int64) for row in rows])], starts)

    def _measured(self) -> np.ndarray:
        """Tokens and pictures of every document, int32 [documents, 2]; 0 tokens where it is broken."""
        count, broken, told = len(self.source), 0, time.monotonic()
        sizes = np.zeros((count, 2), np.int32)
        for index in range(count):
            size = self._measure(index)
            if isinstance(size, str):
                broken += 1
                if broken <= NAMED_BAD:
                    log.warning("%s is left out (%s)", self.source.describe(index), size)
            else:
                sizes[index] = size
            if time.monotonic() - told > SECONDS:
                told = time.monotonic()
                log.info("Measured %d of %d documents", index + 1, count)
        return sizes

    def _measure(self, index: int) -> tuple[int, int] | str:
        """Tokens and pictures of one document, or what is wrong with it."""
        reading = True
        try:
            record = self.source[index]
            reading = False
            document = self._document(record, index)
        except Exception as error:
            if not (is_bad_data(error) or (reading and isinstance(error, UserError))):
                error.add_note(f"while making a document out of {self.source.describe(index)}")
                raise
            return " ".join(str(error).split()) or type(error).__name__
        return len(document[self.field]), len(listed(document.get(self.images_field)))

    def _kept_sizes(self) -> np.ndarray:
        """What documents measure, from its file, or measured and written there."""
        path, key = resolve_path(self.sizes), self._documents_fingerprint()
        if os.path.exists(path):
            with open(path, "rb") as file:
                try:
                    found, sizes = str(np.load(file)), np.load(file)
                except (ValueError, EOFError) as error:
                    raise UserError(
                        f"PackedDocuments.sizes is {path!r}, which holds no sizes: {error}"
                    ) from error
            if found != key:
                raise UserError(
                    f"PackedDocuments.sizes is {path!r}, which holds those of other documents; name another file, or "
                    "delete it."
                )
            return sizes
        sizes = self._measured()
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        part = f"{path}.{uuid.uuid4().hex}"  # whole or not at all, also when several processes measure
        with open(part, "wb") as written:
            np.save(written, np.asarray(key))
            np.save(written, sizes)
        os.replace(part, path)
        return sizes

    # --- rows -----------------------------------------------------------------------------------------------------

    def _document(self, record: Example, index: int) -> Example:
        """A record after all transforms; what they draw is a function of (seed, name, index)."""
        for name, transform in self.transforms.items():
            if isinstance(transform, grain_transforms.RandomMap):
                record = transform.random_map(record, generator(self.seed, name_key(name), index))
            else:
                record = transform.map(record)
        tokens = require(record, self.field, (list, np.ndarray))
        for name in self.per_token:
            entries = require(record, name, (list, np.ndarray))
            if len(entries) != len(tokens):
                raise UserError(
                    f"a document has {len(tokens)} {self.field!r} and {len(entries)} {name!r}; there is one per token"
                )
        return record

    def documents(self, row: SupportsIndex) -> list[int]:
        """Which records of the source this row is made of, in order."""
        order, starts = self._opened
        number = checked_index(row, len(self), self)
        return order[starts[number] : starts[number + 1]].tolist()

    def __len__(self) -> int:
        return len(self._opened.starts) - 1

    def __getitem__(self, index: SupportsIndex) -> Example:
        found = [self._document(self.source[number], number) for number in self.documents(index)]
        lengths = [len(document[self.field]) for document in found]
        used, room = sum(lengths), self.length + 1
        if used > room:
            raise BadExample(
                f"documents of {used} tokens in a row of {room}; they were shorter when measured"
            )
        row: Example = {}
        for name in (self.field, *self.per_token):
            entries = np.concatenate([document[name] for document in found])
            row[name] = np.full(room, self.padding if name == self.field else 0, entries.dtype)
            row[name][:used] = entries
        row["segment_ids"] = np.zeros(room, np.int32)
        row["segment_ids"][:used] = np.repeat(np.arange(1, len(found) + 1), lengths)
        if self.images:
            row[self.images_field] = [
                image for document in found for image in listed(document.get(self.images_field))
            ]
        return row

    def describe(self, index: int) -> str:
        return f"row {index} of {', '.join(map(self.source.describe, self.documents(index)))}"

    def _documents_fingerprint(self) -> str:
        """An id of all that the documents themselves depend on."""
        steps = [(name, settings(step)) for name, step in self.transforms.items()]
        fields = (self.seed, self.field, list(self.per_token), self.images_field)
        return digest("documents", self.source.fingerprint(), steps, fields)

    def fingerprint(self) -> str:
        numbers = (self.length, self.images, self.open_rows, self.padding, self.max_bad_fraction)
        return digest("PackedDocuments", self._documents_fingerprint(), numbers)

    def __getstate__(self) -> dict[str, Any]:
        held = self.__dict__.get(self._OPENED)  # the plan travels along: worker processes measure nothing
        return super().__getstate__() | ({"_planned_as": (self.fingerprint(), held[1])} if held else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        key, plan = state.pop("_planned_as", (None, None))
        if key is not None:
            _PLANS.setdefault(key, plan)
        super().__setstate__(state)


_PLANS: dict[str, _Plan] = {}
