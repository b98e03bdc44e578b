"""iBOT: DINO, and for patches that the student does not see, the teacher's distribution of that very patch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vlpjax.errors import UserError
from vlpjax.objectives.base import Context, Loss, pick
from vlpjax.objectives.crops import entropies
from vlpjax.objectives.dino import DINO
from vlpjax.objectives.masking import block_wise, members, random_subset

SHAPES = ("blocks", "random")


@dataclass(frozen=True)
class IBOT(DINO):
    """DINO with masked patches: the student's large crops lose patches, and it says what the teacher sees there.

    An image's patch loss is the mean of the cross-entropy over the masked patches of a crop, then over its large
    crops; a crop without masks counts as 0.  The teacher sees everything.  Only tokens under the mask reach the head,
    at most ``mask_ratio[1]`` of a crop's.  Centre and balance of the patches are those of the tokens under the mask,
    as in DINOv2 (arXiv 2304.07193).

    Attributes:
      mask_probability: of a large crop to lose patches.
      mask_ratio: the share that it loses is uniform between these.
      mask_shape: ``"blocks"`` (rectangles, see :func:`vlpjax.objectives.masking.block_wise`) or ``"random"``.
      patch_weight: of the patch loss.
      patch_start: duration before which patches have no loss; empty is from the start on.
      patch_prototypes: of a head of its own for patches; None shares the head of the class tokens.
      patch_teacher_temperature: as ``teacher_temperature``, with the same warm-up.

    Source: "iBOT: Image BERT Pre-Training with Online Tokenizer", arXiv 2111.07832, equations 2 and 3.
    """

    mask_probability: float = 0.5
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    mask_shape: str = "blocks"
    patch_weight: float = 1.0
    patch_start: str = ""
    patch_prototypes: int | None = None
    patch_teacher_temperature: tuple[float, float] = (0.04, 0.07)

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.mask_ratio
        if not 0 < low <= high <= 1:
            raise UserError(
                f"IBOT.mask_ratio is {self.mask_ratio}; it is two shares in (0, 1], the smaller first."
            )
        if self.mask_shape not in SHAPES:
            raise UserError(
                f"IBOT.mask_shape is {self.mask_shape!r}; there are {', '.join(map(repr, SHAPES))}."
            )

    def heads(self) -> dict[str, nn.Module]:
        if self.patch_prototypes is None:
            return super().heads()
        return {**super().heads(), "patch_head": self._head(self.patch_prototypes)}

    def initial_state(self, key: jax.Array) -> Any:
        if self.centring != "mean":
            return {}
        return {
            **super().initial_state(key),
            "patch_centre": jnp.zeros(self.patch_prototypes or self.prototypes),
        }

    def encode(self, context: Context) -> dict[str, jax.Array]:
        seen = context.encode_views(self.tower, self.global_views, teacher=self.teacher)
        hidden, places, real = self.masked_places(context, seen["tokens"].shape[2])
        masked, student = self.crops(context, f"{context.objective}/masked", dict(masked=hidden))
        return {
            "student": student,  # [B, V, D]
            "teacher": pick(seen, self.output),  # [B, G, D]
            "student_patches": jnp.take_along_axis(
                masked["tokens"], places[..., None], axis=2
            ),  # [B, G, M, D]
            "teacher_patches": jnp.take_along_axis(seen["tokens"], places[..., None], axis=2),
            "real": real.astype(jnp.float32),  # a number, because features are what gradients are taken by
        }

    def compare(self, features: dict[str, jax.Array], context: Context) -> Loss:
        targets, state = self.class_targets(features["teacher"], context)
        value, metrics = self.class_loss(features["student"], targets, context)
        real = jax.lax.stop_gradient(features["real"]) > 0.5
        patch_targets, state = self.patch_targets(features["teacher_patches"], real, context, state)
        patches = self.patch_loss(features["student_patches"], patch_targets, real, context)
        metrics = {**metrics, **entropies(targets), "patches": patches, "masked": jnp.mean(real)}
        return Loss(value + self.patch_weight_now(context) * patches, metrics, state)

    # --- parts ----------------------------------------------------------------------------------------------

    def draw_masks(self, context: Context, patches: int) -> Bool[Array, "batch large patches"]:
        """Which patches of every large crop the student does not see."""
        images = context.read(self.global_views[0])
        grid, large = _grid(images.shape[1:3], patches), len(self.global_views)
        least, most = (int(share * patches) for share in self.mask_ratio)

        def draw(key: jax.Array) -> jax.Array:
            chance_key, ratio_key, place_key = jax.random.split(key, 3)
            share = jax.random.uniform(ratio_key, minval=self.mask_ratio[0], maxval=self.mask_ratio[1])
            count = jnp.clip((share * patches).astype(jnp.int32), max(least, 1), max(most, 1))
            count = jnp.where(jax.random.bernoulli(chance_key, self.mask_probability), count, 0)
            if self.mask_shape == "random":
                return random_subset(place_key, patches, count)
            return block_wise(place_key, grid, count, smallest=min(4, max(1, least)))

        keys = jax.vmap(lambda key: jax.random.split(key, large))(context.row_keys("masks", len(images)))
        return jax.vmap(jax.vmap(draw))(keys)

    def masked_places(
        self, context: Context, patches: int
    ) -> tuple[
        Bool[Array, "batch large patches"],
        Int[Array, "batch large masked"],
        Bool[Array, "batch large masked"],
    ]:
        """The masks, the places of the patches under them, and which of these places are no filling."""
        hidden = self.draw_masks(context, patches)
        size = max(1, int(self.mask_ratio[1] * patches))
        places, real = jax.vmap(jax.vmap(lambda mask: members(mask, size)))(hidden)
        return hidden, places, real

    def patch_targets(
        self,
        features: Float[Array, "batch large masked width"],
        real: Bool[Array, "batch large masked"],
        context: Context,
        state: Any,
        head: str = "",
    ) -> tuple[Float[Array, "batch large masked prototypes"], Any]:
        """The teacher's distributions of the patches under the mask, and the state after this step."""
        logits = context.head(head or self._patch_head, features, teacher=self.teacher)
        temperature = self.temperature(self.patch_teacher_temperature, context)
        flat, centre = self.targets(
            logits.reshape(-1, logits.shape[-1]),
            temperature,
            context.state.get("patch_centre"),
            real.reshape(-1),
        )
        state = state if centre is None else {**state, "patch_centre": centre}
        return flat.reshape(logits.shape), state

    def patch_loss(
        self,
        features: Float[Array, "batch large masked width"],
        targets: Float[Array, "batch large masked prototypes"],
        real: Bool[Array, "batch large masked"],
        context: Context,
        head: str = "",
    ) -> Float[Array, ""]:
        """Cross-entropy of masked patches: the mean over those of a crop, then over all crops."""
        logits = context.head(head or self._patch_head, features, self.frozen(context))
        logits = logits / self.student_temperature
        losses = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(targets * logits, axis=-1)  # [B, G, M]
        counts = jnp.maximum(jnp.sum(real, axis=-1), 1)
        return jnp.mean(jnp.sum(jnp.where(real, losses, 0.0), axis=-1) / counts)

    def patch_weight_now(self, context: Context) -> Any:
        """The weight of the patch loss at this step."""
        if not self.patch_start:
            return self.patch_weight
        started = context.step >= context.steps(self.patch_start, "patch_start")
        return jnp.where(started, self.patch_weight, 0.0)

    @property
    def _patch_head(self) -> str:
        return "head" if self.patch_prototypes is None else "patch_head"


def _grid(size: tuple[int, ...], patches: int) -> tuple[int, int]:
    """Rows and columns of square patches that are as many as ``patches`` on an image of this height and width."""
    rows = round(math.sqrt(patches * size[0] / size[1]))
    columns = patches // max(rows, 1)
    if rows * columns != patches:
        raise UserError(f"{patches} patches are no grid over {size[0]}x{size[1]} pixels.")
    return rows, columns
