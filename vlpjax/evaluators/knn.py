"""k-nearest-neighbour classification of frozen features: the evaluation that has nothing to train."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlpjax.data.pipeline import Pipeline
from vlpjax.errors import UserError
from vlpjax.evaluators.accuracy import accuracies, chances, class_numbers
from vlpjax.evaluators.base import (
    Encoder,
    Evaluator,
    Result,
    Variables,
    encode_all,
    read_column,
    require_finite,
)
from vlpjax.evaluators.neighbors import DISTANCES, count_votes, make_nearest
from vlpjax.experiment import Experiment
from vlpjax.mesh import Layout

VOTES = ("weighted", "majority")


@dataclass(frozen=True)
class KNN(Evaluator):
    """Accuracy of the vote of the k nearest training examples.

    The weighted vote counts a neighbour of cosine s as exp(s / temperature) ("Emerging Properties in
    Self-Supervised Vision Transformers", arXiv 2104.14294, section 4.1; "Unsupervised Feature Learning via
    Non-Parametric Instance Discrimination", arXiv 1805.01978).  The majority vote counts every neighbour once.  Of
    classes with equal votes the one with the smallest label wins.

    Attributes:
      train, test: finite pipelines of labelled images: the memory, and the queries.
      tower: its name; ``image_field`` is what it reads, ``output`` which of its outputs is compared.
      label: field of the batch that holds the class number.
      ks: numbers of neighbours.
      temperature: of the weighted vote.
      vote: ``"weighted"`` or ``"majority"``.
      distance: ``"cosine"``, or ``"euclidean"``, which goes with the majority vote.
      chunk: queries that are ranked at a time.
    """

    train: Pipeline | None = None
    test: Pipeline | None = None
    tower: str = "image"
    image_field: str = "image"
    output: str = "pooled"
    label: str = "label"
    ks: tuple[int, ...] = (1, 5, 20)
    temperature: float = 0.07
    vote: str = "weighted"
    distance: str = "cosine"
    chunk: int = 256

    def __post_init__(self) -> None:
        if self.vote not in VOTES or self.distance not in DISTANCES:
            raise UserError(
                f"KNN has vote={self.vote!r} and distance={self.distance!r}; votes are {', '.join(VOTES)}, distances "
                f"{', '.join(DISTANCES)}."
            )
        if self.vote == "weighted" and (self.distance != "cosine" or self.temperature <= 0):
            raise UserError(
                "KNN.vote is 'weighted', which takes distance='cosine' and a temperature above 0; it has "
                f"{self.distance!r} and {self.temperature}."
            )
        if not self.ks or min(self.ks) < 1:
            raise UserError(f"KNN.ks is {self.ks}; give at least one number of neighbours, each 1 or more.")

    def make(self, experiment: Experiment, layout: Layout) -> Callable[[Variables], Result]:
        if self.train is None or self.test is None:
            raise UserError(
                "KNN needs 'train' and 'test', finite pipelines; the config leaves one of them out."
            )
        train, test, most = self.train, self.test, max(self.ks)
        for pipeline in (train, test):
            require_finite(pipeline, "KNN")
        if train.num_examples < most:
            raise UserError(
                f"KNN.ks asks for {most} neighbours, but there are {train.num_examples} examples."
            )
        encoder = Encoder(
            experiment, layout, self.tower, self.image_field, self.output, normalize=self.distance == "cosine"
        )
        nearest = make_nearest(layout, most, distance=self.distance, chunk=self.chunk)

        def classify(queries: jax.Array, memory: jax.Array, real: Any, labels: Any, n: int) -> jax.Array:
            """Classes from the best on, per k: [len(ks), N, n]."""
            scores, places = nearest(queries, memory, real)
            found = labels[places]  # [Q, most]
            return jnp.stack([self._ranked(scores[:, :k], found[:, :k], n) for k in self.ks])

        classify = jax.jit(classify, static_argnums=4, out_shardings=layout.replicated)

        def evaluate(variables: Variables) -> Result:
            memory = encode_all(train, {"": encoder}, variables, layout)
            queries = encode_all(test, {"": encoder}, variables, layout)
            columns = (memory.columns, queries.columns)
            classes, (known, asked) = class_numbers(*(read_column(x, self.label, "KNN") for x in columns))
            real = memory.columns["valid"]
            if real.sum() < most:
                raise UserError(
                    f"KNN.ks asks for {most} neighbours, but only {real.sum()} examples are good."
                )
            ranked = classify(queries.features[""], memory.features[""], real, known, classes)
            counted = queries.columns["valid"]
            result = Result({}, {})
            for k, order in zip(self.ks, np.asarray(ranked), strict=True):
                scores = accuracies(order[counted], asked[counted])
                result.metrics.update({f"k{k}/{name}": value for name, value in scores.items()})
                result.chance.update({f"k{k}/{name}": value for name, value in chances(classes).items()})
            return result

        return evaluate

    def _ranked(self, scores: jax.Array, found: jax.Array, classes: int) -> jax.Array:
        """The five classes, or as many as there are, with the most votes: [Q, 5]."""
        votes = count_votes(scores, found, classes, self.temperature if self.vote == "weighted" else None)
        return jax.lax.top_k(votes, min(5, classes))[1]
