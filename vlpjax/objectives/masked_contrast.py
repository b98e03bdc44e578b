"""MMC: rebuild what was corrupted, name each corrupted patch as a teacher does, and tell images apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Float

from vlpjax.errors import UserError
from vlpjax.models.heads import MLPHead
from vlpjax.models.patches import cut
from vlpjax.objectives.base import BatchCoupled, Context, Loss, normalize
from vlpjax.objectives.crops import entropies
from vlpjax.objectives.masked_image import patch_grid
from vlpjax.objectives.masking import PixelGroups
from vlpjax.objectives.moco import momentum_contrast
from vlpjax.objectives.two_views import per_view


@dataclass(frozen=True)
class MaskedMomentumContrast(BatchCoupled):
    """Three losses over one pass: the student sees corrupted views, its moving average sees the clean ones.

    - Pixels: mean absolute error over the corrupted pixels, from a small MLP on each patch token.
    - Patches: cross-entropy of the teacher's centred, sharpened distribution over prototypes, for patches at least
      half of which are corrupted ("iBOT", arXiv 2111.07832).
    - Images: 2 T (CE(q1 k2 / T) + CE(q2 k1 / T)) of the class tokens over the global batch ("MoCo v3", arXiv
      2104.02057); keys carry no gradient.

    The donor of foreign pixels is a neighbour in the batch.  With ``config.accumulate`` it is one in the micro-batch,
    so that a step is that of the whole batch only where ``corruption.donor_probability`` is 0.

    Attributes:
      corruption: of the student's views.
      views: fields of two views of every image.
      tower: its name; a ViT with a class token.
      teacher: an EMA of the tower and of the heads ``patches`` and ``projector``.
      patch, channels: side of the tower's patches in pixels, and of the images.
      pixel_hidden: widths of the pixel head's layers.
      patch_hidden, prototypes: widths of the patch head's layers, and its outputs.
      projector: widths of the projector's layers.
      temperature: of the contrast; ``student_temperature`` and ``teacher_temperature`` are of the distributions.
      centre_momentum: of the running mean of the teacher's prototype scores.
      pixel_weight, patch_weight, image_weight: of the losses.

    Source: "Masked Momentum Contrastive Learning for Zero-shot Semantic Understanding", arXiv 2308.11448; corruption
    and heads as in "GMML is All you Need", arXiv 2205.14986, and "SiT", arXiv 2104.03602.
    """

    corruption: PixelGroups
    views: tuple[str, str] = ("view1", "view2")
    tower: str = "image"
    teacher: str = "ema"
    patch: int = 16
    channels: int = 3
    pixel_hidden: tuple[int, ...] = (384, 384, 384)
    patch_hidden: tuple[int, ...] = (2048, 256)
    prototypes: int = 8192
    projector: tuple[int, ...] = (4096, 4096, 256)
    temperature: float = 0.2
    student_temperature: float = 0.1
    teacher_temperature: float = 0.04
    centre_momentum: float = 0.9
    pixel_weight: float = 1.0
    patch_weight: float = 1.0
    image_weight: float = 1.0

    def heads(self) -> dict[str, nn.Module]:
        pixels = (*self.pixel_hidden, self.patch**2 * self.channels)
        return {
            "pixels": MLPHead(pixels, norm=None, activation="gelu"),
            "patches": MLPHead((*self.patch_hidden, self.prototypes), norm=None, activation="gelu"),
            "projector": MLPHead(tuple(self.projector), last_norm="plain"),
        }

    def initial_state(self, key: jax.Array) -> Any:
        return {"centre": jnp.zeros(self.prototypes)}

    def encode(self, context: Context) -> dict[str, jax.Array]:
        clean = [context.read(view) for view in self.views]
        patch_grid(clean[0], self.patch, "MaskedMomentumContrast")
        batch, views = len(clean[0]), len(clean)
        drawn = [
            self.corruption(context.row_keys(f"corruption/{view}", batch), images)
            for view, images in zip(self.views, clean, strict=True)
        ]

        def join(parts: list[jax.Array]) -> jax.Array:
            """[B, ...] per view -> [B V, ...], the views of an image side by side."""
            return jnp.stack(parts, axis=1).reshape(batch * views, *parts[0].shape[1:])

        corrupted, mask = join([item.images for item in drawn]), join([item.mask for item in drawn])
        seen = context.student.call(self.tower, corrupted, train=context.train)
        if "prefix" not in seen:
            raise UserError(
                f"MaskedMomentumContrast tells images apart by class tokens, but {self.tower!r} has none; set "
                "class_tokens=1."
            )
        taught = context.encode_views(self.tower, self.views, teacher=self.teacher)
        rebuilt = context.head("pixels", seen["tokens"]).astype(jnp.float32)  # [B V, N, p p C]
        size = (self.patch, self.patch)
        hidden = cut(mask[..., None].astype(jnp.float32), size)  # [B V, N, p p]
        gap = jnp.abs(rebuilt - cut(join(clean), size)).reshape(*hidden.shape, self.channels).mean(axis=-1)

        def split(x: jax.Array) -> jax.Array:
            return x.reshape(batch, views, *x.shape[1:])

        tokens = split(seen["tokens"])  # [B, V, N, D]
        errors, truth, targets = self._named(tokens, taught["tokens"], context)
        counted = (split(hidden.mean(axis=-1)) >= 0.5).astype(jnp.float32)  # [B, V, N]
        return {
            "error": split(gap * hidden).sum(axis=(1, 2, 3)),  # [B]
            "pixels": split(hidden).sum(axis=(1, 2, 3)),  # [B]
            "patch_error": jnp.sum(errors * counted, axis=(1, 2)),  # [B]
            "patches": jnp.sum(counted, axis=(1, 2)),  # [B]
            "truth": jnp.mean(truth, axis=(1, 2)),  # [B, K]
            "targets": jnp.mean(targets, axis=(1, 2)),  # [B, K]
            "class": split(seen["prefix"][:, 0]),  # [B, V, D]
            "teacher_class": taught["prefix"][:, :, 0],
        }

    def compare(self, features: dict[str, jax.Array], context: Context) -> Loss:
        pixels, patches = (
            jnp.sum(features[error]) / jnp.maximum(jnp.sum(features[count]), 1.0)
            for error, count in (("error", "pixels"), ("patch_error", "patches"))
        )
        queries = normalize(per_view(context, "projector", features["class"]))  # [B, V, E]
        keys = normalize(per_view(context, "projector", features["teacher_class"], self.teacher))
        contrasts = [
            momentum_contrast(queries[:, view], keys[:, 1 - view], self.temperature) for view in (0, 1)
        ]
        images, accuracy = contrasts[0][0] + contrasts[1][0], (contrasts[0][1] + contrasts[1][1]) / 2
        value = self.pixel_weight * pixels + self.patch_weight * patches + self.image_weight * images
        momentum, truth = self.centre_momentum, jnp.mean(features["truth"], axis=0)
        state = {"centre": momentum * context.state["centre"] + (1 - momentum) * truth}
        metrics = {
            "pixels": pixels,
            "patches": patches,
            "images": images,
            "accuracy": accuracy,
            "prototype_entropy": entropies(jnp.mean(features["targets"], axis=0))["mean_entropy"],
        }
        return Loss(value, metrics, jax.lax.stop_gradient(state))

    def _named(
        self,
        tokens: Float[Array, "batch views patches width"],
        taught: Float[Array, "batch views patches width"],
        context: Context,
    ) -> tuple[
        Float[Array, "batch views patches"],
        Float[Array, "batch views patches prototypes"],
        Float[Array, "batch views patches prototypes"],
    ]:
        """Per patch the cross-entropy with the teacher's distribution, the teacher's scores, and that distribution.

        Here and not in the comparison, because the scores of all patches of a batch are large, and no patch needs
        another's.
        """
        scores = context.head("patches", tokens).astype(jnp.float32)
        truth = context.head("patches", taught, teacher=self.teacher).astype(jnp.float32)
        targets = jax.nn.softmax((truth - context.state["centre"]) / self.teacher_temperature)
        return optax.softmax_cross_entropy(scores / self.student_temperature, targets), truth, targets
