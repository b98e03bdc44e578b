"""``--mode=describe``: what a run would be, without running it.

Towers and parameters with their shardings and rules, the compiled step's FLOPs and memory, and the whole
config.  No parameter is allocated and no data is read beyond one example.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from vlpjax.config import leaves
from vlpjax.rules import tree_names
from vlpjax.run import Run
from vlpjax.state import replicated_share
from vlpjax.step import make_train_step


@dataclass(frozen=True)
class ParameterRow:
    """One parameter.

    Attributes:
      name: its path.
      shape: its size per dimension.
      dtype: of the stored value.
      axes: its logical axes; None where the module names none.
      sharding: the mesh axes per dimension; "-" is whole.
      bytes_per_device: of the parameter itself.
      initializer: how it starts.
      rate: learning-rate factor, of the last layer where layers are stacked; None is frozen.
      decay: weight-decay factor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...] | None
    sharding: str
    bytes_per_device: int
    initializer: str
    rate: float | None
    decay: float


def parameter_rows(run: Run) -> list[ParameterRow]:
    """A row for every parameter of a run, in the order of their names."""
    abstract, shardings = run.abstract
    boxes = jax.tree.leaves(
        run.variables["params"], is_leaf=lambda leaf: isinstance(leaf, nn.meta.AxisMetadata)
    )
    factors = run.experiment.optimizer.factors(abstract.params)
    layers = run.experiment.optimizer.layer_factors(abstract.params)
    rows = []
    for name, box, leaf, sharding in zip(
        tree_names(abstract.params),
        boxes,
        jax.tree.leaves(abstract.params),
        jax.tree.leaves(shardings.params),
        strict=True,
    ):
        local = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        rate, decay = factors[name]
        rate = None if rate is None else rate * float(layers[name].max())
        rows.append(
            ParameterRow(
                name=name,
                shape=leaf.shape,
                dtype=str(leaf.dtype),
                axes=tuple(box.names) if isinstance(box, nn.LogicallyPartitioned) else None,
                sharding=_placed(sharding, len(leaf.shape)),
                bytes_per_device=local,
                initializer=getattr(box, "initializer", ""),
                rate=rate,
                decay=decay,
            )
        )
    return rows


def describe(config: ConfigDict) -> str:
    """The whole description as text.  Where ``config.data.example`` declares the data, it need not be there."""
    run = Run.from_config(config, data="example" not in config.data)
    rows = parameter_rows(run)
    sections = [
        _head(run),
        _table(
            ("parameter", "shape", "axes", "sharding", "bytes/device", "initial", "rate", "decay"),
            [
                (
                    row.name,
                    "x".join(map(str, row.shape)) or "scalar",
                    ", ".join(str(axis) for axis in row.axes or ()) or "-",
                    row.sharding,
                    f"{row.bytes_per_device:,}",
                    row.initializer,
                    "frozen" if row.rate is None else f"{row.rate:g}",
                    f"{row.decay:g}",
                )
                for row in rows
            ],
        ),
        _totals(run, rows),
        _compiled(run),
        "config\n" + "\n".join(f"  {path} = {value!r}" for path, value in leaves(config)),
    ]
    return "\n\n".join(sections)


def step_costs(run: Run) -> dict[str, float]:
    """FLOPs of a step over all devices and bytes per device, from the compiled program.

    Loops are counted once by XLA, so with ``accumulate`` above 1 the FLOPs are those of one micro-batch's turn.
    """
    abstract, shardings = run.abstract
    step: Any = make_train_step(run.experiment, run.layout, shardings, run.batch_shardings)
    compiled = step.lower(abstract, run.batch_shapes).compile()
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    return {
        "flops": float(costs.get("flops", math.nan)) * run.layout.mesh.size,
        "arguments": float(memory.argument_size_in_bytes),
        "temporaries": float(memory.temp_size_in_bytes),
        "peak": float(memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes)
        - float(memory.alias_size_in_bytes),
    }


def _head(run: Run) -> str:
    experiment, mesh = run.experiment, run.layout.mesh.shape
    durations = experiment.durations
    return "\n".join(
        [
            f"{run.config.name or 'experiment'}: {run.total_steps:,} steps of {durations.batch_size:,} examples "
            f"({run.total_steps * durations.batch_size / (durations.examples_per_epoch or math.nan):.1f} epochs of "
            f"{durations.examples_per_epoch:,})",
            "mesh: " + ", ".join(f"{axis}={size}" for axis, size in mesh.items()) + _slices(run),
            f"compute in {experiment.compute_dtype}: {experiment.precision_reason}",
            "objectives: "
            + ", ".join(
                f"{name} {type(loss).__name__} x {weight:g}"
                for name, (weight, loss) in experiment.objectives.items()
            ),
            "batch: " + ", ".join(f"{name} {x.dtype}{list(x.shape)}" for name, x in run.batch_shapes.items()),
        ]
    )


def _slices(run: Run) -> str:
    """Which axes go from slice to slice."""
    cut = ", ".join(f"{axis} by {parts}" for axis, parts in run.layout.slices.items())
    return f"; cut into slices: {cut}" if cut else ""


def _placed(sharding: NamedSharding, dimensions: int) -> str:
    """The mesh axes of each dimension: ``"fsdp, tensor, -"``."""
    entries = tuple(sharding.spec) + (None,) * (dimensions - len(sharding.spec))
    names = [(entry,) if isinstance(entry, str) else entry or ("-",) for entry in entries]
    return ", ".join("+".join(axes) for axes in names) or "-"


def _totals(run: Run, rows: Sequence[ParameterRow]) -> str:
    abstract, shardings = run.abstract
    towers: dict[str, tuple[int, int]] = {}
    for row in rows:
        tower = row.name.partition("/")[0]
        count, size = towers.get(tower, (0, 0))
        towers[tower] = count + math.prod(row.shape), size + row.bytes_per_device
    counts, sizes = zip(*towers.values(), strict=True)
    towers["all"] = sum(counts), sum(sizes)
    lines = [(name, f"{count:,}", f"{size:,}") for name, (count, size) in towers.items()]
    per_device = {
        "parameters": _local_bytes(abstract.params, shardings.params),
        "optimizer": _local_bytes(abstract.optimizer, shardings.optimizer),
        "teachers": _local_bytes(abstract.teachers, shardings.teachers),
        "objectives": _local_bytes(abstract.objectives, shardings.objectives),
        "statistics": _local_bytes(abstract.statistics, shardings.statistics),
    }
    held = "; ".join(f"{name} {_bytes(size)}" for name, size in per_device.items())
    share = replicated_share(abstract, shardings)
    return (
        f"{_table(('tower', 'parameters', 'bytes/device'), lines)}\n\nper device: {held}; in all "
        f"{_bytes(sum(per_device.values()))}; {share:.2%} of the state is replicated"
    )


def _compiled(run: Run) -> str:
    costs = step_costs(run)
    return (
        f"compiled step: {costs['flops'] / 1e9:,.2f} GFLOP over all devices "
        f"({costs['flops'] / run.experiment.durations.batch_size / 1e6:,.1f} MFLOP an example); memory per device: "
        f"state and batch {_bytes(costs['arguments'])}, temporaries {_bytes(costs['temporaries'])}, "
        f"peak {_bytes(costs['peak'])}"
    )


def _local_bytes(abstract: Any, shardings: Any) -> float:
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(jax.tree.leaves(abstract), jax.tree.leaves(shardings), strict=True)
    )


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
