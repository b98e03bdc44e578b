"""Where the compiler may not fuse: a barrier that the backward pass alone sees.

The gradient of a norm's output comes from a matrix product, and the norm's backward pass begins with sums over it.  The
TPU compiler makes one program of both, and has to choose the product's tiles so that the sums fit: the products that
feed the norms of a block then run at 40 to 50 % of what they reach alone, and are a tenth of the step.
"""

from __future__ import annotations

import jax
from jax import lax

from vlpjax.mesh import active_platform


@jax.custom_vjp
def _unfused(x: jax.Array) -> jax.Array:
    return x


_unfused.defvjp(lambda x: (x, None), lambda _, gradient: (lax.optimization_barrier(gradient),))


def unfused_gradient(x: jax.Array) -> jax.Array:
    """``x``; on TPUs its gradient is finished before it is used.  It changes no number."""
    return _unfused(x) if active_platform() == "tpu" else x
