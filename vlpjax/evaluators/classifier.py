"""How often the classifier that was trained with a tower is right."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from vlpjax.config import suggest
from vlpjax.data.pipeline import Pipeline
from vlpjax.errors import UserError
from vlpjax.evaluators.accuracy import accuracies, chances
from vlpjax.evaluators.base import (
    Encoder,
    Evaluator,
    Result,
    Variables,
    encode_all,
    read_column,
    require_finite,
)
from vlpjax.evaluators.labelled import best_classes
from vlpjax.experiment import Experiment
from vlpjax.mesh import Layout
from vlpjax.objectives.base import head_name
from vlpjax.objectives.classification import Classification


@dataclass(frozen=True)
class TrainedClassifier(Evaluator):
    """Accuracy of the classifier of a :class:`vlpjax.objectives.classification.Classification`.

    Attributes:
      data: a finite pipeline with the fields that the objective reads.
      objective: its name in the config.
    """

    data: Pipeline | None = None
    objective: str = "classes"

    def make(self, experiment: Experiment, layout: Layout) -> Callable[[Variables], Result]:
        if self.data is None:
            raise UserError(
                "TrainedClassifier.data is not set; give it a finite pipeline of labelled images."
            )
        data, name = self.data, self.objective
        require_finite(data, "TrainedClassifier")
        known = {
            name: loss
            for name, (_, loss) in experiment.objectives.items()
            if isinstance(loss, Classification)
        }
        if name not in known:
            raise UserError(
                f"TrainedClassifier.objective is {name!r}, which is no Classification{suggest(name, known)}."
            )
        loss, head = known[name], head_name(name, "classifier")
        encoder = Encoder(experiment, layout, loss.tower, loss.image, loss.output, normalize=False)

        @functools.partial(jax.jit, out_shardings=layout.replicated)
        def rank(variables: Variables, features: jax.Array) -> jax.Array:
            logits: Any = experiment.towers.apply(
                variables, method=lambda towers: towers.call(head, features)
            )
            return best_classes(logits)

        def evaluate(variables: Variables) -> Result:
            encoded = encode_all(data, {"": encoder}, variables, layout)
            real = encoded.columns["valid"]
            labels = read_column(encoded.columns, loss.label, "TrainedClassifier")[real]
            ranked = np.asarray(rank(variables, encoded.features[""]))[real]
            return Result(accuracies(ranked, labels), chances(loss.classes))

        return evaluate
