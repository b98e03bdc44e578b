"""Images between words: an image tower, a connector and a language model that reads both as one sequence.

:class:`VisionLanguageModel` has a decoder behind the connector and gives LLaVA, LLaVA-NeXT and PaliGemma by its
fields.  A prompt holds one placeholder id per image token; :func:`expand_prompts` writes them and
:func:`generate_with_images` answers prompts.  BLIP-2, whose images pass through a Q-Former, is in
:mod:`vlpjax.models.blip2`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vlpjax.data.tiling import NEWLINE, NOTHING, Tiling
from vlpjax.errors import UserError
from vlpjax.mesh import active_layout
from vlpjax.models.decoder import Decoder, prefix_causal
from vlpjax.models.generate import Generation, generate
from vlpjax.models.layers import KeyValues, named
from vlpjax.parallel.attention import Interval
from vlpjax.parallel.frames import place_tokens
from vlpjax.parallel.order import TokenOrder
from vlpjax.parallel.sequence import sequence_ranks


def insert_images(
    embeddings: Float[Array, "batch tokens width"],
    placeholders: Bool[Array, "batch tokens"],
    image_tokens: Float[Array, "batch image_tokens width"],
    *,
    order: TokenOrder | None = None,
    count: int | None = None,
) -> Float[Array, "batch tokens width"]:
    """The k-th placeholder of each row becomes the row's k-th image token.

    Image tokens for which there is no placeholder are left out (rows without an image have none).  A placeholder for
    which there is no image token becomes NaN: a compiled program cannot raise, and this is seen in the first loss.

    Args:
      embeddings, placeholders: of the row's tokens, in ``order``.
      image_tokens: in the row's own order; on a mesh with sequence ranks a part of them lies on each, and they are
        brought to their places by :func:`vlpjax.parallel.frames.place_tokens`.
      order: how the row's tokens lie over the sequence ranks; None is the row's own order.
      count: how many of the image tokens there are to take, the first ones; None is all.
    """
    if order is not None and sequence_ranks(active_layout()) > 1:
        placed = place_tokens(image_tokens.astype(embeddings.dtype), placeholders, order, count)
        return jnp.where(placeholders[..., None], placed, embeddings)
    numbers = placeholders if order is None else order.unpermute(placeholders, 1)
    index = jnp.maximum(jnp.cumsum(numbers, axis=1) - 1, 0)
    index = index if order is None else order.permute(index, 1)
    found = jnp.take_along_axis(
        image_tokens[:, :count], index[..., None], axis=1, mode="fill", fill_value=jnp.nan
    )
    return jnp.where(placeholders[..., None], found.astype(embeddings.dtype), embeddings)


def expand_prompts(
    prompts: Sequence[Sequence[int]], counts: Sequence[Sequence[int]], image_token: int
) -> list[list[int]]:
    """Prompts with one placeholder per image, to prompts with one per image token.

    Args:
      counts: per prompt, the number of tokens of each of its images.

    Raises:
      UserError: a prompt with another number of placeholders than of images.
    """
    if len(prompts) != len(counts):
        raise UserError(f"There are {len(prompts)} prompts, but images of {len(counts)}.")
    expanded = []
    for row, (prompt, images) in enumerate(zip(prompts, counts, strict=True)):
        found = sum(token == image_token for token in prompt)
        if found != len(images):
            raise UserError(
                f"Prompt {row} has the image placeholder {image_token} {found} times, but {len(images)} images."
            )
        left = iter(images)
        expanded.append(
            [token for one in prompt for token in ([one] * next(left) if one == image_token else [one])]
        )
    return expanded


def image_features(
    outputs: Mapping[str, Any], layers: Sequence[int] | None, with_prefix: bool = False
) -> Float[Array, "batch tokens features"]:
    """Of what an image tower gave, the tokens for the connector.

    Args:
      outputs: of :class:`vlpjax.models.vit.ViT`, which was asked for these ``layers`` as ``hidden``.
      layers: blocks whose outputs, feature behind feature, are the image's tokens; None takes the tokens after the
        final norm.
      with_prefix: whether the class token and registers are image tokens too, before the patches.
    """
    patches = outputs["tokens"]
    if layers is None:
        shown = [outputs["prefix"]] if with_prefix and "prefix" in outputs else []
        return jnp.concatenate([*shown, patches], axis=1)
    states = jnp.concatenate([outputs["hidden"][layer] for layer in layers], axis=-1)
    return states if with_prefix else states[:, states.shape[1] - patches.shape[1] :]


class VisionLanguageModel(nn.Module):
    """A decoder that sees images where its prompt has placeholders.

    Image tokens enter as rows of the decoder's own scale: they are not multiplied by ``Decoder.embed_scale``, which
    is why PaliGemma's published code divides them by it first.

    Attributes:
      image: the image tower, a :class:`vlpjax.models.vit.ViT`.
      connector: from its tokens to the decoder's, one of :mod:`vlpjax.models.connectors`.
      decoder: the language model.
      image_token: the id that stands for an image token.
      image_layers, image_prefix: which of the tower's tokens are the image's, as :func:`image_features` takes them.
      tiling: how images of any size are cut; there is then a learned ``image_newline``.  None: one size.
      prefix_lm: whether prompts see all of themselves (PaliGemma, arXiv 2407.07726), so that calls must say how long
        they are.

    Parameters: ``image``, ``connector``, ``decoder``, and with a tiling ``image_newline`` [D].
    """

    image: nn.Module
    connector: nn.Module
    decoder: Decoder
    image_token: int
    image_layers: tuple[int, ...] | None = None
    image_prefix: bool = False
    tiling: Tiling | None = None
    prefix_lm: bool = False

    def setup(self) -> None:
        if self.tiling is not None:
            width = self.decoder.width
            initial = named(nn.initializers.normal(width**-0.5), "embed")
            self.newline = self.param("image_newline", initial, (width,))

    def encode_images(
        self,
        images: Float[Array, "batch *images height width channels"],
        arrangement: Int[Array, "batch image_tokens"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "batch image_tokens width"]:
        """The decoder's rows for each row's images, one after the other.

        Args:
          images: one per row, or several, of which some may be padding at the end.
          arrangement: of :meth:`Tiling.arrangements`; None takes all tokens as they come.
        """
        each = images if images.ndim == 5 else images[:, None]  # [B, I, H, W, C]
        outputs = self.image(each.reshape(-1, *each.shape[2:]), hidden=self.image_layers or (), train=train)
        tokens = self.connector(image_features(outputs, self.image_layers, self.image_prefix))
        tokens = tokens.reshape(each.shape[0], -1, tokens.shape[-1])  # [B, I N, D]
        if arrangement is None:
            return tokens
        if self.tiling is None:
            raise UserError("An arrangement of image tokens was given to a model whose tiling is None.")
        newline = jnp.broadcast_to(self.newline, (tokens.shape[0], 1, tokens.shape[-1])).astype(tokens.dtype)
        count = tokens.shape[1]
        tokens = jnp.concatenate([tokens, newline], axis=1)
        place = jnp.where(
            arrangement == NEWLINE, count, jnp.where(arrangement == NOTHING, count + 1, arrangement)
        )
        arranged: jax.Array = jnp.take_along_axis(
            tokens, place[..., None], axis=1, mode="fill", fill_value=jnp.nan
        )
        return arranged

    def embed(
        self,
        ids: Int[Array, "batch tokens"],
        image_tokens: Float[Array, "batch image_tokens width"] | None = None,
    ) -> Float[Array, "batch tokens width"]:
        """What the decoder takes as ``embeddings``: the words', with the image tokens in place of placeholders."""
        if image_tokens is None:
            return self.decoder.embed(ids)
        placeholders = ids == self.image_token
        # The placeholder may lie behind the vocabulary.
        return insert_images(self.decoder.embed(jnp.where(placeholders, 0, ids)), placeholders, image_tokens)

    def embed_prompts(
        self, ids: jax.Array, images: jax.Array | None = None, arrangement: jax.Array | None = None
    ) -> Float[Array, "batch tokens width"]:
        """:meth:`embed` of the images themselves."""
        return self.embed(ids, None if images is None else self.encode_images(images, arrangement))

    def __call__(
        self,
        ids: Int[Array, "batch tokens"],
        images: Float[Array, "batch *images height width channels"] | None = None,
        prefix: Int[Array, " batch"] | None = None,
        *,
        arrangement: Int[Array, "batch image_tokens"] | None = None,
        positions: Int[Array, "*three #batch tokens"] | None = None,
        segment_ids: Int[Array, "batch tokens"] | None = None,
        interval: Interval | None = None,
        mask: Bool[Array, "#batch tokens keys"] | None = None,
        cache: KeyValues | None = None,
        start: Int[Array, ""] | int = 0,
        hidden: Sequence[int] = (),
        attention: Sequence[int] = (),
        logits: bool = True,
        train: bool = False,
    ) -> dict[str, Any]:
        """Reads texts with images in them.

        Args:
          ids: with as many placeholders in each row as its images have tokens.
          images: of :meth:`encode_images`; None reads text (what follows a cache, or a text without images).
          prefix: how many of each row's first tokens, images among them, see one another, in local layers too; what
            follows sees what stands before it.
          arrangement: of :meth:`encode_images`.
          positions, segment_ids, interval, mask, cache, start, hidden, attention, logits, train: of
            :class:`vlpjax.models.decoder.Decoder`.

        Returns:
          What the decoder does, and ``"image_tokens"`` [B, K, D] or None.

        Raises:
          UserError: a ``prefix`` beside an interval, or none for a model with ``prefix_lm``.
        """
        local_interval = None
        if prefix is not None:
            if interval is not None:
                raise UserError("A prefix and an interval were given; both say what tokens see: give one.")
            interval = prefix_causal(prefix, ids.shape[1])
            local_interval = prefix_causal(prefix, ids.shape[1], self.decoder.window)
        elif self.prefix_lm and images is not None and interval is None and mask is None:
            raise UserError(
                "This model's prompts see all of themselves (prefix_lm), so it needs prefix, their lengths in tokens."
            )
        image_tokens = None if images is None else self.encode_images(images, arrangement, train=train)
        outputs = self.decoder(
            embeddings=self.embed(ids, image_tokens),
            positions=positions,
            segment_ids=segment_ids,
            interval=interval,
            local_interval=local_interval,
            mask=mask,
            cache=cache,
            start=start,
            hidden=hidden,
            attention=attention,
            logits=logits,
            train=train,
        )
        return {**outputs, "image_tokens": image_tokens}


@functools.partial(jax.jit, static_argnames=("model", "method"))
def _apply(model: VisionLanguageModel, variables: Any, method: str, *inputs: Any) -> jax.Array:
    return jnp.asarray(model.apply(variables, *inputs, method=method))


def generate_with_images(
    model: VisionLanguageModel,
    variables: Any,
    prompts: Int[Array, "batch prompt"],
    images: Float[Array, "batch *images height width channels"] | None = None,
    *,
    arrangement: Int[Array, "batch image_tokens"] | None = None,
    **options: Any,
) -> Generation:
    """Continues prompts with images in them.

    Args:
      prompts: with as many placeholders in each row as its images have tokens.
      images, arrangement: of :meth:`VisionLanguageModel.encode_images`.
      options: of :func:`vlpjax.models.generate.generate`; ``prefix_lm`` is the model's unless it is given.

    Raises:
      UserError: a row with another number of placeholders than its images have tokens; and what ``generate`` raises.
    """
    ids = np.asarray(prompts, np.int32)
    options = {"prefix_lm": model.prefix_lm, **options}
    if images is None:
        embeddings = _apply(model, variables, "embed", ids)
    else:
        image_tokens = _apply(model, variables, "encode_images", images, arrangement)
        check_placeholders(ids, model.image_token, _image_tokens(image_tokens.shape[1], images, arrangement))
        embeddings = _apply(model, variables, "embed", ids, image_tokens)
    decoder = {"params": variables["params"]["decoder"]}
    return generate(model.decoder, decoder, jnp.asarray(ids), embeddings=embeddings, **options)


def check_placeholders(ids: np.ndarray, image_token: int, counts: Sequence[Sequence[int]]) -> None:
    """Whether each row has as many placeholders as image tokens, or as the first of its images have (or none).

    Args:
      counts: per row, the tokens of each image; images at the end may be padding.

    Raises:
      UserError: a row for which this does not hold.
    """
    for row, (tokens, images) in enumerate(zip(ids, counts, strict=True)):
        found, sums = int(np.sum(tokens == image_token)), np.cumsum([0, *images]).tolist()
        if found not in sums:
            raise UserError(
                f"Row {row} has the image placeholder {image_token} {found} times, but its images have {sums[-1]} "
                "tokens."
            )


def _image_tokens(count: int, images: Any, arrangement: Any) -> list[list[int]]:
    """Per row, the tokens of each of its images (arranged ones are counted together)."""
    batch = len(images)
    if arrangement is not None:
        return [[int(number)] for number in np.sum(np.asarray(arrangement) != NOTHING, axis=1)]
    each = images.shape[1] if images.ndim == 5 else 1
    return [[count // each] * each] * batch
