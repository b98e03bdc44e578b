"""Arrays that travel around a ring of devices: each device meets all of them, and holds two lots at a time.

Ring attention and the losses over all pairs are both made of this: something stays on each device, something else
passes by, and what the devices add to the latter on the way follows it home.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Ring(NamedTuple):
    """Devices that send to the next one and take from the one before; used inside of a ``jax.shard_map``.

    Attributes:
      axes: mesh axes that the devices lie along.
      size: how many devices these are.
    """

    axes: tuple[str, ...]
    size: int

    def passed(self, arrays: Any) -> Any:
        """What the device before had of these arrays."""
        onward = [(place, (place + 1) % self.size) for place in range(self.size)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axes, onward), arrays)

    def meet(self, use: Callable[[Any, Any, Any], Any], carry: Any, arrays: Any) -> Any:
        """``carry = use(carry, step, arrays)`` for the arrays of all devices.

        At step s they are those of the device s places before, at step 0 one's own.  The next ones are under way while
        these are used.
        """

        def turn(state: tuple[Any, Any], step: jax.Array) -> tuple[tuple[Any, Any], None]:
            carry, here = state
            coming = self.passed(here)
            return (use(carry, step, here), coming), None

        (carry, here), _ = jax.lax.scan(turn, (carry, arrays), jnp.arange(self.size - 1))
        return use(carry, self.size - 1, here)

    def collect(
        self, use: Callable[[Any, Any, Any], tuple[Any, Any]], carry: Any, arrays: Any, sums: Any
    ) -> tuple[Any, Any]:
        """``carry, found = use(carry, step, arrays)`` as in :meth:`meet`; what is found goes home and is added up.

        Args:
          sums: zeros, of the form of what is found.

        Returns:
          the carry, and what all devices found with one's own arrays.
        """

        def turn(state: Any, step: jax.Array | int, last: bool = False) -> tuple[Any, None]:
            carry, sums, here = state
            # Neither needs this step's results: the sums of these arrays come from the device that had them before.
            coming = here if last else self.passed(here)
            sums = self.passed(sums)
            carry, found = use(carry, step, here)
            return (carry, jax.tree.map(jnp.add, sums, found), coming), None

        state, _ = jax.lax.scan(turn, (carry, sums, arrays), jnp.arange(self.size - 1))
        (carry, sums, _), _ = turn(state, self.size - 1, last=True)
        return carry, self.passed(sums)
