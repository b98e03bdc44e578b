"""Next-token prediction where some of the tokens are seen: images and video frames between words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from vlpjax.models.towers import Towers
from vlpjax.models.video import encode_frames
from vlpjax.models.vision_language import image_features, insert_images
from vlpjax.objectives.base import Context
from vlpjax.objectives.next_token import NextToken
from vlpjax.parallel.order import TokenOrder


@dataclass(frozen=True)
class VisualNextToken(NextToken):
    """Cross-entropy of every word given the words and the frames before it.

    The k-th placeholder of a row stands for the k-th token that the connector makes of the row's frames, in their
    order.  Rows with fewer frames than there is room for are filled up at the end; no placeholder stands for these.
    Words that follow a frame are asked for, as much as ``weight_field`` says; placeholders are not.

    On a mesh with sequence ranks, frames are dealt out over them and encoded where they lie, and only what the
    connector makes of them moves (:mod:`vlpjax.parallel.frames`).

    Attributes:
      image: name of the tower that encodes a frame, a :class:`vlpjax.models.vit.ViT`.
      connector: name of the tower from its tokens to the decoder's (:mod:`vlpjax.models.connectors`).
      image_field: of the batch; frames [B, F, H, W, C], of floats or bytes.
      placeholder: the id that stands for a visual token; it may lie behind the vocabulary.
      image_layers: blocks of the image tower whose outputs, feature behind feature, the connector takes (LLaVA takes
        ``(-2,)``, the last but one); None takes its tokens after the final norm.
      frames_at_once: of each row, that a device encodes at once (:func:`vlpjax.models.video.encode_frames`).

    Source: "Visual Instruction Tuning" (LLaVA), arXiv 2304.08485; "LongVILA", arXiv 2408.10188.
    """

    image: str = "image"
    connector: str = "connector"
    image_field: str = "video"
    placeholder: int = -1
    image_layers: tuple[int, ...] | None = None
    frames_at_once: int = 8

    def batch_axes(self) -> dict[str, tuple[str | None, ...]]:
        """Frames lie over the sequence ranks from the start."""
        return {self.image_field: ("batch", "sequence")}

    def _asked(self, labels: jax.Array) -> jax.Array:
        return labels != self.placeholder

    def given(self, context: Context, inputs: jax.Array, order: TokenOrder | None) -> dict[str, Any]:
        """The embeddings of words, with what the connector makes of the row's frames in place of placeholders."""
        frames, towers = context.read(self.image_field), context.student

        def encode(towers: Towers, images: jax.Array) -> jax.Array:
            layers = {"hidden": self.image_layers} if self.image_layers else {}
            outputs = towers.call(self.image, images, **layers, train=context.train)
            features = image_features(outputs, self.image_layers)
            tokens: jax.Array = towers.call(self.connector, features, train=context.train)
            return tokens

        visual, count = encode_frames(towers, encode, frames, self.frames_at_once)
        seen = inputs == self.placeholder
        embeddings = towers[self.decoder].embed(jnp.where(seen, 0, inputs))
        return {"embeddings": insert_images(embeddings, seen, visual, order=order, count=count)}
