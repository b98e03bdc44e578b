"""What an evaluator is, and the parts that evaluators share: encoding a whole data set over the mesh."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlpjax.data.feed import feed
from vlpjax.data.pipeline import Pipeline
from vlpjax.errors import UserError
from vlpjax.experiment import Experiment
from vlpjax.mesh import Layout

Variables = Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """What an evaluation found.

    Attributes:
      metrics: name -> value.
      chance: name -> what guessing would reach, for those metrics where that means something.
      examples: JSON-like pictures of single cases, for the report.
    """

    metrics: dict[str, float]
    chance: dict[str, float] = field(default_factory=dict)
    examples: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluator:
    """Base of all evaluators: define ``make``.

    Attributes:
      every: how often it runs, a duration; it always runs at the end.  Empty runs it at the end only.
      title: what the report calls it; by default its name in the config.
      params: whose parameters are evaluated: ``"student"``, or the name of a teacher, whose towers then stand
        in for the student's.
    """

    every: str = ""
    title: str = ""
    params: str = "student"

    def make(self, experiment: Experiment, layout: Layout) -> Callable[[Variables], Result]:
        """Checks the settings and the data, and returns the evaluation; called once, before training."""
        raise TypeError(f"{type(self).__name__} is an evaluator and must define make.")


class Encoder:
    """One tower's features of a whole finite data set, sharded over the mesh.

    Args:
      tower: its name; ``embedding`` of its outputs is taken, normalised to length one.
      field: of the batch.
    """

    def __init__(self, experiment: Experiment, layout: Layout, tower: str, field: str):
        if tower not in experiment.towers:
            raise UserError(
                f"An evaluator names the tower {tower!r}; there are {', '.join(experiment.towers)}."
            )
        self.field = field
        sharding = layout.sharding("frames", None)

        def encode(variables: Variables, batch: jax.Array) -> jax.Array:
            with layout.activate():
                outputs: Any = experiment.towers.apply(
                    variables, method=lambda towers: towers.call(tower, batch)
                )
                z = outputs["embedding"].astype(jnp.float32)
                return z / (jnp.linalg.norm(z, axis=-1, keepdims=True) + 1e-8)  # [B, E]

        self._encode = jax.jit(encode, out_shardings=sharding)

    def __call__(self, variables: Variables, batch: Mapping[str, jax.Array]) -> jax.Array:
        if self.field not in batch:
            raise UserError(f"An evaluator reads the field {self.field!r}; the batch has {', '.join(batch)}.")
        return self._encode(variables, batch[self.field])


def finite_batches(pipeline: Pipeline, layout: Layout) -> Iterator[dict[str, jax.Array]]:
    """The batches of one pass; ``"valid"`` marks what is no padding."""
    with feed(pipeline, layout.sharding("frames")) as batches:
        for _, batch, _ in batches:
            yield batch


def require_finite(pipeline: Pipeline, who: str) -> None:
    """Raises ``UserError`` unless the pipeline covers its source once, in order."""
    if pipeline.repeat or pipeline.shuffle:
        raise UserError(
            f"{who} needs a pipeline with repeat=False and shuffle=False; this one would not end in order."
        )


def to_host(array: jax.Array, layout: Layout) -> np.ndarray:
    """A sharded array, whole, on every process."""
    return np.asarray(jax.device_put(array, layout.replicated))


def picture(data: bytes) -> str:
    """An encoded image as a data URI."""
    kinds = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}
    kind = next((name for magic, name in kinds.items() if data.startswith(magic)), "webp")
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
