"""``Run``: a config made ready on this machine: mesh, data, experiment, shapes and shardings.

Training, evaluation and ``describe`` all begin with it.  Nothing is computed and no parameter exists yet.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from vlpjax.config import Config, apply_overrides, build, suggest
from vlpjax.data.pipeline import Pipeline
from vlpjax.data.sources import Declared
from vlpjax.durations import Durations
from vlpjax.errors import UserError
from vlpjax.experiment import Experiment, base_config
from vlpjax.mesh import Layout, devices_along, hardware_name, make_layout, pick_rule
from vlpjax.state import TrainState, check_replicated
from vlpjax.step import abstract_state, abstract_variables


@dataclass(frozen=True)
class Run:
    """A config made ready.

    Attributes:
      config: complete, overrides and hardware rules applied.
      layout: the mesh and what lies where.
      pipeline: the training data.
      experiment: the pure parts.
    """

    config: ConfigDict
    layout: Layout
    pipeline: Pipeline
    experiment: Experiment

    @classmethod
    def from_config(
        cls, config: ConfigDict, *, data: bool = True, devices: Sequence[Any] | None = None
    ) -> Run:
        """Builds everything that can be checked before anything is compiled.

        Args:
          data: whether the training data is there.  Otherwise what ``config.data.example`` declares stands for it,
            which is all that describing and compiling need.
          devices: that it is for, which need not be there to compile for them; this machine's by default.
        """
        check_complete(config)
        layout = make_layout(config.mesh, config.sharding_rules, devices)
        pipeline = build(config.data.train) if data else declared_pipeline(config)
        if not isinstance(pipeline, Pipeline):
            raise UserError("config.data.train must be a spec of vlpjax.data.pipeline:Pipeline.")
        layout.spec(("batch",), (pipeline.batch_size,), "config.data.train.batch_size")
        length = Durations(pipeline.batch_size, pipeline.num_examples)
        total = length.steps(config.duration, "config.duration")
        if total < 1:
            raise UserError(f"config.duration={config.duration!r} is {total} steps; a run has at least one.")
        durations = Durations(pipeline.batch_size, pipeline.num_examples, total)
        return cls(config, layout, pipeline, Experiment.from_config(config, durations, devices))

    @property
    def total_steps(self) -> int:
        total = self.experiment.durations.total_steps
        assert total is not None
        return total

    @functools.cached_property
    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of a global batch, found by making one example."""
        shapes = self._shapes(self.pipeline)
        if "example" in self.config.data:
            declared = self._shapes(declared_pipeline(self.config))
            wrong = [name for name, shape in declared.items() if shapes.get(name) != shape]
            if wrong:
                raise UserError(
                    f"config.data.example declares {wrong[0]!r} as {_short(declared[wrong[0]])}, but the data has "
                    f"{_short(shapes.get(wrong[0]))}."
                )
        return shapes

    @staticmethod
    def _shapes(pipeline: Pipeline) -> dict[str, jax.ShapeDtypeStruct]:
        size = pipeline.batch_size
        if isinstance(pipeline.source, Declared):
            fields = {**pipeline.source.shapes(), "index": ((), "int32")}
            return {
                name: jax.ShapeDtypeStruct((size, *shape), np.dtype(dtype))
                for name, (shape, dtype) in fields.items()
            }
        row = pipeline.batch(0, rows=[0])
        return {name: jax.ShapeDtypeStruct((size, *np.shape(x)[1:]), x.dtype) for name, x in row.items()}

    @functools.cached_property
    def variables(self) -> Any:
        """Shapes of parameters, with their axes and initialisers, and of statistics."""
        return abstract_variables(self.experiment, self.batch_shapes)

    @functools.cached_property
    def abstract(self) -> tuple[TrainState, TrainState]:
        """Shapes and shardings of the train state.

        Raises:
          UserError: parameters that cannot be divided, or too many that every device would hold a copy of.
        """
        abstract, shardings = abstract_state(self.experiment, self.variables, self.layout)
        check_replicated(abstract.params, shardings.params, self.layout)
        return abstract, shardings

    @functools.cached_property
    def batch_shardings(self) -> dict[str, NamedSharding]:
        """Where the fields of a batch lie: examples over the devices, frames over sequence ranks that divide them."""
        places = dict.fromkeys(self.batch_shapes, self.layout.sharding("batch"))
        wanted = self.experiment.batch_axes()
        for name in wanted.keys() & places.keys():  # an objective itself says which field it misses
            pairs = zip(wanted[name][1:], self.batch_shapes[name].shape[1:], strict=False)
            own = (axis if axis and self._divides(axis, size) else None for axis, size in pairs)
            places[name] = self.layout.sharding("batch", *own)
        return places

    def _divides(self, axis: str, size: int) -> bool:
        return size % devices_along(self.layout, axis) == 0

    def every(self, duration: str, what: str) -> int:
        """A duration as steps, at least 1; empty never comes due."""
        return max(1, self.experiment.durations.steps(duration, what)) if duration else 0


def declared_pipeline(config: ConfigDict) -> Pipeline:
    """Batches of zeros as ``config.data.example`` and ``config.data.examples`` declare them."""
    for name in ("example", "examples"):
        if name not in config.data:
            raise UserError(
                f"config.data.{name} is not set; without the data itself, it must say what an example looks like."
            )
    source = Declared(dict(config.data.example), config.data.examples)
    return Pipeline(source, {}, config.data.train.batch_size, shuffle=False, keep=tuple(config.data.example))


def _short(shape: jax.ShapeDtypeStruct | None) -> str:
    return "no such field" if shape is None else f"{shape.dtype}{list(shape.shape[1:])}"


def check_complete(config: ConfigDict) -> None:
    """Raises ``UserError`` for a field that nothing reads, and for a part that must be set and is not."""
    known = base_config()
    _only(config, known, "config")
    for group in ("start", "checkpoint", "log", "plan"):
        _only(config[group], known[group], f"config.{group}")
    _only(config.data, ("train", "example", "examples"), "config.data")
    for name in config.objectives:
        _only(config.objectives[name], ("weight", "loss"), f"config.objectives.{name}")
        for field in ("weight", "loss"):
            if field not in config.objectives[name]:
                raise UserError(
                    f"config.objectives.{name}.{field} is not set; an objective is {{weight, loss}}."
                )
    for name in ("duration", "towers", "objectives", "optimizer"):
        if not config.get(name):
            raise UserError(f"config.{name} is not set; an experiment needs it.")
    if "train" not in config.data:
        raise UserError("config.data.train is not set; an experiment needs training data.")


def _only(config: ConfigDict, known: Iterable[str], where: str) -> None:
    for name in config:
        if name not in known:
            raise UserError(f"{where} has no field {name!r}{suggest(name, known)}.")


def apply_mesh_rules(config: Config, devices: Sequence[Any] | None = None) -> Config:
    """Applies the first of ``config.mesh_rules`` that matches the devices; this machine's by default.

    It comes before the command line, whose overrides therefore win.
    """
    changes: Any = pick_rule(config.mesh_rules, hardware_name(devices))
    if changes is not None:
        apply_overrides(config, [(path, str(changes[path])) for path in changes])
    return config
