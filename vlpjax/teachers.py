"""Teachers: other sets of parameters for the same towers, called like the student and never differentiated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from vlpjax.config import suggest
from vlpjax.durations import Durations
from vlpjax.errors import UserError

_DECAY = 0.999  # MoCo's, arXiv 1911.05722


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

    def update(self, teacher: Any, params: Any, progress: jax.Array, durations: Durations) -> Any:
        """The teacher after a step.

        Args:
          params: the student's, after the step's update.
          progress: the share of the run that is done, 0 to 1.
          durations: turn durations into steps.
        """
        del params, progress, durations
        return teacher


@dataclass(frozen=True)
class EMA(Teacher):
    """An exponential moving average of the student: teacher = m teacher + (1 - m) student after every step.

    Attributes:
      decay: m at the start of the run; None is 0.999 where there is no ``half_life``.
      final_decay: m at its end, reached along half a cosine ("Bootstrap your own latent", arXiv 2006.07733,
        section 3.1); None keeps ``decay``.
      half_life: the duration after which half of the teacher has been replaced, such as ``"10000 examples"``, in
        place of ``decay``: so said, a change of the batch size changes m, and not how old the teacher is.
    """

    decay: float | None = None
    final_decay: float | None = None
    half_life: str = ""

    def __post_init__(self) -> None:
        if self.half_life and (self.decay is not None or self.final_decay is not None):
            raise UserError(
                f"EMA.half_life is {self.half_life!r}, which decides the decay; leave decay and final_decay out."
            )

    def update(self, teacher: Any, params: Any, progress: jax.Array, durations: Durations) -> Any:
        decay = self._decay(progress, durations)
        student = {name: params[name] for name in teacher}

        def mix(old: jax.Array, new: jax.Array) -> jax.Array:
            # Exact at both ends, and exactly still where teacher and student agree (frozen parameters).
            return jnp.where(decay < 0.5, new + decay * (old - new), old + (1 - decay) * (new - old))

        return jax.tree.map(mix, teacher, student)

    def _decay(self, progress: jax.Array, durations: Durations) -> jax.Array:
        if self.half_life:
            steps = durations.exact_steps(self.half_life, "teachers' half_life")
            return jnp.float32(0.5 ** (1 / steps) if steps else 0.0)
        decay = jnp.float32(_DECAY if self.decay is None else self.decay)
        if self.final_decay is None:
            return decay
        return self.final_decay - (self.final_decay - decay) * 0.5 * (1 + jnp.cos(math.pi * progress))
