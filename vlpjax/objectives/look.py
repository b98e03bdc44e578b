"""LOOK: an image is classified by its nearest neighbours, itself left out, so that a class may keep several modes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from vlpjax.errors import UserError
from vlpjax.mesh import constrain
from vlpjax.models.heads import MLPHead
from vlpjax.objectives.base import BatchCoupled, Context, Loss, normalize, pick
from vlpjax.objectives.queue import enqueue
from vlpjax.parallel.ranking import merge_best, nothing_yet

_NOBODY = -1  # the number of an empty place in the queue; examples count from 0


class References(NamedTuple):
    """What examples are compared with: embeddings of length one, their labels, and the numbers of their examples."""

    features: Float[Array, "references features"]
    labels: Int[Array, " references"]
    examples: Int[Array, " references"]


class Neighbours(NamedTuple):
    """Per query the places of its nearest references, and whether they count."""

    nearest: Int[Array, "queries k"]
    found: Bool[Array, "queries k"]
    classmate: Int[Array, " queries"]  # the nearest reference of the same class
    has_classmate: Bool[Array, " queries"]


@dataclass(frozen=True)
class LOOK(BatchCoupled):
    """Leave-one-out k-nearest-neighbour loss of labelled images.

    -log of the share of the same class among the k most similar references, weighted by exp(cosine / temperature).
    References of the same example, its other views and earlier visits, are left out.  Which references are the
    nearest carries no gradient.  Where none of them is of the same class, the nearest that is joins them: otherwise
    there would be no gradient where it is most needed.  (The paper does not say what it does there.)  The metric
    ``vote`` is the share of the same class without it.

    Attributes:
      tower: name of the tower.
      image: the field that the student sees.
      key_image: the field that the teacher sees, whose embeddings join the queue after the loss.
      label: field of the class; ``example`` of the number that tells one example from another.
      output: which of the tower's outputs is used; see :func:`vlpjax.objectives.base.pick`.
      projector: widths of the projector's layers, without norms.
      neighbours: k.
      temperature: divides the cosines.
      queue: number of references, made by the teacher; 0 takes the batch's own embeddings, with gradient.
      teacher: its name in ``config.teachers``; needed if there is a queue.
      chunk: references that are ranked at a time.

    Source: "Rethinking Supervised Pre-training for Better Downstream Transferring", arXiv 2110.06014, section 3; k,
    temperature and queue are free there, and these defaults are those of MoCo.
    """

    tower: str = "image"
    image: str = "view1"
    key_image: str = "view2"
    label: str = "label"
    example: str = "index"
    output: str = "pooled"
    projector: tuple[int, ...] = (2048, 128)
    neighbours: int = 256
    temperature: float = 0.1
    queue: int = 65536
    teacher: str = "ema"
    chunk: int = 4096

    def __post_init__(self) -> None:
        if self.neighbours < 1:
            raise UserError(f"LOOK.neighbours is {self.neighbours}; it is 1 or more.")
        if self.queue and not self.teacher:
            raise UserError(f"LOOK.queue is {self.queue}, which a teacher fills; name it, or set queue=0.")

    def heads(self) -> dict[str, nn.Module]:
        return {"projector": MLPHead(self.projector, norm=None)}

    def initial_state(self, key: jax.Array) -> Any:
        if not self.queue:
            return ()
        return {
            "features": jnp.zeros((self.queue, self.projector[-1])),
            "labels": jnp.zeros(self.queue, jnp.int32),
            "examples": jnp.full(self.queue, _NOBODY, jnp.int32),
            "oldest": jnp.zeros((), jnp.int32),
        }

    def encode(self, context: Context) -> dict[str, jax.Array]:
        features = {"student": pick(context.encode(self.tower, self.image), self.output)}
        if self.queue:
            seen = context.encode(self.tower, self.key_image, teacher=self.teacher)
            features["teacher"] = pick(seen, self.output)
        return features

    def compare(self, features: dict[str, jax.Array], context: Context) -> Loss:
        queries = normalize(context.head("projector", features["student"]))  # [B, E]
        labels, examples = context.read(self.label), context.read(self.example)
        own = References(queries, labels, examples)
        state: Any = ()
        references = References(*(constrain(x, *[None] * x.ndim) for x in own))
        if self.queue:
            state = context.state
            references = References(state["features"], state["labels"], state["examples"])
            keys = normalize(context.head("projector", features["teacher"], teacher=self.teacher))
            state = enqueue(state, "LOOK", features=keys, labels=labels, examples=examples)
        losses, counted, vote = neighbour_losses(
            own, references, self.neighbours, self.temperature, self.chunk
        )
        number = jnp.maximum(jnp.sum(counted), 1)
        metrics = {
            "vote": jnp.sum(jnp.where(counted, vote, 0)) / number,
            "counted": jnp.mean(counted.astype(jnp.float32)),
        }
        return Loss(jnp.sum(jnp.where(counted, losses, 0.0)) / number, metrics, state)


def neighbour_losses(
    own: References, references: References, k: int, temperature: float, chunk: int = 4096
) -> tuple[Float[Array, " queries"], Bool[Array, " queries"], Float[Array, " queries"]]:
    """Per query its loss, whether it counts (a classmate is among the references), and its neighbours' vote.

    Returns:
      losses; which of them count; the share of the same class among the neighbours, by weight.
    """
    found = find_neighbours(own, references, k, chunk)
    places = jnp.concatenate([found.nearest, found.classmate[:, None]], axis=1)  # [B, k + 1]
    features = references.features[places]  # [B, k + 1, E]
    logits = jnp.einsum("be,bne->bn", constrain(own.features, "frames", None), features) / temperature
    same = references.labels[places] == own.labels[:, None]
    alone = ~jnp.any(same[:, :-1] & found.found, axis=1)
    present = jnp.concatenate([found.found, (alone & found.has_classmate)[:, None]], axis=1)
    # Where nothing counts, sums over everything keep values and gradients finite until they are dropped.
    counted = found.has_classmate
    logits = jnp.where(counted[:, None], logits, 0.0)
    total, right = (
        jax.nn.logsumexp(logits, axis=1, b=(chosen | ~counted[:, None]).astype(jnp.float32))
        for chosen in (present, present & same)
    )
    losses = jnp.where(counted, total - right, 0.0)
    return losses, counted, jnp.where(alone, 0.0, jnp.exp(-losses))


def find_neighbours(own: References, references: References, k: int, chunk: int) -> Neighbours:
    """The k nearest references and the nearest of the same class, ``chunk`` references at a time.

    References of the same example and empty places are left out.  A device ranks for its own queries.
    """
    queries = jax.lax.stop_gradient(constrain(own.features, "frames", None))
    size = min(chunk, references.features.shape[0])
    padding = -references.features.shape[0] % size
    padded = References(
        jnp.pad(jax.lax.stop_gradient(references.features), ((0, padding), (0, 0))),
        jnp.pad(references.labels, (0, padding)),
        jnp.pad(references.examples, (0, padding), constant_values=_NOBODY),
    )
    chunks = jax.tree.map(lambda x: x.reshape(-1, size, *x.shape[1:]), padded)
    starts = jnp.arange(chunks.labels.shape[0], dtype=jnp.int32) * size
    batch = queries.shape[0]

    def merge(best: Any, item: Any) -> tuple[Any, None]:
        nearest, (mate_score, mate) = best
        part, start = item
        cosines = jnp.einsum("be,ce->bc", queries, part.features, precision="highest")  # [B / devices, chunk]
        out = (part.examples == _NOBODY)[None] | (part.examples[None] == own.examples[:, None])
        cosines = jnp.where(out, -jnp.inf, cosines)
        mates = jnp.where(part.labels[None] == own.labels[:, None], cosines, -jnp.inf)
        nearer = jnp.max(mates, axis=1) > mate_score
        mate = jnp.where(nearer, start + jnp.argmax(mates, axis=1), mate)
        mate_score = jnp.maximum(mate_score, jnp.max(mates, axis=1))
        return (merge_best(nearest, cosines, start), (mate_score, mate)), None

    nobody = jnp.full(batch, -jnp.inf), jnp.zeros(batch, jnp.int32)
    best, _ = jax.lax.scan(merge, (nothing_yet(batch, k), nobody), (chunks, starts))
    (scores, places), (mate_score, mate) = best
    return Neighbours(places, scores > -jnp.inf, mate, mate_score > -jnp.inf)
