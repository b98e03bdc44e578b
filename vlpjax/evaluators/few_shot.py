"""Few-shot classification: least squares on a handful of examples per class, in closed form."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from vlpjax.errors import UserError
from vlpjax.evaluators.labelled import Answers, Classify, Examples, FeatureClassifier, best_classes
from vlpjax.evaluators.probing import Classifier
from vlpjax.mesh import Layout

REGULARIZATIONS = tuple(2.0**power for power in range(-10, 21))


@dataclass(frozen=True)
class FewShot(FeatureClassifier):
    """Accuracy of ridge regression onto -1 and 1, from a few random examples per class.

    Features are standardised by the mean and deviation of the shots.  The regularisation is the one with the
    smallest squared error when every shot is predicted by all others, which ridge regression gives in closed form;
    so neither further examples nor the test set choose it.  The protocol is that of "An Image is Worth 16x16 Words",
    arXiv 2010.11929, section 4.1.

    Attributes:
      shots: examples per class, drawn from ``train``.
      seeds: draws of the shots that scores are the mean of.
      regularizations: what is added to the squared singular values of the shots, of which one is chosen.
    """

    shots: tuple[int, ...] = (1, 5, 10)
    seeds: tuple[int, ...] = (0, 1, 2)
    regularizations: tuple[float, ...] = REGULARIZATIONS

    def __post_init__(self) -> None:
        if not self.shots or min(self.shots) < 1 or not self.seeds:
            raise UserError(
                f"FewShot has shots={self.shots} and seeds={self.seeds}; give at least one of each, shots from 1 on."
            )
        if not self.regularizations or min(self.regularizations) <= 0:
            raise UserError(
                f"FewShot.regularizations is {self.regularizations}; give at least one, all above 0."
            )

    def _classify(self, layout: Layout) -> Classify:
        take = jax.jit(lambda features, rows: features[rows], out_shardings=layout.replicated)

        @functools.partial(jax.jit, out_shardings=layout.replicated)
        def rank(model: Classifier, features: jax.Array) -> jax.Array:
            return best_classes(model(features))

        def classify(known: Examples, asked: Examples, classes: int) -> Answers:
            def ranking(shots: int, seed: int) -> np.ndarray:
                rows = draw_shots(known.labels, known.real, shots, seed)
                features = np.asarray(take(known.features, rows))
                model = fit_ridge(features, known.labels[rows], classes, self.regularizations).classifier
                return np.asarray(rank(model, asked.features))

            return Answers(
                {f"shots{shots}": [ranking(shots, seed) for seed in self.seeds] for shots in self.shots}
            )

        return classify


def draw_shots(labels: np.ndarray, real: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Rows of this many random examples per class; a larger number of shots contains a smaller one.

    Raises:
      UserError: a class with fewer examples.
    """
    rng = np.random.default_rng(seed)
    chosen = []
    for label in np.unique(labels[real]):
        rows = rng.permutation(np.flatnonzero(real & (labels == label)))
        if len(rows) < shots:
            raise UserError(
                f"FewShot.shots asks for {shots} per class, but class number {label} has {len(rows)}."
            )
        chosen.append(rows[:shots])
    return np.sort(np.concatenate(chosen))


class Ridge(NamedTuple):
    """The chosen classifier of raw features, its regularisation, and the left-out error of every candidate."""

    classifier: Classifier
    regularization: float
    errors: np.ndarray


def fit_ridge(
    features: np.ndarray, labels: np.ndarray, classes: int, regularizations: tuple[float, ...]
) -> Ridge:
    """Ridge regression with an intercept onto -1 and 1; the regularisation has the smallest left-out squared error.

    Args:
      features: [S, E]; they are standardised here.
      labels: int [S].
    """
    x = features.astype(np.float64)
    mean, deviation = x.mean(axis=0), x.std(axis=0)
    deviation = np.where(deviation > 1e-6, deviation, 1.0)
    targets = np.where(labels[:, None] == np.arange(classes), 1.0, -1.0)
    center = targets.mean(axis=0)
    left, values, right = np.linalg.svd((x - mean) / deviation, full_matrices=False)
    projected = left.T @ (targets - center)  # [R, C]
    errors = []
    for regularization in regularizations:
        shrunk = values**2 / (values**2 + regularization)
        predicted = left @ (shrunk[:, None] * projected) + center
        leverage = 1 / len(x) + np.square(left) @ shrunk  # of every shot on its own prediction
        errors.append(np.mean(np.square((targets - predicted) / np.maximum(1 - leverage, 1e-9)[:, None])))
    chosen = regularizations[int(np.argmin(errors))]
    kernel = right.T @ ((values / (values**2 + chosen))[:, None] * projected) / deviation[:, None]
    bias = center - mean @ kernel
    model = Classifier(kernel.astype(np.float32), bias.astype(np.float32))
    return Ridge(model, chosen, np.array(errors))
