"""Converts WebDataset tars, or a folder of captioned images, to ArrayRecord shards, with Apache Beam.

On this machine, with Beam's local runner:

    python -m data_pipelines.convert_webdataset --tars='/data/cc3m-{00000..00331}.tar' \\
        --output=/data/cc3m --name=cc3m --shards=64

On a cluster the same command takes Beam's own options, for example ``--runner=DataflowRunner
--project=... --temp_location=gs://...`` (``FlinkRunner`` and ``SparkRunner`` likewise); inputs and output
may then be any file system that Beam knows, and the workers need this package (``--setup_file=./setup.py``).
Compressed tars are read too.

Records land in the shard that a hash of their key names, sorted by key, so the same input always gives the
same bytes.  A shard appears under its name only when it is complete.  ``NAME.summary.json`` beside the
shards counts the records that were written and, by reason, those that were left out.  A worker holds one
shard in memory: choose ``--shards`` so that a shard is a few hundred megabytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from array_record.python import array_record_module
from PIL import Image

from vlpjax.data.paths import expand_braces, resolve_path
from vlpjax.data.sources import ImageFolder, pack_record
from vlpjax.data.sources.array_records import WRITER_OPTIONS
from vlpjax.data.sources.webdataset import make_example, split_name, tar_members
from vlpjax.errors import UserError

IMAGE_KINDS = ("jpg", "jpeg", "png", "webp")
TEXT_KINDS = ("txt",)
JSON_KINDS = ("json",)
_COUNTERS = "convert_webdataset"
_FOLDER_SLICE = 1000  # images of a folder that one work item covers


class Converted(NamedTuple):
    """One input record: ``record`` is what to store, or None for a bad one, of which ``reason`` says why."""

    key: str
    record: bytes | None
    reason: str = ""


def convert_tar(path: str) -> Iterator[Converted]:
    """The samples of one tar; a tar that breaks off gives what came before the damage, and one bad record."""
    # Imported on the worker that runs this: the program must be able to say that Beam is missing.
    from apache_beam.io.filesystem import CompressionTypes
    from apache_beam.io.filesystems import FileSystems

    prefix = os.path.basename(path).split(".")[0]
    with FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as stream:
        try:
            for key, members in _samples(stream):
                yield _convert(f"{prefix}/{key}", members)
        except (tarfile.TarError, EOFError, OSError) as error:
            yield Converted(prefix, None, f"damaged tar: {type(error).__name__}")


def _samples(stream: Any) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of each sample; WebDataset keeps a sample's members next to each other."""
    current: str | None = None
    members: dict[str, bytes] = {}
    for tar, member in tar_members(stream, "r|*"):
        key, kind = split_name(member.name)
        if current is not None and key != current:
            yield current, members
            members = {}
        current = key
        content = tar.extractfile(member)
        members[kind] = content.read() if content is not None else b""
    if current is not None:
        yield current, members


def _convert(key: str, members: dict[str, bytes]) -> Converted:
    for kinds, missing in ((IMAGE_KINDS, "no image"), (TEXT_KINDS, "no text")):
        if not any(kind in members for kind in kinds):
            return Converted(key, None, missing)
    try:
        example = make_example(key, members, IMAGE_KINDS, TEXT_KINDS, JSON_KINDS) | {"key": key}
        return _checked(key, example)
    except UserError:
        return Converted(key, None, "unreadable text or JSON")


def convert_folder(folder: ImageFolder, begin: int, end: int) -> Iterator[Converted]:
    """The images ``begin`` to ``end`` of a folder of captioned images."""
    for index in range(begin, end):
        key = f"{index:09d}"
        try:
            yield _checked(key, folder[index] | {"key": key})
        except UserError:
            yield Converted(key, None, "unreadable file")


def _checked(key: str, example: dict[str, Any]) -> Converted:
    """Packs the example if its image has a header that Pillow understands."""
    try:
        with Image.open(io.BytesIO(example["image"])):
            return Converted(key, pack_record(example))
    except (OSError, Image.DecompressionBombError):  # Pillow's "cannot identify" is an OSError
        return Converted(key, None, "unreadable image")


def shard_of(key: str, shards: int) -> int:
    """The shard of a record: a hash of its key, equal on every machine."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") % shards


def shard_path(output: str, name: str, shard: int, shards: int) -> str:
    return f"{output.rstrip('/')}/{name}.array_record-{shard:05d}-of-{shards:05d}"


def write_shard(path: str, records: Iterable[bytes]) -> int:
    """Writes an ArrayRecord file that appears under ``path`` only when complete; returns its record count."""
    from apache_beam.io.filesystems import FileSystems

    unfinished = f"{path}.{uuid.uuid4().hex}.unfinished"  # retried work items must not share a file
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        # ArrayRecord writes local files only; Beam then copies to whatever file system the output is on.
        local = os.path.join(folder, "shard")
        writer = array_record_module.ArrayRecordWriter(local, WRITER_OPTIONS)
        for record in records:
            writer.write(record)
            count += 1
        writer.close()
        with (
            open(local, "rb") as source,
            FileSystems.create(unfinished, "application/octet-stream") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
    if FileSystems.exists(path):
        FileSystems.delete([path])
    FileSystems.rename([unfinished], [path])
    return count


def _import_beam() -> Any:
    try:
        import apache_beam
    except ImportError as error:
        raise UserError(
            "This program needs Apache Beam, which is not installed; run: pip install 'vlpjax[beam]'"
        ) from error
    return apache_beam


def _count(converted: Converted) -> Iterator[tuple[str, bytes]]:
    """Counts the record, good or bad, and passes the good ones on."""
    from apache_beam.metrics import Metrics

    if converted.record is None:
        Metrics.counter(_COUNTERS, "bad").inc()
        Metrics.counter(_COUNTERS, f"bad: {converted.reason}").inc()
        return
    Metrics.counter(_COUNTERS, "good").inc()
    yield converted.key, converted.record


def _work_items(args: argparse.Namespace) -> list[tuple[Any, ...]]:
    """The arguments of ``_read``: one tar, or one slice of the folder, each."""
    if args.tars is not None:
        from apache_beam.io.filesystems import FileSystems

        written = [name for pattern in args.tars.split() for name in expand_braces(resolve_path(pattern))]
        # Beam finds nothing for a local pattern that names no folder.
        patterns = [name if "://" in name else os.path.abspath(name) for name in written]
        items = []
        for pattern, match in zip(patterns, FileSystems.match(patterns), strict=True):
            found = sorted(metadata.path for metadata in match.metadata_list)
            if not found:
                raise UserError(f"No tar {pattern!r} exists; give --tars the paths of existing files.")
            items += [(path,) for path in found]
        names = [os.path.basename(path).split(".")[0] for (path,) in items]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise UserError(
                f"Several tars are named {min(repeated)!r}; names must differ, because keys begin with them."
            )
        return items
    folder = ImageFolder(args.folder, captions=args.captions)
    return [(folder, i, min(i + _FOLDER_SLICE, len(folder))) for i in range(0, len(folder), _FOLDER_SLICE)]


def _read(item: tuple[Any, ...]) -> Iterator[Converted]:
    return convert_tar(*item) if len(item) == 1 else convert_folder(*item)


def _write(
    shard_and_records: tuple[int, Iterable[tuple[str, bytes]]], output: str, name: str, shards: int
) -> int:
    shard, keyed = shard_and_records
    records = [record for key, record in sorted(keyed) if key]
    return write_shard(shard_path(output, name, shard, shards), records)


def convert(args: argparse.Namespace, beam_arguments: Sequence[str]) -> dict[str, Any]:
    """Runs the pipeline, writes the summary beside the shards, and returns it."""
    beam = _import_beam()
    from apache_beam.io.filesystems import FileSystems
    from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions

    options = PipelineOptions(list(beam_arguments))
    options.view_as(SetupOptions).save_main_session = True  # workers import this file by its contents
    output, shards = resolve_path(args.output), args.shards
    items = _work_items(args)
    if not FileSystems.exists(output):
        FileSystems.mkdirs(output)
    pipeline = beam.Pipeline(options=options)
    # An empty record per shard makes every shard exist, also one that no key falls into.
    every_shard = pipeline | "ListShards" >> beam.Create([(shard, ("", b"")) for shard in range(shards)])
    records = (
        pipeline
        | "ListInputs" >> beam.Create(items)
        | "SpreadInputs" >> beam.Reshuffle()
        | "Read" >> beam.FlatMap(_read)
        | "Count" >> beam.FlatMap(_count)
        | "ChooseShard" >> beam.Map(lambda keyed: (shard_of(keyed[0], shards), keyed))
    )
    _ = (
        (every_shard, records)
        | "Merge" >> beam.Flatten()
        | "GroupByShard" >> beam.GroupByKey()
        | "Write" >> beam.Map(_write, output=output, name=args.name, shards=shards)
    )
    result = pipeline.run()
    result.wait_until_finish()
    summary = {"name": args.name, "shards": shards, "inputs": len(items)} | _counts(result)
    with FileSystems.create(f"{output.rstrip('/')}/{args.name}.summary.json", "application/json") as stream:
        stream.write((json.dumps(summary, indent=2) + "\n").encode())
    return summary


def _counts(result: Any) -> dict[str, Any]:
    """The pipeline's counters: good, bad, and bad by reason."""
    found = result.metrics().query()["counters"]
    counts = {c.key.metric.name: c.result for c in found if c.key.metric.namespace == _COUNTERS}
    reasons = {
        name.removeprefix("bad: "): n for name, n in sorted(counts.items()) if name.startswith("bad: ")
    }
    return {"good": counts.get("good", 0), "bad": counts.get("bad", 0), "bad_by_reason": reasons}


def parse_arguments(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """This program's arguments, and the rest, which are Beam's."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--tars", help="WebDataset tars: paths, globs or {000..015} forms, separated by spaces"
    )
    source.add_argument("--folder", help="a folder of captioned images")
    parser.add_argument(
        "--captions", default="captions.csv", help="where the folder's captions are (see ImageFolder)"
    )
    parser.add_argument("--output", required=True, help="the folder that receives the shards")
    parser.add_argument("--name", required=True, help="the first part of the shards' names")
    parser.add_argument("--shards", type=int, default=16, help="how many files to write (default: 16)")
    args, beam_arguments = parser.parse_known_args(arguments)
    if args.shards < 1:
        parser.error(f"--shards is {args.shards}; it must be at least 1")
    return args, beam_arguments


def main(arguments: Sequence[str] | None = None) -> int:
    args, beam_arguments = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        summary = convert(args, beam_arguments)
    except UserError as error:
        print(f"convert_webdataset: {error}", file=sys.stderr)
        return 1
    print(json.dumps(summary, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
