"""Balanced assignment of examples to prototypes: Sinkhorn-Knopp, over the global batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vlpjax.mesh import constrain


def sinkhorn(
    scores: Float[Array, "batch prototypes"],
    epsilon: float | Float[Array, ""],
    rounds: int,
    counted: Bool[Array, batch] | None = None,
) -> Float[Array, "batch prototypes"]:
    """Soft codes that use all prototypes equally, as far as ``rounds`` rounds of balancing get.

    Starting from exp(scores / epsilon), a round gives every prototype the same total and then every example the
    total 1.  The rounds keep only two vectors of logarithms, so nothing overflows however sharp ``epsilon`` is, and
    a constant that is added to all scores changes nothing.  The sums run over the whole batch, on whichever
    devices its rows lie.

    Args:
      scores: similarity of every example to every prototype; the codes carry no gradient to it.
      epsilon: temperature; the smaller, the closer to one prototype per example.
      rounds: of balancing, three in all papers below.
      counted: which rows have a part in the balance; the others get codes for the prototypes' totals as they are.

    Returns:
      float32 codes; every row sums to 1.

    Source: "Sinkhorn Distances", arXiv 1306.0895; "Unsupervised Learning of Visual Features by Contrasting Cluster
    Assignments", arXiv 2006.09882, section 3.1; "DINOv2", arXiv 2304.07193, section 4.
    """
    scores = jax.lax.stop_gradient(scores).astype(jnp.float32) / epsilon
    scores = constrain(scores, "frames", None)
    present = None if counted is None else counted[:, None].astype(jnp.float32)
    rows = jnp.zeros((scores.shape[0], 1))
    columns = jnp.zeros((1, scores.shape[1]))
    for _ in range(rounds):
        totals = jax.nn.logsumexp(scores + rows, axis=0, keepdims=True, b=present)  # [1, K]
        columns = jnp.where(jnp.isfinite(totals), -totals, 0.0)  # no row counted is no balance
        rows = -jax.nn.logsumexp(scores + columns, axis=1, keepdims=True)  # [B, 1]
    return jax.nn.softmax(scores + columns, axis=1)
