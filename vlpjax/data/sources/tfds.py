"""TFDS data sets that were prepared in the ArrayRecord format, read without TensorFlow."""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, SupportsIndex

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from vlpjax.data.paths import resolve_path
from vlpjax.data.sources.base import Example, LazySource, checked_index, digest
from vlpjax.errors import UserError

# Features that are one value in the stored record.  TFDS' own decoding takes some 250 microseconds for a
# record of a dozen fields, most of it on building NumPy arrays of one element; taking the values directly
# takes 5.  Fields of any other kind go through TFDS.
_ONE_VALUE = (tfds.features.Scalar, tfds.features.Text, tfds.features.ClassLabel, tfds.features.Image)


class _Field(NamedTuple):
    stored_in: str  # which list of the record's proto
    convert: Callable[[Any], Any]


class _Opened(NamedTuple):
    records: Any  # random access to serialised records
    features: Any
    direct: dict[str, _Field]
    others: tuple[str, ...]
    instructions: tuple[Any, ...]  # the pieces of files that make up the split
    ends: tuple[int, ...]
    title: str


@dataclass(frozen=True)
class TFDS(LazySource):
    """A split of a TFDS data set, by its directory or by its name.

    ``TFDS("bundled:emoji1594/1.0.0", "noto+twemoji")`` reads a prepared directory;
    ``TFDS(name="coco_captions", data_dir="~/data", split="train[:90%]")`` one that TFDS finds.  Nothing is
    downloaded or prepared here.  Images stay encoded; byte strings become ``str`` except in ``bytes_fields``.

    Raises (on first use):
      UserError: if the data set or the split does not exist, or is not stored as ArrayRecord.
    """

    directory: str | None = None
    split: str = "train"
    name: str | None = None
    data_dir: str | None = None
    bytes_fields: tuple[str, ...] = ("image",)

    _survives_fork: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if (self.directory is None) == (self.name is None):
            raise UserError(
                f"TFDS was given directory={self.directory!r} and name={self.name!r};"
                " give exactly one of the two."
            )

    def _open(self) -> _Opened:
        builder = self._builder()
        images = {
            name: tfds.decode.SkipDecoding()
            for name, feature in builder.info.features.items()
            if isinstance(feature, tfds.features.Image)
        }
        if not builder.info.splits:
            raise UserError(
                f"{builder.data_dir} is not prepared; run 'tfds build --file_format=array_record' for it."
            )
        try:
            instructions = tuple(builder.info.splits[self.split].file_instructions)
            if not instructions:
                raise UserError(
                    f"The split {self.split!r} of {builder.data_dir} is empty; choose a larger part."
                )
            source = builder.as_data_source(self.split, decoders=images)
        except NotImplementedError as error:
            stored = builder.info.file_format
            raise UserError(
                f"{builder.data_dir} is stored as {stored.value if stored else 'nothing'}, which has no"
                " random access; prepare it with file_format='array_record'."
            ) from error
        except UserError:
            raise
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{builder.data_dir} has no split {self.split!r};"
                f" its splits are {', '.join(sorted(builder.info.splits))}."
            ) from error
        features = sorted(builder.info.features.items())  # TFDS' own order differs between processes
        direct = {name: field for name, feature in features if (field := self._field(name, feature))}
        others = tuple(name for name, _ in features if name not in direct)
        ends = tuple(itertools.accumulate(piece.take for piece in instructions))
        title = f"{builder.info.name} {builder.info.version}"
        return _Opened(source, builder.info.features, direct, others, instructions, ends, title)

    def _builder(self) -> Any:
        if self.directory is not None:
            directory = resolve_path(self.directory)
            if "://" not in directory and not os.path.isfile(os.path.join(directory, "dataset_info.json")):
                what = "has no dataset_info.json" if os.path.isdir(directory) else "does not exist"
                raise UserError(
                    f"The TFDS directory {directory!r} {what}; give the folder of one prepared version."
                )
            return tfds.builder_from_directory(directory)
        data_dir = None if self.data_dir is None else resolve_path(self.data_dir)
        try:
            return tfds.builder(self.name, data_dir=data_dir, file_format="array_record")
        except (tfds.core.registered.DatasetNotFoundError, AssertionError, ValueError) as error:
            raise UserError(
                f"TFDS finds no data set {self.name!r} in {data_dir or 'its default folder'};"
                " check the name, or give the prepared directory."
            ) from error

    def _field(self, name: str, feature: Any) -> _Field | None:
        """How to take a field straight from the record, or None if TFDS has to decode it."""
        if type(feature) not in _ONE_VALUE and not (
            type(feature) is tfds.features.Tensor and feature.shape == ()
        ):
            return None
        kind = np.dtype(feature.np_dtype)
        if isinstance(feature, tfds.features.Image) or (kind.kind in "OSU" and name in self.bytes_fields):
            return _Field("bytes_list", bytes)
        if kind.kind in "OSU":
            return _Field("bytes_list", bytes.decode)
        if kind.kind == "f":
            return _Field("float_list", float)
        return _Field("int64_list", bool if kind.kind == "b" else int)

    def __len__(self) -> int:
        return self._opened.ends[-1]

    def __getitem__(self, index: SupportsIndex) -> Example:
        opened = self._opened
        number = checked_index(index, opened.ends[-1], self)
        try:
            record = opened.records.data_source[number]
            stored = tf_example_pb2.Example.FromString(record).features.feature
            example = {
                name: field.convert(getattr(stored[name], field.stored_in).value[0])
                for name, field in opened.direct.items()
            }
            if opened.others:
                decoded = opened.features.deserialize_example_np(record, decoders=opened.records.decoders)
                example |= {name: self._plain(name, decoded[name]) for name in opened.others}
        except UnicodeDecodeError as error:
            raise UserError(
                f"A field of {self.describe(number)} is not text ({error.reason}); name it in bytes_fields."
            ) from error
        except (IndexError, RuntimeError, ValueError) as error:
            raise UserError(
                f"Cannot read {self.describe(number)}: {error}; prepare the data set again."
            ) from error
        return example

    def _plain(self, name: str, value: Any) -> Any:
        """What TFDS decoded, with byte strings as text inside lists and dicts."""
        if isinstance(value, bytes):
            return value if name in self.bytes_fields else value.decode()
        if isinstance(value, dict):
            return {key: self._plain(name, item) for key, item in value.items()}
        if isinstance(value, list) or (isinstance(value, np.ndarray) and value.dtype == object):
            return [self._plain(name, item) for item in value]
        return value

    def describe(self, index: int) -> str:
        opened = self._opened
        number = checked_index(index, opened.ends[-1], self)
        piece = bisect.bisect_right(opened.ends, number)
        instruction = opened.instructions[piece]
        inside = instruction.skip + number - (opened.ends[piece - 1] if piece else 0)
        return f"{opened.title} {self.split}[{number}] (record {inside} of {instruction.filename})"

    def fingerprint(self) -> str:
        opened = self._opened
        pieces = [
            (os.path.basename(piece.filename), piece.skip, piece.take, piece.examples_in_shard)
            for piece in opened.instructions
        ]
        return digest("TFDS", opened.title, pieces)
