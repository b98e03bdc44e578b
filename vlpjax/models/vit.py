"""The Vision Transformer (arXiv 2010.11929), with what published towers and pretraining have added to it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vlpjax.errors import UserError
from vlpjax.models.heads import Projection
from vlpjax.models.layers import Block, dense, named, norm
from vlpjax.models.packing import Packed
from vlpjax.models.patches import PatchEmbedding
from vlpjax.models.pooling import AttentionPool, mean_pool
from vlpjax.models.positions import Rotation
from vlpjax.models.positions_2d import (
    grid_positions,
    pair,
    resize_positions,
    rotation_2d,
    sample_positions,
    sincos_positions,
)
from vlpjax.models.stack import Stack
from vlpjax.parallel.attention import Interval, causal, segments

POOLS = ("cls", "mean", "map", "none")
POSITIONS = ("learned", "sincos", "rotary", "none")


class ViT(nn.Module):
    """Images, clips or packed images of any shape to features.

    The tokens inside the tower are, in this order, class tokens, registers and patches; the first two are called the
    prefix.

    Attributes:
      image_size: height and width in pixels, or both as one number.
      patch: height and width of a patch in pixels, or both as one number.
      patch_crop: leave out the pixels at the bottom and at the right that fill no patch (SigLIP's So400m/14 sees 378 of
        384 pixels); otherwise they are an error.
      patch_base: size of the patches that the projection's kernel is stored for; it is resized to ``patch`` when used
        ("FlexiViT", arXiv 2212.08013).  None is ``patch``.
      channels: of the images.
      frames, tubelet: frames of a clip, and frames per patch ("ViViT", arXiv 2103.15691).  One frame is an image.
      stem: ``"linear"`` projects each patch; ``"conv"`` reaches the same grid through 3x3 convolutions
        ("Early Convolutions Help Transformers See Better", arXiv 2106.14881) with ``stem_channels`` (by
        default doubling up to ``width``), ``stem_strides`` (by default all 2; their product is ``patch``) and
        ``stem_norm`` (``"batch"``, ``"layer"`` or ``"rms"``).
      patch_bias: whether the patch projection has a bias (CLIP's has none).
      width, depth, heads: of the transformer.
      mlp_ratio: the MLP's hidden width over ``width``, unless ``mlp_dim`` gives it.
      class_tokens: learned tokens before the patches; None is 1 if ``pool`` is ``"cls"`` and else 0.
      registers: further learned tokens, without positions ("Vision Transformers Need Registers", arXiv 2309.16588).
      positions: ``"learned"`` (a table that is added), ``"sincos"`` (a fixed one), ``"rotary"`` (queries and keys turn)
        or ``"none"``.
      position_grid: rows and columns of the learned table, where they differ from the image's.
      position_prefix: whether the learned table has rows for the class tokens.
      position_method, position_antialias: how the learned table is resized to another grid: ``"bicubic"`` or
        ``"bilinear"``.
      resize_positions: whether images of another size than ``image_size`` are taken.
      sincos_form: see :func:`vlpjax.models.positions_2d.sincos_positions`.
      rotary_form, rotary_base: see :func:`vlpjax.models.positions_2d.rotation_2d`.
      rotary_rescale: in training, rotary coordinates are multiplied by a factor that is log-uniform between 1 /
        ``rotary_rescale`` and ``rotary_rescale``, one for the whole batch (DINOv3, arXiv 2508.10104); 1 does nothing.
      causal: whether a token sees itself and the tokens before it only, class tokens first ("NEPA", arXiv 2512.16922).
      segments: images per row of packed images that come without grids.
      pool: ``"cls"`` (the first class token), ``"mean"`` (of the patches), ``"map"`` (attention with a learned query
        to the patches), or ``"none"``.
      pooler: a dense layer with tanh on what was pooled, as in the ViT of `transformers`.
      embedding: width of the joint space that ``"embedding"`` is projected into; None projects nothing.
      projection_bias: whether that projection has a bias, as classifiers have.
      mask_token: whether there is a learned token for patches that are masked ("BEiT", arXiv 2106.08254; DINOv2, arXiv
        2304.07193).
      pre_norm: norm before the first block, as in CLIP.
      final_norm: norm of all tokens after the last block, before pooling.
      pool_norm: norm of what was pooled (CLIP, which has no ``final_norm``; timm's ``fc_norm``).
      norm: ``"layer"`` or ``"rms"``, and its ``epsilon``.
      qk_norm: kind of norm on each head's queries and keys (arXiv 2302.05442), or None.
      layer_scale: initial value of a learned factor per feature at each branch's end (arXiv 2103.17239), or None.
      activation: of the MLPs; ``gated`` makes them SwiGLU (with ``"silu"``) or GeGLU (arXiv 2002.05202).
      qkv_bias, out_bias, mlp_bias: whether the blocks' projections have biases.
      drop_path: in training, the rate at which the last block's branches are skipped; it grows linearly from 0 at the
        first block (arXiv 1603.09382).
      dropout: in training, share of each branch's output that is zeroed.
      patch_dropout: in training, share of the patch tokens that is left out ("FLIP", arXiv 2212.00794);
        positions are added before, the prefix always stays.
      scan: one program for all blocks, with stacked parameters; ``remat``: a key of
        :data:`vlpjax.models.stack.REMAT`.
      dtype: compute type; None is float32.

    Parameters: ``patches/projection``, ``position_embedding`` [1, class tokens + patches, D], ``class_token`` and
    ``registers`` [1, count, D], ``pre_norm``, ``block_{n}`` (or ``blocks``), ``final_norm``, ``pool_head`` (``query``,
    ``attention``, ``mlp_norm``, ``mlp``), ``pool_norm``, ``pooler``, ``projection/kernel``, ``mask_token``.
    """

    image_size: int | tuple[int, int] = 224
    patch: int | tuple[int, int] = 16
    patch_crop: bool = False
    patch_base: int | tuple[int, int] | None = None
    channels: int = 3
    frames: int = 1
    tubelet: int = 1
    stem: str = "linear"
    stem_channels: tuple[int, ...] = ()
    stem_strides: tuple[int, ...] = ()
    stem_norm: str = "batch"
    patch_bias: bool = False
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    mlp_dim: int | None = None
    class_tokens: int | None = None
    registers: int = 0
    positions: str = "learned"
    position_grid: tuple[int, int] | None = None
    position_prefix: bool = True
    position_method: str = "bicubic"
    position_antialias: bool = False
    resize_positions: bool = False
    sincos_form: str = "big_vision"
    rotary_form: str = "patches"
    rotary_base: float = 10000.0
    rotary_rescale: float = 1.0
    causal: bool = False
    segments: int = 1
    pool: str = "cls"
    pooler: bool = False
    embedding: int | None = None
    projection_bias: bool = False
    mask_token: bool = False
    pre_norm: bool = True
    final_norm: bool = True
    pool_norm: bool = False
    norm: str = "layer"
    epsilon: float = 1e-6
    qk_norm: str | None = None
    layer_scale: float | None = None
    activation: str = "gelu"
    gated: bool = False
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    drop_path: float = 0.0
    dropout: float = 0.0
    patch_dropout: float = 0.0
    scan: bool = False
    remat: str = "none"
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        images: Float[Array, "batch *frames height width channels"] | Mapping[str, jax.Array],
        *,
        masked: Bool[Array, "batch patches"] | None = None,
        keep: Int[Array, "batch kept"] | None = None,
        keys: Bool[Array, "batch patches"] | None = None,
        embedded: bool = False,
        hidden: tuple[int, ...] = (),
        attention: tuple[int, ...] = (),
        train: bool = False,
    ) -> dict[str, Any]:
        """Encodes a batch.

        Args:
          images: [B, H, W, C]; clips [B, T, H, W, C] if the tower takes several frames; or rows of patches of S images
            each: the fields of :class:`vlpjax.models.packing.Packed`.
          masked: patches that the mask token stands for; their pixels are not seen.
          keep: the patches that are encoded, in this order, each with its own position; the others are left out, and
            the tokens that come back are of these (arXiv 2111.06377).  The prefix always stays.
          keys: the patches that tokens attend to, in every block; all of them keep attending (arXiv 2207.07611).  The
            prefix is always attended to.
          embedded: also return the patches as they were before masking and positions.
          hidden: blocks to read the tokens after out of; negative numbers count from the end.
          attention: blocks to read the attention weights out of.

        Returns:
          ``"tokens"`` [B, N, D] after the final norm (patches only), ``"prefix"`` [B, P, D] likewise if there are class
          tokens or registers, ``"pooled"`` [B, D], ``"embedding"`` [B, E] projected into the joint space (equal to
          ``"pooled"`` without a projection).  Packed, pooled and embedded are [B, S, D] and [B, S, E], zero where a
          row has no such image, and tokens of padding mean nothing.  Without pooling the last two are absent.
          ``"patch_embeddings"`` [B, N, D] of all patches, ``"hidden"`` {block: [B, P + N, D]} and ``"attention"``
          {block: [B, H, P + N, P + N]} if they were asked for.

        Raises:
          UserError: images of another size than ``image_size``, or settings that there are not.
        """
        self._check_settings()
        packed = self._packed(images) if isinstance(images, Mapping) else None
        tokens = PatchEmbedding(
            patch=self.patch,
            width=self.width,
            stem=self.stem,
            channels=self.stem_channels,
            strides=self.stem_strides,
            stem_norm=self.stem_norm,
            bias=self.patch_bias,
            dtype=self.dtype,
            tubelet=self.tubelet,
            base=self.patch_base,
            name="patches",
        )(self._checked(images) if packed is None else packed.patches, train=train)  # [B, N, D]
        patches, tokens = tokens, self._mask(tokens, masked)
        size = pair(self.image_size) if isinstance(images, Mapping) else images.shape[-3:-1]
        grid = self._grid((size[0], size[1]))
        rotation = self._rotation(grid, packed, train)
        tokens = self._add_positions(tokens, grid, packed)  # [B, P + N, D]
        if keep is not None:
            self._check_keep(keep, packed)
        elif train and self.patch_dropout:
            keep = self._drawn_patches(tokens)
        if keep is not None:
            tokens = self._kept(tokens, keep)  # [B, P + K, D]
            rotation = None if rotation is None else Rotation(*(self._kept(x, keep) for x in rotation))
        if self.pre_norm:
            tokens = self._norm("pre_norm", tokens)
        shared: dict[str, Any] = {} if rotation is None else {"rotation": rotation}
        if keys is not None:
            shared["mask"] = self._key_mask(keys, keep, tokens.shape[1])
        interval = self._interval(tokens.shape[1], packed)
        stacked = Stack(
            self._block(), self.depth, scan=self.scan, remat=self.remat, drop_path=self.drop_path
        )(tokens, interval, hidden=hidden, weights=attention, train=train, **shared)
        outputs = self._outputs(stacked.tokens, packed)
        if embedded:
            outputs["patch_embeddings"] = patches
        if hidden:
            outputs["hidden"] = stacked.hidden
        if attention:
            outputs["attention"] = stacked.weights
        return outputs

    # --- settings ---------------------------------------------------------------------------------------------

    @property
    def _classes(self) -> int:
        return int(self.pool == "cls") if self.class_tokens is None else self.class_tokens

    @property
    def _prefix(self) -> int:
        return self._classes + self.registers

    @property
    def _hidden_width(self) -> int:
        return round(self.mlp_ratio * self.width) if self.mlp_dim is None else self.mlp_dim

    def _check_settings(self) -> None:
        if self.pool not in POOLS:
            raise UserError(f"ViT.pool is {self.pool!r}; there are {', '.join(map(repr, POOLS))}.")
        if self.positions not in POSITIONS:
            raise UserError(
                f"ViT.positions is {self.positions!r}; there are {', '.join(map(repr, POSITIONS))}."
            )
        if self.pool == "cls" and not self._classes:
            raise UserError("ViT.pool is 'cls', which needs a class token, but class_tokens is 0.")
        if self.pool == "none" and (self.pool_norm or self.pooler or self.embedding is not None):
            raise UserError(
                "ViT.pool is 'none', so there is nothing for pool_norm, pooler or embedding to act on."
            )
        if self.frames % self.tubelet:
            raise UserError(f"ViT.frames is {self.frames}, which tubelet={self.tubelet} does not divide.")
        if self.frames > self.tubelet and self.positions in ("sincos", "rotary"):
            raise UserError(
                f"ViT.positions is {self.positions!r}, which knows rows and columns but not time; clips of more than "
                "one tubelet take 'learned'."
            )
        if self.rotary_rescale < 1 or (self.rotary_rescale > 1 and self.positions != "rotary"):
            raise UserError(
                f"ViT.rotary_rescale is {self.rotary_rescale} with positions={self.positions!r}; it is at least 1, and "
                "more than 1 only with 'rotary'."
            )

    def _checked(self, images: Any) -> jax.Array:
        """Images or clips of the shape that the tower takes."""
        clip = self.frames > 1
        if images.ndim != 4 + clip or (clip and images.shape[1] != self.frames):
            wanted = (
                f"[batch, {self.frames}, height, width, channels]"
                if clip
                else "[batch, height, width, channels]"
            )
            raise UserError(f"The image tower takes {wanted}, but the batch has {images.shape}.")
        if images.shape[-1] != self.channels:
            raise UserError(
                f"The image tower takes {self.channels} channels, but the batch has {images.shape[-1]}."
            )
        if images.shape[-3:-1] != pair(self.image_size) and not self.resize_positions:
            raise UserError(
                f"The image tower takes {self.image_size} pixels, but the batch has {images.shape[-3:-1]}; "
                "resize_positions=True takes other sizes."
            )
        if self.patch_crop:
            (rows, columns), patch = self._grid(images.shape[-3:-1]), pair(self.patch)
            images = images[..., : rows * patch[0], : columns * patch[1], :]
        return images

    def _packed(self, inputs: Mapping[str, jax.Array]) -> Packed:
        if self.frames > 1 or self.patch_dropout:
            raise UserError("Packed images take no clips and no patch_dropout.")
        packed = Packed.of(inputs, math.prod(pair(self.patch)) * self.channels, self.segments)
        if self._prefix and packed.grids.shape[1] > 1:
            raise UserError(
                f"Rows of up to {packed.grids.shape[1]} packed images have no class tokens and no registers, but the "
                f"tower has {self._prefix}; pool by 'mean' or 'map', or pack one image per row."
            )
        return packed

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches of an image."""
        patch = pair(self.patch)
        return size[0] // patch[0], size[1] // patch[1]

    def _block(self) -> functools.partial[Block]:
        return functools.partial(
            Block,
            heads=self.heads,
            mlp_dim=self._hidden_width,
            depth=self.depth,
            qk_norm=self.qk_norm,
            qkv_bias=self.qkv_bias,
            out_bias=self.out_bias,
            mlp_bias=self.mlp_bias,
            activation=self.activation,
            gated=self.gated,
            layer_scale=self.layer_scale,
            dropout=self.dropout,
            norm=self.norm,
            epsilon=self.epsilon,
            dtype=self.dtype,
        )

    # --- steps ------------------------------------------------------------------------------------------------

    def _norm(self, name: str, tokens: jax.Array) -> jax.Array:
        normed: jax.Array = norm(name, self.norm, self.dtype, self.epsilon)(tokens)
        return normed

    def _mask(self, tokens: jax.Array, masked: jax.Array | None) -> jax.Array:
        """Puts the mask token where patches are masked."""
        if not self.mask_token:
            if masked is not None:
                raise UserError(
                    "The image tower was told which patches are masked, but has mask_token=False."
                )
            return tokens
        initial = named(nn.initializers.normal(self.width**-0.5), None, None, "embed")
        token = self.param("mask_token", initial, (1, 1, self.width)).astype(tokens.dtype)
        return tokens if masked is None else jnp.where(masked[..., None], token, tokens)

    def _with_prefix(self, patches: jax.Array, value: float) -> jax.Array:
        """Entries per patch [B, N, ...], with entries of ``value`` for the prefix before them."""
        widths = [(0, 0), (self._prefix, 0), *[(0, 0)] * (patches.ndim - 2)]
        return jnp.pad(patches, widths, constant_values=value)

    def _rotation(self, grid: tuple[int, int], packed: Packed | None, train: bool) -> Rotation | None:
        """Angles per token; the prefix does not turn."""
        if self.positions != "rotary":
            return None
        positions = grid_positions(*grid)[None] if packed is None else packed.positions
        grids = jnp.asarray(grid)[None, None] if packed is None else packed.token_grids
        scale: jax.Array | float = 1.0
        if train and self.rotary_rescale > 1:
            scale = self.rotary_rescale ** jax.random.uniform(self.make_rng("dropout"), minval=-1.0)
        head_dim = self.width // self.heads
        rotation = rotation_2d(positions, grids, head_dim, self.rotary_base, self.rotary_form, scale)
        return Rotation(self._with_prefix(rotation.cos, 1.0), self._with_prefix(rotation.sin, 0.0))

    def _add_positions(self, tokens: jax.Array, grid: tuple[int, int], packed: Packed | None) -> jax.Array:
        """Adds positions to the patches, and puts the prefix before them."""
        classes: jax.Array | float = 0.0
        if self.positions == "learned":
            classes, patches = self._learned_positions(grid, packed)
            tokens = tokens + patches.astype(tokens.dtype)
        elif self.positions == "sincos":
            where = grid_positions(*grid)[None] if packed is None else packed.positions
            tokens = tokens + sincos_positions(where, self.width, self.sincos_form).astype(tokens.dtype)
        prefix = []
        if self._classes:
            token = self._prefix_tokens("class_token", self._classes, tokens)
            prefix.append(token + jnp.asarray(classes, tokens.dtype))
        if self.registers:
            prefix.append(self._prefix_tokens("registers", self.registers, tokens))
        return jnp.concatenate([*prefix, tokens], axis=1) if prefix else tokens

    def _learned_positions(
        self, grid: tuple[int, int], packed: Packed | None
    ) -> tuple[jax.Array | float, jax.Array]:
        """Rows of the table for the class tokens (0 if it has none), and for the patches."""
        rows, columns = self.position_grid or self._grid(pair(self.image_size))
        times = self.frames // self.tubelet
        classes = self._classes if self.position_prefix else 0
        shape = (1, classes + times * rows * columns, self.width)
        initial, axes = nn.initializers.normal(self.width**-0.5), (None, "position", "embed")
        table = self.param("position_embedding", named(initial, *axes), shape)
        patches = table[:, classes:].reshape(times, rows, columns, self.width)
        how = (self.position_method, self.position_antialias)
        if packed is None:
            patches = resize_positions(patches, grid, *how).reshape(1, -1, self.width)
        else:
            patches = sample_positions(patches[0], packed.positions, packed.token_grids, *how)
        return table[:, :classes] if classes else 0.0, patches

    def _prefix_tokens(self, name: str, count: int, tokens: jax.Array) -> jax.Array:
        """``count`` learned tokens for every row."""
        initial = named(nn.initializers.normal(self.width**-0.5), None, None, "embed")
        learned = self.param(name, initial, (1, count, self.width)).astype(tokens.dtype)
        return jnp.broadcast_to(learned, (tokens.shape[0], count, self.width))

    def _drawn_patches(self, tokens: jax.Array) -> jax.Array:
        """int(N (1 - patch_dropout)) random patches per image, in their order: [B, K]."""
        batch, count = tokens.shape[0], tokens.shape[1] - self._prefix
        kept = max(1, int(count * (1 - self.patch_dropout)))
        noise = jax.random.uniform(self.make_rng("dropout"), (batch, count))
        return jnp.sort(jnp.argsort(noise, axis=1)[:, :kept], axis=1)

    def _check_keep(self, keep: jax.Array, packed: Packed | None) -> None:
        if packed is not None or keep.ndim != 2:
            raise UserError(
                f"The image tower was told which patches to keep by an array of shape {keep.shape}"
                f"{'' if packed is None else ' for packed images'}; it takes [batch, kept] for images of one size."
            )

    def _kept(self, entries: jax.Array, keep: jax.Array) -> jax.Array:
        """Of entries per token [B or 1, P + N, ...] those of the prefix and of the kept patches."""
        entries = jnp.broadcast_to(entries, (keep.shape[0], *entries.shape[1:]))
        chosen = keep.reshape(*keep.shape, *[1] * (entries.ndim - 2))
        patches = jnp.take_along_axis(entries[:, self._prefix :], chosen, axis=1)
        return jnp.concatenate([entries[:, : self._prefix], patches], axis=1)

    def _key_mask(self, keys: jax.Array, keep: jax.Array | None, tokens: int) -> jax.Array:
        """Which tokens are attended to, the same for all queries: [B, P + N, P + N]."""
        seen = self._with_prefix(keys, 1)
        seen = seen if keep is None else self._kept(seen, keep)
        return jnp.broadcast_to(seen[:, None], (len(seen), tokens, tokens))

    def _interval(self, tokens: int, packed: Packed | None) -> Interval | None:
        """What each token sees."""
        if packed is None:
            return causal(tokens) if self.causal else None
        if self.causal:
            raise UserError("A causal image tower takes no packed images.")
        return segments(self._with_prefix(packed.segment_ids, 1))

    def _outputs(self, tokens: jax.Array, packed: Packed | None) -> dict[str, Any]:
        """Norms and pools what the last block gave."""
        if self.final_norm:
            tokens = self._norm("final_norm", tokens)
        prefix, tokens = tokens[:, : self._prefix], tokens[:, self._prefix :]
        outputs: dict[str, Any] = {"tokens": tokens}
        if self._prefix:
            outputs["prefix"] = prefix
        if self.pool == "none":
            return outputs
        members = None if packed is None else packed.members
        if self.pool == "cls":
            pooled = prefix[:, 0] if members is None else prefix[:, :1]
        elif self.pool == "mean":
            pooled = mean_pool(tokens, members)
        else:
            head = AttentionPool(
                self.heads,
                self._hidden_width,
                self.activation,
                self.norm,
                self.epsilon,
                self.dtype,
                self.gated,
                name="pool_head",
            )
            pooled = head(tokens, members)
        if self.pool_norm:
            pooled = self._norm("pool_norm", pooled)
        if self.pooler:
            axes, stddev = ("embed", None), self.width**-0.5
            pooled = jnp.tanh(dense(self.width, axes, stddev=stddev, name="pooler", dtype=self.dtype)(pooled))
        embedding = pooled
        if self.embedding is not None:
            project = Projection(self.embedding, self.dtype, self.projection_bias, name="projection")
            embedding = project(pooled)  # [B, E]
        if members is not None:
            present = members.any(axis=-1)[..., None]
            pooled, embedding = jnp.where(present, pooled, 0), jnp.where(present, embedding, 0)
        return {**outputs, "pooled": pooled, "embedding": embedding}
