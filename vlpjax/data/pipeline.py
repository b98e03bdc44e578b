"""The input pipeline: batch s is a pure function of (settings, s).

Row r of step s has the stream position ``s * batch_size + r``.  The position decides which example is read
(`vlpjax.data.sources.order`), and together with the seed and a transform's name all that the transform draws.
No state is carried from batch to batch.  So a run resumes by starting at another step, a host can make its own
rows only, and however many processes, threads and hosts there are, the same step has the same batch.

`Pipeline.batch` computes rows directly.  `Pipeline.batches` runs the same function through Grain, ahead of its
use, in threads or in worker processes: the elements of the Grain data set are chunks of rows, small enough
that many workers share one batch.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import grain
import numpy as np
from absl import flags
from grain import transforms as grain_transforms
from PIL import Image

from vlpjax.data.bad import Replacement, is_bad_data
from vlpjax.data.sources import order
from vlpjax.errors import UserError

log = logging.getLogger("vlpjax.data")

Arrays = dict[str, np.ndarray]
# Rows that one Grain element holds at most: a unit of work, and of waiting for the first batch.
CHUNK_ROWS = 64
# Length of a Grain data set that stands for an endless stream.
ENDLESS = 1 << 40
RESERVED = ("index", "valid")


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Examples of `source`, passed through `transforms` in order, in batches.

    A batch is a dict of arrays with the leading dimension `batch_size`: all fields that are numbers or numeric
    arrays after the transforms (64-bit values become 32-bit, images uint8), plus "index", int32 [batch]: the
    example's index in the source.  Texts and bytes are dropped.  With ``repeat=False`` the batches cover the
    source once; the last one is filled up with copies of the last example, and "valid", bool [batch], is False
    for these and for stand-ins of bad examples.

    An example that cannot be read or transformed (see `vlpjax.data.bad`) is replaced by the next good one of
    its own source, which keeps the batch a pure function.

    Attributes:
      source: anything with ``len``, ``[i]``, ``describe(i)`` and ``fingerprint()``; see `vlpjax.data.sources`.
      transforms: name -> transform (`grain.transforms.Map` or `RandomMap`).  The names seed the transforms:
        adding one or moving one does not change what the others draw.
      batch_size: rows of the global batch.
      shuffle: a new order in every epoch; otherwise the source's own.
      repeat: an endless stream for training, or one pass for evaluation.
      seed: of order and transforms.
      keep: the fields that batches have, besides "index" and "valid"; all numeric ones if None.
      workers: processes that make batches; 0 makes them in threads of this process.
      threads: threads per process that read and transform.
      prefetch: batches that are made ahead.
      max_bad_fraction: fraction of the drawn examples that may be bad before the stream ends with an error.
      min_bad_count: this many bad examples are accepted in any case.
      max_probes: how many records after a bad one are tried.
    """

    source: Any
    transforms: Mapping[str, Any]
    batch_size: int
    shuffle: bool = True
    repeat: bool = True
    seed: int = 0
    keep: tuple[str, ...] | None = None
    workers: int = 0
    threads: int = 2
    prefetch: int = 4
    max_bad_fraction: float = 0.01
    min_bad_count: int = 10
    max_probes: int = 16

    def __post_init__(self) -> None:
        for name, least in (
            ("batch_size", 1),
            ("workers", 0),
            ("threads", 1),
            ("prefetch", 1),
            ("max_probes", 0),
        ):
            if getattr(self, name) < least:
                raise UserError(f"Pipeline.{name} is {getattr(self, name)}; it is {least} or more")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError(f"Pipeline.max_bad_fraction is {self.max_bad_fraction}; it is between 0 and 1")
        for name, transform in self.transforms.items():
            if not isinstance(transform, (grain_transforms.Map, grain_transforms.RandomMap)):
                raise UserError(
                    f"transform {name!r} is a {type(transform).__name__}; it must be a grain Map or RandomMap"
                )

    # --- size -------------------------------------------------------------------------------------------------

    @functools.cached_property
    def num_examples(self) -> int:
        """Number of examples of the source; raises `UserError` if it is empty."""
        count = len(self.source)
        if not count:
            raise UserError(f"the source {type(self.source).__name__} has no examples")
        return count

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which as many examples are drawn as the source has; not a whole number in general."""
        return self.num_examples / self.batch_size

    @property
    def num_batches(self) -> int | None:
        """Batches of one pass, the last one padded; None if the stream is endless."""
        return None if self.repeat else -(-self.num_examples // self.batch_size)

    # --- batches ----------------------------------------------------------------------------------------------

    def batch(self, step: int, rows: Sequence[int] | None = None) -> Arrays:
        """The batch of `step`, or its `rows` only: nothing else is read.  A pure function."""
        arrays, replaced = self.batch_and_report(step, rows)
        self._reporter.report(replaced)
        return arrays

    def batch_and_report(
        self, step: int, rows: Sequence[int] | None = None
    ) -> tuple[Arrays, list[Replacement]]:
        """Like `batch`, with the examples that were replaced."""
        if step < 0 or (self.num_batches is not None and step >= self.num_batches):
            raise UserError(
                f"there is no batch {step}; the batches are 0 to {(self.num_batches or ENDLESS) - 1}"
            )
        rows = range(self.batch_size) if rows is None else rows
        gathered = _Gather(len(rows))
        replaced: list[Replacement] = []
        last: tuple[int, Arrays] | None = None
        for row in rows:
            if not 0 <= row < self.batch_size:
                raise UserError(f"row {row} is outside the batch of {self.batch_size} rows")
            position = step * self.batch_size + int(row)
            padding = not self.repeat and position >= self.num_examples
            position = self.num_examples - 1 if padding else position
            if last is None or last[0] != position:
                values, bad = self._example(position)
                replaced += bad
                last = position, values
            values = last[1]
            gathered.add({**values, "valid": False} if padding else values)
        return gathered.arrays, replaced

    def batches(
        self, start_step: int = 0, rows: Sequence[int] | None = None, stop: int | None = None
    ) -> BatchStream:
        """Iterator over the batches from `start_step` to before `stop`, made ahead in threads or processes."""
        return BatchStream(self, start_step, rows, stop)

    @functools.cached_property
    def _reporter(self) -> _Reporter:
        return _Reporter()

    def __getstate__(self) -> dict[str, Any]:  # caches and logs stay in their process
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    # --- one example ------------------------------------------------------------------------------------------

    def _example(self, position: int) -> tuple[dict[str, Any], list[Replacement]]:
        """Fields of the batch for one position of the stream, and the replacement that was made, if any."""
        drawn, _ = order.draw(self.source, position, self.seed, self.shuffle)
        index, first_error = drawn, None
        for _ in range(self.max_probes + 1):
            reading = True
            try:
                example = self.source[index]
                reading = False
                example = self._transformed(example, position)
            except Exception as error:
                if not (is_bad_data(error) or (reading and isinstance(error, UserError))):
                    error.add_note(f"while making an example out of {_describe(self.source, index)}")
                    raise
                first_error = first_error or error
                index = _next_of_same_source(self.source, index)
                if index == drawn:
                    break
                continue
            values = self._numeric(example)
            values["index"] = index
            if not self.repeat:
                values["valid"] = first_error is None
            if first_error is None:
                return values, []
            reason = _reason(first_error)
            return values, [Replacement(position, _describe(self.source, drawn), drawn, index, reason)]
        assert first_error is not None
        raise UserError(
            f"{_describe(self.source, drawn)} cannot be used ({_reason(first_error)}), and neither can the records "
            f"after it (max_probes={self.max_probes})"
        ) from first_error

    def _transformed(self, example: dict[str, Any], position: int) -> dict[str, Any]:
        for transform, key in self._chain:
            drawn = () if key is None else (generator(self.seed, key, position),)
            example = transform(example, *drawn)
        return example

    @functools.cached_property
    def _chain(self) -> list[tuple[Callable[..., dict[str, Any]], int | None]]:
        return [
            (transform.random_map, name_key(name))
            if isinstance(transform, grain_transforms.RandomMap)
            else (transform.map, None)
            for name, transform in self.transforms.items()
        ]

    def _numeric(self, example: dict[str, Any]) -> dict[str, Any]:
        """The fields of `example` that go into batches, images as arrays."""
        values = {}
        for name in example if self.keep is None else self.keep:
            if name not in example:
                raise UserError(
                    f"Pipeline.keep names {name!r}, but examples have {', '.join(map(repr, example))}"
                )
            value = example[name]
            if isinstance(value, Image.Image):
                value = np.asarray(value)
            if isinstance(value, (bool, int, float, np.number, np.bool_)) or (
                isinstance(value, np.ndarray) and value.dtype.kind in "biuf"
            ):
                if name in RESERVED:
                    raise UserError(
                        f"an example has the field {name!r}, which batches use themselves; rename or drop it"
                    )
                values[name] = value
            elif self.keep is not None:
                raise UserError(
                    f"Pipeline.keep names {name!r}, which is of type {type(value).__name__}; batches hold numbers only"
                )
        return values

    # --- the data record of a checkpoint ----------------------------------------------------------------------

    def data_state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps of the data: a JSON-like record of where the stream is before `step`."""
        position = step * self.batch_size
        parts = self._identity()
        return {
            "step": step,
            "position": position,
            "epoch": position // self.num_examples,
            "seed": self.seed,
            "cursors": order.cursors(self.source, position),
            "parts": parts,
            "fingerprint": _digest(parts),
        }

    def check_state(self, record: Mapping[str, Any]) -> None:
        """Raises `UserError`, naming what differs, if `record` was made by a pipeline with another stream."""
        ours = self._identity()
        if record.get("fingerprint") == _digest(ours):
            return
        theirs = record.get("parts", {})
        changed = [_difference(name, theirs.get(name), ours.get(name)) for name in {**theirs, **ours}]
        named = "; ".join(filter(None, changed)) or "its record is damaged"
        raise UserError(
            f"the checkpoint was made with other data: {named}; resume with the settings it was made with"
        )

    def _identity(self) -> dict[str, Any]:
        """All that the content of the stream depends on; how it is computed (workers, threads) is left out."""
        parts: dict[str, Any] = {
            name: getattr(self, name) for name in ("batch_size", "shuffle", "repeat", "seed", "max_probes")
        }
        parts["keep"] = None if self.keep is None else list(self.keep)
        parts["source"] = self.source.fingerprint()
        parts["order of transforms"] = list(self.transforms)
        for name, transform in self.transforms.items():
            parts[f"transform {name}"] = json.dumps(settings(transform), sort_keys=True)
        return parts


def _difference(name: str, theirs: Any, ours: Any) -> str:
    if theirs == ours:
        return ""
    if theirs is None or ours is None:
        return f"{name} is {'new' if theirs is None else 'gone'}"
    return f"{name} was {_short(theirs)} and is {_short(ours)}"


def _short(value: Any, length: int = 160) -> str:
    text = str(value)
    return text if len(text) <= length else text[: length - 3] + "..."


def settings(value: Any) -> Any:
    """JSON-like description of a configurable object that is the same in every process and on every machine."""
    if hasattr(value, "fingerprint"):
        kind = type(value)
        return {"type": f"{kind.__module__}:{kind.__qualname__}", "fingerprint": value.fingerprint()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: settings(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": f"{type(value).__module__}:{type(value).__qualname__}", **fields}
    if isinstance(value, Mapping):
        return {str(key): settings(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [settings(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return {
        "type": f"{type(value).__module__}:{type(value).__qualname__}"
    }  # a user's transform, no dataclass


def _digest(parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=12).hexdigest()


# --- randomness ---------------------------------------------------------------------------------------------------


def name_key(name: str) -> int:
    """A number for a transform's name, the same in every process (Python's `hash` is not)."""
    return zlib.crc32(name.encode())


class _Reusable(threading.local):
    """One generator per thread that is set to a new place for every use: 1.3 us, against 11 us for a new one."""

    def __init__(self) -> None:
        self.bits = np.random.Philox(key=np.zeros(2, np.uint64))
        self.generator = np.random.Generator(self.bits)
        self.state = self.bits.state
        self.key, self.counter = self.state["state"]["key"], self.state["state"]["counter"]


_reusable = _Reusable()


def generator(seed: int, key: int, position: int) -> np.random.Generator:
    """Generator of (seed, transform, position), valid until the same thread asks for the next one.

    Philox is counter-based (Salmon et al. 2011): seed and transform are its key, the position is the second
    word of its counter, so each example has a stream of 2**64 blocks that overlaps with no other.
    """
    reusable = _reusable
    # Element by element, which NumPy does faster than from a tuple; the rest of the state stays at its beginning.
    reusable.key[0] = seed & 0xFFFFFFFFFFFFFFFF
    reusable.key[1] = key
    reusable.counter[1] = position
    reusable.bits.state = reusable.state
    return reusable.generator


# --- assembling rows ----------------------------------------------------------------------------------------------


class _Gather:
    """Writes examples into the rows of arrays that are made when the first one shows their shapes."""

    def __init__(self, count: int):
        self.count = count
        self.filled = 0
        self.arrays: Arrays = {}

    def add(self, values: Mapping[str, Any]) -> None:
        if not self.filled:
            for name, value in values.items():
                self.arrays[name] = np.empty((self.count, *np.shape(value)), _device_type(value))
        if values.keys() != self.arrays.keys():
            odd = min(values.keys() ^ self.arrays.keys())
            raise UserError(
                f"field {odd!r} is in some examples and not in others; use Keep, or Pipeline.keep"
            )
        for name, array in self.arrays.items():
            value = values[name]
            # A number is not asked for its shape, which would cost more than to store it.
            shape = value.shape if isinstance(value, np.ndarray) else ()
            if shape != array.shape[1:]:
                raise UserError(
                    f"field {name!r} has the shape {shape} in one example and {array.shape[1:]} in another; "
                    "a transform must bring all to one shape"
                )
            try:
                array[self.filled] = value
            except OverflowError:
                raise UserError(
                    f"field {name!r} has the value {value}, which does not fit {array.dtype}"
                ) from None
        self.filled += 1


def _device_type(value: Any) -> np.dtype:
    """The type on devices: 64-bit numbers become 32-bit, all else stays."""
    if isinstance(value, (bool, np.bool_)):
        return np.dtype(np.bool_)
    dtype = getattr(value, "dtype", np.dtype(np.int64 if isinstance(value, int) else np.float64))
    return np.dtype({"i8": np.int32, "u8": np.uint32, "f8": np.float32}.get(dtype.str[1:], dtype))


def _describe(source: Any, index: int) -> str:
    return source.describe(index) if hasattr(source, "describe") else f"{type(source).__name__}[{index}]"


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _next_of_same_source(source: Any, index: int) -> int:
    """The index after `index`, staying within the same part of a mixture or concatenation."""
    if hasattr(source, "part_of"):
        part, inside = source.part_of(index)
        return source.index_of(part, _next_of_same_source(source.sources[part], inside))
    return (index + 1) % len(source)


# --- the stream ---------------------------------------------------------------------------------------------------


class _Reporter:
    """Logs each bad record once, counts, and ends the stream when there are too many."""

    def __init__(self) -> None:
        self.drawn = 0
        self.replaced = 0
        self.first: dict[int, Replacement] = {}

    def report(self, replaced: Sequence[Replacement]) -> None:
        for replacement in replaced:
            if replacement.drawn not in self.first:
                self.first[replacement.drawn] = replacement
                log.warning("%s", replacement)

    def count(self, drawn: int, replaced: Sequence[Replacement], pipeline: Pipeline) -> None:
        """Adds to the totals; raises `UserError` if the budget of bad examples is exceeded."""
        self.report(replaced)
        self.drawn += drawn
        self.replaced += len(replaced)
        if self.replaced > max(pipeline.min_bad_count, pipeline.max_bad_fraction * self.drawn):
            few = "; ".join(f"{bad.source}: {bad.reason}" for bad in list(self.first.values())[:3])
            raise UserError(
                f"{self.replaced} of {self.drawn} examples could not be used, more than max_bad_fraction="
                f"{pipeline.max_bad_fraction:g} (and min_bad_count={pipeline.min_bad_count}) allows, such as {few}"
            )


class BatchStream(Iterator[Arrays]):
    """Batches of consecutive steps, made ahead through Grain.

    Attributes:
      step: the step of the batch that ``next`` will return.
      last_replaced: the bad examples of the batch that was returned last.
      replaced: their number since the stream began.
    """

    def __init__(self, pipeline: Pipeline, start_step: int, rows: Sequence[int] | None, stop: int | None):
        self.pipeline = pipeline
        self.step = start_step
        self.last_replaced: tuple[Replacement, ...] = ()
        len(pipeline.source)  # opened here: what it finds out then travels to the worker processes
        self._stop = _last_step(pipeline, stop)
        self._reporter = _Reporter()
        rows = list(range(pipeline.batch_size)) if rows is None else [int(row) for row in rows]
        self._rows = len(rows)
        self._chunks = max(1, -(-len(rows) // CHUNK_ROWS))
        chunks = [part.tolist() for part in np.array_split(np.asarray(rows, np.int64), self._chunks)]
        self._elements = iter(_grain_dataset(pipeline, start_step, self._stop, chunks))

    @property
    def replaced(self) -> int:
        return self._reporter.replaced

    def __next__(self) -> Arrays:
        if self.step >= self._stop:
            self.close()
            raise StopIteration
        parts = [next(self._elements) for _ in range(self._chunks)]
        for part in parts:
            if "error" in part:
                self.close()
                raise UserError(part["error"])
        self.last_replaced = tuple(
            Replacement(*bad) for part in parts for bad in json.loads(part["replaced"])
        )
        self.step += 1
        self._reporter.count(self._rows, self.last_replaced, self.pipeline)
        return _joined([part["arrays"] for part in parts])

    def close(self) -> None:
        """Ends the threads or processes; the stream can be closed more than once."""
        self._elements.close()
        self._stop = self.step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _last_step(pipeline: Pipeline, stop: int | None) -> int:
    last = pipeline.num_batches
    if last is None:
        return ENDLESS if stop is None else stop
    return last if stop is None else min(stop, last)


def _joined(parts: list[Arrays]) -> Arrays:
    if len(parts) == 1:
        return parts[0]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _grain_dataset(pipeline: Pipeline, start: int, stop: int, chunks: list[list[int]]) -> grain.IterDataset:
    """Elements: chunk after chunk of batch after batch, so element e belongs to step ``start + e // chunks``."""
    elements = max(0, stop - start) * len(chunks)
    ahead = pipeline.prefetch * len(chunks)
    dataset = grain.MapDataset.range(elements).map(_Assemble(pipeline, start, chunks))
    if not pipeline.workers:
        options = grain.ReadOptions(
            num_threads=pipeline.threads, prefetch_buffer_size=max(ahead, pipeline.threads)
        )
        return dataset.to_iter_dataset(options)
    if (
        not flags.FLAGS.is_parsed()
    ):  # Grain asks absl's flags, which only absl programs parse; defaults will do
        flags.FLAGS.mark_as_parsed()
    # One thread works in the process itself; more of them hide the waiting for slow storage.
    threads = pipeline.threads if pipeline.threads > 1 else 0
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    processes = grain.multiprocessing.MultiprocessingOptions(
        num_workers=pipeline.workers, per_worker_buffer_size=max(1, -(-ahead // pipeline.workers))
    )
    return dataset.to_iter_dataset(options).mp_prefetch(processes, _keep_off_devices)


class _Assemble:
    """Makes one element: the rows of one chunk, with the report on bad examples as text.

    A `UserError` is handed over as an element, so that it reaches the user as the sentence that it is, without
    the worker's traceback.
    """

    def __init__(self, pipeline: Pipeline, start: int, chunks: list[list[int]]):
        self.pipeline, self.start, self.chunks = pipeline, start, chunks

    def __call__(self, element: int) -> dict[str, Any]:
        step, chunk = divmod(int(element), len(self.chunks))
        try:
            arrays, replaced = self.pipeline.batch_and_report(self.start + step, self.chunks[chunk])
        except UserError as error:
            return {"error": str(error)}
        return {"arrays": arrays, "replaced": json.dumps(replaced)}


def _keep_off_devices(worker: int, workers: int) -> None:
    """Run at the start of a worker process: Grain imports JAX there, and it must not take an accelerator."""
    del worker, workers
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:
        sys.modules["jax"].config.update("jax_platforms", "cpu")
