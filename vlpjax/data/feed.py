"""Feeding the mesh: turns a pipeline's batches into global ``jax.Array``s, one step ahead of their use.

Each process makes the rows that its own devices hold and no others; since a row's content depends on its place
in the stream only, the global batch is the same on every mesh.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter
from typing import NamedTuple, Self

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from vlpjax.data.bad import Replacement
from vlpjax.data.pipeline import Arrays, Pipeline
from vlpjax.errors import UserError

GlobalBatch = dict[str, jax.Array]


class HostReport(NamedTuple):
    """What this process has to say about one batch."""

    replaced: int  # rows of this process in which another example stands in for a bad one
    wait_seconds: float  # time that the training loop waited for this batch
    bad: tuple[Replacement, ...]


def feed(
    pipeline: Pipeline,
    sharding: NamedSharding | Mapping[str, NamedSharding],
    start_step: int = 0,
    stop: int | None = None,
) -> Feed:
    """Iterator of ``(step, {name: global array}, HostReport)`` from `start_step` to before `stop`.

    Args:
      pipeline: where the batches come from.
      sharding: says how dimension 0, the batch, is laid out over the mesh; other dimensions are whole.  Or a sharding
        per field, which agree in dimension 0 and may lay out other dimensions too.
      start_step: the first step.
      stop: the first step that is not returned; by default the stream goes on, or ends with the source.

    Raises:
      UserError: if the batch cannot be divided evenly.
    """
    return Feed(pipeline, sharding, start_step, stop)


class Feed(Iterator[tuple[int, GlobalBatch, HostReport]]):
    """See `feed`.  A thread waits for the next batch and sends it to the devices while a step is computed."""

    def __init__(
        self,
        pipeline: Pipeline,
        sharding: NamedSharding | Mapping[str, NamedSharding],
        start_step: int,
        stop: int | None,
    ):
        self.layout = BatchLayout(pipeline.batch_size, sharding)
        self._stream = pipeline.batches(start_step, rows=self.layout.rows, stop=stop)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vlpjax-feed")
        self._next: Future | None = self._thread.submit(self._make)

    def _make(self) -> tuple[int, GlobalBatch, tuple[Replacement, ...]] | None:
        step = self._stream.step
        local = next(self._stream, None)
        return None if local is None else (step, self.layout.globalize(local), self._stream.last_replaced)

    def __next__(self) -> tuple[int, GlobalBatch, HostReport]:
        if self._next is None:
            raise StopIteration
        begin = perf_counter()
        try:
            made = self._next.result()
        except BaseException:
            self.close()
            raise
        waited = perf_counter() - begin
        if made is None:
            self.close()
            raise StopIteration
        self._next = self._thread.submit(self._make)
        step, batch, bad = made
        return step, batch, HostReport(len(bad), waited, bad)

    def close(self) -> None:
        """Ends the threads and worker processes; batches that were made ahead are dropped."""
        self._next = None
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class BatchLayout:
    """Which rows of the global batch this process needs, and how they go to its devices.

    Attributes:
      sharding: of dimension 0 of every array of the batch; ``fields`` are those of arrays that were given their own.
      rows: the rows that the devices of this process hold, in ascending order.
      places: per device, which part of these rows it holds.
    """

    def __init__(self, batch_size: int, sharding: NamedSharding | Mapping[str, NamedSharding]):
        self.fields = {} if isinstance(sharding, NamedSharding) else dict(sharding)
        sharding = sharding if isinstance(sharding, NamedSharding) else next(iter(self.fields.values()))
        axes = sharding.spec[0] if len(sharding.spec) else None
        names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        shards = int(np.prod([sharding.mesh.shape[name] for name in names], initial=1))
        if batch_size % shards:
            raise UserError(
                f"batch_size is {batch_size}, which the {shards} shards of the mesh axes {', '.join(names)} cannot "
                f"divide evenly; make it a multiple of {shards}"
            )
        self.batch_size = batch_size
        self.sharding = NamedSharding(sharding.mesh, PartitionSpec(axes))
        placed = self.sharding.addressable_devices_indices_map((batch_size,))
        spans = {device: index[0].indices(batch_size)[:2] for device, index in placed.items() if index}
        self.rows = sorted({row for begin, end in spans.values() for row in range(begin, end)})
        # Rows of one device are neighbours here too, because its span is unbroken in the global batch.
        first = {row: place for place, row in enumerate(self.rows)}
        self.places = {device: slice(first[a], first[a] + b - a) for device, (a, b) in spans.items()}

    def globalize(self, local: Arrays) -> GlobalBatch:
        """Global arrays [batch_size, ...] out of the rows that this process has made."""
        return {
            name: self._global(self.fields.get(name, self.sharding), array) for name, array in local.items()
        }

    def _global(self, sharding: NamedSharding, array: np.ndarray) -> jax.Array:
        shape = (self.batch_size, *array.shape[1:])
        held = sharding.addressable_devices_indices_map(shape)
        parts = [array[(place, *(held[device] or ())[1:])] for device, place in self.places.items()]
        return jax.make_array_from_single_device_arrays(
            shape, sharding, jax.device_put(parts, list(self.places))
        )
