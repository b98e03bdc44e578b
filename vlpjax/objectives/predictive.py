"""Pretraining without a decoder: predict the next patch's embedding, or a patch's own position."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from vlpjax.errors import UserError
from vlpjax.models.mae import PatchPrediction
from vlpjax.objectives.base import Context, Loss, Objective, normalize
from vlpjax.objectives.masked_image import patch_grid
from vlpjax.objectives.masking import RandomPatches
from vlpjax.objectives.targets import distance


@dataclass(frozen=True)
class NextEmbedding(Objective):
    """NEPA: every token of a causal tower predicts the embedding of the next patch.

    L = -mean over patches of cos(h_{i-1}, sg(z_i)), where z are the tower's own patch embeddings, before positions,
    and h its outputs; the last class token predicts the first patch, and the last patch predicts nothing.

    Attributes:
      tower, image: name of the tower, a causal ViT with a class token, and the field that it reads.
      stop_gradient: whether z carries no gradient; with it the embeddings collapse to one direction.

    Source: "Next-Embedding Prediction Makes Strong Vision Learners", arXiv 2512.16922, equation 1.
    """

    tower: str = "image"
    image: str = "image"
    stop_gradient: bool = True

    def __call__(self, context: Context) -> Loss:
        tower = context.student[self.tower]
        if not tower.causal:
            raise UserError(f"NextEmbedding needs a causal tower, but {self.tower!r} has causal=False.")
        if tower.patch_dropout:
            raise UserError(
                f"NextEmbedding predicts every patch from those before it, but {self.tower!r} leaves patches out: "
                f"patch_dropout={tower.patch_dropout}."
            )
        outputs = context.encode(self.tower, self.image, variant="embedded", embedded=True)
        if "prefix" not in outputs:
            raise UserError(
                f"NextEmbedding needs a class token, which predicts the first patch; {self.tower!r} has none."
            )
        hidden = jnp.concatenate([outputs["prefix"][:, -1:], outputs["tokens"]], axis=1)[:, :-1]  # [B, N, D]
        embedded = outputs["patch_embeddings"]
        return next_embedding_loss(
            hidden, jax.lax.stop_gradient(embedded) if self.stop_gradient else embedded
        )


def next_embedding_loss(predicted: jax.Array, embedded: jax.Array) -> Loss:
    """-cos between what each position predicts and the embedding of the patch after it, both [B, N, D].

    The metric ``spread`` is the variance of the embeddings' directions, which is 0 when they have collapsed.
    """
    errors = distance(predicted, embedded, "cosine")  # [B, N]
    spread = jnp.mean(jnp.var(normalize(embedded), axis=1).sum(axis=-1))  # within an image
    return Loss(jnp.mean(errors) - 1.0, {"spread": jax.lax.stop_gradient(spread)})


@dataclass(frozen=True)
class PositionPrediction(Objective):
    """MP3: every patch, without positions, predicts where it stands; only some patches may be attended to.

    L = mean over all patches of the cross-entropy between a linear layer of its token and its number in reading
    order.  Only the patches that the mask leaves serve as keys and values, the same in every block.

    Attributes:
      mask: which patches are not attended to.
      grid: rows and columns of patches, which are the classes.
      tower, image: name of the tower, a ViT without positions and class tokens, and the field that it reads.
      patch: side of a patch, in pixels.

    Source: "Position Prediction as an Effective Pretraining Strategy", arXiv 2207.07611, section 3.
    """

    mask: RandomPatches
    grid: tuple[int, int]
    tower: str = "image"
    image: str = "image"
    patch: int = 16

    def heads(self) -> dict[str, nn.Module]:
        # Zeros: at the start every position is equally likely, and the loss is log N.
        return {"head": PatchPrediction(math.prod(self.grid), stddev=0.0)}

    def __call__(self, context: Context) -> Loss:
        images = context.read(self.image)
        self._check(context, images)
        seen = ~self.mask(context.row_keys("context", len(images)), self.grid)  # [B, N]
        outputs = context.encode(self.tower, self.image, variant=f"{context.objective}/context", keys=seen)
        logits = context.head("head", outputs["tokens"])  # [B, N, N]
        places = jnp.broadcast_to(jnp.arange(logits.shape[1]), logits.shape[:2])
        errors = optax.softmax_cross_entropy_with_integer_labels(logits, places)
        accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == places)
        return Loss(jnp.mean(errors), {"accuracy": accuracy})

    def _check(self, context: Context, images: jax.Array) -> None:
        grid = patch_grid(images, self.patch, "PositionPrediction")
        if grid != tuple(self.grid):
            raise UserError(f"PositionPrediction.grid is {self.grid}, but the images have {grid} patches.")
        tower = context.student[self.tower]
        if tower.causal or tower.patch_dropout:
            raise UserError(
                f"PositionPrediction asks every patch for its place among all of them, so {self.tower!r} must neither "
                f"count them (causal={tower.causal}) nor leave any out (patch_dropout={tower.patch_dropout})."
            )
        if tower.positions != "none" or tower.pool == "cls" or tower.class_tokens or tower.stem != "linear":
            raise UserError(
                f"PositionPrediction needs a tower that knows no positions: positions='none', no class tokens and "
                f"stem='linear'; {self.tower!r} has positions={tower.positions!r}, pool={tower.pool!r}, "
                f"class_tokens={tower.class_tokens} and stem={tower.stem!r}."
            )
