"""What an objective is: a frozen dataclass, and a pure function from a context to a loss.

An objective names the towers it uses and the heads it adds; the step calls it, weighs it and differentiates
it.  It owns no parameters, no teacher and no optimizer.  What it must remember between steps (a queue, a
centre) it receives and returns as ``state``.

An objective that compares the examples of a batch with one another derives from :class:`BatchCoupled` and
says separately how to encode and how to compare; the step can then accumulate gradients over micro-batches
exactly, because it takes the comparison over the features of the full batch.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlpjax.config import suggest
from vlpjax.durations import Durations
from vlpjax.errors import UserError
from vlpjax.models.towers import Towers


class Loss(NamedTuple):
    """What an objective returns.

    Attributes:
      value: the loss, a mean over the examples it was given; float32.
      metrics: numbers to log, also means over the examples.
      state: the objective's own state after this step.
    """

    value: Float[Array, ""]
    metrics: Mapping[str, Float[Array, ""]] = {}
    state: Any = ()


def fold_name(key: jax.Array, name: str) -> jax.Array:
    """The random key of this name: randomness is a function of (seed, step, name), never of call order."""
    return jax.random.fold_in(key, zlib.crc32(name.encode()) & 0x7FFFFFFF)


@dataclass
class Context:
    """What an objective sees of one step.

    Attributes:
      student: the towers with the parameters that are trained.
      teachers: per name, the towers with a teacher's parameters; their outputs carry no gradient.
      batch: per field, an array with the examples on the first dimension.
      rng: the random key of the step, and of the micro-batch where there are several.
      step: number of the step, from 0.
      state: this objective's state.
      train: whether towers run in training mode.
      objective: name of the objective, which prefixes its heads' names.
      outputs: tower outputs of this step, so that objectives share forward passes.
      rows: int32 [B], the rows that the examples have in the step's whole batch; None is 0 to B - 1.
      row_rng: the random key that per-example draws start from, the same for all micro-batches; None is ``rng``.
      durations: turn the durations of schedules into steps; None where nothing is scheduled.
      seed: of the run.
    """

    student: Towers
    batch: Mapping[str, jax.Array]
    rng: jax.Array
    step: jax.Array
    train: bool = True
    teachers: Mapping[str, Towers] = field(default_factory=dict)
    state: Any = ()
    objective: str = ""
    outputs: dict[Any, Any] = field(default_factory=dict)
    rows: jax.Array | None = None
    row_rng: jax.Array | None = None
    durations: Durations | None = None
    seed: int = 0

    def of(self, objective: str, state: Any = ()) -> Context:
        """The same context as another objective sees it; tower outputs are shared."""
        return dataclasses.replace(self, objective=objective, state=state)

    def read(self, name: str) -> jax.Array:
        """A field of the batch; an unknown name is an error that lists the fields there are."""
        if name not in self.batch:
            raise UserError(
                f"objectives.{self.objective} reads {name!r} from the batch{suggest(name, self.batch)}."
            )
        return self.batch[name]

    def encode(
        self, tower: str, name: str, teacher: str | None = None, variant: str = "", **options: Any
    ) -> dict[str, Any]:
        """The outputs of a tower on a field of the batch, computed once per step however many ask for it.

        Args:
          teacher: whose parameters to use.  A teacher's backbones run with ``train=False``, but for those with
            BatchNorm, which run as the student's do, dropout included, and leave no statistics.
          variant: names what ``options`` make different (``"masked"``); calls with options share their outputs
            only with calls of the same variant.
          options: further arguments of the tower, such as ``masked=`` of a ViT; ``train=False`` encodes as in
            evaluation.
        """
        return self._encoded((tower, name, teacher, variant), tower, self.read(name), teacher, options)

    def encode_views(
        self, tower: str, names: Sequence[str], teacher: str | None = None, variant: str = "", **options: Any
    ) -> dict[str, Any]:
        """The outputs of a tower on several fields of equal shape, in one pass over ``B * V`` examples.

        Every output is [B, V, ...], the views in the order of ``names``.  The views of an example stay on the
        device that holds the example.

        Args:
          options: as in :meth:`encode`; arrays are [B, V, ...].
        """
        fields = [self.read(name) for name in names]
        shapes = {name: value.shape for name, value in zip(names, fields, strict=True)}
        if len(set(shapes.values())) != 1:
            raise UserError(
                f"objectives.{self.objective} encodes views of different shapes together: {shapes}."
            )
        batch, views = fields[0].shape[0], len(names)
        joined = jnp.stack(fields, axis=1).reshape(batch * views, *fields[0].shape[1:])
        options = {
            key: value.reshape(batch * views, *value.shape[2:]) if hasattr(value, "shape") else value
            for key, value in options.items()
        }
        outputs = self._encoded((tower, tuple(names), teacher, variant), tower, joined, teacher, options)
        return jax.tree.map(lambda x: x.reshape(batch, views, *x.shape[1:]), outputs)

    def _encoded(
        self, where: Any, tower: str, inputs: jax.Array, teacher: str | None, options: Mapping[str, Any]
    ) -> dict[str, Any]:
        if options and not where[-1]:
            raise TypeError(
                f"encode({tower!r}, ...) with {', '.join(options)} needs a variant to be remembered by"
            )
        if where not in self.outputs:
            if teacher is None:
                self.outputs[where] = self.student.call(tower, inputs, **{"train": self.train, **options})
            else:
                towers = self.teacher(teacher)
                # The running statistics are the student's: where there is BatchNorm, a teacher takes those of its
                # batch, as a key encoder does (MoCo, arXiv 1911.05722, algorithm 1).
                normed = tower in towers.variables.get("batch_stats", {})
                outputs = towers.call(tower, inputs, **{"train": self.train and normed, **options})
                self.outputs[where] = jax.tree.map(jax.lax.stop_gradient, outputs)
        return self.outputs[where]

    def teacher(self, name: str) -> Towers:
        """A teacher's towers; an unknown name is an error that lists the teachers there are."""
        if name not in self.teachers:
            raise UserError(
                f"objectives.{self.objective} asks for the teacher {name!r}{suggest(name, self.teachers)}."
            )
        return self.teachers[name]

    def head(self, name: str, *args: Any, teacher: str | None = None, **kwargs: Any) -> Any:
        """Calls a head of this objective, or a teacher's copy of it, whose outputs carry no gradient.

        Both see the statistics of the batch in training: a teacher's projector with BatchNorm does as well
        ("Bootstrap your own latent", arXiv 2006.07733; MoCo v3, arXiv 2104.02057), and leaves no running ones.
        """
        full = head_name(self.objective, name)
        if teacher is None:
            return self.student.call(full, *args, train=self.train, **kwargs)
        outputs = self.teacher(teacher).call(full, *args, train=self.train, **kwargs)
        return jax.tree.map(jax.lax.stop_gradient, outputs)

    def key(self, name: str) -> jax.Array:
        """A random key for this objective and this purpose; every micro-batch has its own."""
        return fold_name(self.rng, f"{self.objective}/{name}")

    def run_key(self, name: str) -> jax.Array:
        """A random key for this objective and this purpose that is the same at every step of the run."""
        return fold_name(jax.random.key(self.seed), f"{self.objective}/{name}")

    def row_keys(self, name: str, batch: int) -> jax.Array:
        """A random key per example [B]: a function of (seed, step, name, row) however the batch is split up.

        What is drawn from these (a mask, a sub-network per example) is the same with any number of micro-batches
        and on any mesh.
        """
        base = fold_name(self.rng if self.row_rng is None else self.row_rng, f"{self.objective}/{name}")
        rows = jnp.arange(batch) if self.rows is None else self.rows
        return jax.vmap(jax.random.fold_in, (None, 0))(base, rows)

    def steps(self, duration: str, what: str) -> int:
        """A duration of a schedule as a number of steps.

        Args:
          what: the field that holds it, for messages.
        """
        if self.durations is None:
            raise UserError(
                f"objectives.{self.objective}.{what} is {duration!r}, but the run's length is unknown."
            )
        return self.durations.steps(duration, f"objectives.{self.objective}.{what}")

    def ramp(self, start: float, end: float, duration: str, what: str) -> Float[Array, ""]:
        """``start`` at the first step, rising or falling linearly to ``end``, which it has after ``duration``."""
        if start == end or not duration:
            return jnp.float32(end)
        share = jnp.minimum(1.0, self.step.astype(jnp.float32) / max(1, self.steps(duration, what)))
        return start + (end - start) * share


def head_name(objective: str, head: str) -> str:
    """The tower name under which a head of an objective keeps its parameters."""
    return f"{objective}_{head}"


@dataclass(frozen=True)
class Objective:
    """Base of all objectives: define ``__call__``, and whichever of the others is needed."""

    def __call__(self, context: Context) -> Loss:
        """The loss of the examples in the context."""
        raise TypeError(f"{type(self).__name__} is an objective and must define __call__.")

    def heads(self) -> dict[str, nn.Module]:
        """The modules that this objective adds to the towers, by name."""
        return {}

    def constraints(self) -> dict[str, Callable[[Any], Any]]:
        """Per name of a head, what its parameters pass through after every update, such as :func:`clipped`."""
        return {}

    def batch_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Per field of the batch, the logical axes of its first dimensions, where they are more than ``"batch"``."""
        return {}

    def initial_state(self, key: jax.Array) -> Any:
        """The state before the first step: a tree of arrays, empty by default.

        Args:
          key: what is random in it starts from; a function of the run's seed and the objective's name.
        """
        return ()

    def tokens(self, batch: Mapping[str, Any]) -> int:
        """Tokens of an example that are predicted one by one, if rates are told in tokens; otherwise 0.

        Args:
          batch: shapes are enough.
        """
        return 0


@dataclass(frozen=True)
class BatchCoupled(Objective):
    """Base of objectives whose loss of one example depends on the others of its batch."""

    def encode(self, context: Context) -> Any:
        """Features: a tree of arrays with the examples on the first dimension."""
        raise TypeError(f"{type(self).__name__} is batch-coupled and must define encode.")

    def compare(self, features: Any, context: Context) -> Loss:
        """The loss of the full batch's features.  ``context.batch`` is the full batch; towers are not called."""
        raise TypeError(f"{type(self).__name__} is batch-coupled and must define compare.")

    def __call__(self, context: Context) -> Loss:
        return self.compare(self.encode(context), context)


def clipped(low: float, high: float) -> Callable[[Any], Any]:
    """The constraint that keeps all parameters of a head in an interval."""
    return lambda params: jax.tree.map(lambda x: jnp.clip(x, low, high), params)


def pick(outputs: Mapping[str, Any], output: str) -> jax.Array:
    """An output of a tower by name; ``"prefix/1"`` is the second token of ``"prefix"``.

    Raises:
      UserError: an output that the tower does not have, with those that it has, or a token that there is not.
    """
    name, _, index = output.partition("/")
    if name not in outputs:
        raise UserError(f"The tower has no output {name!r}{suggest(name, outputs)}.")
    value: jax.Array = outputs[name]
    if not index:
        return value
    if not index.isdecimal() or int(index) >= value.shape[-2]:
        raise UserError(
            f"The output {output!r} is not there: {name!r} has the tokens 0 to {value.shape[-2] - 1}."
        )
    return value[..., int(index), :]


def normalize(x: Float[Array, "... features"], epsilon: float = 1e-8) -> Float[Array, "... features"]:
    """Rows of length one, in float32.  A row of zeros stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + epsilon**2)
