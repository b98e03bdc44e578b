"""Rows of patches of several images, of any shape: what the image tower takes instead of equal images.

Source: "Patch n' Pack: NaViT", arXiv 2307.06304; with one image per row, the NaFlex form of "SigLIP 2", arXiv
2502.14786.  :mod:`vlpjax.data.packing` makes such rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlpjax.errors import UserError
from vlpjax.models.pooling import segment_members

FIELDS = ("patches", "positions", "segment_ids")


class Packed(NamedTuple):
    """A batch of rows of patches.

    Attributes:
      patches: pixels of each patch, flattened as [height, width, channels].
      positions: row and column of each patch in its image.
      segment_ids: which image of the row a patch is of, from 1; 0 is padding.  The patches of an image stand together.
      grids: rows and columns of each image; anything for images that a row does not have.
    """

    patches: Float[Array, "batch tokens pixels"]
    positions: Int[Array, "batch tokens 2"]
    segment_ids: Int[Array, "batch tokens"]
    grids: Int[Array, "batch segments 2"]

    @classmethod
    def of(cls, inputs: Mapping[str, jax.Array], pixels: int, segments: int) -> Packed:
        """Checks what was given as a dict, and derives the grids from the positions if there are none.

        Args:
          inputs: ``"patches"``, ``"positions"``, ``"segment_ids"`` and maybe ``"grids"``, whose length then is the
            number of images per row.
          pixels: numbers per patch.
          segments: images per row if there are no grids.

        Raises:
          UserError: a field that is missing, or of another shape.
        """
        if missing := [name for name in FIELDS if name not in inputs]:
            raise UserError(
                f"Packed images lack {' and '.join(map(repr, missing))}; they need {', '.join(FIELDS)}."
            )
        patches, positions, ids = (jnp.asarray(inputs[name]) for name in FIELDS)
        wanted = {"patches": (*ids.shape, pixels), "positions": (*ids.shape, 2), "segment_ids": ids.shape[:2]}
        for name, array in zip(FIELDS, (patches, positions, ids), strict=True):
            if array.shape != wanted[name] or ids.ndim != 2:
                raise UserError(
                    f"Packed images have {name!r} of shape {array.shape}; with segment_ids of {ids.shape} (batch, "
                    f"tokens) and this tower's patches it would be {wanted[name]}."
                )
        if "grids" in inputs:
            grids = jnp.asarray(inputs["grids"])
        else:
            members = segment_members(ids, segments)[..., None]  # [B, S, N, 1]
            grids = jnp.max(jnp.where(members, positions[:, None], 0), axis=2) + 1
        return cls(patches, positions, ids, grids)

    @property
    def members(self) -> Bool[Array, "batch segments tokens"]:
        """Which patches are of which image."""
        return segment_members(self.segment_ids, self.grids.shape[1])

    @property
    def token_grids(self) -> Int[Array, "batch tokens 2"]:
        """Rows and columns of the image that each patch is of; 1 for padding."""
        index = jnp.clip(self.segment_ids - 1, 0, self.grids.shape[1] - 1)[..., None]
        grids = jnp.take_along_axis(self.grids, index, axis=1)
        return jnp.where(self.segment_ids[..., None] > 0, jnp.maximum(grids, 1), 1)
