"""KoLeo: features spread evenly over the sphere, because each is pushed away from its nearest neighbour."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlpjax.mesh import constrain
from vlpjax.objectives.base import normalize
from vlpjax.objectives.contrastive import local_rows


def koleo(features: Float[Array, "batch features"], epsilon: float = 1e-8) -> Float[Array, ""]:
    """The mean of -log of the distance to the nearest other feature of the batch, all at length one.

    Which one is nearest carries no gradient.  A device compares its own rows with all, [B / devices, B].

    Source: "Spreading vectors for similarity search", arXiv 1806.03198, equation 3; "DINOv2", arXiv 2304.07193,
    section 4.
    """
    unit = normalize(features)  # [B, D]
    everyone = constrain(unit, None, None)
    rows = jnp.arange(unit.shape[0])
    cosines = local_rows(unit, unit, 1.0)  # [B / devices, B]
    cosines = jnp.where(constrain(rows, "frames")[:, None] == rows[None, :], -1.0, cosines)
    nearest = jnp.argmax(jax.lax.stop_gradient(cosines), axis=1)
    # The small constant in every difference is that of PyTorch's pairwise distance: equal features have a gradient.
    apart = jnp.sqrt(jnp.sum(jnp.square(unit - everyone[nearest] + epsilon), axis=1))
    return -jnp.mean(jnp.log(apart + epsilon))
