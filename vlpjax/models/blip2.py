"""BLIP-2 (arXiv 2301.12597): a Q-Former condenses an image to a few tokens, to match texts or for a language model.

The two stages of the paper are two modules: :class:`ImageQFormer` (with texts, for contrast and matching), and
:class:`Blip2`, whose language model is an encoder-decoder that reads the queries between its words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlpjax.errors import UserError
from vlpjax.models.connectors import LinearConnector
from vlpjax.models.encoder_decoder import EncoderDecoder
from vlpjax.models.qformer import QFormer
from vlpjax.models.vision_language import insert_images


def all_tokens(outputs: dict[str, Any]) -> Float[Array, "batch tokens width"]:
    """What an image tower gave, class tokens and registers before the patches."""
    shown = [outputs["prefix"]] if "prefix" in outputs else []
    return jnp.concatenate([*shown, outputs["tokens"]], axis=1)


class ImageQFormer(nn.Module):
    """The first stage: an image tower and a Q-Former.

    Attributes:
      image: the image tower.
      qformer: with a vocabulary, it reads texts too.
      matching: whether a head says if image and text belong together.

    Parameters: ``image``, ``qformer``, ``matching_head``.
    """

    image: nn.Module
    qformer: QFormer
    matching: bool = False

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "batch height width channels"] | None = None,
        ids: Int[Array, "batch length"] | None = None,
        *,
        mask: str = "bidirectional",
        lengths: Int[Array, " batch"] | None = None,
        hidden: Sequence[int] = (),
        train: bool = False,
    ) -> dict[str, Any]:
        """Reads images, texts or both.

        Args:
          ids, mask, lengths, hidden: of :class:`vlpjax.models.qformer.QFormer`.

        Returns:
          What the Q-Former does; ``"image_tokens"`` [B, N, W] of the image tower; and with ``matching``, for images
          and texts under the mask ``"bidirectional"``, ``"matching"`` [B, 2]: float32 logits of "no" and "yes".
        """
        image_tokens = None if images is None else all_tokens(self.image(images, train=train))
        outputs = self.qformer(image_tokens, ids, mask=mask, lengths=lengths, hidden=hidden, train=train)
        if image_tokens is not None:
            outputs = {**outputs, "image_tokens": image_tokens}
        if self.matching and image_tokens is not None and ids is not None and mask == "bidirectional":
            head = LinearConnector(2, name="matching_head")
            outputs["matching"] = jnp.mean(head(outputs["tokens"]).astype(jnp.float32), axis=1)
        return outputs


class Blip2(nn.Module):
    """The second stage: the queries, projected, stand among the words that an encoder-decoder reads.

    Attributes:
      image: the image tower.
      qformer: without a vocabulary.
      language: the language model.
      image_token: the id that stands for a query; a text has ``qformer.queries`` of them.

    Parameters: ``image``, ``qformer``, ``projection``, ``language``.
    """

    image: nn.Module
    qformer: QFormer
    language: EncoderDecoder
    image_token: int

    def setup(self) -> None:
        self.projection = LinearConnector(self.language.width, dtype=self.language.dtype)

    def encode_images(
        self, images: Float[Array, "batch height width channels"], *, train: bool = False
    ) -> dict[str, Any]:
        """``"image_tokens"`` [B, N, W] of the tower, ``"queries"`` [B, Q, E] of the Q-Former, and ``"tokens"``
        [B, Q, D], which the language model reads."""
        image_tokens = all_tokens(self.image(images, train=train))
        queries = self.qformer(image_tokens, train=train)["tokens"]
        return {"image_tokens": image_tokens, "queries": queries, "tokens": self.projection(queries)}

    def __call__(
        self,
        images: Float[Array, "batch height width channels"],
        ids: Int[Array, "batch length"],
        outputs: Int[Array, "batch output_length"],
        *,
        lengths: Int[Array, " batch"] | None = None,
        hidden: Sequence[int] = (),
        decoder_hidden: Sequence[int] = (),
        train: bool = False,
    ) -> dict[str, Any]:
        """Logits of what follows each token of ``outputs``, of an image and a text.

        Args:
          ids: with a placeholder per query; a row with more of them becomes NaN.
          outputs, lengths, hidden, decoder_hidden: of :class:`vlpjax.models.encoder_decoder.EncoderDecoder`.

        Returns:
          What the encoder-decoder does, and ``"image"``, what :meth:`encode_images` does.
        """
        if not self.qformer.queries <= ids.shape[1]:
            raise UserError(
                f"The texts are {ids.shape[1]} ids long, but the {self.qformer.queries} queries alone need as many."
            )
        seen = self.encode_images(images, train=train)
        if lengths is None:
            lengths = jnp.sum(ids != self.language.pad_id, axis=-1)
        placeholders = ids == self.image_token
        words = self.language.embed(jnp.where(placeholders, 0, ids))
        tokens: jax.Array = insert_images(words, placeholders, seen["tokens"])
        encoded = self.language.encode(tokens=tokens, lengths=lengths, hidden=hidden, train=train)
        decoded = self.language.decode(
            outputs, memory=encoded["tokens"], memory_lengths=lengths, hidden=decoder_hidden, train=train
        )
        return {**decoded, "encoder": encoded, "image": seen}
