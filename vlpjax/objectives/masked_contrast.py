"""MMC: rebuild what was corrupted, name each corrupted patch as a teacher does, and tell images apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from vlpjax.errors import UserError
from vlpjax.mesh import constrain
from vlpjax.models.heads import MLPHead
from vlpjax.models.patches import cut
from vlpjax.objectives.base import BatchCoupled, Context, Loss, normalize
from vlpjax.objectives.masked_image import patch_grid
from vlpjax.objectives.masking import PixelGroups
from vlpjax.objectives.targets import masked_mean


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

    def initial_state(self) -> Any:
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

        return {
            "error": split(gap * hidden).sum(axis=(1, 2, 3)),  # [B]
            "pixels": split(hidden).sum(axis=(1, 2, 3)),  # [B]
            "corrupted": split(hidden.mean(axis=-1)),  # [B, V, N]
            "tokens": split(seen["tokens"]),  # [B, V, N, D]
            "class": split(seen["prefix"][:, 0]),  # [B, V, D]
            "teacher_tokens": taught["tokens"],
            "teacher_class": taught["prefix"][:, :, 0],
        }

    def compare(self, features: dict[str, jax.Array], context: Context) -> Loss:
        pixels = jnp.sum(features["error"]) / jnp.maximum(jnp.sum(features["pixels"]), 1.0)
        scores = context.head("patches", features["tokens"]).astype(jnp.float32)  # [B, V, N, K]
        truth = context.head("patches", features["teacher_tokens"], teacher=self.teacher).astype(jnp.float32)
        centre = context.state["centre"]
        targets = jax.nn.softmax((truth - centre) / self.teacher_temperature)
        errors = optax.softmax_cross_entropy(scores / self.student_temperature, targets)  # [B, V, N]
        patches = masked_mean(errors, features["corrupted"] >= 0.5)
        queries = normalize(context.head("projector", features["class"]))  # [B, V, E]
        keys = normalize(context.head("projector", features["teacher_class"], teacher=self.teacher))
        images = symmetric_contrast(queries, keys, self.temperature)
        value = self.pixel_weight * pixels + self.patch_weight * patches + self.image_weight * images
        mean = jnp.mean(targets, axis=(0, 1, 2))
        entropy = -jnp.sum(mean * jnp.log(mean + 1e-12)) / jnp.log(float(self.prototypes))
        momentum = self.centre_momentum
        state = {"centre": momentum * centre + (1 - momentum) * jnp.mean(truth, axis=(0, 1, 2))}
        metrics = {"pixels": pixels, "patches": patches, "images": images, "prototype_entropy": entropy}
        return Loss(value, metrics, jax.lax.stop_gradient(state))


def symmetric_contrast(
    queries: Float[Array, "batch 2 features"], keys: Float[Array, "batch 2 features"], temperature: float
) -> Float[Array, ""]:
    """2 T times the cross-entropies of each view's queries with the other view's keys; both of length one."""
    total = jnp.zeros(())
    for view in (0, 1):
        query = constrain(queries[:, view], "frames", None)
        key = constrain(jax.lax.stop_gradient(keys[:, 1 - view]), None, None)
        logits = constrain(query @ key.T, "frames", None) / temperature  # [B / devices, B]
        right: Bool[Array, "batch batch"] = jnp.eye(len(query), dtype=bool)
        log_shares = jax.nn.log_softmax(logits, axis=-1)
        total = total - jnp.sum(jnp.where(constrain(right, "frames", None), log_shares, 0.0)) / len(query)
    return 2 * temperature * total
