"""Durations in any unit: the one place that turns ``"3 epochs"`` or ``"10%"`` into steps."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from vlpjax.errors import UserError

_UNITS = {"step": "steps", "epoch": "epochs", "example": "examples", "percent": "percent", "%": "percent"}
_PATTERN = re.compile(r"\s*([0-9][0-9_]*(?:\.[0-9]+)?(?:e[0-9]+)?)\s*(steps?|epochs?|examples?|percent|%)\s*")


@dataclass(frozen=True)
class Durations:
    """What is needed to turn durations into steps.

    Attributes:
      batch_size: examples per step, over all devices.
      examples_per_epoch: examples in one pass over the training data; None where that is not known.
      total_steps: length of the run, which percentages refer to; None while the run's own length is resolved.
    """

    batch_size: int
    examples_per_epoch: int | None = None
    total_steps: int | None = None

    def steps(self, duration: str, what: str = "duration") -> int:
        """The number of steps that ``duration`` names, such as ``"800 steps"`` or ``"2.5 epochs"``.

        Epochs and examples round up, so that no example is left out; percentages round to the nearest step.

        Raises:
          UserError: not a number with one unit, a unit that cannot be resolved here, or a part of a step.
        """
        exact, unit = self._resolved(duration, what)
        if unit == "steps" and exact != int(exact):
            raise UserError(f"{what} is {duration!r}, but steps are whole numbers.")
        return round(exact) if unit == "percent" else math.ceil(exact)

    def exact_steps(self, duration: str, what: str = "duration") -> float:
        """The same without rounding, for what is no point in time (a half-life)."""
        return self._resolved(duration, what)[0]

    def _resolved(self, duration: str, what: str) -> tuple[float, str]:
        """Steps and parts of a step, and the unit that they were given in."""
        match = _PATTERN.fullmatch(str(duration))
        if match is None:
            raise UserError(
                f"{what} is {duration!r}; write one number with one unit: '800 steps', '3 epochs', "
                "'10000 examples' or '10%'."
            )
        amount = float(match[1].replace("_", ""))
        unit = _UNITS[match[2] if match[2] == "%" or match[2] == "percent" else match[2].rstrip("s")]
        if unit == "steps":
            return amount, unit
        if unit == "examples":
            return amount / self.batch_size, unit
        if unit == "epochs":
            if self.examples_per_epoch is None:
                raise UserError(
                    f"{what} is {duration!r}, but the data does not know its length; give steps or examples."
                )
            return amount * self.examples_per_epoch / self.batch_size, unit
        if self.total_steps is None:
            raise UserError(f"{what} is {duration!r}; the length of a run cannot be a share of itself.")
        return amount / 100 * self.total_steps, unit
