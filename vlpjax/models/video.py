"""Frames of videos, each encoded by the device that holds it, a few at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Num

from vlpjax.errors import UserError
from vlpjax.mesh import active_layout, constrain
from vlpjax.parallel.sequence import sequence_ranks

Module = TypeVar("Module", bound=nn.Module)


def encode_frames(
    module: Module,
    encode: Callable[
        [Module, Float[Array, "frames height width channels"]], Float[Array, "frames tokens width"]
    ],
    frames: Num[Array, "batch frames height width channels"],
    at_once: int,
) -> tuple[Float[Array, "batch visual width"], int]:
    """The tokens of the frames of each row, one frame's after the other's, and how many these are.

    On a mesh with sequence ranks a row's frames are cut into as many runs, and every rank encodes its own.  It does so
    whatever the frames show: rows with fewer frames are filled up, and cost what full ones do.

    Args:
      module: that ``encode`` calls; it may have no running statistics.
      encode: frames to tokens.
      frames: floating point as the tower takes it, or bytes, which become -1 to 1 where they are encoded.
      at_once: how many frames of a row a device encodes at once, at most: the largest number that divides its frames
        evenly is taken.  With fewer than it has, they are encoded again in the backward pass, as many at once, and of
        what is computed in between nothing waits for it.

    Returns:
      [B, K, D], the tokens of run after run, each on its rank; and the number of tokens per row.  K is larger where the
      ranks do not divide the frames: tokens of frames that were added stand at the end.

    Raises:
      UserError: frames of another form, or ``at_once`` below 1.
    """
    if frames.ndim != 5 or at_once < 1:
        raise UserError(
            f"Frames are [batch, frames, height, width, channels] and encoded 1 or more at once; these are "
            f"{frames.shape}, {at_once} at once."
        )
    ranks = sequence_ranks(active_layout())
    batch, count, *form = frames.shape
    own = -(-count // ranks)
    if own * ranks != count:
        frames = jnp.pad(frames, [(0, 0), (0, own * ranks - count)] + [(0, 0)] * len(form))
    some = max(size for size in range(1, min(at_once, own) + 1) if own % size == 0)
    if module.is_initializing():  # parameters do not depend on how many frames there are
        some = own
    parts = jnp.moveaxis(frames.reshape(batch, ranks, own // some, some, *form), 2, 0)
    parts = constrain(
        parts, None, "batch", "sequence", *[None] * (len(form) + 1)
    )  # [steps, B, R, some, H, W, C]

    def run(module: Module, carry: None, part: jax.Array) -> tuple[None, jax.Array]:
        images = constrain(part.reshape(-1, *form), "frames", *[None] * len(form))
        if jnp.issubdtype(images.dtype, jnp.integer):
            images = images.astype(jnp.float32) / 127.5 - 1
        tokens = encode(module, images)
        tokens = tokens.reshape(batch, ranks, -1, tokens.shape[-1])
        return carry, constrain(tokens, "batch", "sequence", None, None)

    if len(parts) == 1:
        encoded = run(module, None, parts[0])[1][None]
    else:
        again: Any = nn.remat(run, prevent_cse=False)
        scanned = nn.scan(again, variable_broadcast="params", split_rngs={"params": False, "dropout": True})
        encoded = scanned(module, None, parts)[1]  # [steps, B, R, tokens, D]
    encoded = jnp.moveaxis(encoded, 0, 2)
    visual = encoded.reshape(batch, -1, encoded.shape[-1])
    return constrain(visual, "batch", "sequence", None), visual.shape[1] // (own * ranks) * count
