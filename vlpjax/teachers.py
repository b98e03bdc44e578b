"""Teachers: other sets of parameters for the same towers, called like the student and never differentiated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from vlpjax.config import suggest
from vlpjax.errors import UserError


@dataclass(frozen=True)
class Teacher:
    """Base of all teachers, and the frozen one: the parameters stay as they were given.

    Attributes:
      towers: names of the towers that the teacher has; empty means all of them.
      checkpoint: work directory of the run whose newest parameters it takes; empty takes the student's
        initial parameters.
    """

    towers: tuple[str, ...] = ()
    checkpoint: str = ""

    def initial(self, params: dict[str, Any]) -> dict[str, Any]:
        """The teacher's parameters, copied from the student's."""
        unknown = [name for name in self.towers if name not in params]
        if unknown:
            raise UserError(f"A teacher names the tower {unknown[0]!r}{suggest(unknown[0], params)}.")
        return {name: jax.tree.map(jnp.array, params[name]) for name in self.towers or params}

    def update(self, teacher: Any, params: Any, progress: jax.Array) -> Any:
        """The teacher after a step; ``progress`` is the share of the run that is done, 0 to 1."""
        del params, progress
        return teacher


@dataclass(frozen=True)
class EMA(Teacher):
    """An exponential moving average of the student: teacher = m teacher + (1 - m) student after every step.

    Attributes:
      decay: m at the start of the run.
      final_decay: m at its end, reached along half a cosine ("Bootstrap your own latent", arXiv 2006.07733,
        section 3.1); None keeps ``decay``.
    """

    decay: float = 0.999
    final_decay: float | None = None

    def update(self, teacher: Any, params: Any, progress: jax.Array) -> Any:
        decay = jnp.asarray(self.decay)
        if self.final_decay is not None:
            decay = self.final_decay - (self.final_decay - self.decay) * 0.5 * (
                1 + jnp.cos(math.pi * progress)
            )
        student = {name: params[name] for name in teacher}
        return jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), teacher, student)
