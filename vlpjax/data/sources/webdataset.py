"""WebDataset tars with random access: an index of every member's place, made once and kept in a file.

A shard is an uncompressed tar in which ``a/0001.jpg``, ``a/0001.txt`` and ``a/0001.json`` are one sample
with the key ``a/0001``; everything after the first dot of the last path part is the member's kind.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import json
import os
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, Literal, NamedTuple, Self, SupportsIndex

import numpy as np

from vlpjax.data.paths import expand_files, resolve_path
from vlpjax.data.sources.base import Example, LazySource, checked_index, digest
from vlpjax.errors import UserError

_INDEX_FORMAT = 1
_KEPT_SHARDS = 256  # shards whose index and file stay open in a process
_GZIP_MAGIC = b"\x1f\x8b"
_CONVERTER = "data_pipelines/convert_webdataset.py"

Member = tuple[int, int]  # offset and size of the content in the tar, in bytes


class StrictTarInfo(tarfile.TarInfo):
    """Makes damage an error: ``tarfile`` alone takes a broken header for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except (tarfile.EOFHeaderError, tarfile.EmptyHeaderError):  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"bad member header at byte {tar.offset} ({error})") from error


def split_name(name: str) -> tuple[str, str]:
    """``a/0001.seg.png`` as the sample's key and the member's kind: ``("a/0001", "seg.png")``."""
    folder, _, last = name.rpartition("/")
    stem, _, kind = last.partition(".")
    return (f"{folder}/{stem}" if folder else stem), kind.lower()


def first_of(kinds: Sequence[str], members: dict[str, Any]) -> Any | None:
    """The sample's first member whose kind is listed."""
    return next((members[kind] for kind in kinds if kind in members), None)


def make_example(
    key: str, members: dict[str, bytes], image: Sequence[str], text: Sequence[str], json_kinds: Sequence[str]
) -> Example:
    """The example of one sample: ``key``, the fields of its JSON object, ``text`` and ``image``.

    Raises:
      UserError: if a wanted image or text is missing, a text is not UTF-8, or the JSON is no object.
    """
    example: Example = {}
    for kinds, field in ((json_kinds, None), (text, "text"), (image, "image")):
        content = first_of(kinds, members)
        if content is None:
            if kinds and field is not None:
                raise UserError(
                    f"Sample {key!r} has no {'/'.join(kinds)} member, only {', '.join(sorted(members))}."
                )
        elif field == "image":
            example["image"] = content
        elif field == "text":
            example["text"] = _as_text(key, content).strip()
        else:
            example |= _as_object(key, content)
    return example | {"key": key}


def _as_text(key: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"A text of sample {key!r} is not UTF-8 ({error.reason}); store texts as UTF-8."
        ) from error


def _as_object(key: str, content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(_as_text(key, content))
    except json.JSONDecodeError as error:
        raise UserError(f"The JSON of sample {key!r} cannot be read: {error}.") from error
    if not isinstance(value, dict):
        raise UserError(
            f"The JSON of sample {key!r} is a {type(value).__name__}; it must be an object of fields."
        )
    return value


class _Table(NamedTuple):
    """Where everything in a shard is: ``offsets[kind][i]`` belongs to ``keys[i]``; size -1 means absent."""

    keys: list[str]
    offsets: dict[str, np.ndarray]
    sizes: dict[str, np.ndarray]

    def members(self, sample: int) -> dict[str, Member]:
        return {
            kind: (int(self.offsets[kind][sample]), int(sizes[sample]))
            for kind, sizes in self.sizes.items()
            if sizes[sample] >= 0
        }


class _Shard:
    """An open tar and its table; the file is closed when the last thread that reads it lets go."""

    def __init__(self, path: str, table: _Table) -> None:
        self.path, self.table = path, table
        self.descriptor = os.open(path, os.O_RDONLY)

    def read(self, member: Member) -> bytes:
        offset, size = member
        content = os.pread(self.descriptor, size, offset)
        if len(content) != size:
            raise UserError(f"The tar {self.path!r} ends inside a member at byte {offset}; copy it again.")
        return content

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _Opened(NamedTuple):
    paths: tuple[str, ...]
    ends: tuple[int, ...]  # running total of the sample counts
    shard: Any  # number of a shard -> _Shard, the last ones kept


@dataclass(frozen=True)
class WebDataset(LazySource):
    """The samples of tar shards; ``tars`` are paths, globs or ``{000..015}`` forms.

    Of each sample the first member whose kind is in ``image`` becomes ``image`` (encoded bytes), the first
    of ``text`` becomes ``text``, the object in the first of ``json`` adds its fields, and ``key`` is the
    sample's key.  An empty tuple leaves that part out.

    The index of ``shard.tar`` is kept as ``shard.tar.index.json`` beside it, or in ``index_dir``; it is made
    again when the size or the time of the tar changes.

    Raises (on first use):
      UserError: if a shard is missing, compressed or damaged, the index cannot be written, or there are no
        samples.  A sample without image or text raises when it is read.
    """

    tars: str | Sequence[str]
    image: tuple[str, ...] = ("jpg", "jpeg", "png", "webp")
    text: tuple[str, ...] = ("txt",)
    json: tuple[str, ...] = ("json",)
    index_dir: str | None = None

    def _open(self) -> _Opened:
        paths = expand_files(self.tars, "tar")
        ends = tuple(itertools.accumulate(len(self._table(path).keys) for path in paths))
        if not ends[-1]:
            raise UserError(f"The tars {self.tars!r} hold no samples; check that they were written fully.")
        shard = functools.lru_cache(_KEPT_SHARDS)(
            lambda number: _Shard(paths[number], self._table(paths[number]))
        )
        return _Opened(paths, ends, shard)

    def _table(self, path: str) -> _Table:
        """The index of a shard: read if it fits the tar as it is now, otherwise made and written."""
        status = os.stat(path)
        stamp = {"format": _INDEX_FORMAT, "size": status.st_size, "mtime_ns": status.st_mtime_ns}
        folder = os.path.dirname(path) if self.index_dir is None else resolve_path(self.index_dir)
        index = os.path.join(folder, os.path.basename(path) + ".index.json")
        content = _read_index(index, stamp)
        if content is None:
            content = stamp | scan_tar(path)
            _write_index(index, content)
        arrays = [
            {kind: np.asarray(values, np.int64) for kind, values in content[name].items()}
            for name in ("offsets", "sizes")
        ]
        return _Table(content["keys"], *arrays)

    def _place(self, index: SupportsIndex) -> tuple[int, int]:
        ends = self._opened.ends
        number = checked_index(index, ends[-1], self)
        shard = bisect.bisect_right(ends, number)
        return shard, number - (ends[shard - 1] if shard else 0)

    def __len__(self) -> int:
        return self._opened.ends[-1]

    def __getitem__(self, index: SupportsIndex) -> Example:
        number, sample = self._place(index)
        shard = self._opened.shard(number)
        members = shard.table.members(sample)
        wanted = {*self.image, *self.text, *self.json}
        contents = {kind: shard.read(member) if kind in wanted else b"" for kind, member in members.items()}
        try:
            return make_example(shard.table.keys[sample], contents, self.image, self.text, self.json)
        except UserError as error:
            raise UserError(f"{self.describe(int(index))}: {error}") from error

    def describe(self, index: int) -> str:
        number, sample = self._place(index)
        return f"sample {self._opened.shard(number).table.keys[sample]!r} of {self._opened.paths[number]}"

    def fingerprint(self) -> str:
        paths, ends, _ = self._opened
        shards = [(os.path.basename(path), os.path.getsize(path)) for path in paths]
        return digest(
            "WebDataset", shards, ends, [list(kinds) for kinds in (self.image, self.text, self.json)]
        )


def scan_tar(path: str) -> dict[str, Any]:
    """Keys, offsets and sizes of all samples of a tar, from its headers alone.

    Raises:
      UserError: if the tar is compressed, damaged, or has two members of one name.
    """
    with open(path, "rb") as stream:
        if stream.read(2) == _GZIP_MAGIC:
            raise UserError(
                f"The tar {path!r} is gzip-compressed, which has no random access; unpack it with gunzip or"
                f" convert it with {_CONVERTER}."
            )
        stream.seek(0)
        samples: dict[str, dict[str, Member]] = {}
        try:
            for _, member in tar_members(stream, "r:"):
                key, kind = split_name(member.name)
                if kind in samples.setdefault(key, {}):
                    raise UserError(
                        f"The tar {path!r} has two members {member.name!r}; sample keys must differ."
                    )
                samples[key][kind] = (member.offset_data, member.size)
        except tarfile.TarError as error:
            raise UserError(f"The tar {path!r} is damaged: {error}; copy it again.") from error
    kinds = sorted({kind for members in samples.values() for kind in members})
    absent = (0, -1)
    columns = [
        {kind: [members.get(kind, absent)[place] for members in samples.values()] for kind in kinds}
        for place in (0, 1)
    ]
    return {"keys": list(samples), "offsets": columns[0], "sizes": columns[1]}


def tar_members(
    stream: IO[bytes], mode: Literal["r:", "r|*"]
) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The regular files of a tar that have a kind, none hidden; damage raises ``tarfile.TarError``."""
    with tarfile.open(fileobj=stream, mode=mode, tarinfo=StrictTarInfo) as tar:
        while (member := tar.next()) is not None:
            last_part = os.path.basename(member.name)
            if member.isreg() and not last_part.startswith(".") and "." in last_part:
                yield tar, member
            # tarfile remembers every header; the list of a long shard would grow without end.
            tar.members = []  # type: ignore[attr-defined]


def _read_index(index: str, stamp: dict[str, int]) -> dict[str, Any] | None:
    try:
        with open(index, encoding="utf-8") as stream:
            content = json.load(stream)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:  # a damaged index is only a cache: make it again
        return None
    return content if stamp.items() <= content.items() else None


def _write_index(index: str, content: dict[str, Any]) -> None:
    """Writes atomically, so that processes which start together never read half an index."""
    folder = os.path.dirname(index) or "."
    try:
        os.makedirs(folder, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=".index-")
        with open(descriptor, "w", encoding="utf-8") as stream:
            json.dump(content, stream, separators=(",", ":"))
        os.replace(temporary, index)
    except OSError as error:
        raise UserError(f"Cannot write {index!r} ({error.strerror}); give a writable index_dir.") from error
