"""k-nearest-neighbour classification of frozen features: the evaluation that has nothing to train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlpjax.errors import UserError
from vlpjax.evaluators.labelled import Answers, Classify, Examples, FeatureClassifier, best_classes
from vlpjax.evaluators.neighbors import DISTANCES, count_votes, make_nearest
from vlpjax.mesh import Layout

VOTES = ("weighted", "majority")


@dataclass(frozen=True)
class KNN(FeatureClassifier):
    """Accuracy of the vote of the k nearest training examples.

    The weighted vote counts a neighbour of cosine s as exp(s / temperature) ("Emerging Properties in
    Self-Supervised Vision Transformers", arXiv 2104.14294, section 4.1; "Unsupervised Feature Learning via
    Non-Parametric Instance Discrimination", arXiv 1805.01978).  The majority vote counts every neighbour once.  Of
    classes with equal votes the one with the smallest label wins.

    Attributes:
      ks: numbers of neighbours.
      temperature: of the weighted vote.
      vote: ``"weighted"`` or ``"majority"``.
      distance: ``"cosine"``, or ``"euclidean"``, which goes with the majority vote.
      chunk: queries that are ranked at a time.
    """

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

    def _classify(self, layout: Layout) -> Classify:
        most = max(self.ks)
        if self.train is not None and self.train.num_examples < most:
            raise UserError(
                f"KNN.ks asks for {most} neighbours, but there are {self.train.num_examples} examples."
            )
        nearest = make_nearest(layout, most, distance=self.distance, chunk=self.chunk)
        temperature = self.temperature if self.vote == "weighted" else None

        def rank(queries: jax.Array, memory: jax.Array, real: Any, labels: Any, n: int) -> jax.Array:
            """Classes from the best on, per k: [len(ks), N, 5]; of equal votes the smallest label is first."""
            scores, places = nearest(queries, memory, real)
            found = labels[places]  # [Q, most]
            votes = [count_votes(scores[:, :k], found[:, :k], n, temperature) for k in self.ks]
            return jnp.stack([best_classes(one) for one in votes])

        rank = jax.jit(rank, static_argnums=4, out_shardings=layout.replicated)

        def classify(known: Examples, asked: Examples, classes: int) -> Answers:
            if known.real.sum() < most:
                raise UserError(
                    f"KNN.ks asks for {most} neighbours, but only {known.real.sum()} examples are good."
                )
            ranked = np.asarray(rank(asked.features, known.features, known.real, known.labels, classes))
            return Answers({f"k{k}": [one] for k, one in zip(self.ks, ranked, strict=True)})

        return classify
