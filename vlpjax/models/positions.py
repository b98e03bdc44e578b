"""Rotary positions: where a token stands, as an angle that its queries and keys are turned by."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Rotation(NamedTuple):
    """Cosines and sines per token, of half as many angles as features turn; in float32."""

    cos: Float[Array, "#batch tokens angles"]
    sin: Float[Array, "#batch tokens angles"]


def rotate(
    x: Float[Array, "batch tokens heads head_dim"], rotation: Rotation
) -> Float[Array, "batch tokens heads head_dim"]:
    """Turns pairs of features by the rotation's angles; features beyond the pairs pass unchanged.

    Feature ``i`` is paired with feature ``i + angles`` (halves, not neighbours), which is the convention of GPT-NeoX
    and of Llama weights in the `transformers` layout.

    Source: "RoFormer", arXiv 2104.09864.
    """
    angles = rotation.cos.shape[-1]
    cos, sin = rotation.cos[:, :, None], rotation.sin[:, :, None]  # [B, N, 1, A]
    first, second, rest = jnp.split(x.astype(jnp.float32), (angles, 2 * angles), axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
    return turned.astype(x.dtype)
