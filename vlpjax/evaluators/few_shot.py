"""Few-shot classification: least squares on a handful of examples per class, in closed form."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
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
from vlpjax.evaluators.probing import Classifier
from vlpjax.experiment import Experiment
from vlpjax.mesh import Layout

REGULARIZATIONS = tuple(2.0**power for power in range(-10, 21))


@dataclass(frozen=True)
class FewShot(Evaluator):
    """Accuracy of ridge regression onto -1 and 1, from a few random examples per class.

    Features are standardised by the mean and deviation of the shots.  The regularisation is the one with the
    smallest squared error when every shot is predicted by all others, which ridge regression gives in closed form;
    so neither further examples nor the test set choose it.  The protocol is that of "An Image is Worth 16x16 Words",
    arXiv 2010.11929, section 4.1.

    Attributes:
      train, test: finite pipelines of labelled images; shots are drawn from ``train``.
      shots: examples per class.
      seeds: draws of the shots that scores are the mean of.
      regularizations: what is added to the squared singular values of the shots, of which one is chosen.
      tower: its name; ``image_field`` is what it reads, ``output`` which of its outputs is classified.
      label: field of the batch that holds the class number.
    """

    train: Pipeline | None = None
    test: Pipeline | None = None
    shots: tuple[int, ...] = (1, 5, 10)
    seeds: tuple[int, ...] = (0, 1, 2)
    regularizations: tuple[float, ...] = REGULARIZATIONS
    tower: str = "image"
    image_field: str = "image"
    output: str = "pooled"
    label: str = "label"

    def __post_init__(self) -> None:
        if not self.shots or min(self.shots) < 1 or not self.seeds:
            raise UserError(
                f"FewShot has shots={self.shots} and seeds={self.seeds}; give at least one of each, shots from 1 on."
            )
        if not self.regularizations or min(self.regularizations) <= 0:
            raise UserError(
                f"FewShot.regularizations is {self.regularizations}; give at least one, all above 0."
            )

    def make(self, experiment: Experiment, layout: Layout) -> Callable[[Variables], Result]:
        if self.train is None or self.test is None:
            raise UserError(
                "FewShot needs 'train' and 'test', finite pipelines; the config leaves one of them out."
            )
        train, test = self.train, self.test
        for pipeline in (train, test):
            require_finite(pipeline, "FewShot")
        encoder = Encoder(experiment, layout, self.tower, self.image_field, self.output, normalize=False)
        take = jax.jit(lambda features, rows: features[rows], out_shardings=layout.replicated)

        @functools.partial(jax.jit, out_shardings=layout.replicated)
        def best(model: Classifier, features: jax.Array) -> jax.Array:
            logits = model(features)
            return jax.lax.top_k(logits, min(5, logits.shape[1]))[1]

        def evaluate(variables: Variables) -> Result:
            seen, unseen = (encode_all(data, {"": encoder}, variables, layout) for data in (train, test))
            columns = (read_column(data.columns, self.label, "FewShot") for data in (seen, unseen))
            classes, (known, asked) = class_numbers(*columns)
            counted = unseen.columns["valid"]
            result = Result({}, {})
            for shots in self.shots:
                scores = []
                for seed in self.seeds:
                    rows = draw_shots(known, seen.columns["valid"], shots, seed)
                    features = np.asarray(take(seen.features[""], rows))
                    model = fit_ridge(features, known[rows], classes, self.regularizations).classifier
                    ranked = np.asarray(best(model, unseen.features[""]))
                    scores.append(accuracies(ranked[counted], asked[counted]))
                for name in scores[0]:
                    values = [score[name] for score in scores]
                    result.metrics[f"shots{shots}/{name}"] = float(np.mean(values))
                    if len(values) > 1:
                        result.metrics[f"shots{shots}/{name}_deviation"] = float(np.std(values, ddof=1))
                result.chance.update(
                    {f"shots{shots}/{key}": value for key, value in chances(classes).items()}
                )
            return result

        return evaluate


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
