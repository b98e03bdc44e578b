"""Masked image modelling: hide patches, and predict them from those that are seen.

Three forms.  A masked autoencoder encodes the visible patches only and leaves the rest to a light decoder.  Masked
prediction keeps the whole grid, with a mask token at the hidden places, and reads the prediction off the tower's own
tokens.  Cross-view completion is the first form with a second view for the decoder to look at.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from vlpjax.errors import UserError
from vlpjax.models.mae import MAEDecoder, PatchPrediction
from vlpjax.models.patches import cut, join
from vlpjax.objectives.base import BatchCoupled, Context, Loss, Objective
from vlpjax.objectives.masking import BlockWise, RandomCells, RandomPatches, Split
from vlpjax.objectives.targets import Target, loss_of_sums, masked_mean, sums_per_example


def patch_grid(images: jax.Array, patch: int, who: str) -> tuple[int, int]:
    """Rows and columns of patches of images [B, H, W, C].

    Raises:
      UserError: what is no batch of images, or sides that the patch does not divide.
    """
    if images.ndim != 4 or images.shape[1] % patch or images.shape[2] % patch:
        raise UserError(
            f"{who}.patch is {patch}, but the batch has images of shape {images.shape}; it takes [batch, height, "
            "width, channels] with sides that the patch divides."
        )
    return images.shape[1] // patch, images.shape[2] // patch


def pictures(
    target: Target,
    images: Float[Array, "batch height width channels"],
    mask: Bool[Array, "batch patches"],
    predicted: Float[Array, "batch patches features"],
    patch: int,
) -> dict[str, Float[Array, "batch height width channels"]]:
    """What a report shows of a prediction: ``"original"``, ``"masked"`` and ``"reconstructed"``.

    Hidden patches of the second have the image's mean; those of the third have the prediction.

    Raises:
      UserError: a target that is no pixels.
    """
    size = (patch, patch)
    hidden = mask[..., None]
    seen = cut(images.astype(jnp.float32), size)  # [B, N, p p c]
    mean = jnp.mean(images, axis=(1, 2), keepdims=True)
    patches = {
        "original": seen,
        "masked": jnp.where(hidden, cut(jnp.broadcast_to(mean, images.shape), size), seen),
        "reconstructed": jnp.where(hidden, target.pixels(predicted, images, size), seen),
    }
    grid = (images.shape[1] // patch, images.shape[2] // patch)
    return {name: join(value, grid, size) for name, value in patches.items()}


@dataclass(frozen=True)
class MaskedAutoencoding(Objective):
    """MAE: the tower sees a quarter of the patches, a light decoder predicts the others.

    L = mean over hidden patches of the target's error (by default the squared error of standardised pixels).
    All images hide equally many patches, so the mean of micro-batches' means is the batch's.

    Attributes:
      mask: which patches are hidden.
      target: what they are predicted as.
      tower, image: name of the tower, a ViT, and the field that it reads.
      patch: side of the tower's patches, in pixels.
      channels: of the images.
      masked_only: whether only hidden patches count.
      decoder_width, decoder_depth, decoder_heads: of the decoder's blocks.

    Source: "Masked Autoencoders Are Scalable Vision Learners", arXiv 2111.06377.
    """

    mask: RandomPatches
    target: Target
    tower: str = "image"
    image: str = "image"
    patch: int = 16
    channels: int = 3
    masked_only: bool = True
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16

    def heads(self) -> dict[str, nn.Module]:
        return {"decoder": self._decoder(cross=False)}

    def _decoder(self, cross: bool) -> MAEDecoder:
        features = self.target.features((self.patch, self.patch), self.channels)
        return MAEDecoder(features, self.decoder_width, self.decoder_depth, self.decoder_heads, cross=cross)

    def __call__(self, context: Context) -> Loss:
        images, split, predicted = self._predict(context)
        truth = self.target.truth(context, images, (self.patch, self.patch))
        errors = self.target.error(predicted, truth)  # [B, N]
        return Loss(masked_mean(errors, split.mask if self.masked_only else None))

    def reconstruct(self, context: Context) -> dict[str, jax.Array]:
        """Images as they are, as they are seen, and with the prediction in place of the hidden patches."""
        images, split, predicted = self._predict(context)
        return pictures(self.target, images, split.mask, predicted, self.patch)

    def _memory(self, context: Context) -> jax.Array | None:
        """Tokens of a second view for the decoder; none here."""
        del context
        return None

    def _predict(self, context: Context) -> tuple[jax.Array, Split, jax.Array]:
        """Images, what of them is hidden, and the prediction of all patches [B, N, features]."""
        images = context.read(self.image)
        grid = patch_grid(images, self.patch, type(self).__name__)
        split = self.mask.split(context.row_keys("mask", len(images)), grid[0] * grid[1])
        outputs = context.encode(
            self.tower, self.image, variant=f"{context.objective}/kept", keep=split.keep
        )  # tokens [B, K, D]
        predicted = context.head(
            "decoder", outputs["tokens"], split.restore, grid, prefix=outputs.get("prefix"),
            memory=self._memory(context),
        )  # fmt: skip
        return images, split, predicted


@dataclass(frozen=True)
class CrossViewCompletion(MaskedAutoencoding):
    """CroCo: nine tenths of one view are hidden, and the decoder looks at another view of the same scene.

    The tower encodes the visible patches of the first view, and all patches of the second.

    Attributes:
      image, other: fields of the first view, which is completed, and of the second.

    Source: "CroCo: Self-Supervised Pre-training for 3D Vision Tasks by Cross-View Completion", arXiv 2210.10716.
    """

    image: str = "view1"
    other: str = "view2"

    def heads(self) -> dict[str, nn.Module]:
        return {"decoder": self._decoder(cross=True)}

    def _memory(self, context: Context) -> jax.Array:
        tokens: jax.Array = context.encode(self.tower, self.other)["tokens"]
        return tokens


@dataclass(frozen=True)
class MaskedPrediction(BatchCoupled):
    """SimMIM, BEiT, MaskFeat: the tower sees the whole grid with mask tokens, a linear layer predicts what is hidden.

    L = sum of the hidden patches' errors over the number of hidden patches, both of the whole batch: block-wise masks
    hide more of one image than of another, so the loss is taken over sums and counts per image.

    Attributes:
      mask: which patches are hidden.
      target: what they are predicted as: pixels with ``"l1"`` and no standardisation (SimMIM), token ids (BEiT),
        oriented gradients (MaskFeat), a teacher's features.
      tower, image: name of the tower, a ViT with ``mask_token=True``, and the field that it reads.
      patch: side of the tower's patches, in pixels.
      channels: of the images.

    Source: "SimMIM", arXiv 2111.09886; "BEiT", arXiv 2106.08254; "MaskFeat", arXiv 2112.09133.
    """

    mask: RandomPatches | RandomCells | BlockWise
    target: Target
    tower: str = "image"
    image: str = "image"
    patch: int = 16
    channels: int = 3

    def heads(self) -> dict[str, nn.Module]:
        return {"head": PatchPrediction(self.target.features((self.patch, self.patch), self.channels))}

    def reconstruct(self, context: Context) -> dict[str, jax.Array]:
        """As of :class:`MaskedAutoencoding`, where pixels are predicted."""
        images, mask, predicted = self._predict(context)
        return pictures(self.target, images, mask, predicted, self.patch)

    def _predict(self, context: Context) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Images, which patches are hidden [B, N], and the prediction of all patches [B, N, features]."""
        images = context.read(self.image)
        grid = patch_grid(images, self.patch, type(self).__name__)
        mask = self.mask(context.row_keys("mask", len(images)), grid)
        outputs = context.encode(self.tower, self.image, variant=f"{context.objective}/masked", masked=mask)
        return images, mask, context.head("head", outputs["tokens"])

    def encode(self, context: Context) -> dict[str, jax.Array]:
        images, mask, predicted = self._predict(context)
        truth = self.target.truth(context, images, (self.patch, self.patch))
        sums = {"error": self.target.error(predicted, truth)}
        hits = self.target.hits(predicted, truth)
        if hits is not None:
            sums["accuracy"] = hits.astype(jnp.float32)
        return sums_per_example(mask, **sums)

    def compare(self, features: dict[str, jax.Array], context: Context) -> Loss:
        return loss_of_sums(features)
