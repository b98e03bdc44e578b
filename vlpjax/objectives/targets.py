"""What masked patches are to be predicted as: pixels, a teacher's features or tokens, oriented gradients.

A target says how many numbers a head predicts per patch, makes the truth of a batch, and measures the error per
patch.  Truths carry no gradient.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Array, Bool, Float

from vlpjax.errors import UserError
from vlpjax.models.patches import cut
from vlpjax.objectives.base import Context, Loss, normalize

EPSILON = 1e-6  # added to the variance of a patch (MAE, arXiv 2111.06377)
DISTANCES = ("l1", "l2", "smooth_l1", "cosine")


def distance(
    predicted: Float[Array, "*shape features"], truth: Float[Array, "*shape features"], kind: str = "l2"
) -> Float[Array, "*shape"]:
    """Mean distance per patch: absolute, squared, Huber's with delta 1, or 1 - cosine."""
    predicted, truth = predicted.astype(jnp.float32), truth.astype(jnp.float32)
    if kind == "cosine":
        return 1 - jnp.sum(normalize(predicted) * normalize(truth), axis=-1)
    if kind == "l1":
        return jnp.mean(jnp.abs(predicted - truth), axis=-1)
    if kind == "l2":
        return jnp.mean(jnp.square(predicted - truth), axis=-1)
    if kind == "smooth_l1":
        return jnp.mean(optax.huber_loss(predicted, truth), axis=-1)
    raise UserError(f"A distance is {kind!r}; there are {', '.join(map(repr, DISTANCES))}.")


def standardized_patches(
    pixels: Float[Array, "batch patches pixels"], epsilon: float = EPSILON
) -> Float[Array, "batch patches pixels"]:
    """Every patch with its own mean 0 and variance 1.

    The variance is the unbiased one, as in MAE's code, so that predicting a patch's mean costs (P - 1) / P.
    """
    mean = jnp.mean(pixels, axis=-1, keepdims=True)
    variance = jnp.var(pixels, axis=-1, keepdims=True, ddof=1)
    return (pixels - mean) / jnp.sqrt(variance + epsilon)


@dataclass(frozen=True)
class Target:
    """Base of all targets."""

    def features(self, patch: tuple[int, int], channels: int) -> int:
        """Numbers that are predicted per patch."""
        raise TypeError(f"{type(self).__name__} is a target and must define features.")

    def truth(self, context: Context, images: jax.Array, patch: tuple[int, int]) -> jax.Array:
        """What should be predicted: [B, N, ...]."""
        raise TypeError(f"{type(self).__name__} is a target and must define truth.")

    def error(self, predicted: Float[Array, "batch patches features"], truth: jax.Array) -> jax.Array:
        """The error per patch: [B, N]."""
        raise TypeError(f"{type(self).__name__} is a target and must define error.")

    def hits(self, predicted: Float[Array, "batch patches features"], truth: jax.Array) -> jax.Array | None:
        """Which patches are right, where that means something: [B, N]."""
        del predicted, truth
        return None

    def pixels(
        self, predicted: jax.Array, images: jax.Array, patch: tuple[int, int]
    ) -> Float[Array, "batch patches pixels"]:
        """The predicted patches as pixels, for pictures.

        Raises:
          UserError: what is predicted is no pixels.
        """
        raise UserError(f"{type(self).__name__} predicts no pixels, so there is no picture of it.")


@dataclass(frozen=True, kw_only=True)
class Vectors(Target):
    """Base of the targets that are a vector per patch.

    Attributes:
      distance: a key of :data:`DISTANCES`, from the prediction to the vector.
    """

    distance: str = "l2"

    def __post_init__(self) -> None:
        if self.distance not in DISTANCES:
            raise UserError(
                f"{type(self).__name__}.distance is {self.distance!r}; there are {', '.join(map(repr, DISTANCES))}."
            )

    def error(self, predicted: jax.Array, truth: jax.Array) -> jax.Array:
        return distance(predicted, truth, self.distance)


@dataclass(frozen=True)
class Pixels(Vectors):
    """The pixels of the patch.

    Attributes:
      standardize: per patch, as MAE does (arXiv 2111.06377, section 3), with the distance ``"l2"``; SimMIM (arXiv
        2111.09886) takes them as they are in the batch, with ``"l1"``.
    """

    standardize: bool = True

    def features(self, patch: tuple[int, int], channels: int) -> int:
        return math.prod(patch) * channels

    def truth(self, context: Context, images: jax.Array, patch: tuple[int, int]) -> jax.Array:
        pixels = cut(images.astype(jnp.float32), patch)  # [B, N, p q c]
        return jax.lax.stop_gradient(standardized_patches(pixels) if self.standardize else pixels)

    def pixels(self, predicted: jax.Array, images: jax.Array, patch: tuple[int, int]) -> jax.Array:
        """As predicted; standardised pixels take mean and deviation from the patch itself, as MAE's pictures do."""
        if not self.standardize:
            return predicted
        real = cut(images.astype(jnp.float32), patch)
        mean, variance = jnp.mean(real, axis=-1, keepdims=True), jnp.var(real, axis=-1, keepdims=True, ddof=1)
        return predicted * jnp.sqrt(variance + EPSILON) + mean


@dataclass(frozen=True)
class Features(Vectors):
    """The tokens that a teacher's tower makes of the whole image.

    Attributes:
      teacher, tower: whose tokens.
      width: of the tokens.
      standardize: to mean 0 and variance 1 per token, without learned scale (data2vec, arXiv 2202.03555).
    """

    width: int
    teacher: str = "teacher"
    tower: str = "image"
    field: str = "image"
    standardize: bool = True
    distance: str = dataclasses.field(default="smooth_l1", kw_only=True)

    def features(self, patch: tuple[int, int], channels: int) -> int:
        return self.width

    def truth(self, context: Context, images: jax.Array, patch: tuple[int, int]) -> jax.Array:
        tokens = context.encode(self.tower, self.field, teacher=self.teacher)["tokens"].astype(jnp.float32)
        if self.standardize:
            tokens = jax.nn.standardize(tokens, axis=-1, epsilon=1e-6)
        return jax.lax.stop_gradient(tokens)


@dataclass(frozen=True)
class TokenIds(Target):
    """The ids that a frozen tokenizer gives the patches ("BEiT", arXiv 2106.08254).

    Attributes:
      vocabulary: number of ids.
      teacher, tower: the tokenizer: a tower whose outputs have ``"ids"`` [B, N].
      field: the image that the tokenizer reads, which may have another size than the tower's.
    """

    vocabulary: int
    teacher: str = "tokenizer"
    tower: str = "tokenizer"
    field: str = "image"

    def features(self, patch: tuple[int, int], channels: int) -> int:
        return self.vocabulary

    def truth(self, context: Context, images: jax.Array, patch: tuple[int, int]) -> jax.Array:
        ids: jax.Array = context.encode(self.tower, self.field, teacher=self.teacher)["ids"]
        return ids

    def error(self, predicted: jax.Array, truth: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(predicted.astype(jnp.float32), truth)

    def hits(self, predicted: jax.Array, truth: jax.Array) -> jax.Array | None:
        return jnp.argmax(predicted, axis=-1) == truth


def oriented_gradients(
    images: Float[Array, "batch height width channels"], bins: int = 9, cell: int = 8
) -> Float[Array, "batch rows columns channels bins"]:
    """Histograms of oriented gradients: per cell and channel, how much edge there is in each direction.

    The gradient is the difference of the two neighbours, borders reflected; a pixel votes with its gradient's length
    for one bin of unsigned orientation; each histogram is scaled to length one.

    Source: "Masked Feature Prediction for Self-Supervised Visual Pre-Training", arXiv 2112.09133, section 3.2, after
    Dalal and Triggs 2005.
    """
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    down = padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]
    along = padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]
    length = jnp.sqrt(jnp.square(down) + jnp.square(along))
    turn = jnp.arctan2(down, along) / math.pi  # in (-1, 1]; opposite directions differ by 1
    index = jnp.floor((turn % 1.0) * bins).astype(jnp.int32) % bins
    votes = jax.nn.one_hot(index, bins, dtype=images.dtype) * length[..., None]  # [B, H, W, C, bins]
    sums = votes.reshape(len(images), images.shape[1] // cell, cell, -1, cell, images.shape[-1], bins).sum(
        (2, 4)
    )
    return normalize(sums, epsilon=1e-6)


@dataclass(frozen=True)
class OrientedGradients(Vectors):
    """Histograms of oriented gradients of the whole image, those of a patch's cells together (MaskFeat).

    Attributes:
      bins: of orientation.
      cell: side in pixels; divides the patch's.

    Source: arXiv 2112.09133, section 3.2 and table 1.
    """

    bins: int = 9
    cell: int = 8

    def features(self, patch: tuple[int, int], channels: int) -> int:
        if patch[0] % self.cell or patch[1] % self.cell:
            raise UserError(
                f"OrientedGradients.cell is {self.cell} pixels, which does not divide a patch of {patch[0]}x{patch[1]}."
            )
        return math.prod(patch) // self.cell**2 * channels * self.bins

    def truth(self, context: Context, images: jax.Array, patch: tuple[int, int]) -> jax.Array:
        cells = oriented_gradients(images.astype(jnp.float32), self.bins, self.cell)
        pattern = "b (h p) (w q) c o -> b (h w) (p q c o)"
        return jax.lax.stop_gradient(
            rearrange(cells, pattern, p=patch[0] // self.cell, q=patch[1] // self.cell)
        )


def sums_per_example(
    mask: Bool[Array, "batch places"], **values: Float[Array, "batch places"]
) -> dict[str, Float[Array, " batch"]]:
    """Sums over the masked places of each example, and their number as ``"masked"``: for :func:`loss_of_sums`."""
    sums = {name: jnp.sum(jnp.where(mask, value, 0.0), axis=1) for name, value in values.items()}
    return {**sums, "masked": jnp.sum(mask, axis=1, dtype=jnp.float32)}


def loss_of_sums(sums: Mapping[str, Float[Array, " batch"]]) -> Loss:
    """``"error"`` over all masked places of the batch as the loss, the others likewise as metrics.

    Examples may have unequally many masked places: numerator and denominator are of the whole batch.
    """
    count = jnp.maximum(jnp.sum(sums["masked"]), 1.0)
    means = {name: jnp.sum(value) / count for name, value in sums.items() if name != "masked"}
    return Loss(means.pop("error"), {**means, "masked": jnp.mean(sums["masked"])})


def masked_mean(values: Float[Array, "*shape"], mask: Array | None) -> Float[Array, ""]:
    """Mean of the values where the mask is True; of all without a mask, and 0 where nothing is masked."""
    if mask is None:
        return jnp.mean(values)
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(jnp.sum(mask), 1)
