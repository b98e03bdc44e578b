"""Adafactor as large vision models take it: a factored second moment, and a first moment in half precision."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax


def adafactor(
    b1: float = 0.9, b2: float = 0.999, exponent: float = 0.8, factor_from: int = 32
) -> optax.GradientTransformation:
    """A direction for :class:`vlpjax.optim.optimizer.Optimizer`: about half a number of state per parameter.

    Neither the parameter's own size nor a schedule relative to it has a part in the step, and nothing is corrected for
    its start.

    Args:
      b1: decay of the first moment, which is bfloat16.
      b2: largest decay of the second moment; until then it is 1 - t^-exponent at step t.
      exponent: of that rise.
      factor_from: matrices whose second largest dimension is at least so large keep the second moment's rows and
        columns only.

    Source: "Scaling Vision Transformers", arXiv 2106.04560, section 3.4; "Adafactor", arXiv 1804.04235.
    """

    def decay(step: Any, exponent: Any) -> jax.Array:
        return jnp.minimum(b2, 1 - (jnp.asarray(step, jnp.float32) + 1) ** -exponent)

    return optax.chain(
        optax.scale_by_factored_rms(
            decay_rate=exponent, min_dim_size_to_factor=factor_from, decay_rate_fn=decay
        ),
        optax.ema(b1, debias=False, accumulator_dtype=jnp.bfloat16),
    )
