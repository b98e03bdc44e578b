"""What evaluators of frozen features share that learn from labelled examples and are asked about others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

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
from vlpjax.experiment import Experiment
from vlpjax.mesh import Layout

SHOWN = 5  # classes per example that are ranked: as many as scores look at


class Examples(NamedTuple):
    """Encoded examples.

    Attributes:
      features: rows are sharded over the mesh.
      labels: on every host, [N] or [N, H, W].
      real: bool [N]; False is padding.
    """

    features: Float[Array, "examples ..."]
    labels: np.ndarray
    real: np.ndarray


@dataclass(frozen=True)
class LabelledEvaluator(Evaluator):
    """Base of evaluators with two labelled data sets: define ``_judge``.

    Attributes:
      train, test: finite pipelines of labelled images: what is known, and what is asked.
      tower: its name; ``image_field`` is what it reads, ``output`` which of its outputs is judged.
      label: field of the batch that holds the class number.
      options: what the tower's call is given besides: ``dict(size=(64, 2))`` judges that sub-network of an
        :class:`vlpjax.models.elastic.ElasticViT`.
    """

    label_fields: ClassVar[bool] = False  # whether a label is more than one number per example

    train: Pipeline | None = None
    test: Pipeline | None = None
    tower: str = "image"
    image_field: str = "image"
    output: str = "pooled"
    label: str = "label"
    options: Mapping[str, Any] = field(default_factory=dict)

    def make(self, experiment: Experiment, layout: Layout) -> Callable[[Variables], Result]:
        who = type(self).__name__
        if self.train is None or self.test is None:
            raise UserError(
                f"{who} needs 'train' and 'test', finite pipelines; the config leaves one of them out."
            )
        train, test = self.train, self.test
        for pipeline in (train, test):
            require_finite(pipeline, who)
        encoder = self._encoder(experiment, layout)
        judge = self._judge(layout)
        fields = (self.label,) if self.label_fields else ()

        def examples(data: Pipeline, variables: Variables) -> Examples:
            encoded = encode_all(data, {"": encoder}, variables, layout, fields)
            labels = read_column(encoded.columns, self.label, who)
            return Examples(encoded.features[""], labels, encoded.columns["valid"])

        return lambda variables: judge(examples(train, variables), examples(test, variables))

    def _encoder(self, experiment: Experiment, layout: Layout, normalize: bool = False) -> Encoder:
        where = self.tower, self.image_field, self.output
        return Encoder(experiment, layout, *where, normalize=normalize, options=self.options)

    def _judge(self, layout: Layout) -> Callable[[Examples, Examples], Result]:
        """A function from what is known and what is asked to the result."""
        raise TypeError(f"{type(self).__name__} must define _judge.")


# Classes of every asked example from the best on, [N, n].
Ranking = np.ndarray


class Answers(NamedTuple):
    """What a classifier says.

    Attributes:
      rankings: per name of a setting, such as ``"k5"``, one ranking, or several whose scores are averaged.
      metrics: what else there is to tell.
    """

    rankings: Mapping[str, Sequence[Ranking]]
    metrics: Mapping[str, float] = {}


Classify = Callable[[Examples, Examples, int], Answers]


@dataclass(frozen=True)
class FeatureClassifier(LabelledEvaluator):
    """Base of evaluators whose labels are classes, which need not count from 0: define ``_classify``."""

    def _classify(self, layout: Layout) -> Classify:
        """A function from what is known, what is asked, and the number of classes; labels are class numbers."""
        raise TypeError(f"{type(self).__name__} must define _classify.")

    def _judge(self, layout: Layout) -> Callable[[Examples, Examples], Result]:
        classify = self._classify(layout)

        def judge(known: Examples, asked: Examples) -> Result:
            classes, numbers = class_numbers(known.labels, asked.labels)
            known, asked = known._replace(labels=numbers[0]), asked._replace(labels=numbers[1])
            rankings, further = classify(known, asked, classes)
            result = Result(dict(further), {})
            for setting, several in rankings.items():
                prefix = f"{setting}/" if setting else ""
                scores = [accuracies(one[asked.real], asked.labels[asked.real]) for one in several]
                for name in scores[0]:
                    values = [score[name] for score in scores]
                    result.metrics[f"{prefix}{name}"] = float(np.mean(values))
                    if len(values) > 1:
                        result.metrics[f"{prefix}{name}_deviation"] = float(np.std(values, ddof=1))
                result.chance.update({f"{prefix}{name}": value for name, value in chances(classes).items()})
            return result

        return judge


def best_classes(scores: Float[Array, "examples classes"]) -> jax.Array:
    """The classes with the highest scores from the best on, five or as many as there are."""
    return jax.lax.top_k(scores, min(SHOWN, scores.shape[1]))[1]
