"""What an evaluator is, and the parts that evaluators share: encoding a whole data set over the mesh."""

from __future__ import annotations

import base64
import contextlib
import contextvars
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vlpjax.config import suggest
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
    """One tower's features of a field of the batch, float32, sharded over the mesh.

    Args:
      tower: its name.
      field: of the batch, which the tower reads.  Token ids [B, captions, L] are several texts per example.
      output: which of the tower's outputs is taken.
      normalize: whether features are brought to length one.
      options: what the tower's call is given besides, such as ``size`` of an elastic tower.
    """

    def __init__(
        self,
        experiment: Experiment,
        layout: Layout,
        tower: str,
        field: str,
        output: str = "embedding",
        *,
        normalize: bool = True,
        options: Mapping[str, Any] | None = None,
    ):
        if tower not in experiment.towers:
            raise UserError(
                f"An evaluator names the tower {tower!r}; there are {', '.join(experiment.towers)}."
            )
        self.tower, self.field, self.output, self.normalize = tower, field, output, normalize
        self.layout, self.options = layout, dict(options or {})

        def encode(variables: Variables, batch: jax.Array) -> jax.Array:
            several = batch.shape[:2] if batch.ndim == 3 and batch.dtype == jnp.int32 else ()
            if several:
                batch = batch.reshape(-1, batch.shape[-1])
            with layout.activate():
                outputs: Any = experiment.towers.apply(
                    variables, method=lambda towers: towers.call(tower, batch, **self.options)
                )
            if output not in outputs:
                raise UserError(
                    f"An evaluator asks the tower {tower!r} for {output!r}; its outputs are {', '.join(outputs)}."
                )
            features = outputs[output].astype(jnp.float32)
            return features.reshape(*several, *features.shape[1:]) if several else features  # [B, ..., E]

        self._encode = jax.jit(encode, out_shardings=layout.sharding("frames"))
        self._unit = jax.jit(unit)

    def __call__(self, variables: Variables, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The features of one batch, [B, ..., E]."""
        return self.finish(self.raw(variables, batch))

    def raw(self, variables: Variables, batch: Mapping[str, jax.Array]) -> jax.Array:
        """The features of one batch as the tower gives them."""
        if self.field not in batch:
            raise UserError(f"An evaluator reads the field {self.field!r}; the batch has {', '.join(batch)}.")
        return self._encode(variables, batch[self.field])

    def finish(self, features: jax.Array) -> jax.Array:
        """What the tower gave, brought to length one if asked for."""
        out: jax.Array = self._unit(features) if self.normalize else features
        return out

    def key(self, variables: Variables) -> tuple[Any, ...]:
        """What the raw features of an example depend on besides the example."""
        used = [variables.get(kind, {}).get(self.tower, {}) for kind in ("params", "batch_stats")]
        where = tuple(map(id, jax.tree.leaves(used)))
        return (self.tower, self.field, self.output, repr(self.options), id(self.layout), where)


class Encoded(NamedTuple):
    """A whole finite data set as towers see it, in the order of its pipeline.

    Attributes:
      features: per name of an encoder, [N, ..., E], rows sharded over the mesh.
      columns: per field of one number per example ("index", "valid", a label), [N] on every host; and those fields
        that were asked for by name.
    """

    features: dict[str, jax.Array]
    columns: dict[str, np.ndarray]


_SHARED: contextvars.ContextVar[dict[Any, Any] | None] = contextvars.ContextVar("features", default=None)


@contextlib.contextmanager
def shared_features() -> Iterator[None]:
    """While it is open, evaluators that ask for the same features of the same data encode it once.

    The same means: equal fingerprint of the pipeline, the same tower, options, field and output, and the very same
    arrays of parameters, which live at least as long as this is open.  Nothing is kept afterwards.
    """
    token = _SHARED.set({})
    try:
        yield
    finally:
        _SHARED.reset(token)


def encode_all(
    pipeline: Pipeline,
    encoders: Mapping[str, Encoder],
    variables: Variables,
    layout: Layout,
    fields: tuple[str, ...] = (),
) -> Encoded:
    """Encodes a finite pipeline, in one pass for all encoders; see :func:`shared_features`.

    Args:
      fields: of the batch, which are among the columns although they are more than one number per example.
    """
    shared = _SHARED.get()
    known = {} if shared is None else shared
    data, kept = pipeline_key(pipeline), ("columns", pipeline.data_state(0)["fingerprint"], fields)
    places = {name: (data, encoder.key(variables)) for name, encoder in encoders.items()}
    missing = {name: encoder for name, encoder in encoders.items() if places[name] not in known}
    if missing or kept not in known:
        parts: dict[str, list[jax.Array]] = {name: [] for name in missing}
        columns: dict[str, list[np.ndarray]] = {}
        for batch in finite_batches(pipeline, layout):
            for name, encoder in missing.items():
                parts[name].append(encoder.raw(variables, batch))
            for name, values in batch.items():
                if values.ndim == 1 or name in fields:
                    columns.setdefault(name, []).append(to_host(values, layout))
        for name in missing:
            # The variables stay alive beside the features, so that no other array takes over their identity.
            known[places[name]] = (jnp.concatenate(parts[name]), variables)
        known[kept] = {name: np.concatenate(values) for name, values in columns.items()}
    features = {name: encoder.finish(known[places[name]][0]) for name, encoder in encoders.items()}
    return Encoded(features, known[kept])


def pipeline_key(pipeline: Pipeline) -> str:
    """Equal for pipelines whose fields hold the same, whichever of them they keep."""
    parts = pipeline.data_state(0)["parts"]
    return json.dumps({name: part for name, part in parts.items() if name != "keep"}, sort_keys=True)


def unit(x: Float[Array, "... features"]) -> Float[Array, "... features"]:
    """Rows of length one."""
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-8)


def read_column(columns: Mapping[str, np.ndarray], name: str, who: str) -> np.ndarray:
    """A field of one number per example; an unknown name is an error that lists those there are."""
    if name not in columns:
        raise UserError(f"{who} reads {name!r} from the batch{suggest(name, columns)}.")
    return columns[name]


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
