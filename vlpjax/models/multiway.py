"""The multiway transformer: one self-attention for images and texts, and an MLP ("expert") for each of the two.

Source: "Image as a Foreign Language" (BEiT-3), arXiv 2208.10442; "VLMo", arXiv 2111.02358; in the form of "M2-Encoder",
arXiv 2401.15896.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from vlpjax.errors import UserError
from vlpjax.mesh import constrain
from vlpjax.models.embedding import Embedding
from vlpjax.models.heads import Projection
from vlpjax.models.layers import Attention, Mlp, named, norm
from vlpjax.models.patches import PatchEmbedding
from vlpjax.parallel.attention import Interval, prefix

IMAGE, TEXT, JOINT = "image", "text", "joint"


class MultiwayBlock(nn.Module):
    """A pre-norm block whose attention is everyone's and whose MLP, with the norm before it, is an expert's.

    Attributes:
      expert: whose MLP is used; parameters are ``<expert>_norm`` and ``<expert>_mlp``.
      heads, mlp_dim: of attention and MLP.
      index: of the layer, from 1: values and what writes into the residual stream start smaller by the root of twice
        the index.
      epsilon: of norms.
      dtype: compute type.
    """

    expert: str
    heads: int
    mlp_dim: int
    index: int
    epsilon: float = 1e-6
    dtype: Any = None

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "batch tokens width"], interval: Interval | None = None
    ) -> Float[Array, "batch tokens width"]:
        """One block."""
        tokens = constrain(tokens, "frames", None, "activation")
        normed = norm("attention_norm", "layer", self.dtype, self.epsilon)(tokens)
        attention = Attention(
            self.heads, depth=self.index, value_gain=(2 * self.index) ** -0.5, epsilon=self.epsilon, dtype=self.dtype,
            name="attention",
        )  # fmt: skip
        tokens = tokens + attention(normed, interval).tokens
        normed = norm(f"{self.expert}_norm", "layer", self.dtype, self.epsilon)(tokens)
        mlp = Mlp(self.mlp_dim, self.index, dtype=self.dtype, name=f"{self.expert}_mlp")
        out: jax.Array = tokens + mlp(normed)
        return out


class Multiway(nn.Module):
    """One tower for images and texts, named twice by an objective.

    Each modality passes ``depth`` layers with its own expert, then ``joint_depth`` layers whose expert is shared.
    There is a projection into a joint space before and one after these last layers.

    Attributes:
      image_size, patch: of square images.
      vocabulary, length: of texts.
      width, depth, joint_depth, heads: of the transformer.
      mlp_ratio: the MLPs' hidden width over ``width``.
      embedding: width of both joint spaces.
      pad_id: the id that fills texts up, at their end.
      epsilon: of norms.
      remat: compute blocks again in the backward pass instead of keeping what is inside.
      dtype: compute type; None is float32.
    """

    image_size: int = 224
    patch: int = 16
    vocabulary: int = 115_244
    length: int = 52
    width: int = 768
    depth: int = 9
    joint_depth: int = 3
    heads: int = 12
    mlp_ratio: float = 4.0
    embedding: int = 768
    pad_id: int = 0
    epsilon: float = 1e-6
    remat: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        inputs: Float[Array, "batch height width channels"] | Int[Array, "batch length"],
        *,
        train: bool = False,
    ) -> dict[str, jax.Array]:
        """Encodes a batch of images (four dimensions) or of padded texts (two).

        Returns:
          ``"tokens"`` [B, N, D] after the last norm, ``"pooled"`` [B, D] of the class token, ``"embedding"`` [B, E]
          made of it, and ``"early_embedding"`` [B, E] made of the class token before the joint layers.

        Raises:
          UserError: inputs that are neither, of another size, or too long.
        """
        if inputs.ndim == 4:
            expert, interval, tokens = IMAGE, None, self._patches(inputs, train)
        elif inputs.ndim == 2:
            expert, tokens = TEXT, self._words(inputs)
            interval = prefix(1 + jnp.sum(inputs != self.pad_id, axis=1), tokens.shape[1])
        else:
            raise UserError(
                f"A multiway tower takes images [B, H, W, C] or texts [B, L], not an array of shape {inputs.shape}."
            )
        early = tokens
        block = nn.remat(MultiwayBlock) if self.remat else MultiwayBlock
        for index in range(self.depth + self.joint_depth):
            if index == self.depth:
                early = tokens
            used = expert if index < self.depth else JOINT
            tokens = block(
                expert=used, heads=self.heads, mlp_dim=round(self.mlp_ratio * self.width), index=index + 1,
                epsilon=self.epsilon, dtype=self.dtype, name=f"block_{index}",
            )(tokens, interval)  # fmt: skip
        early = tokens if self.joint_depth == 0 else early
        tokens = norm("final_norm", "layer", self.dtype, self.epsilon)(tokens)
        before = norm("early_norm", "layer", self.dtype, self.epsilon)(early[:, 0])

        def project(name: str, x: jax.Array) -> jax.Array:
            projected: jax.Array = Projection(self.embedding, self.dtype, name=f"{expert}_{name}")(x)
            return projected

        return {
            "tokens": tokens[:, 1:],
            "pooled": tokens[:, 0],
            "embedding": project("projection", tokens[:, 0]),
            "early_embedding": project("early_projection", before),
        }

    def _patches(self, images: jax.Array, train: bool) -> jax.Array:
        """Class token and patches with their positions."""
        if images.shape[1:3] != (self.image_size, self.image_size):
            raise UserError(
                f"The tower takes {self.image_size} pixels, but the batch has {images.shape[1:3]}."
            )
        embed = PatchEmbedding(
            patch=self.patch, width=self.width, stem="linear", channels=(), strides=(), stem_norm="batch",
            bias=True, dtype=self.dtype, tubelet=1, base=None, name="patches",
        )  # fmt: skip
        return self._with_class(IMAGE, embed(images, train=train), (self.image_size // self.patch) ** 2)

    def _words(self, ids: jax.Array) -> jax.Array:
        """Class token and token embeddings with their positions."""
        if ids.shape[1] > self.length:
            raise UserError(f"The tower takes {self.length} tokens, but the batch has {ids.shape[1]}.")
        table = named(nn.initializers.normal(0.02), "vocabulary", "embed")
        embed = Embedding(
            self.vocabulary, self.width, dtype=self.dtype, embedding_init=table, name="token_embedding"
        )
        return self._with_class(TEXT, embed(ids), self.length)

    def _with_class(self, kind: str, tokens: jax.Array, places: int) -> jax.Array:
        initial = named(nn.initializers.normal(0.02), "position", "embed")
        positions = self.param(f"{kind}_position_embedding", initial, (places, self.width))
        tokens = tokens + positions[: tokens.shape[1]].astype(tokens.dtype)
        initial = named(nn.initializers.normal(0.02), None, None, "embed")
        first = self.param(f"{kind}_class_token", initial, (1, 1, self.width)).astype(tokens.dtype)
        return jnp.concatenate([jnp.broadcast_to(first, (tokens.shape[0], 1, self.width)), tokens], axis=1)
