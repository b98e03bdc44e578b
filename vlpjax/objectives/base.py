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
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlpjax.config import suggest
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
      rng: the step's random key.
      step: number of the step, from 0.
      state: this objective's state.
      train: whether towers run in training mode.
      objective: name of the objective, which prefixes its heads' names.
      outputs: tower outputs of this step, so that objectives share forward passes.
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

    def encode(self, tower: str, name: str, teacher: str | None = None) -> dict[str, jax.Array]:
        """The outputs of a tower on a field of the batch, computed once per step however many ask for it."""
        where = (tower, name, teacher)
        if where not in self.outputs:
            if teacher is None:
                self.outputs[where] = self.student.call(tower, self.read(name), train=self.train)
            elif teacher in self.teachers:
                outputs = self.teachers[teacher].call(tower, self.read(name), train=False)
                self.outputs[where] = jax.tree.map(jax.lax.stop_gradient, outputs)
            else:
                raise UserError(
                    f"objectives.{self.objective} asks for the teacher {teacher!r}{suggest(teacher, self.teachers)}."
                )
        return self.outputs[where]

    def head(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a head of this objective."""
        return self.student.call(head_name(self.objective, name), *args, train=self.train, **kwargs)

    def key(self, name: str) -> jax.Array:
        """A random key for this objective and this purpose."""
        return fold_name(self.rng, f"{self.objective}/{name}")


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

    def bounds(self) -> dict[str, tuple[float, float]]:
        """Per name of a head, the interval that its parameters are clipped to after every update."""
        return {}

    def initial_state(self) -> Any:
        """The state before the first step: a tree of arrays, empty by default."""
        return ()


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


def normalize(x: Float[Array, "... features"], epsilon: float = 1e-8) -> Float[Array, "... features"]:
    """Rows of length one, in float32.  A row of zeros stays zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + epsilon**2)
