"""Losses of visual self-supervision put between images and texts, and the CLIP recipe that catches up with them.

All work on views: of images one weak and some strong ones, of texts likewise.  The weak pair is the *global* one; every
strong image with every strong text makes the *local* ones.

Source: "Improved baselines for vision-language pre-training", arXiv 2305.08675.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from vlpjax.errors import UserError
from vlpjax.mesh import constrain
from vlpjax.models.heads import MLPHead, Scalar
from vlpjax.objectives.assignment import sinkhorn
from vlpjax.objectives.base import BatchCoupled, Context, Loss, clipped, normalize, pick
from vlpjax.objectives.contrastive import best_is, cross_entropy, local_rows

Views = dict[str, jax.Array]


@dataclass(frozen=True)
class CrossModal(BatchCoupled):
    """Base of objectives on views of both modalities.

    Dropout and stochastic depth of the text tower act on strong texts only: the weak text, which the zero-shot
    classifier will resemble, is encoded as in evaluation.

    Attributes:
      image, text: names of the towers.
      image_views, text_views: fields of the batch; the first is the weak view, the others are strong.
      image_output, text_output: what projectors read, of the towers' outputs.
    """

    image: str = "image"
    text: str = "text"
    image_views: tuple[str, ...] = ("image", "image1", "image2")
    text_views: tuple[str, ...] = ("text", "text1", "text2")
    image_output: str = "pooled"
    text_output: str = "pooled"

    def __post_init__(self) -> None:
        if not self.image_views or not self.text_views:
            raise UserError(f"{type(self).__name__} needs a weak view, the first, of images and of texts.")

    @property
    def local_pairs(self) -> list[tuple[str, str]]:
        """Every strong image with every strong text."""
        return list(itertools.product(self.image_views[1:], self.text_views[1:]))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The global pair, then the local ones."""
        return [(self.image_views[0], self.text_views[0]), *self.local_pairs]

    def encode(self, context: Context) -> dict[str, Views]:
        return {"student": self.features(context)}

    def features(self, context: Context, teacher: str | None = None, first: int = 0) -> Views:
        """What projectors read, per view.

        Args:
          first: 0 encodes all views, 1 the strong ones only.
        """
        images = {
            f"image:{view}": pick(context.encode(self.image, view, teacher=teacher), self.image_output)
            for view in self.image_views[first:]
        }
        texts = {
            f"text:{view}": pick(self.encoded_text(context, view, teacher), self.text_output)
            for view in self.text_views[first:]
        }
        return images | texts

    def encoded_text(self, context: Context, view: str, teacher: str | None = None) -> dict[str, jax.Array]:
        """The text tower's outputs, without dropout for the weak view; objectives share them."""
        if teacher is not None or view != self.text_views[0]:
            return context.encode(self.text, view, teacher=teacher)
        return context.encode(self.text, view, variant="evaluation", train=False)

    def project(
        self, context: Context, features: Views, heads: Mapping[str, str], teacher: str | None = None
    ) -> Views:
        """Each view by itself through the head of its modality; BatchNorm takes the statistics of one view."""
        return {
            name: context.head(heads[name.partition(":")[0]], x, teacher=teacher)
            for name, x in features.items()
        }


PROJECTORS = {"image": "image_projector", "text": "text_projector"}


def _mean(values: list[jax.Array]) -> jax.Array:
    return sum(values[1:], values[0]) / len(values)


def symmetric(
    image: Float[Array, "batch features"],
    text: Float[Array, "batch features"],
    scale: Float[Array, ""],
    positive: Bool[Array, "batch batch"],
    smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """InfoNCE of rows of length one in both directions, and how often an image's best text is right."""
    target = positive / jnp.sum(positive, axis=1, keepdims=True)
    logits = local_rows(image, text, scale)
    rows = cross_entropy(logits, target, smoothing=smoothing)
    columns = cross_entropy(local_rows(text, image, scale), target, smoothing=smoothing)
    return jnp.mean(rows + columns) / 2, jnp.mean(best_is(positive, logits))


@dataclass(frozen=True)
class Rocket(CrossModal):
    """CLIP on the weak pair, and on every pair of strong views through projectors and a temperature of their own.

    L = (L_global + 2 L_local) / 3, with L_local the mean over local pairs; without strong views it is L_global.

    Attributes:
      image_embedding, text_embedding: what the global pair compares, of the towers' outputs.
      projector: widths of the strong views' projectors.
      temperature, local_temperature: first values of the two temperatures.
      label_smoothing: of local pairs only.
      max_scale: both scales are clipped to [1, max_scale].
      same: as in :class:`vlpjax.objectives.contrastive.Contrastive`.

    Source: "Improved baselines for vision-language pre-training", arXiv 2305.08675, section 4.
    """

    image_embedding: str = "embedding"
    text_embedding: str = "embedding"
    projector: tuple[int, ...] = (4096, 4096, 256)
    temperature: float = 0.07
    local_temperature: float = 0.1
    label_smoothing: float = 0.1
    max_scale: float = 100.0
    same: str | None = None

    def heads(self) -> dict[str, nn.Module]:
        heads: dict[str, nn.Module] = {"logit_scale": Scalar(-math.log(self.temperature))}
        if self.local_pairs:
            heads["local_scale"] = Scalar(-math.log(self.local_temperature))
            heads |= {name: MLPHead(self.projector) for name in PROJECTORS.values()}
        return heads

    def constraints(self) -> dict[str, Callable[[Any], Any]]:
        scales = ("logit_scale", "local_scale") if self.local_pairs else ("logit_scale",)
        return dict.fromkeys(scales, clipped(0.0, math.log(self.max_scale)))

    def encode(self, context: Context) -> dict[str, Views]:
        image = context.encode(self.image, self.image_views[0])
        text = self.encoded_text(context, self.text_views[0])
        weak = {"image": pick(image, self.image_embedding), "text": pick(text, self.text_embedding)}
        return {"weak": weak, "strong": self.features(context, first=1) if self.local_pairs else {}}

    def compare(self, features: dict[str, Views], context: Context) -> Loss:
        weak = {side: normalize(x) for side, x in features["weak"].items()}
        batch = weak["image"].shape[0]
        labels = jnp.arange(batch) if self.same is None else context.read(self.same)
        positive = constrain(labels, "frames")[:, None] == constrain(labels, None)[None, :]
        scale = jnp.exp(context.head("logit_scale"))
        value, accuracy = symmetric(weak["image"], weak["text"], scale, positive)
        metrics = {"accuracy": accuracy, "scale": scale, "global": value}
        if self.local_pairs:
            projected = self.project(context, features["strong"], PROJECTORS)
            strong = {name: normalize(x) for name, x in projected.items()}
            local_scale = jnp.exp(context.head("local_scale"))
            local = _mean(
                [
                    symmetric(
                        strong[f"image:{image}"],
                        strong[f"text:{text}"],
                        local_scale,
                        positive,
                        self.label_smoothing,
                    )[0]
                    for image, text in self.local_pairs
                ]
            )
            metrics |= {"local": local, "local_scale": local_scale}
            value = (value + 2 * local) / 3
        return Loss(value, metrics)


@dataclass(frozen=True)
class BarLIP(CrossModal):
    """Barlow Twins between modalities: over the batch, features of image and text are to correlate one to one.

    C = v_image^T v_text / B; L = scale [sum_d (C_dd - 1)^2 + off_diagonal sum_{d != e} C_de^2], averaged over pairs.

    Attributes:
      projector: widths of both projectors; BatchNorm with scale and bias follows the last layer.
      scale: of the loss.
      off_diagonal: weight of what should be zero.

    Source: "Improved baselines for vision-language pre-training", arXiv 2305.08675, section 3; "Barlow Twins", arXiv
    2103.03230, equation 1.
    """

    projector: tuple[int, ...] = (3000, 3000, 8192)
    scale: float = 0.025
    off_diagonal: float = 0.005

    def heads(self) -> dict[str, nn.Module]:
        return {name: MLPHead(self.projector, last_norm="affine") for name in PROJECTORS.values()}

    def compare(self, features: dict[str, Views], context: Context) -> Loss:
        v = self.project(context, features["student"], PROJECTORS)
        found = [
            cross_correlation_loss(v[f"image:{image}"], v[f"text:{text}"], self.off_diagonal)
            for image, text in self.pairs
        ]
        return Loss(self.scale * _mean(found))


def cross_correlation_loss(
    first: Float[Array, "batch features"], second: Float[Array, "batch features"], off_diagonal: float
) -> Float[Array, ""]:
    """sum_d (C_dd - 1)^2 + off_diagonal sum_{d != e} C_de^2 of C = first^T second / B, over the whole batch.

    The sum of all C_de^2 is that of (first first^T) * (second second^T) / B^2, so that the smaller of [D, D] and [B, B]
    is made, and of the latter no device has more than its rows.
    """
    batch, width = first.shape
    first, second = (constrain(x.astype(jnp.float32), "frames", None) for x in (first, second))
    diagonal = jnp.sum(first * second, axis=0) / batch
    with jax.default_matmul_precision("highest"):  # a small difference of large sums is what is looked for
        if batch < width:
            total = jnp.sum(local_rows(first, first, 1.0) * local_rows(second, second, 1.0))
        else:
            total = jnp.sum(jnp.square(constrain(first.T @ second, "frames", None)))
    rest = total / batch**2 - jnp.sum(jnp.square(diagonal))
    return jnp.sum(jnp.square(diagonal - 1)) + off_diagonal * rest


@dataclass(frozen=True)
class SiamLIP(CrossModal):
    """SimSiam between modalities; with a teacher, BYOL ("BYOLIP").

    v = projector(features), p = predictor(v); per pair L = (2 - 2 cos(p_image, sg v_text)) + the same with the
    modalities exchanged, averaged over pairs.

    Attributes:
      projector: widths of both projectors; BatchNorm without scale and bias follows the last layer.
      predictor: widths of both predictors.
      teacher: name of the teacher that makes the targets v; None is the student itself.

    Source: "Improved baselines for vision-language pre-training", arXiv 2305.08675, section 3; "Exploring Simple
    Siamese Representation Learning", arXiv 2011.10566.
    """

    projector: tuple[int, ...] = (4096, 4096, 128)
    predictor: tuple[int, ...] = (512, 128)
    teacher: str | None = None

    def heads(self) -> dict[str, nn.Module]:
        if self.projector[-1] != self.predictor[-1]:
            raise UserError(
                f"SiamLIP's predictor ends in {self.predictor[-1]} features and its projector in {self.projector[-1]}; "
                "one predicts the other, so they are equal."
            )
        projectors = {name: MLPHead(self.projector, last_norm="plain") for name in PROJECTORS.values()}
        predictors = {f"{side}_predictor": MLPHead(self.predictor) for side in PROJECTORS}
        return {**projectors, **predictors}

    def encode(self, context: Context) -> dict[str, Views]:
        features = {"student": self.features(context)}
        return (
            features if self.teacher is None else features | {"teacher": self.features(context, self.teacher)}
        )

    def compare(self, features: dict[str, Views], context: Context) -> Loss:
        v = self.project(context, features["student"], PROJECTORS)
        p = self.project(context, v, {side: f"{side}_predictor" for side in PROJECTORS})
        if self.teacher is None:
            targets = jax.tree.map(jax.lax.stop_gradient, v)
        else:
            targets = self.project(context, features["teacher"], PROJECTORS, self.teacher)

        def distance(predicted: str, target: str) -> jax.Array:
            cosine = jnp.sum(normalize(p[predicted]) * normalize(targets[target]), axis=-1)
            return 2 - 2 * jnp.mean(cosine)

        found = [
            distance(f"image:{image}", f"text:{text}") + distance(f"text:{text}", f"image:{image}")
            for image, text in self.pairs
        ]
        return Loss(_mean(found))


@dataclass(frozen=True)
class SwALIP(CrossModal):
    """SwAV between modalities, with the batch's own examples for prototypes.

    For the strong image a and the strong text b, similarities over the batch are to agree with the balanced assignment
    of the *other* image and text: L = CE(S h_a h_b^T, Sinkhorn(h_a' h_b'^T)), both directions, mean over all four.

    Attributes:
      projector: widths of both projectors, unless ``heads_of`` is set.
      heads_of: name of a :class:`Rocket` objective whose projectors and local scale are used; empty has own ones.
      temperature: first value of the own scale's inverse.
      max_scale: the own scale is clipped to [1, max_scale].
      epsilon, rounds: of the balanced assignment.

    Source: "Improved baselines for vision-language pre-training", arXiv 2305.08675, section 3; "Unsupervised Learning
    of Visual Features by Contrasting Cluster Assignments", arXiv 2006.09882.
    """

    projector: tuple[int, ...] = (4096, 4096, 256)
    heads_of: str = ""
    temperature: float = 0.1
    max_scale: float = 100.0
    epsilon: float = 0.05
    rounds: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.image_views) != 3 or len(self.text_views) != 3:
            raise UserError(
                "SwALIP compares two strong views with the two others; give one weak and two strong views of each."
            )

    def heads(self) -> dict[str, nn.Module]:
        if self.heads_of:
            return {}
        scale = {"local_scale": Scalar(-math.log(self.temperature))}
        return {**scale, **{name: MLPHead(self.projector) for name in PROJECTORS.values()}}

    def constraints(self) -> dict[str, Callable[[Any], Any]]:
        return {} if self.heads_of else {"local_scale": clipped(0.0, math.log(self.max_scale))}

    def encode(self, context: Context) -> dict[str, Views]:
        return {"student": self.features(context, first=1)}

    def compare(self, features: dict[str, Views], context: Context) -> Loss:
        owner = context.of(self.heads_of) if self.heads_of else context
        h = {name: normalize(x) for name, x in self.project(owner, features["student"], PROJECTORS).items()}
        scale = jnp.exp(owner.head("local_scale"))
        images, texts = self.image_views[1:], self.text_views[1:]
        found = []
        for a, b in itertools.product(range(2), range(2)):
            image, text = h[f"image:{images[a]}"], h[f"text:{texts[b]}"]
            other_image, other_text = h[f"image:{images[1 - a]}"], h[f"text:{texts[1 - b]}"]
            found.append(self._agreement(image, text, other_image, other_text, scale))
            found.append(self._agreement(text, image, other_text, other_image, scale))
        return Loss(_mean(found))

    def _agreement(
        self,
        rows: jax.Array,
        columns: jax.Array,
        other_rows: jax.Array,
        other_columns: jax.Array,
        scale: jax.Array,
    ) -> Float[Array, ""]:
        target = sinkhorn(local_rows(other_rows, other_columns, 1.0), self.epsilon, self.rounds)
        return jnp.mean(cross_entropy(local_rows(rows, columns, scale), target))
