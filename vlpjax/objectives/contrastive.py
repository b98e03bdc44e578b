"""Image-text contrastive losses: the softmax form of CLIP and the sigmoid form of SigLIP.

Both compare every image of the global batch with every text.  Each device holds the rows of its own
examples against the gathered features of all: logits of [B / devices, B], never [B, B].  The gather carries
gradient, so that value and gradient are those of one device.

Cross-entropy is linear in its target: soft targets that a teacher gives are a second objective beside this one
(:mod:`vlpjax.objectives.distillation`), and the two weights say how they are mixed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from vlpjax.errors import UserError
from vlpjax.mesh import constrain, constrain_blocks
from vlpjax.models.heads import Scalar
from vlpjax.objectives.base import BatchCoupled, Context, Loss, clipped, normalize, pick
from vlpjax.parallel.ring import against_all

SIDES = ("image", "text")
NEVER = -1e9  # a logit whose probability is zero and whose gradient is no NaN


@dataclass(frozen=True)
class Scaled(BatchCoupled):
    """Base of objectives whose similarities are multiplied by a scale, the inverse of a temperature.

    Attributes:
      temperature: initial value; the learned parameter is the logarithm of its inverse.
      max_scale: the scale is clipped to [1, max_scale] after every update (CLIP clips to 100).
      learned: whether the scale is learned; otherwise it stays ``1 / temperature``.
      scale_of: name of another objective whose scale is used instead of one of its own.
    """

    temperature: float = 0.07
    max_scale: float = 100.0
    learned: bool = True
    scale_of: str = ""

    def __post_init__(self) -> None:
        if self.scale_of and not self.learned:
            raise UserError(
                f"{type(self).__name__}.scale_of={self.scale_of!r} uses another's scale, but learned=False fixes it; "
                "give one of the two."
            )

    def heads(self) -> dict[str, nn.Module]:
        return {"logit_scale": Scalar(-math.log(self.temperature))} if self._own_scale else {}

    def constraints(self) -> dict[str, Callable[[Any], Any]]:
        return {"logit_scale": clipped(0.0, math.log(self.max_scale))} if self._own_scale else {}

    def scale(self, context: Context) -> Float[Array, ""]:
        """The inverse temperature."""
        if not self.learned:
            return jnp.float32(1 / self.temperature)
        return jnp.exp((context.of(self.scale_of) if self.scale_of else context).head("logit_scale"))

    @property
    def _own_scale(self) -> bool:
        return self.learned and not self.scale_of


@dataclass(frozen=True)
class Contrastive(Scaled):
    """What both losses share: two towers, a scale, and who counts as a positive.

    Attributes:
      image, text: names of the towers.
      image_field, text_field: the fields of the batch that they read.
      image_output, text_output: which of a tower's outputs is compared; see :func:`vlpjax.objectives.base.pick`.
      same: a field of integers; examples with equal values are positives of one another (two drawings of
        one concept in a batch are no negatives).  None makes the pairs of the batch the only positives.
    """

    image: str = "image"
    text: str = "text"
    image_field: str = "image"
    text_field: str = "text"
    image_output: str = "embedding"
    text_output: str = "embedding"
    same: str | None = None

    def encode(self, context: Context) -> dict[str, jax.Array]:
        image = context.encode(self.image, self.image_field)
        text = context.encode(self.text, self.text_field)
        return {
            "image": normalize(pick(image, self.image_output)),  # [B, E]
            "text": normalize(pick(text, self.text_output)),  # [B, E]
        }

    def labels(self, context: Context, batch: int) -> jax.Array:
        """Integers [B] of which equal ones mark positives."""
        return jnp.arange(batch) if self.same is None else context.read(self.same)


def local_rows(
    queries: Float[Array, "batch features"],
    keys: Float[Array, "batch features"],
    scale: Float[Array, ""] | float,
) -> Float[Array, "batch batch"]:
    """scale * queries @ keys^T, rows on the devices of their queries, keys gathered."""
    queries = constrain(queries, "frames", None) * scale
    return constrain(queries @ constrain(keys, None, None).T, "frames", None)  # [B / devices, B]


def only(
    logits: Float[Array, "*rows columns"], columns: Bool[Array, "*#rows columns"] | None
) -> Float[Array, "*rows columns"]:
    """The logits of the columns that take part; the others are never chosen.  None is all."""
    return logits if columns is None else jnp.where(columns, logits, NEVER)


def cross_entropy(
    logits: Float[Array, "*rows columns"],
    target: Float[Array, "*rows columns"],
    columns: Bool[Array, "*#rows columns"] | None = None,
    smoothing: float = 0.0,
) -> Float[Array, "*rows"]:
    """Cross-entropy of each row.

    Args:
      target: sums to one along each row.
      columns: which columns take part; the others have probability zero.
      smoothing: share of the target that is spread evenly over the columns that take part.
    """
    count: Any = logits.shape[-1]
    logits = only(logits, columns)
    if columns is not None:
        count = jnp.maximum(jnp.sum(columns, axis=-1, keepdims=True), 1)
    spread = smoothing / count if columns is None else jnp.where(columns, smoothing / count, 0.0)
    target = (1 - smoothing) * target + spread
    return -jnp.sum(target * jax.nn.log_softmax(logits, axis=-1), axis=-1)


def best_is(
    positive: Bool[Array, "*rows columns"], logits: Float[Array, "*rows columns"]
) -> Bool[Array, "*rows"]:
    """Whether the largest logit of each row is a positive's."""
    best = jnp.argmax(logits, axis=-1)[..., None]
    return jnp.take_along_axis(positive, best, axis=-1)[..., 0]


@dataclass(frozen=True)
class InfoNCE(Contrastive):
    """Softmax contrastive loss: each image picks its text among the batch's, each text its image.

    L = (CE(S u v^T, P) + CE(S v u^T, P)) / 2, with P uniform over a row's positives.

    Attributes:
      label_smoothing: share of the target that is spread evenly over all columns.
      rows: whose rows are taken: ``"image"`` (each image picks a text), ``"text"``, or both.
      captions: fields with further texts of each image.  An image's row has all of them among its columns, and its
        target is spread over its own; each of them has a row of its own against the images ("CoCu", arXiv 2309.13505).
      negatives: fields with texts that are wrong for every image; columns of the images' rows and never rows
        ("NegCLIP", arXiv 2210.01936).
      own_negatives: whether an image sees the negatives of its own example only (arXiv 2305.01118, location loss).
      valid: a field of booleans; a pair that is False is neither row nor column.
      mixed: a field with the share of each image that is its own; the rest of it was taken from the image of the row
        at the same distance from the batch's other end, and of the target likewise ("TiMix", arXiv 2312.08846).
      groups: the batch is split into this many blocks of neighbouring rows, and each is compared with itself only; on a
        mesh features are gathered among the devices of a block only ("M2-Encoder", arXiv 2401.15896).

    Source: "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020,
    figure 3; several positives as in "Unified Contrastive Learning", arXiv 2204.03610.
    """

    label_smoothing: float = 0.0
    rows: tuple[str, ...] = SIDES
    captions: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ()
    own_negatives: bool = False
    valid: str | None = None
    mixed: str | None = None
    groups: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rows or not set(self.rows) <= set(SIDES):
            raise UserError(f"InfoNCE.rows is {self.rows!r}; it takes 'image', 'text' or both.")
        if not 0 <= self.label_smoothing < 1:
            raise UserError(f"InfoNCE.label_smoothing is {self.label_smoothing}; it is in [0, 1).")
        if self.groups < 1:
            raise UserError(f"InfoNCE.groups is {self.groups}; it is 1 or more.")
        if self.mixed and (self.groups > 1 or self.captions or self.valid):
            raise UserError("InfoNCE.mixed goes with one group, one caption and no 'valid'.")
        if self.negatives and "image" not in self.rows:
            raise UserError("InfoNCE.negatives are columns of the images' rows, but rows has no 'image'.")

    def encode(self, context: Context) -> dict[str, jax.Array]:
        features = super().encode(context)
        for kind, names in (("captions", self.captions), ("negatives", self.negatives)):
            if names:
                outputs = context.encode_views(self.text, names)
                features[kind] = normalize(pick(outputs, self.text_output))  # [B, K, E]
        return features

    def compare(self, features: dict[str, jax.Array], context: Context) -> Loss:
        if self.groups > 1 and context.student.is_initializing():  # on two examples, however many a batch has
            return dataclasses.replace(self, groups=1).compare(features, context)
        batch = features["image"].shape[0]
        if batch % self.groups:
            raise UserError(f"InfoNCE.groups={self.groups} does not divide the batch of {batch}.")
        scale = self.scale(context)
        blocks = {name: self._blocks(x) for name, x in features.items()}
        images, captions = blocks["image"], [blocks["text"]]
        if "captions" in blocks:
            more = blocks["captions"]
            captions += [more[..., index, :] for index in range(more.shape[-2])]
        labels = self._blocks(self.labels(context, batch))
        positive = self._on_rows(labels)[..., :, None] == self._gathered(labels)[..., None, :]
        valid = None if self.valid is None else self._blocks(context.read(self.valid).astype(bool))

        if valid is not None:
            positive &= self._gathered(valid)[..., None, :]
        target = positive / jnp.maximum(jnp.sum(positive, axis=-1, keepdims=True), 1)
        image_target, text_target = target, target
        if self.mixed is not None:
            image_target, text_target = mixed_targets(positive, context.read(self.mixed))
        losses, hits = [], []
        if "image" in self.rows:
            logits = self._image_logits(images, captions, blocks.get("negatives"), scale)
            share = self._columns([image_target / len(captions)] * len(captions), logits)
            right = self._columns([positive] * len(captions), logits)
            columns = None if valid is None else self._valid_columns(valid, len(captions), logits)
            losses.append(cross_entropy(logits, share, columns, self.label_smoothing))
            hits.append(best_is(right, only(logits, columns)))
        if "text" in self.rows:
            columns = None if valid is None else self._gathered(valid)[..., None, :]
            all_logits = [self._logits(caption, images, scale) for caption in captions]
            rows = [cross_entropy(x, text_target, columns, self.label_smoothing) for x in all_logits]
            losses.append(sum(rows[1:], rows[0]) / len(rows))
            hits.append(best_is(positive, only(all_logits[0], columns)))
        each = sum(losses[1:], losses[0]) / len(losses)  # [B], or [groups, B / groups]
        metrics = {"accuracy": _mean(hits[0], valid), "scale": scale}
        return Loss(_mean(each, valid), metrics)

    # --- blocks of the batch ----------------------------------------------------------------------------------

    def _blocks(self, x: jax.Array) -> jax.Array:
        """[B, ...] as [groups, B / groups, ...]; unchanged if there is one group."""
        return x if self.groups == 1 else x.reshape(self.groups, -1, *x.shape[1:])

    def _on_rows(self, x: jax.Array) -> jax.Array:
        """Examples on the devices that hold them."""
        if self.groups > 1:
            return constrain_blocks(x)
        return constrain(x, "frames", *[None] * (x.ndim - 1))

    def _gathered(self, x: jax.Array) -> jax.Array:
        """Examples on all devices that compare with them."""
        return constrain_blocks(x, gathered=True) if self.groups > 1 else constrain(x, *[None] * x.ndim)

    def _logits(self, queries: jax.Array, keys: jax.Array, scale: jax.Array) -> jax.Array:
        """Rows of ``queries`` against all of ``keys``: [..., B / devices, B]."""
        if self.groups == 1:
            return local_rows(queries, keys, scale)
        keys = jnp.swapaxes(self._gathered(keys), -1, -2)
        return self._on_rows((self._on_rows(queries) * scale) @ keys)

    def _image_logits(
        self, images: jax.Array, captions: Sequence[jax.Array], negatives: jax.Array | None, scale: jax.Array
    ) -> jax.Array:
        """The images' rows: columns of all captions, first those of the batch's first, then all negatives."""
        logits = [self._logits(images, caption, scale) for caption in captions]
        if negatives is not None and self.own_negatives:
            own = jnp.einsum("...e,...ke->...k", self._on_rows(images) * scale, self._on_rows(negatives))
            logits.append(self._on_rows(own))
        elif negatives is not None:
            logits += [
                self._logits(images, negatives[..., index, :], scale) for index in range(negatives.shape[-2])
            ]
        return jnp.concatenate(logits, axis=-1) if len(logits) > 1 else logits[0]

    def _columns(self, parts: Sequence[jax.Array], logits: jax.Array) -> jax.Array:
        """Entries for the captions' columns, and zeros for the negatives'."""
        known = jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        missing = logits.shape[-1] - known.shape[-1]
        return jnp.pad(known, [(0, 0)] * (known.ndim - 1) + [(0, missing)]) if missing else known

    def _valid_columns(self, valid: jax.Array, captions: int, logits: jax.Array) -> jax.Array:
        """Which columns of the images' rows are texts of valid pairs."""
        everyone = self._gathered(valid)[..., None, :]
        size = everyone.shape[-1]
        if not self.own_negatives:
            return jnp.tile(everyone, (*[1] * (everyone.ndim - 1), logits.shape[-1] // size))
        shown = jnp.tile(everyone, (*[1] * (everyone.ndim - 1), captions))
        more = [(0, 0)] * (shown.ndim - 1) + [(0, logits.shape[-1] - captions * size)]
        return jnp.pad(shown, more, constant_values=True)


def mixed_targets(
    positive: Bool[Array, "batch batch"], share: Float[Array, " batch"]
) -> tuple[Float[Array, "batch batch"], Float[Array, "batch batch"]]:
    """Targets of images that were mixed with those of the batch in reverse order.

    Returns:
      the rows of the images, ``share P + (1 - share) P reversed``; and those of the texts, which are its columns,
      scaled to sum to one.
    """
    share = share.astype(jnp.float32)
    host, donor = constrain(share, "frames")[:, None], constrain(1 - share, "frames")[:, None]
    target = positive / jnp.sum(positive, axis=1, keepdims=True)
    images = host * target + donor * target[::-1]
    counts = constrain(jnp.sum(positive, axis=1), None)
    by_column = positive * (constrain(share, None) / counts)[None]
    by_column += positive[:, ::-1] * (constrain(1 - share, None) / counts[::-1])[None]
    total = jnp.sum(by_column, axis=1, keepdims=True)
    return images, by_column / jnp.where(total == 0, 1.0, total)


def _mean(each: jax.Array, valid: jax.Array | None) -> jax.Array:
    """The mean over examples, of the valid ones if not all are."""
    if valid is None:
        return jnp.mean(each)
    return jnp.sum(jnp.where(valid, each, 0.0)) / jnp.maximum(jnp.sum(valid), 1)


@dataclass(frozen=True)
class Sigmoid(Contrastive):
    """Pairwise sigmoid loss: every image-text pair of the batch is a binary question of its own.

    L = -1/B sum_ij log sigmoid(y_ij (S u_i . v_j + b)), y = +1 for positives and -1 otherwise.  The sum is
    divided by the batch size, not by the number of pairs.

    Attributes:
      bias: initial value of the learned bias.
      chunks: the texts are compared in pieces of at most ``1 / chunks`` of the batch, one at a time, and their logits
        are made again in the backward pass.  On a mesh each device's texts travel around the ring of devices, so that
        texts are never gathered: logits of [B / devices, B / max(chunks, devices)].  1 gathers them.

    Source: "Sigmoid Loss for Language Image Pre-Training", arXiv 2303.15343, equation 1 and section 3.3; initial
    temperature 0.1 and bias -10.
    """

    temperature: float = 0.1
    bias: float = -10.0
    chunks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunks < 1:
            raise UserError(f"Sigmoid.chunks is {self.chunks}; it is 1 or more.")

    def heads(self) -> dict[str, nn.Module]:
        return {**super().heads(), "logit_bias": Scalar(self.bias)}

    def compare(self, features: dict[str, jax.Array], context: Context) -> Loss:
        image, text = features["image"], features["text"]
        batch = image.shape[0]
        scale, bias = self.scale(context), context.head("logit_bias")
        labels = self.labels(context, batch)

        def some(queries: Any, keys: Any, scale: jax.Array, bias: jax.Array) -> jax.Array:
            """Per image: its losses against some texts, its largest logit, and whether that one is right."""
            logits = (queries[0] * scale) @ keys[0].T + bias
            positive = queries[1][:, None] == keys[1][None, :]
            losses = -jax.nn.log_sigmoid(jnp.where(positive, logits, -logits))
            best = jnp.argmax(logits, axis=1)[:, None]
            top, right = (jnp.take_along_axis(x, best, axis=1)[:, 0] for x in (logits, positive))
            return jnp.stack([jnp.sum(losses, axis=1), top, right.astype(logits.dtype)])  # [3, rows]

        def join(first: jax.Array, second: jax.Array) -> jax.Array:
            better = jnp.where(second[1] > first[1], second, first)
            return jnp.stack([first[0] + second[0], better[1], better[2]])

        nothing = (0.0, -jnp.inf, 0.0)
        each = against_all(
            some, join, (image, labels), (text, labels), (scale, bias), nothing=nothing, pieces=self.chunks
        )  # [3, B]
        metrics = {"accuracy": jnp.mean(each[2]), "scale": scale, "bias": bias}
        return Loss(jnp.sum(each[0]) / batch, metrics)
